"""OffQ against loops over its definition (arXiv:2606.07116)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import postlude as pl
from postlude.errors import SettingsError
from postlude.numerics.formats import Integer
from postlude.numerics.hadamard import hadamard
from postlude.numerics.rotation import group_sizes, outlier_grouping
from postlude.numerics.schemes import Granularity, Scheme
from postlude.quantization.engine import generator, quantize
from postlude.quantization.offq import OffQ, offset_rotation, outlier_basis
from postlude.quantization.quarot import QuaRot
from postlude.quantization.rtn import RTN
from postlude.surgery.anatomy import Site, anatomy_of
from postlude.surgery.layers import QuantizedLinear
from postlude.surgery.transforms import BlockHadamard, HeadRotation

from .models import TOKENS, checkpoint, logits, site_inputs, twin


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=random(9), dtype=torch.float64))[0]


# The rotation


@pytest.mark.parametrize(
    ("width", "group"), [(64, 64), (256, 64), (172, 128), (160, 64), (70, 32), (33, 8)]
)
def test_the_residual_rotation_by_its_definition(width: int, group: int) -> None:
    """U P H with H made block by block; orthogonal to 1e-10, ragged last group or not."""
    basis, order = orthogonal(width), torch.randperm(width, generator=random(1))
    rotation = offset_rotation(basis, order, group, random(2))
    assert rotation.dtype == torch.float64
    identity = torch.eye(width, dtype=torch.float64)
    torch.testing.assert_close(rotation @ rotation.T, identity, atol=1e-10, rtol=0)

    mixing = (basis[:, outlier_grouping(order, group_sizes(width, group))]).T @ rotation
    start = 0
    for size in group_sizes(width, group):
        block = mixing[start : start + size, start : start + size]
        # The outlier channel is spread evenly and never negated; the rest have signs of their own.
        torch.testing.assert_close(
            block[0], torch.full_like(block[0], size**-0.5), atol=1e-12, rtol=0
        )
        if size & (size - 1) == 0:
            signs = block[:, :1].sign()
            torch.testing.assert_close(
                block, signs * hadamard(size) / math.sqrt(size), atol=1e-12, rtol=0
            )
        mixing[start : start + size, start : start + size] = 0
        start += size
    assert mixing.abs().max() < 1e-12
    other = offset_rotation(basis, order, group, random(3))
    assert (other - rotation).abs().max() > 0.01


def test_the_first_channel_becomes_an_offset() -> None:
    """x H = x_1 / sqrt(d) * ones + x_rest H"""
    d = 64
    x = torch.randn(5, d, generator=random(), dtype=torch.float64)
    identity = torch.eye(d, dtype=torch.float64)
    h = offset_rotation(identity, torch.tensor([0, *range(d - 1, 0, -1)]), d, random(1))
    rest = x.clone()
    rest[:, 0] = 0
    torch.testing.assert_close(x @ h, x[:, :1] / math.sqrt(d) + rest @ h, atol=1e-12, rtol=0)


def test_the_published_grouping() -> None:
    values = torch.tensor([1, 2, 3, 4, 50, 60])
    index = outlier_grouping(torch.argsort(values, descending=True), group_sizes(6, 3))
    assert values[index].tolist() == [60, 1, 2, 50, 3, 4]


# The statistics


def test_basis_is_uncentred_and_falls() -> None:
    rows = torch.randn(40, 12, generator=random(), dtype=torch.float64)
    rows += 3 * torch.nn.functional.normalize(torch.ones(12, dtype=torch.float64), dim=0) * 4
    basis, order = outlier_basis(rows)
    moment = sum(torch.outer(row, row) for row in rows) / len(rows)
    rotated = basis.T @ moment @ basis
    diagonal = rotated.diagonal()
    assert (rotated - torch.diag(diagonal)).abs().max() < 1e-10
    assert (diagonal.diff() <= 1e-10).all()
    assert order.tolist() == list(range(12))
    # The mean is the largest direction, and taking it out would lose it.
    mean = torch.nn.functional.normalize(rows.mean(0), dim=0)
    assert abs(float(basis[:, 0] @ mean)) > 0.99
    centred = torch.linalg.eigh((rows - rows.mean(0)).T @ (rows - rows.mean(0)))[1][:, -1]
    assert abs(float(centred @ mean)) < 0.9


def test_with_few_tokens_channels_are_ranked_by_what_they_reach() -> None:
    rows = torch.randn(5, 12, generator=random(), dtype=torch.float64)
    basis, order = outlier_basis(rows)
    reached = [max(abs(float(row @ basis[:, axis])) for row in rows) for axis in range(12)]
    ranked = sorted(range(12), key=lambda axis: -reached[axis])
    assert order[:5].tolist() == ranked[:5]  # nothing reaches the others


def post_rotary_keys(model: Any, block: int, tokens: Tensor) -> Tensor:
    """``[sequences, heads, length, head size]``, by the model's own functions."""
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    attention = model.model.layers[block].self_attn
    seen: list[Tensor] = []
    handle = attention.k_proj.register_forward_hook(lambda _, __, out: seen.append(out))
    logits(model, tokens)
    handle.remove()
    keys = seen[0].unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    positions = torch.arange(tokens.shape[1])[None]
    cos, sin = model.model.rotary_emb(keys, positions)
    rotated: Tensor = apply_rotary_pos_emb(keys, keys, cos, sin)[1]
    return rotated


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_statistics_by_loops(name: str) -> None:
    made = checkpoint(name)
    settings = OffQ()
    settings.fold(made)
    expected = site_inputs(made)
    found = settings.statistics(made, TOKENS, 0)

    rows, by_l2 = [], []
    for block in (0, 1):
        for site in ("qkv_in", "ug_in"):
            for sequence in expected[block, site]:
                largest = [float(token.abs().max()) for token in sequence]
                rows.append(sequence[largest.index(max(largest))])
                lengths = [float(token.norm()) for token in sequence]
                by_l2.append(sequence[lengths.index(max(lengths))])
    chosen = torch.stack(rows)
    assert not torch.equal(chosen, torch.stack(by_l2))
    # 24 rows in 64 dimensions: the basis is free in the rest, so compare what it must do.
    basis = found["residual.basis"]
    moment = chosen.T @ chosen / len(chosen)
    rotated = basis.T @ moment @ basis
    assert (rotated - torch.diag(rotated.diagonal())).abs().max() < 1e-9
    eigenvalues = torch.linalg.eigvalsh(moment).flip(0)
    torch.testing.assert_close(rotated.diagonal(), eigenvalues, atol=1e-9, rtol=0)
    reached = (chosen @ basis).abs().amax(0)
    assert (reached[found["residual.order"]].diff() <= 1e-9).all()

    for block in (0, 1):
        largest = expected[block, "down_in"].abs().flatten(0, 1).amax(0)
        assert (largest[found[f"{block}.product"]].diff() <= 0).all()

    keys = [key for key in found if key.endswith(".keys")]
    assert keys == ([] if name == "llama" else ["0.keys", "1.keys"])
    for block, key in enumerate(keys):
        after = post_rotary_keys(made.model, block, TOKENS)
        for head in range(2):
            top = torch.stack([max(s[head], key=lambda k: float(k.abs().max())) for s in after])
            basis = found[key][head]
            turned = basis.T @ (top.T @ top / len(top)) @ basis
            assert (turned - torch.diag(turned.diagonal())).abs().max() < 1e-5
            assert (turned.diagonal().diff() < 1e-5).all()
    assert made.model.get_submodule(made.anatomy.blocks[0].attention)._forward_pre_hooks == {}


