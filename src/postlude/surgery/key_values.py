"""Quantized keys and values, in a single forward pass and in the cache of ``generate``.

A :class:`KeyValueQuantizer` sits inside an attention module as ``key_values``. A hook gives the attention
module a view of whatever cache it was called with; the view rotates the keys (after the rotary embedding),
quantizes keys and values, and keeps the codes packed in the cache. Without a cache the tensors make the same
round trip, so both ways give the same numbers. The queries are rotated by the attention function
``"postlude"``, which is transformers' ``sdpa`` otherwise; a module whose keys are rotated refuses to run under
another attention function, because its logits would be silently wrong.

Layout: ``[batch, heads, tokens, head_size]``; the rotation acts on the last axis.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from postlude.errors import SettingsError
from postlude.numerics.packing import pack, unpack
from postlude.numerics.schemes import Encoded, Scheme
from postlude.surgery.attention import product_attention, takes
from postlude.surgery.transforms import BlockHadamard, HeadRotation, build_transform

__all__ = [
    "ATTENTION",
    "KeyValueQuantizer",
    "attach",
    "detach",
    "fast_attention",
    "register_attention",
    "use_rotating_attention",
]

ATTENTION = "postlude"
# The same with the attention of :mod:`postlude.surgery.attention` where that takes a call.
_FAST_ATTENTION = "postlude_fast"


class KeyValueQuantizer(nn.Module):
    """How the keys and values of one attention module are transformed and quantized.

    Args:
        key, value: schemes per token, groups along the head; None leaves them in float.
        rotation: orthogonal transform of post-rotary queries and keys.

    Attributes:
        quantize: switched off while statistics of the float model are wanted.
        observer: called with the post-rotary keys ``[batch, heads, tokens, head_size]`` before they are
            rotated; None most of the time.
        recent: tokens at the end of a cache that stay in floating point until newer ones push them out; 0 gives
            the numbers of a pass without a cache.
    """

    def __init__(
        self,
        key: Scheme | None = None,
        value: Scheme | None = None,
        rotation: BlockHadamard | HeadRotation | None = None,
    ) -> None:
        super().__init__()
        self.key, self.value = key, value
        self.rotation = rotation
        self.quantize = True
        self.observer: Callable[[Tensor], None] | None = None
        self.recent = 0

    def rotate(self, x: Tensor) -> Tensor:
        return x if self.rotation is None else cast(Tensor, self.rotation(x))

    def schemes(self) -> tuple[Scheme | None, Scheme | None]:
        """Schemes in force."""
        return (self.key, self.value) if self.quantize else (None, None)

    def spec(self) -> dict[str, Any]:
        return {
            "key": self.key.to_dict() if self.key else None,
            "value": self.value.to_dict() if self.value else None,
            "rotation": self.rotation.spec() if self.rotation is not None else None,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], device: Any = None) -> KeyValueQuantizer:
        """An empty one from its description."""
        return cls(
            Scheme.from_dict(spec["key"]) if spec["key"] else None,
            Scheme.from_dict(spec["value"]) if spec["value"] else None,
            cast("BlockHadamard | HeadRotation | None", build_transform(spec["rotation"], device)),
        )


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


def _packed_layer_class() -> type:
    """The cache layer; made when transformers is there, so that importing this module does not import it."""
    from transformers.cache_utils import DynamicLayer

    class PackedLayer(DynamicLayer):
        """A cache layer that keeps codes; ``update`` returns what attention reads."""

        def __init__(
            self,
            schemes: tuple[Scheme | None, Scheme | None],
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


class _CacheView:
    """What an attention module sees instead of its cache."""

    def __init__(self, owner: KeyValueQuantizer, cache: Any) -> None:
        self._owner, self._cache = owner, cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        owner, cache = self._owner, self._cache
        if owner.observer is not None:
            owner.observer(key_states)
        key_states = owner.rotate(key_states)
        schemes = owner.schemes()
        if cache is None:
            keys, values = (
                x if scheme is None else scheme.round_trip(x)
                for x, scheme in zip((key_states, value_states), schemes, strict=True)
            )
            return keys, values
        if schemes != (None, None):
            _ensure_packed(cache, layer_idx, schemes, owner.recent)
        result = cache.update(key_states, value_states, layer_idx, *args, **kwargs)
        return cast(tuple[Tensor, Tensor], result)


def _ensure_packed(
    cache: Any, index: int, schemes: tuple[Scheme | None, Scheme | None], recent: int
) -> None:
    """Put a packed layer in the place of an empty dynamic one."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    global _PACKED_LAYER
    if _PACKED_LAYER is None:
        _PACKED_LAYER = _packed_layer_class()
    layers = cache.layers
    while len(layers) <= index and cache.layer_class_to_replicate is not None:
        layers.append(cache.layer_class_to_replicate())
    layer = layers[index]
    if isinstance(layer, _PACKED_LAYER):
        return
    sliding = type(layer) is DynamicSlidingWindowLayer
    if (type(layer) is not DynamicLayer and not sliding) or layer.is_initialized:
        state = "already filled" if layer.is_initialized else "not a dynamic one"
        raise SettingsError(
            f"the keys and values of this model are quantized, but cache layer {index} is a "
            f"{type(layer).__name__} that is {state}. Pass no cache, or an empty DynamicCache."
        )
    layers[index] = _PACKED_LAYER(schemes, layer.sliding_window if sliding else None, recent)


