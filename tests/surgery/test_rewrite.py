"""Rewrites alone leave logits equal; wrong ones do not; undo puts the same bits back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from postlude.numerics.formats import Integer
from postlude.numerics.rotation import random_orthogonal
from postlude.numerics.schemes import Granularity, Scheme
from postlude.surgery.anatomy import Anatomy, anatomy_of
from postlude.surgery.key_values import KeyValueQuantizer
from postlude.surgery.rewrite import (
    Undo,
    fold_norms,
    permute_product,
    rotate_keys,
    rotate_residual,
    rotate_values,
    scale_norm_site,
    transform_input,
    untie_head,
)
from postlude.surgery.transforms import BlockHadamard, HeadRotation

from .models import MODELS, build

TOKENS = torch.arange(24).reshape(2, 12) * 7 % 97


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def fold(model: nn.Module, anatomy: Anatomy) -> Undo:
    return untie_head(model, anatomy).extend(fold_norms(model, anatomy))


def residual(model: nn.Module, anatomy: Anatomy) -> Undo:
    undo = fold(model, anatomy)
    return undo.extend(rotate_residual(model, anatomy, random_orthogonal(64, generator())))


def values(model: nn.Module, anatomy: Anatomy) -> Undo:
    undo = Undo()
    for block in anatomy.blocks:
        heads = block.heads
        turns = torch.stack(
            [random_orthogonal(heads.size, generator()) for _ in range(heads.key_value)]
        )
        undo.extend(rotate_values(model, block, turns))
    return undo


def keys_hadamard(model: nn.Module, anatomy: Anatomy) -> Undo:
    undo = Undo()
    for block in anatomy.blocks:
        turn = BlockHadamard(16, 16).randomize(generator(), keep_first=True)
        undo.extend(rotate_keys(model, block, KeyValueQuantizer(rotation=turn)))
    return undo


def keys_by_head(model: nn.Module, anatomy: Anatomy) -> Undo:
    undo = Undo()
    for block in anatomy.blocks:
        heads = block.heads
        turn = HeadRotation(heads.key_value, heads.size, torch.float64)
        for head in range(heads.key_value):
            turn.matrices[head] = random_orthogonal(heads.size, torch.Generator().manual_seed(head))
        undo.extend(rotate_keys(model, block, KeyValueQuantizer(rotation=turn)))
    return undo


def product(model: nn.Module, anatomy: Anatomy) -> Undo:
    undo = Undo()
    for block in anatomy.blocks:
        site = block.site("down_in")
        undo.extend(
            permute_product(model, block, torch.randperm(site.width, generator=generator()))
        )
        turn = BlockHadamard(site.width, 32).randomize(generator(), keep_first=True)
        undo.extend(transform_input(model, site, turn))
    return undo


def full_product(model: nn.Module, anatomy: Anatomy) -> Undo:
    undo = Undo()
    for block in anatomy.blocks:
        site = block.site("down_in")
        undo.extend(transform_input(model, site, BlockHadamard(site.width, site.width)))
    return undo


def across_heads(model: nn.Module, anatomy: Anatomy) -> Undo:
    undo = Undo()
    for block in anatomy.blocks:
        turn = BlockHadamard(64, block.heads.query, inner=block.heads.size)
        undo.extend(transform_input(model, block.site("o_in"), turn))
    return undo


def scales(model: nn.Module, anatomy: Anatomy) -> Undo:
    undo = Undo()
    for _, site in anatomy.sites():
        scale = torch.rand(site.width, generator=generator(), dtype=torch.float64) + 0.5
        if site.norm:
            undo.extend(scale_norm_site(model, site, scale))
    return undo


def everything(model: nn.Module, anatomy: Anatomy) -> Undo:
    undo = scales(model, anatomy)
    for step in (residual, values, product, across_heads, keys_by_head):
        undo.extend(step(model, anatomy))
    return undo


REWRITES: dict[str, Callable[[nn.Module, Anatomy], Undo]] = {
    function.__name__: function
    for function in (
        fold,
        residual,
        values,
        keys_hadamard,
        keys_by_head,
        product,
        full_product,
        across_heads,
        scales,
        everything,
    )
}


@pytest.mark.parametrize("rewrite", REWRITES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_stay_and_undo_is_exact(name: str, rewrite: str) -> None:
    model = build(name)
    anatomy = anatomy_of(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = logits(model)
    undo = REWRITES[rewrite](model, anatomy)
    torch.testing.assert_close(logits(model), expected, atol=1e-10, rtol=0)
    undo()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    torch.testing.assert_close(logits(model), expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_everything_in_fp32(name: str) -> None:
    model = build(name, torch.float32)
    expected = logits(model)
    everything(model, anatomy_of(model))
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)


def test_mean_centred_embeddings_change_an_rmsnorm_model() -> None:
    model = build("llama")
    expected = logits(model)
    untie_head(model, anatomy_of(model))
    table = model.get_submodule("model.embed_tokens").weight
    table.data -= table.data.mean(1, keepdim=True)
    assert (logits(model) - expected).abs().max() > 0.1


def test_wrong_head_mapping_is_seen() -> None:
    model = build("llama")
    expected = logits(model)
    block = anatomy_of(model).blocks[0]
    turns = torch.stack([random_orthogonal(16, torch.Generator().manual_seed(i)) for i in range(2)])
    rotate_values(model, block, turns)
    output = block.linear("output").weight(model)
    # Serve query heads 1 and 2 from the other key/value head.
    output[:, 16:48] = torch.cat([output[:, 32:48], output[:, 16:32]], 1)
    assert (logits(model) - expected).abs().max() > 0.1


def test_rotated_keys_refuse_another_attention_function() -> None:
    model = build("llama")
    keys_hadamard(model, anatomy_of(model))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="needs attn_implementation='postlude'"):
        logits(model)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_cache_holds_packed_codes_and_gives_the_same_logits(name: str) -> None:
    model = build(name, torch.float32)
    scheme = Scheme(Integer(4, symmetric=False, range="free"), Granularity("token"))
    for block in anatomy_of(model).blocks:
        turn = BlockHadamard(16, 16).randomize(generator(), keep_first=True)
        rotate_keys(model, block, KeyValueQuantizer(scheme, scheme, turn))
    whole = logits(model)
    with torch.no_grad():
        step = model(TOKENS[:, :7], use_cache=True)
        pieces = [step.logits]
        for position in range(7, 12):
            token = TOKENS[:, position : position + 1]
            step = model(token, past_key_values=step.past_key_values, use_cache=True)
            pieces.append(step.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=2e-5, rtol=0)
    layer = step.past_key_values.layers[0]
    heads = anatomy_of(model).blocks[0].heads.key_value
    kept = 5 if name == "mistral" else 12
    # Keys and values: 16 codes of 4 bits, an fp16 scale and an int16 zero point per token and head.
    assert layer.stored_bytes() == 2 * 2 * heads * kept * (8 + 2 + 2)