# The whole


@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen2", "qwen3", "mistral"])
def test_the_stream_is_rotated_and_the_embedding_keeps_its_mean(name: str) -> None:
    """On an RMSNorm model nothing is subtracted; a head that was tied has a weight of its own afterwards."""
    made = checkpoint(name)
    table = made.model.get_submodule("model.embed_tokens").weight.data.clone()
    head = made.model.lm_head.weight.data.clone()
    gamma = made.model.model.norm.weight.data.clone()
    settings = OffQ(activation_group=32)
    settings.fold(made)
    found = settings.statistics(made, TOKENS, 0)
    settings.rewrite(made, found, 5)
    turn = offset_rotation(
        found["residual.basis"], found["residual.order"], 32, generator(5, "residual")
    )
    torch.testing.assert_close(made.model.model.embed_tokens.weight, table @ turn)
    torch.testing.assert_close(made.model.lm_head.weight, (head * gamma) @ turn)
    assert made.model.lm_head.weight is not made.model.model.embed_tokens.weight
    assert not made.model.config.tie_word_embeddings


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_keys_values_and_product(name: str) -> None:
    """Where each transform sits, written out with dense matrices."""
    before = checkpoint(name)
    settings = OffQ(activation_group=32)
    settings.fold(before)
    made = twin(before)
    found = settings.statistics(made, TOKENS, 0)
    settings.rewrite(made, found, 0)
    old, new = before.model.model.layers[1], made.model.model.layers[1]

    index = outlier_grouping(found["1.product"], group_sizes(172, 32))
    down = new.mlp.down_proj
    assert isinstance(down, QuantizedLinear)
    assert isinstance(down.transform, BlockHadamard)
    mixing = down.transform(torch.eye(172, dtype=torch.float64))
    for start in range(0, 172, 32):  # the outlier of every group is its offset
        size = min(32, 172 - start)
        row = torch.zeros(172, dtype=torch.float64)
        row[start : start + size] = size**-0.5
        torch.testing.assert_close(mixing[start], row)
    turn = offset_rotation(
        found["residual.basis"], found["residual.order"], 32, generator(0, "residual")
    )
    expected = turn.T @ old.mlp.down_proj.weight[:, index] @ mixing
    torch.testing.assert_close(down.weight, expected)
    # The gate's input was rotated as well, so only the order of its rows shows, in their norms.
    norms = old.mlp.gate_proj.weight.norm(dim=1)
    torch.testing.assert_close(new.mlp.gate_proj.weight.norm(dim=1), norms[index])

    rotation = new.self_attn.key_values.rotation
    if name == "llama":
        assert isinstance(rotation, BlockHadamard)
        matrices = rotation(torch.eye(16, dtype=torch.float64))
        torch.testing.assert_close(matrices, hadamard(16) / 4)
    else:
        assert isinstance(rotation, HeadRotation)
        expected = found["1.keys"] @ (hadamard(16) / 4)
        torch.testing.assert_close(rotation.matrices.double(), expected, atol=1e-6, rtol=0)
        # A key along the outlier direction is the same number in every channel.
        outlier = found["1.keys"][0][:, 0] @ rotation.matrices[0].double()
        torch.testing.assert_close(outlier, torch.full_like(outlier, 0.25), atol=1e-6, rtol=0)


