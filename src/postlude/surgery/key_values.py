"""Quantized keys and values, in a single forward pass and in the cache of ``generate``.

A :class:`KeyValueQuantizer` sits inside an attention module as ``key_values``. A hook gives the attention
module a view of whatever cache it was called with; the view rotates the keys (after the rotary embedding),
quantizes keys and values, and keeps the codes packed in the cache (:mod:`postlude.surgery.packed_cache`). Without a
cache the tensors make the same round trip, so both ways give the same numbers. The queries are rotated by the attention
function ``"postlude"``, which is transformers' ``sdpa`` otherwise; a module whose keys are rotated refuses to run under
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
from postlude.numerics.schemes import Scheme
from postlude.surgery.attention import product_attention, takes
from postlude.surgery.packed_cache import Schemes, ensure_packed
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

    def schemes(self) -> Schemes:
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
            ensure_packed(cache, layer_idx, schemes, owner.recent)
        result = cache.update(key_states, value_states, layer_idx, *args, **kwargs)
        return cast(tuple[Tensor, Tensor], result)


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


def _rotated(module: nn.Module, query: Tensor) -> Tensor:
    """The queries of an attention module, as its keys are."""
    quantizer = getattr(module, "key_values", None)
    return quantizer.rotate(query) if isinstance(quantizer, KeyValueQuantizer) else query


def register_attention() -> None:
    """Make the attention functions known to transformers; calling it again changes nothing."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        return sdpa_attention_forward(module, _rotated(module, query), key, value, *args, **kwargs)

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
        return product_attention(_rotated(module, query), key, value, kwargs["scaling"]), None

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
