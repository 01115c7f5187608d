"""Layers of a key/value cache that keep packed codes instead of floating-point numbers.

Layout: ``[batch, heads, tokens, head_size]``. What is appended is quantized token by token; what attention reads is
decoded at every step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.packing import pack, unpack
from postlude.numerics.schemes import Encoded, Scheme

__all__ = ["Schemes", "ensure_packed"]

Schemes = tuple[Scheme | None, Scheme | None]
"""Of keys and of values, per token; None leaves them in floating point."""


class _Packed:
    """One growing tensor ``[batch, heads, tokens, size]``, kept as packed codes, scales and zero points.

    With ``recent`` tokens in floating point, the last part is those; tokens are quantized one by one when they
    leave it, so what is stored of a token depends on nothing but the token.
    """

    def __init__(self, scheme: Scheme, recent: int = 0) -> None:
        self.scheme, self.recent = scheme, recent
        self.parts: list[Tensor] = []
        self.size = 0

    def append(self, x: Tensor) -> None:
        self.size = x.shape[-1]
        if self.recent:
            if self.parts:
                x = torch.cat([self.parts.pop(), x], dim=-2)
            kept = min(self.recent, x.shape[-2])
            x, tail = x.tensor_split([x.shape[-2] - kept], dim=-2)
        self._encode(x)
        if self.recent:
            self.parts.append(tail.contiguous())

    def _encode(self, x: Tensor) -> None:
        encoded = self.scheme.encode(x)
        parts = [pack(encoded.codes, self.scheme.format.code_bits), encoded.scale]
        if encoded.zero_point is not None:
            parts.append(encoded.zero_point)
        if self.parts:
            parts = [
                torch.cat([old, new], dim=-2) for old, new in zip(self.parts, parts, strict=True)
            ]
        self.parts = parts

    def values(self, dtype: torch.dtype) -> Tensor:
        codes = unpack(self.parts[0], self.scheme.format.code_bits, self.size)
        zero = self.parts[2] if self.scheme.format.zero_point_bits else None
        decoded = Encoded(codes, self.parts[1], zero, self.scheme).decode().to(dtype)
        return torch.cat([decoded, self.parts[-1].to(dtype)], dim=-2) if self.recent else decoded

    def tokens(self) -> int:
        if not self.parts:
            return 0
        return self.parts[0].shape[-2] + (self.parts[-1].shape[-2] if self.recent else 0)

    def drop_first(self, count: int) -> None:
        packed = self.parts[0].shape[-2]
        edges = [min(count, packed)] * len(self.parts)
        if self.recent:
            edges[-1] = max(count - packed, 0)
        self.parts = [p[..., edge:, :] for p, edge in zip(self.parts, edges, strict=True)]

    def drop_last(self, count: int) -> None:
        tail = self.parts[-1].shape[-2] if self.recent else 0
        packed = self.parts[0].shape[-2] - max(count - tail, 0)
        edges = [packed] * len(self.parts)
        if self.recent:
            edges[-1] = max(tail - count, 0)
        self.parts = [p[..., : max(edge, 0), :] for p, edge in zip(self.parts, edges, strict=True)]


class _Plain:
    """The same interface for a tensor that is not quantized."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def append(self, x: Tensor) -> None:
        self.parts = [torch.cat([*self.parts, x], dim=-2)]

    def values(self, dtype: torch.dtype) -> Tensor:
        return self.parts[0].to(dtype)

    def tokens(self) -> int:
        return self.parts[0].shape[-2] if self.parts else 0

    def drop_first(self, count: int) -> None:
        self.parts = [part[..., count:, :] for part in self.parts]

    def drop_last(self, count: int) -> None:
        self.parts = [part[..., : max(part.shape[-2] - count, 0), :] for part in self.parts]


def _store(scheme: Scheme | None, recent: int) -> _Packed | _Plain:
    return _Plain() if scheme is None else _Packed(scheme, recent)


