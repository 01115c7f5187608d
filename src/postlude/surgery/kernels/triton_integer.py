"""A Triton program that multiplies codes by codes on the 8-bit matrix units of a GPU.

W8A8, W4A8 and W4A4 alike: codes of fewer bits are 8-bit numbers once they are out of their byte. The arithmetic, runs
and zero points included, is that of :mod:`postlude.surgery.kernels.integers`; products are summed in int32 within a
run, runs in fp32. The codes of the weight are read where the checkpoint's buffer lies.

Tested in Triton's interpreter and compiled for compute capability 8.0 and 9.0; its cost is an estimate that has not
been measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from postlude.surgery.kernels.integers import (
    add_input_zero,
    input_codes,
    refuse,
    runs,
    weight_sums,
)
from postlude.surgery.kernels.kernel import Kernel, integer_format, no_triton, rounding_cost
from postlude.surgery.kernels.layouts import Layout
from postlude.surgery.layers import QuantizedLinear

__all__ = ["TritonInteger"]


class TritonInteger(Kernel):
    """Integer weights of 2, 4 or 8 bits, integer inputs of at most 8, any granularity; on a GPU."""

    name = "triton_integer"
    layouts = ("stored",)

    def takes(self, layer: QuantizedLinear, dtype: torch.dtype, device: torch.device) -> str | None:
        reason = refuse(layer, dtype)
        format_ = integer_format(layer)
        if reason is None and format_ is not None and format_.bits not in (2, 4, 8):
            reason = f"takes weights of 2, 4 or 8 bits, not {format_.bits}"
        return reason or no_triton(device)

    def cost(self, layer: QuantizedLinear, rows: int, layout: str) -> float:
        weights = layer.in_features * layer.out_features
        if layer.codes.device.type == "cpu":
            return 1e9 + weights * 1e3 * rows
        pieces = len(runs(layer)) * rows * layer.out_features * 0.0005
        return 25_000 + weights * (0.0004 + 0.000004 * rows) + pieces + rounding_cost(layer, rows)

    def prepare(self, layer: QuantizedLinear, weight: Layout) -> dict[str, Tensor]:
        pieces = torch.tensor(runs(layer), dtype=torch.int32, device=layer.scale.device)
        return {"runs": pieces, **weight_sums(layer, weight)}

    def run(
        self, layer: QuantizedLinear, x: Tensor, weight: Layout, extras: dict[str, Tensor]
    ) -> Tensor:
        from postlude.surgery.kernels import triton_programs as programs

        format_ = integer_format(layer)
        if format_ is None:
            raise TypeError("triton_integer reads integer weights")
        codes, input_scale, input_zero = input_codes(layer, x)
        input_scale = input_scale.float()
        rows, channels, row_bytes = len(x), layer.out_features, layer.codes.shape[1]
        per, moved = 8 // format_.bits, -128 if format_.bits == 8 else 0
        codes = torch.nn.functional.pad(codes, (0, row_bytes * per - layer.in_features))
        codes = codes.view(rows, row_bytes, per).permute(2, 0, 1).contiguous()
        out = torch.empty(rows, channels, device=x.device)
        longest = max(last - first for first, last, _, _ in runs(layer))
        # Products of 8-bit tiles are at least 32 deep.
        deep = 64 if longest > 32 * per else 32
        tall, wide = min(64, max(16, 1 << (rows - 1).bit_length())), 64
        programs.integer_rows[(-(-rows // tall), -(-channels // wide))](
            codes,
            input_scale,
            layer.codes,
            layer.scale,
            layer.scale if layer.zero_point is None else layer.zero_point,
            extras["runs"],
            out,
            rows,
            channels,
            row_bytes,
            len(extras["runs"]),
            *input_scale.stride(),
            *((0, 0) if layer.scale.ndim == 1 else layer.scale.stride()),
            BITS=format_.bits,
            ZERO=float(moved if layer.zero_point is not None else format_.highest + 1 + moved),
            HAS_ZERO=layer.zero_point is not None,
            BLOCK_M=tall,
            BLOCK_N=wide,
            BLOCK_J=deep,
        )
        add_input_zero(out, layer, input_scale, input_zero, extras.get("weight_sums"))
        if layer.bias is not None:
            out += layer.bias
        return out.to(x.dtype)
