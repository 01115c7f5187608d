"""QuaRot with dense matrices (arXiv:2404.00456)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.formats import Integer
from postlude.numerics.hadamard import hadamard
from postlude.numerics.schemes import Granularity, Scheme
from postlude.quantization.engine import quantize
from postlude.quantization.offq import OffQ
from postlude.quantization.quarot import QuaRot
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import anatomy_of
from postlude.surgery.layers import QuantizedLinear
from postlude.surgery.transforms import BlockHadamard

from .models import TOKENS, checkpoint, logits, site_inputs, twin


def dense(order: int) -> Tensor:
    return hadamard(order) / order**0.5


def rewritten(name: str, seed: int = 0) -> tuple[Checkpoint, Checkpoint]:
    """The model with its norms folded, and the same rotated."""
    folded = checkpoint(name)
    settings = QuaRot()
    settings.fold(folded)
    made = twin(folded)
    settings.rewrite(made, {}, seed)
    return folded, made


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_the_stream_is_rotated_by_a_signed_hadamard_matrix(name: str) -> None:
    folded, made = rewritten(name)
    head = folded.model.get_submodule(made.anatomy.head).weight
    turn = torch.linalg.lstsq(head, made.model.get_submodule(made.anatomy.head).weight).solution
    torch.testing.assert_close(turn.abs(), torch.full_like(turn, 1 / 8))
    torch.testing.assert_close(turn @ turn.T, torch.eye(64, dtype=torch.float64))
    # diag(+-1) Hadamard: the first column holds the signs.
    torch.testing.assert_close(turn, turn[:, :1].sign() * dense(64))
    for path in made.anatomy.embeddings:
        table = folded.model.get_submodule(path).weight
        torch.testing.assert_close(made.model.get_submodule(path).weight, table @ turn)
    _, other = rewritten(name, seed=1)
    assert not torch.equal(made.model.lm_head.weight, other.model.lm_head.weight)


@pytest.mark.parametrize(("name", "centred"), [("llama", False), ("qwen2", False), ("gpt2", True)])
def test_means_are_taken_out_for_layer_norm_only(name: str, centred: bool) -> None:
    """On an RMSNorm model taking them out would change the function."""
    original, (folded, _) = checkpoint(name), rewritten(name)
    path = original.anatomy.embeddings[0]
    before = original.model.get_submodule(path).weight
    after = folded.model.get_submodule(path).weight
    expected = before - before.mean(1, keepdim=True) if centred else before
    torch.testing.assert_close(after, expected)
    assert folded.model.lm_head.weight is not after
    assert not folded.model.config.tie_word_embeddings


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_what_the_linears_multiply(name: str) -> None:
    """Values and their mixture: kron(Hadamard(heads), Hadamard(dh)), half fused and half online; the product: one
    Hadamard matrix of order 172, which is not symmetric."""
    folded, made = rewritten(name)
    assert not torch.equal(hadamard(172), hadamard(172).T)
    whole = {"o_in": torch.kron(dense(4), dense(16)), "down_in": dense(172)}
    before, after = site_inputs(folded), site_inputs(made)
    for block in made.anatomy.blocks:
        for site, matrix in whole.items():
            (path,) = block.site(site).modules
            layer = made.model.get_submodule(path)
            assert isinstance(layer, QuantizedLinear)
            assert layer.transform is not None
            seen = layer.transform(after[block.index, site])
            torch.testing.assert_close(seen, before[block.index, site] @ matrix)
        rotation = made.model.get_submodule(block.attention).key_values.rotation
        assert isinstance(rotation, BlockHadamard)
        torch.testing.assert_close(rotation(torch.eye(16, dtype=torch.float64)), dense(16))


def test_two_stages_are_the_full_width_transform() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    within = torch.cat([part @ dense(16) for part in x.split(16, dim=-1)], dim=-1)
    across = BlockHadamard(64, 4, inner=16)(within)
    torch.testing.assert_close(across, x @ torch.kron(dense(4), dense(16)))
    torch.testing.assert_close(across, x @ dense(64))  # Sylvester's own construction


@pytest.mark.parametrize("method", [QuaRot, OffQ])
def test_sizes_that_are_no_hadamard_order(method: type[QuaRot] | type[OffQ]) -> None:
    """Six heads of ten channels, a product of 50: an orthonormal cosine transform takes the place."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "vocab_size": 97, "hidden_size": 60, "intermediate_size": 50, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10, "max_position_embeddings": 64,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    expected = logits(model)
    made = Checkpoint(model, None, anatomy_of(model))
    quantize(made, method(weights=16, activations=16, kv=16), TOKENS)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)


def test_schemes_are_those_of_the_paper() -> None:
    made = checkpoint("llama")
    block = made.anatomy.blocks[0]
    settings = QuaRot()
    for site in block.sites:
        assert settings.weight_scheme(site) == Scheme(Integer(4), Granularity("channel"))
        assert settings.input_scheme(site) == Scheme(Integer(4), Granularity("token"), clip=0.9)
    around_zero = Integer(4, symmetric=False, range="zero")
    expected = Scheme(around_zero, Granularity("token"), clip=0.95)
    assert settings.key_value_schemes(block) == (expected, expected)
    assert (settings.rounding, settings.clip) == ("gptq", True)
    for name in ("activation_clip", "kv_clip"):
        with pytest.raises(SettingsError, match=rf"{name} is 1\.5; expected a clip ratio"):
            QuaRot(**{name: 1.5})
