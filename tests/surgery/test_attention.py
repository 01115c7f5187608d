"""Attention by two products against its definition, and where it is used."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from postlude.numerics.formats import Integer
from postlude.numerics.schemes import Granularity, Scheme
from postlude.surgery.attention import product_attention, takes
from postlude.surgery.key_values import KeyValueQuantizer, attach, fast_attention
from postlude.surgery.transforms import BlockHadamard


def by_definition(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    batch, heads, count, _ = query.shape
    out = query.new_empty(batch, count, heads, value.shape[-1])
    for row in range(batch):
        for head in range(heads):
            shared = head * key.shape[1] // heads
            for place in range(count):
                seen = key.shape[2] - count + place + 1
                scores = key[row, shared, :seen] @ query[row, head, place] * scaling
                weights = torch.exp(scores - scores.max())
                out[row, place, head] = weights @ value[row, shared, :seen] / weights.sum()
    return out


@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 77), (64, 64), (130, 130), (2, 2)])
@pytest.mark.parametrize("heads, shared", [(6, 2), (3, 3), (4, 1)])
def test_product_attention(queries: int, keys: int, heads: int, shared: int) -> None:
    torch.manual_seed(queries)
    query = torch.randn(2, heads, queries, 8, dtype=torch.float64)
    key = torch.randn(2, shared, keys, 8, dtype=torch.float64)
    value = torch.randn(2, shared, keys, 5, dtype=torch.float64)
    expected = by_definition(query, key, value, 0.3)
    assert torch.allclose(product_attention(query, key, value, 0.3), expected, atol=1e-12)


@pytest.mark.parametrize("scaling", [0.25, 0.3])
def test_in_bfloat16_it_is_as_exact_as_eager_attention(scaling: float) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 4, 96, 16) * 2 for _ in range(3))
    narrow = [x.bfloat16() for x in (query, key, value)]
    exact = by_definition(*(x.float() for x in narrow), scaling=scaling)
    mask = torch.full((96, 96), -math.inf).triu(1)
    scores = (narrow[0] @ narrow[1].transpose(2, 3) * scaling).float() + mask
    eager = (scores.softmax(-1).bfloat16() @ narrow[2]).transpose(1, 2)
    ours = product_attention(*narrow, scaling=scaling)
    assert (ours.float() - exact).norm() < 1.2 * (eager.float() - exact).norm()


def test_what_it_is_not_meant_for() -> None:
    query = torch.zeros(1, 4, 3, 8, dtype=torch.bfloat16)
    key = torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert takes(query, key, None, True)
        assert takes(query[:, :, :1], key, None, False)
        assert not takes(query, key, None, False)
        assert not takes(query, key, torch.zeros(1), True)
        assert not takes(query.float(), key.float(), None, True)
        assert not takes(query[:, :, :2], key, None, True)
    assert not takes(query, key, None, True)


def tiny_llama(**more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **more,
    )
    return LlamaForCausalLM(config).eval().bfloat16()


def logits(model: Any, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
    """Of a prompt, and of one token after it."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        first = model(input_ids=tokens, past_key_values=cache, attention_mask=padding).logits
        again = torch.ones(len(tokens), 1, dtype=torch.long)
        wide = None if padding is None else torch.cat([padding, again], 1)
        second = model(input_ids=again, past_key_values=cache, attention_mask=wide).logits
    return torch.cat([first, second], 1).float()


@pytest.mark.parametrize("rotated", [False, True])
def test_a_model_gives_the_same_logits(rotated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from postlude.surgery import key_values

    model = tiny_llama()
    if rotated:
        four = Scheme(Integer(4), Granularity.parse("token"))
        for layer in range(2):
            owner = KeyValueQuantizer(four, four, BlockHadamard(8, 8))
            attach(model, f"model.layers.{layer}.self_attn", owner)
        key_values.use_rotating_attention(model)
    used = model.config._attn_implementation
    tokens = torch.randint(0, 50, (2, 70))
    before = logits(model, tokens)
    calls: list[int] = []
    monkeypatch.setattr(
        key_values,
        "product_attention",
        lambda *args: calls.append(1) or product_attention(*args),  # type: ignore[func-returns-value]
    )
    with fast_attention(model):
        after = logits(model, tokens)
        assert len(calls) == 4
        # Left padding comes with a mask, which is not for it.
        padding = torch.ones(2, 70, dtype=torch.long)
        padding[0, :5] = 0
        padded = logits(model, tokens, padding)
        assert len(calls) == 4
    assert model.config._attn_implementation == used
    spread = (before - before.mean(-1, keepdim=True)).norm()
    assert (after - before).norm() < 0.03 * spread
    assert torch.equal(padded, logits(model, tokens, padding))


def test_other_types_and_attentions_are_left_alone() -> None:
    model = tiny_llama().float()
    with fast_attention(model):
        assert model.config._attn_implementation == "sdpa"
    model = tiny_llama(attn_implementation="eager")
    with fast_attention(model):
        assert model.config._attn_implementation == "eager"
