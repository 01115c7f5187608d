"""Integer inputs times integer weights, summed exactly in int32 by ``torch._int_mm``.

The arithmetic is in :mod:`postlude.surgery.kernels.integers`.

Codes of 4 bits are not unpacked in order: the low halves of all bytes meet the even inputs, the high halves the
odd ones, as two products. So nothing but the codes of the checkpoint is kept. Codes in the order of ``int4pack``
are unpacked a few hundred channels at a time, which pays for prefill.
"""

from __future__ import annotations

import torch
from torch import Tensor

from postlude.surgery.kernels.integers import (
    add_input_zero,
    input_codes,
    refuse,
    runs,
    weight_parameters,
    weight_sums,
)
from postlude.surgery.kernels.kernel import Kernel, rounding_cost
from postlude.surgery.kernels.layouts import Int4Pack, Int8, Layout
from postlude.surgery.layers import QuantizedLinear

__all__ = ["IntegerMatmul"]

# Output channels at once: their unpacked codes stay in the cache.
_TILE = 512


class IntegerMatmul(Kernel):
    """Integer weights and inputs of at most 8 bits, any granularity; fp32, bf16 and fp16 on the CPU."""

    name = "integer"
    layouts = ("stored", "int4pack", "int8")

    def takes(self, layer: QuantizedLinear, dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"runs on the CPU, the layer is on {device.type}"
        return refuse(layer, dtype)

    def cost(self, layer: QuantizedLinear, rows: int, layout: str) -> float:
        count = len(runs(layer))
        weights = layer.in_features * layer.out_features
        read = {"int8": 0.033, "stored": 0.062}.get(layout, 0.3)
        pieces = count * rows * layer.out_features * 0.4 + count * 15_000
        return weights * (read + 0.0045 * rows) + pieces + rounding_cost(layer, rows)

    def prepare(self, layer: QuantizedLinear, weight: Layout) -> dict[str, Tensor]:
        return weight_sums(layer, weight)

    def run(
        self, layer: QuantizedLinear, x: Tensor, weight: Layout, extras: dict[str, Tensor]
    ) -> Tensor:
        codes, input_scale, input_zero = input_codes(layer, x)
        scale, zero = weight_parameters(layer)
        sums = extras.get("weight_sums")
        # Where codes are signed numbers and the grid is symmetric, zero is zero.
        moved = layer.zero_point is not None or not isinstance(weight, Int8)
        if isinstance(weight, Int8):
            zero = zero - 128
        every = runs(layer)
        halves = _halves(layer, weight)
        prepared = [_Piece(codes[:, first:last], moved) for first, last, _, _ in every]
        out = x.new_empty(len(x), layer.out_features)
        for start in range(0, layer.out_features, _TILE):
            stop = min(start + _TILE, layer.out_features)
            whole = None if halves else _tile(layer, weight, start, stop)
            total: Tensor | None = None
            for piece, (first, last, input_group, group) in zip(prepared, every, strict=True):
                if whole is None:
                    packed = layer.codes[start:stop, first // 2 : (last + 1) // 2]
                    product = piece.times_halves(packed)
                else:
                    product = torch._int_mm(piece.codes, whole[first:last])[:, : stop - start]
                value = product.float()
                if piece.sums is not None:
                    value.addmm_(piece.sums, zero[start:stop, group, None].T, alpha=-1)
                value *= input_scale[:, input_group, None]
                value *= scale[start:stop, group]
                total = value if total is None else total.add_(value)
            if total is None:
                raise ValueError("a layer without inputs")
            part = None if sums is None else sums[start:stop]
            add_input_zero(total, layer, input_scale, input_zero, part)
            if layer.bias is not None:
                total += layer.bias[start:stop]
            out[:, start:stop] = total
        return out


class _Piece:
    """The input codes of one run, ``int8 [rows, inputs]``, and their sums where they count."""

    def __init__(self, codes: Tensor, summed: bool) -> None:
        self.codes = codes.contiguous()
        self.sums: Tensor | None = None
        if summed:
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


def _halves(layer: QuantizedLinear, weight: Layout) -> bool:
    """Whether weights are multiplied without unpacking: 4 bits, and no run ends inside a byte."""
    scheme = layer.weight_scheme
    if scheme is None or scheme.format.code_bits != 4 or not weight.keeps_codes:
        return False
    return all(first % 2 == 0 for first, _, _, _ in runs(layer))


def _tile(layer: QuantizedLinear, weight: Layout, start: int, stop: int) -> Tensor:
    """Codes of some output channels as ``int8 [inputs, channels]``, for whole blocks of them or more."""
    if isinstance(weight, Int8):
        return weight.weight[start:stop].T
    if isinstance(weight, Int4Pack):
        stop += -stop % weight.step
        return weight.transposed(start, stop).view(torch.int8)
    codes = weight.unsigned(layer, start, stop)
    if layer.weight_scheme is not None and layer.weight_scheme.format.code_bits == 8:
        raise TypeError("codes of 8 bits are read in the layout int8")
    return codes.view(torch.int8).T
