"""Codes of Postlude in the blocks of GGUF, where a type of GGUF means the same.

Blocks of 32 inputs of one output; ``d`` and ``m`` are fp16::

    Q4_0  d (q - 8)       Q5_0  d (q - 16)      Q8_0  d q              symmetric
    Q4_1  d q + m         Q5_1  d q + m                                asymmetric, m = -z d rounded to fp16

Blocks of 256, whose parts have scales ``c`` and offsets ``o`` of their own, small integers::

    Q2_K  d c q - e o     Q4_K  d c q - e o     Q5_K  d c q - e o      asymmetric, and symmetric ones of 2 bits
    Q3_K  d c (q - 4)     Q6_K  d c (q - 32)                           symmetric

No code of ours has scales of scales. But where 256 inputs share a scale ``s``, as in a whole channel, ``d = e = s``,
``c = 1`` and ``o = z`` say exactly the same, zero points included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.formats import Integer
from postlude.numerics.packing import pack, unpack
from postlude.surgery.layers import QuantizedLinear

__all__ = ["BLOCK", "blocks", "type_of"]

BLOCK, _LARGE = 32, 256
# Largest accepted error of an offset in fp16, in steps of the grid.
_OFFSET_ERROR = 0.01
# By bits of a code: the type of blocks of 256 and of 32, the first None where the second is as small.
_SYMMETRIC = {
    2: ("q2_k", "q4_0"),
    3: ("q3_k", "q4_0"),
    4: (None, "q4_0"),
    5: (None, "q5_0"),
    6: ("q6_k", "q8_0"),
    7: (None, "q8_0"),
    8: (None, "q8_0"),
}
_ASYMMETRIC = {2: ("q2_k", "q4_1"), 3: ("q4_k", "q4_1"), 4: ("q4_k", "q4_1"), 5: ("q5_k", "q5_1")}


def type_of(layer: QuantizedLinear) -> tuple[str | None, str]:
    """The type that holds the codes of a layer, or None and why there is none."""
    scheme = layer.weight_scheme
    if scheme is None or layer.input_scheme is not None:
        return None, "rounds its input, and llama.cpp rounds activations its own way"
    format, granularity, width = scheme.format, scheme.granularity, layer.in_features
    if not isinstance(format, Integer):
        return None, f"has {format.kind} codes, and GGUF has blocks of integers"
    if width % BLOCK:
        return None, f"has {width} inputs, and a block of GGUF holds {BLOCK}"
    if granularity.kind == "group" and granularity.size % BLOCK and granularity.size < width:
        return None, f"has groups of {granularity.size}, and a block of GGUF holds {BLOCK}"
    scale, zero = layer.scale.float(), layer.zero_point
    if not bool((scale.half().float() == scale).all()):
        return None, "has scales that fp16 does not hold exactly"
    whole = granularity.kind != "group" or granularity.size >= width
    shared = width % _LARGE == 0 and (whole or granularity.size % _LARGE == 0)
    if zero is None:
        large, small = _SYMMETRIC[format.bits]
        return (large if shared and large else small), ""
    if format.bits not in _ASYMMETRIC:
        return None, f"has asymmetric {format.bits}-bit codes, for which GGUF has no type"
    large, small = _ASYMMETRIC[format.bits]
    if shared and bool(((zero >= 0) & (zero <= (15 if large == "q2_k" else 63))).all()):
        return large, ""
    offset = zero.float() * scale
    error = float(((offset.half().float() - offset).abs() / scale.abs()).max())
    if not error <= _OFFSET_ERROR:
        return (
            None,
            f"has zero points so far outside its codes that fp16 moves them by {error:.2g} steps",
        )
    return small, ""


def blocks(layer: QuantizedLinear, type: str) -> Any:
    """The codes of a layer as blocks of a GGUF type, ``uint8 [out, bytes]`` of numpy.

    Raises:
        SettingsError: the type does not hold these codes.
    """
    held, reason = type_of(layer)
    scheme = layer.weight_scheme
    if held != type or scheme is None or not isinstance(scheme.format, Integer):
        raise SettingsError(f"{type} does not hold this layer: {reason or f'it takes {held}'}")
    size = _LARGE if type.endswith("_k") else BLOCK
    codes = unpack(layer.codes, scheme.format.bits, layer.in_features).cpu()
    codes = codes.unflatten(1, (-1, size)).to(torch.int16)
    scale = _per_block(layer, layer.scale, size).half().unsqueeze(-1)
    middle = scheme.format.highest + 1
    if layer.zero_point is not None:
        zero = _per_block(layer, layer.zero_point, size).to(torch.int16).unsqueeze(-1)
    else:
        zero = torch.full(scale.shape, middle, dtype=torch.int16)
    parts = _ENCODERS[type](codes, scale, zero)
    whole = torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)
    return whole.reshape(layer.out_features, -1).numpy()


def _per_block(layer: QuantizedLinear, values: Tensor, size: int) -> Tensor:
    """``[out, groups]`` or ``[1]`` to ``[out, blocks]``."""
    count = layer.in_features // size
    values = values.cpu()
    scheme = layer.weight_scheme
    if values.ndim == 1 or values.shape[1] == 1 or scheme is None:
        return values.reshape(-1, 1).expand(layer.out_features, count).contiguous()
    return values.repeat_interleave(scheme.granularity.size // size, 1)[:, :count].contiguous()


def _bytes(values: Tensor) -> Tensor:
    return values.to(torch.uint8)


def _halves(low: Tensor) -> Tensor:
    """Four bits of 32 entries in 16 bytes: the first half in the low halves of the bytes."""
    return _bytes(low[..., :16] | (low[..., 16:] << 4))


def _fields(values: Tensor, bits: int, runs: int, run: int) -> Tensor:
    """``[.., runs * fields * run]`` to bytes ``[.., runs * run]``: a byte has one entry of every run of its fields."""
    spread = values.unflatten(-1, (runs, 8 // bits, run)).to(torch.int32)
    shifts = torch.arange(0, 8, bits).unsqueeze(-1)
    return _bytes((spread << shifts).sum(-2)).flatten(-2)


def _q4_0(codes: Tensor, scale: Tensor, zero: Tensor) -> list[Tensor]:
    return [scale, _halves(codes - zero + 8)]


def _q4_1(codes: Tensor, scale: Tensor, zero: Tensor) -> list[Tensor]:
    return [scale, (-zero.float() * scale.float()).half(), _halves(codes)]


def _q5_0(codes: Tensor, scale: Tensor, zero: Tensor) -> list[Tensor]:
    shifted = codes - zero + 16
    return [scale, pack(shifted >> 4, 1), _halves(shifted & 15)]


def _q5_1(codes: Tensor, scale: Tensor, zero: Tensor) -> list[Tensor]:
    offset = (-zero.float() * scale.float()).half()
    return [scale, offset, pack(codes >> 4, 1), _halves(codes & 15)]


def _q8_0(codes: Tensor, scale: Tensor, zero: Tensor) -> list[Tensor]:
    return [scale, (codes - zero).to(torch.int8)]


def _q2_k(codes: Tensor, scale: Tensor, zero: Tensor) -> list[Tensor]:
    parts = _bytes(1 | (zero << 4)).expand(*codes.shape[:-1], 16)
    return [parts, _fields(codes, 2, 2, 32), scale, scale]


def _q3_k(codes: Tensor, scale: Tensor, zero: Tensor) -> list[Tensor]:
    shifted = codes - zero + 4
    # Sixteen scales of 6 bits, each 1 + 32: low four bits first, then the high two.
    scales = torch.tensor([0x11] * 8 + [0xAA] * 4, dtype=torch.uint8).expand(*codes.shape[:-1], 12)
    return [_fields(shifted >> 2, 1, 1, 32), _fields(shifted & 3, 2, 2, 32), scales, scale]


def _small_scales(codes: Tensor, zero: Tensor) -> Tensor:
    """Eight scales of 1 and eight offsets of 6 bits in 12 bytes."""
    front = torch.ones(*codes.shape[:-1], 4, dtype=torch.uint8)
    offsets = _bytes((zero & 63) | (((zero >> 4) & 3) << 6)).expand(*codes.shape[:-1], 4)
    rest = _bytes(1 | ((zero & 15) << 4)).expand(*codes.shape[:-1], 4)
    return torch.cat([front, offsets, rest], dim=-1)


def _q4_k(codes: Tensor, scale: Tensor, zero: Tensor) -> list[Tensor]:
    return [scale, scale, _small_scales(codes, zero), _fields(codes, 4, 4, 32)]


def _q5_k(codes: Tensor, scale: Tensor, zero: Tensor) -> list[Tensor]:
    high, low = _fields(codes >> 4, 1, 1, 32), _fields(codes & 15, 4, 4, 32)
    return [scale, scale, _small_scales(codes, zero), high, low]


def _q6_k(codes: Tensor, scale: Tensor, zero: Tensor) -> list[Tensor]:
    shifted = codes - zero + 32
    ones = torch.ones(*codes.shape[:-1], 16, dtype=torch.int8)
    return [_fields(shifted & 15, 4, 2, 64), _fields(shifted >> 4, 2, 2, 32), ones, scale]


_ENCODERS: dict[str, Callable[[Tensor, Tensor, Tensor], list[Tensor]]] = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}
