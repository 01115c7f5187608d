"""A cache that keeps its last tokens in floating point, against a list of tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from postlude.numerics.formats import Integer
from postlude.numerics.schemes import Granularity, Scheme
from postlude.surgery.packed_cache import ensure_packed

SCHEME = Scheme(Integer(4, symmetric=False, range="zero"), Granularity("token"))


class Cache:
    """As much of a cache as a packed layer is put into."""

    layer_class_to_replicate = None

    def __init__(self, window: int | None) -> None:
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        self.layers = [DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)]


def expected(tokens: Tensor, recent: int) -> Tensor:
    """Every token on its own, rounded unless it is among the last."""
    edge = max(tokens.shape[-2] - recent, 0)
    old = [SCHEME.round_trip(tokens[..., i : i + 1, :]) for i in range(edge)]
    return torch.cat([*old, tokens[..., edge:, :]], dim=-2)


@pytest.mark.parametrize("recent", [0, 1, 3, 50])
@pytest.mark.parametrize("scheme", [SCHEME, Scheme(Integer(3), Granularity("token"))])
def test_steps_of_any_length(recent: int, scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SCHEME", scheme)
    cache = Cache(None)
    ensure_packed(cache, 0, (scheme, scheme), recent)
    layer = cache.layers[0]
    keys = torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(0))
    values = keys.flip(-2)
    seen = 0
    for step in (5, 1, 1, 4, 1):
        new = slice(seen, seen + step)
        seen += step
        got = layer.update(keys[..., new, :], values[..., new, :])
        assert torch.equal(got[0], expected(keys[..., :seen, :], recent))
        assert torch.equal(got[1], expected(values[..., :seen, :], recent))
    assert layer.stored_tokens() == layer.get_seq_length() == 12
    plain = min(recent, 12) * 8 * 4
    code_bytes = (12 - min(recent, 12)) * (-(-8 * scheme.format.code_bits // 8) + 2)
    code_bytes += (12 - min(recent, 12)) * scheme.format.zero_point_bits // 8
    assert layer.stored_bytes() == 2 * 2 * 3 * (plain + code_bytes)


@pytest.mark.parametrize("recent", [0, 2, 5])
@pytest.mark.parametrize("removed", [1, 4, 9, 20])
def test_crop(recent: int, removed: int) -> None:
    cache = Cache(None)
    ensure_packed(cache, 0, (SCHEME, None), recent)
    layer = cache.layers[0]
    tokens = torch.randn(1, 2, 20, 8, generator=torch.Generator().manual_seed(1))
    layer.update(tokens, tokens)
    layer.crop(-removed)
    left = 20 - removed
    assert layer.stored_tokens() == layer.get_seq_length() == left
    got, plain = layer.update(tokens[..., :1, :], tokens[..., :1, :])
    assert torch.equal(plain, torch.cat([tokens[..., :left, :], tokens[..., :1, :]], dim=-2))
    # What was in floating point and is left stays so, with the new token, as far as it is recent.
    rounded = min(left, 20 - recent)
    rounded = max(rounded, left + 1 - recent)
    whole = torch.cat([tokens[..., :left, :], tokens[..., :1, :]], dim=-2)
    both = [SCHEME.round_trip(whole[..., :rounded, :]), whole[..., rounded:, :]]
    assert torch.equal(got, torch.cat(both, dim=-2))


@pytest.mark.parametrize("recent", [0, 2, 9])
def test_sliding_window(recent: int) -> None:
    cache = Cache(6)
    ensure_packed(cache, 0, (SCHEME, SCHEME), recent)
    layer = cache.layers[0]
    tokens = torch.randn(1, 2, 15, 8, generator=torch.Generator().manual_seed(2))
    kept = tokens[..., :0, :]
    for start in range(0, 15, 3):
        new = tokens[..., start : start + 3, :]
        got, _ = layer.update(new, new)
        kept = torch.cat([kept, new], dim=-2)
        assert torch.equal(got, expected(kept, recent))
        kept = kept[..., -5:, :]
        assert layer.stored_tokens() == kept.shape[-2]


def test_beams() -> None:
    cache = Cache(None)
    ensure_packed(cache, 0, (SCHEME, SCHEME), 2)
    layer = cache.layers[0]
    tokens = torch.randn(2, 2, 6, 8, generator=torch.Generator().manual_seed(3))
    layer.update(tokens, tokens)
    layer.reorder_cache(torch.tensor([1, 1]))
    layer.batch_repeat_interleave(2)
    got, _ = layer.update(tokens[[0, 0, 1, 1]][..., :1, :], tokens[[0, 0, 1, 1]][..., :1, :])
    assert torch.equal(got[0, :, :5], got[2, :, :5])
    both = torch.cat([tokens[1:], tokens[:1, :, :1]], dim=-2)
    assert torch.equal(got[:1], expected(both, 2))
