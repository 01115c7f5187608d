"""Decode a few output channels at a time into a buffer that stays in the cache, and multiply by those.

The arithmetic of ``simulate`` without its dense weight: the values are the same bits, and the memory beside the
packed weight is one tile. Decoding costs the same for one row as for many, so this is a kernel for prefill.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from postlude.surgery.kernels.kernel import Kernel, integer_format, rounded_input, rounding_cost
from postlude.surgery.kernels.layouts import LAYOUTS, Layout
from postlude.surgery.layers import QuantizedLinear

__all__ = ["Tiled"]

_TILE = 128


class Tiled(Kernel):
    """Takes every quantized weight, on every device, in every type."""

    name = "tiled"
    layouts = tuple(LAYOUTS)

    def takes(self, layer: QuantizedLinear, dtype: torch.dtype, device: torch.device) -> str | None:
        if layer.weight_scheme is None:
            return "the weight is not quantized"
        return None

    def cost(self, layer: QuantizedLinear, rows: int, layout: str) -> float:
        weights = layer.in_features * layer.out_features
        tiles = -(-layer.out_features // _TILE)
        return 30_000 * tiles + weights * (0.55 + 0.006 * rows) + rounding_cost(layer, rows)

    def run(
        self, layer: QuantizedLinear, x: Tensor, weight: Layout, extras: dict[str, Tensor]
    ) -> Tensor:
        x = rounded_input(layer, x)
        out = x.new_empty(len(x), layer.out_features)
        float_tile = torch.empty(_TILE, layer.in_features, device=x.device)
        tile = (
            float_tile if x.dtype == torch.float32 else torch.empty_like(float_tile, dtype=x.dtype)
        )
        for start in range(0, layer.out_features, _TILE):
            stop = min(start + _TILE, layer.out_features)
            values = decode(layer, weight, start, stop, float_tile[: stop - start])
            if x.dtype != torch.float32:
                values = tile[: stop - start].copy_(values)
            bias = None if layer.bias is None else layer.bias[start:stop]
            out[:, start:stop] = linear(x, values, bias)
        return out


def decode(layer: QuantizedLinear, weight: Layout, start: int, stop: int, out: Tensor) -> Tensor:
    """Values of some output channels in fp32, ``[stop - start, in_features]``, in ``out`` where that is easy."""
    scheme, format_ = layer.weight_scheme, integer_format(layer)
    if scheme is None:
        raise ValueError("an unquantized weight is not decoded")
    codes = weight.unsigned(layer, start, stop)
    rows = slice(None) if scheme.granularity.kind == "tensor" else slice(start, stop)
    scale = layer.scale[rows]
    zero = None if layer.zero_point is None else layer.zero_point[rows]
    size = scheme.granularity.size or layer.in_features
    if format_ is None or layer.in_features % size:
        return scheme.decode(codes, scale, zero)
    # The same operations as Scheme.decode, in place.
    values: Tensor = out.copy_(codes).unflatten(-1, (-1, size))
    values -= format_.highest + 1 if zero is None else zero.float().unsqueeze(-1)
    values *= scale.float().unsqueeze(-1)
    return values.flatten(-2)
