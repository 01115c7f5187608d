"""A Triton program that reads packed integer weights and multiplies in the type of the activations.

The values are those of ``simulate``: ``(code - zero) * scale`` in fp32, rounded to the type of the activations; sums
are in fp32. One row (decoding) is a product of fp32 numbers, more are products of tiles on matrix units. Nothing is
repacked: codes and scales are read where the checkpoint's buffers lie.

Tested in Triton's interpreter and compiled for compute capability 8.0 and 9.0; its cost is an estimate that has not
been measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from postlude.surgery.kernels.kernel import (
    Kernel,
    integer_format,
    no_triton,
    rounded_input,
    rounding_cost,
)
from postlude.surgery.kernels.layouts import Layout
from postlude.surgery.layers import QuantizedLinear

__all__ = ["TritonPacked"]

_BYTES_AT_ONCE = 64


class TritonPacked(Kernel):
    """Integer weights of 2, 4 or 8 bits, any granularity and width; fp32, bf16, fp16 on a GPU."""

    name = "triton_packed"
    layouts = ("stored",)

    def takes(self, layer: QuantizedLinear, dtype: torch.dtype, device: torch.device) -> str | None:
        format_ = integer_format(layer)
        if format_ is None or format_.bits not in (2, 4, 8):
            return "takes integer weights of 2, 4 or 8 bits"
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"takes activations of 16 or 32 bits, not {str(dtype).removeprefix('torch.')}"
        return no_triton(device)

    def cost(self, layer: QuantizedLinear, rows: int, layout: str) -> float:
        weights = layer.in_features * layer.out_features
        if layer.codes.device.type == "cpu":
            return 1e9 + weights * 1e3 * rows
        return 15_000 + weights * (0.0003 + 0.00001 * rows) + rounding_cost(layer, rows)

    def run(
        self, layer: QuantizedLinear, x: Tensor, weight: Layout, extras: dict[str, Tensor]
    ) -> Tensor:
        from postlude.surgery.kernels import triton_programs as programs

        scheme, format_ = layer.weight_scheme, integer_format(layer)
        if scheme is None or format_ is None:
            raise TypeError("triton_packed reads integer weights")
        x = rounded_input(layer, x).contiguous()
        rows, channels = len(x), layer.out_features
        out = x.new_empty(rows, channels)
        per = 8 // format_.bits
        group = scheme.granularity.size or layer.in_features
        tensor = layer.scale.ndim == 1
        tile = min(_BYTES_AT_ONCE, max(16, _power_of_two(layer.codes.shape[1])))
        # Pointers that are not read still have to be some tensor.
        zero = layer.scale if layer.zero_point is None else layer.zero_point
        pointers = (x, layer.codes, layer.scale, zero, x if layer.bias is None else layer.bias, out)
        sizes = (layer.in_features, channels, layer.codes.shape[1])
        strides = (0, 0) if tensor else layer.scale.stride()
        one = rows == 1
        tall, wide = (1, 16) if one else (min(64, max(16, _power_of_two(rows))), 64)
        programs.packed_rows[(-(-rows // tall), -(-channels // wide))](
            *pointers,
            rows,
            *sizes,
            *strides,
            BITS=format_.bits,
            GROUP=group,
            ZERO=float(format_.highest + 1),
            HAS_ZERO=layer.zero_point is not None,
            HAS_BIAS=layer.bias is not None,
            ONE_GROUP=group >= layer.in_features or group % (tile * per) == 0,
            ONE_ROW=one,
            WIDE=x.device.type == "cpu",
            BLOCK_M=tall,
            BLOCK_N=wide,
            BLOCK_J=tile,
        )
        return out


def _power_of_two(value: int) -> int:
    """The smallest that is not less."""
    return 1 << (value - 1).bit_length()