def test_every_head_of_the_values_has_a_rotation_of_its_own() -> None:
    before = checkpoint("llama")
    settings = OffQ()
    settings.fold(before)
    made = twin(before)
    found = settings.statistics(made, TOKENS, 0)
    settings.rewrite(made, found, 0)
    turn = offset_rotation(
        found["residual.basis"], found["residual.order"], 64, generator(0, "residual")
    )
    old = before.model.model.layers[0].self_attn.v_proj.weight @ turn
    new = made.model.model.layers[0].self_attn.v_proj.weight
    turns = []
    for head in (slice(0, 16), slice(16, 32)):
        solved = torch.linalg.lstsq(old[head].T, new[head].T).solution
        torch.testing.assert_close(solved @ solved.T, torch.eye(16, dtype=torch.float64))
        torch.testing.assert_close(solved.abs(), torch.full_like(solved, 0.25))
        turns.append(solved)
    assert (turns[0] - turns[1]).abs().max() > 0.1


@pytest.mark.parametrize("biases", [False, True])
def test_logits_stay_at_width_256(biases: bool) -> None:
    """Through the whole engine with every quantizer off, in fp32."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from postlude.runs.checkpoint import Checkpoint

    shape = {
        "vocab_size": 97, "hidden_size": 256, "intermediate_size": 344, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(**shape)).eval()
        for path, parameter in model.named_parameters():
            if path.endswith("bias"):
                parameter.data.normal_(0, 0.5 if biases else 0)
            elif parameter.ndim == 1:
                parameter.data.uniform_(0.5, 1.5)
            else:
                parameter.data.normal_(0, 0.1)
    expected = logits(model)
    made = Checkpoint(model, None, anatomy_of(model))
    assert made.anatomy.attention_bias(model) is biases
    quantize(made, OffQ(weights=16, activations=16, kv=16, activation_group=64), TOKENS)
    assert isinstance(model.model.layers[0].self_attn.key_values.rotation, HeadRotation) is biases
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)


def test_schemes_are_those_of_the_paper() -> None:
    made = checkpoint("llama")
    block = made.anatomy.blocks[0]
    settings = OffQ()
    free = Integer(4, symmetric=False, range="free")
    wide = Site("qkv_in", 512, ())
    assert settings.input_scheme(wide) == Scheme(free, Granularity("group", 128))
    assert settings.input_scheme(block.site("o_in")) == Scheme(free, Granularity("group", 16))
    assert settings.weight_scheme(wide) == Scheme(Integer(4), Granularity("channel"))
    assert settings.key_value_schemes(block) == (Scheme(free, Granularity("token")),) * 2
    assert settings.rounding == "gptq"
    with pytest.raises(
        SettingsError, match="activation_group is token or a number of channels, got 'tensor'"
    ):
        OffQ(activation_group="tensor")


# The table of the simulation


def extreme_tokens(
    seed: int, width: int = 256, length: int = 256, sequences: int = 12
) -> tuple[Tensor, Tensor]:
    """RMS-normalised anisotropic Gaussian tokens ``[sequences, length, width]``, two of each sequence along one
    direction with four huge channels; and which those are."""
    draw = random(seed)
    scales = torch.exp(0.6 * torch.randn(width, generator=draw, dtype=torch.float64))
    x = torch.randn(sequences, length, width, generator=draw, dtype=torch.float64) * scales
    defect = 0.02 * torch.randn(width, generator=draw, dtype=torch.float64)
    channels = torch.randperm(width, generator=draw)[:4]
    defect[channels] = torch.tensor([3.0, -2.0, 1.5, 1.0], dtype=torch.float64)
    defect /= defect.norm()
    outlier = torch.zeros(sequences, length, dtype=torch.bool)
    outlier[:, 0] = True
    outlier[torch.arange(sequences), torch.randint(1, length, (sequences,), generator=draw)] = True
    sizes = 300 * (1 + 0.2 * torch.rand(int(outlier.sum()), 1, generator=draw, dtype=torch.float64))
    x[outlier] += sizes * defect
    return x / x.square().mean(-1, keepdim=True).sqrt(), outlier


@pytest.mark.parametrize("seed", range(3))
def test_errors_fall_in_the_order_of_the_simulation(seed: int) -> None:
    width, group = 256, 64
    x, outlier = extreme_tokens(seed)
    top = torch.stack([max(s, key=lambda token: float(token.abs().max())) for s in x])

    def error(turn: Tensor, scheme: Scheme) -> tuple[float, float]:
        """Relative squared error of outlier tokens and of the others."""
        turned = x @ turn
        wrong = (scheme.round_trip(turned) - turned).square().sum(-1)
        right = turned.square().sum(-1)
        return tuple(float(wrong[m].sum() / right[m].sum()) for m in (outlier, ~outlier))

    free = Integer(4, symmetric=False, range="free")
    by_token, by_group = (Scheme(free, Granularity.parse(g)) for g in ("token", group))
    basis, order = outlier_basis(
        top.repeat(6, 1)
    )  # as many rows as a model of several blocks gives
    offq = offset_rotation(basis, order, group, random(1))
    everything, all_order = outlier_basis(x.flatten(0, 1))
    all_tokens = offset_rotation(everything, all_order, group, random(1))
    identity = torch.eye(width, dtype=torch.float64)
    spread = BlockHadamard(width, width).randomize(random(2), keep_first=False)(identity)

    table = {
        "offq": error(offq, by_group),
        "zero in range": error(offq, Scheme(Integer(4, symmetric=False), Granularity.parse(group))),
        "symmetric": error(offq, Scheme(Integer(4), Granularity.parse(group))),
        "all tokens": error(all_tokens, by_group),
        "hadamard, group": error(spread, by_group),
        "hadamard, token": error(spread, by_token),
        "none, group": error(identity, by_group),
        "none, token": error(identity, by_token),
    }
    extreme = {name: errors[0] for name, errors in table.items()}
    baselines = [value for name, value in extreme.items() if "hadamard" in name or "none" in name]
    assert extreme["offq"] * 5 < extreme["zero in range"], extreme
    assert extreme["zero in range"] * 3 < extreme["symmetric"], extreme
    # Axes of all tokens miss the direction: no better than spreading it, give or take the draw.
    assert extreme["symmetric"] * 2 < min(*baselines, extreme["all tokens"]), extreme
    assert extreme["hadamard, group"] < extreme["hadamard, token"] < extreme["none, token"], extreme
    assert extreme["none, group"] < extreme["none, token"], extreme
    normal = {name: errors[1] for name, errors in table.items()}
    assert normal["all tokens"] < normal["offq"] < normal["hadamard, group"], normal
    assert normal["hadamard, group"] < normal["hadamard, token"] < normal["none, token"], normal

    def captured(axes: Tensor) -> float:
        tokens = x[outlier]
        return float((tokens @ axes[:, 0]).square().sum() / tokens.square().sum())

    assert captured(basis) > 0.95
    assert captured(everything) < captured(basis) - 0.2


def test_perplexity_of_the_built_in_model(tmp_path: Path) -> None:
    """Inputs and cache in 4 bits, groups of equal size: float < OffQ < Hadamard < nothing."""
    model = pl.load("zoo:tiny-lm", device="cpu")
    assert model.path is not None
    held_out = tmp_path / "held_out.txt"
    held_out.write_text((model.path / "held_out.txt").read_text()[:12000])
    perplexity = [pl.evaluate(model, held_out, max_length=256)["perplexity"]]
    for method in (OffQ, QuaRot, RTN):
        settings = method(weights=16, activations=4, kv=4, activation_group=64)
        text = model.path / "calibration.txt"
        made = pl.quantize(model, settings, calibration=text, samples=16, length=256)
        perplexity.append(pl.evaluate(made, held_out, max_length=256)["perplexity"])
    assert perplexity == sorted(perplexity), perplexity