_PACKED_LAYER: type | None = None


def _hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    owner = cast(KeyValueQuantizer, module.key_values)
    used = getattr(module.config, "_attn_implementation", None)
    if owner.rotation is not None and used not in (ATTENTION, _FAST_ATTENTION):
        raise SettingsError(
            f"this model rotates its keys and needs attn_implementation={ATTENTION!r}, but runs with "
            f"{used!r}. Load it without attn_implementation, or call "
            f"model.set_attn_implementation({ATTENTION!r})."
        )
    return args, {**kwargs, "past_key_values": _CacheView(owner, kwargs.get("past_key_values"))}


def attach(model: nn.Module, attention: str, quantizer: KeyValueQuantizer) -> None:
    """Give the attention module at this path its quantizer, replacing an earlier one."""
    detach(model, attention)
    module = model.get_submodule(attention)
    module.key_values = quantizer
    handle = module.register_forward_pre_hook(_hook, with_kwargs=True)
    cast(Any, module)._key_values_handle = handle


def detach(model: nn.Module, attention: str) -> None:
    """Undo :func:`attach`; nothing happens where nothing is attached."""
    module = model.get_submodule(attention)
    if hasattr(module, "key_values"):
        cast(Any, module)._key_values_handle.remove()
        del module._key_values_handle
        del module.key_values


def register_attention() -> None:
    """Make the attention functions known to transformers; calling it again changes nothing."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        quantizer = getattr(module, "key_values", None)
        if isinstance(quantizer, KeyValueQuantizer):
            query = quantizer.rotate(query)
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    def fast(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        plain = not kwargs.get("dropout") and kwargs.get("scaling") is not None
        plain = plain and kwargs.get("softcap") is None and kwargs.get("position_bias") is None
        if not (plain and takes(query, key, attention_mask, causal)):
            return attention(module, query, key, value, attention_mask, **kwargs)
        quantizer = getattr(module, "key_values", None)
        if isinstance(quantizer, KeyValueQuantizer):
            query = quantizer.rotate(query)
        return product_attention(query, key, value, kwargs["scaling"]), None

    for name, function in ((ATTENTION, attention), (_FAST_ATTENTION, fast)):
        ALL_ATTENTION_FUNCTIONS.register(name, function)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, sdpa_mask)


@contextlib.contextmanager
def fast_attention(model: nn.Module) -> Iterator[None]:
    """Generate with :mod:`postlude.surgery.attention` while the context lasts; for transformers models.

    Changes nothing where the model runs with another attention than PyTorch's, or not in bfloat16 on a CPU.
    """
    config = getattr(model, "config", None)
    used = getattr(config, "_attn_implementation", None)
    first = next(model.parameters())
    if (
        used not in ("sdpa", ATTENTION)
        or first.device.type != "cpu"
        or first.dtype != torch.bfloat16
    ):
        yield
        return
    register_attention()
    cast(Any, model).set_attn_implementation(_FAST_ATTENTION)
    try:
        yield
    finally:
        cast(Any, model).set_attn_implementation(used)


def use_rotating_attention(model: nn.Module) -> None:
    """Run every attention module of a transformers model through the attention function ``"postlude"``."""
    register_attention()
    cast(Any, model).set_attn_implementation(ATTENTION)
