"""Integer inputs times integer weights, summed exactly in int32 by ``torch._int_mm``.

With codes ``u`` of the input (scale ``a``, zero point ``z``) and ``v`` of the weight (scale ``s``, zero point
``w``), both constant over a run of inputs, one run contributes::

    a s sum (u - z)(v - w)  =  a s [ sum u v - w sum u ]  -  (a z) [ s sum (v - w) ]

The first bracket is an integer product; the second depends on the weight alone and is kept. A zero point of the
input may lie as far outside the codes as it likes: it never enters the integers. Runs are cut where a group of
the input or of the weight ends; one run where neither has groups.

Codes of 4 bits are not unpacked in order: the low halves of all bytes meet the even inputs, the high halves the
odd ones, as two products. So nothing but the codes of the checkpoint is kept. Codes in the order of ``int4pack``
are unpacked a few channels at a time, which pays for prefill.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from postlude.numerics.formats import Integer
from postlude.surgery.kernels.kernel import Kernel, integer_format, rounding_cost
from postlude.surgery.kernels.layouts import Int8, Layout
from postlude.surgery.layers import QuantizedLinear

__all__ = ["IntegerMatmul", "runs"]

# Output channels at once: their unpacked codes stay in the cache.
_TILE = 512
# |code| <= 128 twice, summed over this many inputs, stays inside int32 with room for the zero points.
_LARGEST_WIDTH = 60_000


class IntegerMatmul(Kernel):
    """Integer weights and inputs of at most 8 bits, any granularity; fp32, bf16 and fp16 on the CPU."""

    name = "integer"
    layouts = ("stored", "int4pack", "int8")

    def takes(self, layer: QuantizedLinear, dtype: torch.dtype, device: torch.device) -> str | None:
        if integer_format(layer) is None:
            return "takes integer weights"
        if layer.input_scheme is None:
            return "takes quantized inputs, these stay in floating point"
        if not isinstance(layer.input_scheme.format, Integer):
            return "takes integer inputs"
        if device.type != "cpu":
            return f"runs on the CPU, the layer is on {device.type}"
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"computes in float32, the activations are {str(dtype).removeprefix('torch.')}"
        if layer.in_features > _LARGEST_WIDTH:
            return f"sums at most {_LARGEST_WIDTH} products exactly, got {layer.in_features}"
        return None

    def cost(self, layer: QuantizedLinear, rows: int, layout: str) -> float:
        count = len(runs(layer))
        weights = layer.in_features * layer.out_features
        read = {"int8": 0.033, "stored": 0.062}.get(layout, 0.7)
        pieces = count * rows * layer.out_features * 0.4 + count * 15_000
        return weights * (read + 0.0045 * rows) + pieces + rounding_cost(layer, rows)

    def prepare(self, layer: QuantizedLinear, weight: Layout) -> dict[str, Tensor]:
        scheme = layer.input_scheme
        if scheme is None or not scheme.format.zero_point_bits:
            return {}
        pieces = runs(layer)
        sums = torch.empty(layer.out_features, len(pieces))
        scale, zero = _weight_parameters(layer)
        for start in range(0, layer.out_features, _TILE):
            stop = min(start + _TILE, layer.out_features)
            codes = weight.unsigned(layer, start, stop)
            for index, (first, last, _, group) in enumerate(pieces):
                total = codes[:, first:last].sum(-1, dtype=torch.int32).float()
                total -= (last - first) * zero[start:stop, group]
                sums[start:stop, index] = total * scale[start:stop, group]
        return {"weight_sums": sums}

    def run(
        self, layer: QuantizedLinear, x: Tensor, weight: Layout, extras: dict[str, Tensor]
    ) -> Tensor:
        codes, input_scale, input_zero = _input_codes(layer, x)
        scale, zero = _weight_parameters(layer)
        signed = isinstance(weight, Int8)
        if signed:
            zero = zero - 128
        pieces = runs(layer)
        out = torch.zeros(len(x), layer.out_features)
        tile = _TILE if len(pieces) == 1 else layer.out_features
        prepared = [_Piece(codes[:, first:last]) for first, last, _, _ in pieces]
        for start in range(0, layer.out_features, tile):
            stop = min(start + tile, layer.out_features)
            whole = None if _halves(layer, weight) else _tile(layer, weight, start, stop)
            for piece, (first, last, input_group, group) in zip(prepared, pieces, strict=True):
                if whole is None:
                    packed = layer.codes[start:stop, first // 2 : (last + 1) // 2]
                    product = piece.times_halves(packed)
                else:
                    product = torch._int_mm(piece.codes, whole[:, first:last].T)
                value = product.float()
                value -= piece.sums * zero[start:stop, group]
                value *= input_scale[:, input_group, None]
                value *= scale[start:stop, group]
                out[:, start:stop] += value
        if input_zero is not None:
            index = torch.tensor([piece[2] for piece in pieces])
            out -= (input_scale * input_zero)[:, index] @ extras["weight_sums"].T
        if layer.bias is not None:
            out += layer.bias
        return out.to(x.dtype)


class _Piece:
    """The input codes of one run, ``int8 [rows, inputs]``."""

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes.contiguous()
        self.sums = codes.sum(-1, keepdim=True, dtype=torch.int32).float()
        self._even: Tensor | None = None
        self._odd = codes

    def times_halves(self, packed: Tensor) -> Tensor:
        """Products with weights packed two to a byte, ``uint8 [channels, bytes]``."""
        if self._even is None:
            self._even = self.codes[:, 0::2].contiguous()
            odd = self.codes[:, 1::2]
            # The high half of a last byte that holds one code is zero.
            missing = self._even.shape[1] - odd.shape[1]
            self._odd = torch.nn.functional.pad(odd, (0, missing)).contiguous()
        product = torch._int_mm(self._even, (packed & 15).view(torch.int8).T)
        product += torch._int_mm(self._odd, (packed >> 4).view(torch.int8).T)
        return product


def runs(layer: QuantizedLinear) -> list[tuple[int, int, int, int]]:
    """``(first, last, input group, weight group)``: inputs over which all scales are constant."""
    width = layer.in_features
    sizes = [
        scheme.granularity.size or width
        for scheme in (layer.input_scheme, layer.weight_scheme)
        if scheme is not None
    ]
    edges = sorted({edge for size in sizes for edge in range(0, width, size)} | {width})
    return [
        (first, last, first // sizes[0], first // sizes[1])
        for first, last in itertools.pairwise(edges)
    ]


def _halves(layer: QuantizedLinear, weight: Layout) -> bool:
    """Whether weights are multiplied without unpacking: 4 bits, and no run ends inside a byte."""
    scheme = layer.weight_scheme
    if scheme is None or scheme.format.code_bits != 4 or not weight.keeps_codes:
        return False
    return all(first % 2 == 0 for first, _, _, _ in runs(layer))


def _tile(layer: QuantizedLinear, weight: Layout, start: int, stop: int) -> Tensor:
    """Codes of some output channels as ``int8``."""
    if isinstance(weight, Int8):
        return weight.weight[start:stop]
    codes = weight.unsigned(layer, start, stop)
    if layer.weight_scheme is not None and layer.weight_scheme.format.code_bits == 8:
        raise TypeError("codes of 8 bits are read in the layout int8")
    return codes.view(torch.int8)


def _weight_parameters(layer: QuantizedLinear) -> tuple[Tensor, Tensor]:
    """Scale and zero point as fp32 ``[out_features, groups]``; the zero point of unsigned codes."""
    format_ = integer_format(layer)
    if format_ is None:
        raise ValueError("the weight is not an integer")
    scale = layer.scale.float()
    offset = layer.zero_point
    zero = torch.full_like(scale, format_.highest + 1) if offset is None else offset.float()
    if scale.ndim == 1:
        shape = (layer.out_features, 1)
        return scale.expand(shape), zero.expand(shape)
    return scale, zero


def _input_codes(layer: QuantizedLinear, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """``int8`` codes, and fp32 scale and zero point ``[rows, groups]``; no zero point where it is 0."""
    scheme = layer.input_scheme
    if scheme is None or not isinstance(scheme.format, Integer):
        raise ValueError("the input is not quantized to integers")
    scale, zero = scheme.parameters(x)
    codes = scheme.encode(x, (scale, zero)).codes
    bits = scheme.format.bits
    if scale.ndim == 1:
        scale = scale.expand(len(x), 1)
        zero = None if zero is None else zero.expand(len(x), 1)
    if zero is None or bits == 8:
        # Of 8 bits, codes above 127 wrap around to negative numbers, and the subtraction wraps them back.
        codes = codes.view(torch.int8) + (-128 if bits == 8 else -(2 ** (bits - 1)))
        return codes, scale, None if zero is None else zero - 128
    return codes.view(torch.int8), scale, zero