@functools.cache
def _packed_layer_class() -> type:
    """The cache layer; made when transformers is there, so that importing this module does not import it."""
    from transformers.cache_utils import DynamicLayer

    class PackedLayer(DynamicLayer):
        """A cache layer that keeps codes; ``update`` returns what attention reads."""

        def __init__(
            self,
            schemes: Schemes,
            window: int | None,
            recent: int = 0,
        ) -> None:
            super().__init__()
            self._stores = (_store(schemes[0], recent), _store(schemes[1], recent))
            self._window = window
            self._seen = 0
            self.is_sliding = window is not None

        def _tensors(self) -> Iterator[tuple[_Packed | _Plain, int]]:
            for store in self._stores:
                for index in range(len(store.parts)):
                    yield store, index

        def _map(self, change: Callable[[Tensor], Tensor]) -> None:
            for store, index in self._tensors():
                store.parts[index] = change(store.parts[index])

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self._seen += key_states.shape[-2]
            for store, new in zip(self._stores, (key_states, value_states), strict=True):
                store.append(new)
            out = (self._stores[0].values(self.dtype), self._stores[1].values(self.dtype))
            if self._window is not None:
                for store in self._stores:
                    store.drop_first(max(store.tokens() - (self._window - 1), 0))
            return out

        def get_seq_length(self) -> int:
            return self._seen

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            if self._window is None:
                return self._seen + query_length, 0
            kept = min(self._seen, self._window - 1)
            return kept + query_length, max(self._seen - self._window + 1, 0)

        def stored_bytes(self) -> int:
            """Bytes of everything the layer keeps."""
            parts = [store.parts[index] for store, index in self._tensors()]
            return sum(part.numel() * part.element_size() for part in parts)

        def stored_tokens(self) -> int:
            """Tokens the layer keeps; fewer than it has seen where a sliding window drops some."""
            return self._stores[0].tokens()

        def reset(self) -> None:
            for store in self._stores:
                store.parts = []
            self._seen, self.is_initialized = 0, False

        def reorder_cache(self, beam_idx: Tensor) -> None:
            self._map(lambda part: part.index_select(0, beam_idx.to(part.device)))

        def crop(self, tokens_to_remove: int) -> None:
            if tokens_to_remove > 0:
                raise ValueError(f"crop takes minus the tokens to remove, got {tokens_to_remove}")
            if tokens_to_remove and self._window is not None and self._seen >= self._window:
                raise RuntimeError(
                    "tokens that left the sliding window are gone, so the cache cannot be taken back; "
                    "generate without assistant or prompt lookup"
                )
            if tokens_to_remove and self.is_initialized:
                for store in self._stores:
                    store.drop_last(-tokens_to_remove)
                self._seen += tokens_to_remove

        def batch_repeat_interleave(self, repeats: int) -> None:
            self._map(lambda part: part.repeat_interleave(repeats, dim=0))

        def batch_select_indices(self, indices: Tensor) -> None:
            self._map(lambda part: part[indices, ...])

        def offload(self) -> None:
            self._map(lambda part: part.to("cpu", non_blocking=True))

        def prefetch(self) -> None:
            if self.is_initialized:
                self._map(lambda part: part.to(self.device, non_blocking=True))

    return PackedLayer


def ensure_packed(cache: Any, index: int, schemes: Schemes, recent: int) -> None:
    """Put a packed layer in the place of an empty dynamic one; nothing happens where one is already.

    Args:
        cache: of transformers.
        index: of the layer; layers up to it are made where the cache makes them as needed.
        schemes: of keys and values; None keeps them in floating point.
        recent: tokens at the end that stay in floating point.

    Raises:
        SettingsError: the layer is filled, or of another kind.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    packed_layer = _packed_layer_class()
    layers = cache.layers
    while len(layers) <= index and cache.layer_class_to_replicate is not None:
        layers.append(cache.layer_class_to_replicate())
    layer = layers[index]
    if isinstance(layer, packed_layer):
        return
    sliding = type(layer) is DynamicSlidingWindowLayer
    if (type(layer) is not DynamicLayer and not sliding) or layer.is_initialized:
        state = "already filled" if layer.is_initialized else "not a dynamic one"
        raise SettingsError(
            f"the keys and values of this model are quantized, but cache layer {index} is a "
            f"{type(layer).__name__} that is {state}. Pass no cache, or an empty DynamicCache."
        )
    layers[index] = packed_layer(schemes, layer.sliding_window if sliding else None, recent)
