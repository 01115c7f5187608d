"""``aten::_weight_int8pack_mm``: 8-bit weights read as int8, activations in bf16.

``y = s (x q^T)``: the op gets ones for scales and its output is multiplied by the exact ones. A zero point enters
as ``s (128 - z) sum_k x_k``, in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from postlude.surgery.kernels.kernel import (
    Kernel,
    integer_format,
    no_cpu_op,
    rounded_input,
    rounding_cost,
)
from postlude.surgery.kernels.layouts import Int8, Layout
from postlude.surgery.layers import QuantizedLinear

__all__ = ["Int8PackMatmul"]


class Int8PackMatmul(Kernel):
    """8-bit integer weights per channel or tensor, a multiple of 16 inputs; bf16 on the CPU."""

    name = "int8pack"
    layouts = ("int8",)

    def takes(self, layer: QuantizedLinear, dtype: torch.dtype, device: torch.device) -> str | None:
        format_, scheme = integer_format(layer), layer.weight_scheme
        if format_ is None or format_.bits != 8 or scheme is None:
            return "takes 8-bit integer weights"
        if scheme.granularity.kind == "group":
            return f"takes one scale per output channel, not groups of {scheme.granularity}"
        if layer.in_features % 16:
            # The op reads whole vectors, and crashes past the end of the last row.
            return f"takes a multiple of 16 inputs, not {layer.in_features}"
        return no_cpu_op(dtype, device)

    def cost(self, layer: QuantizedLinear, rows: int, layout: str) -> float:
        weights = layer.in_features * layer.out_features
        return 15_000 + weights * (0.068 + 0.0135 * rows) + rounding_cost(layer, rows)

    def prepare(self, layer: QuantizedLinear, weight: Layout) -> dict[str, Tensor]:
        extras = {"ones": torch.ones(layer.out_features, dtype=torch.bfloat16)}
        scale = layer.scale.float().flatten()
        if layer.zero_point is not None:
            extras["offset"] = scale * (128 - layer.zero_point.float().flatten())
        return extras

    def run(
        self, layer: QuantizedLinear, x: Tensor, weight: Layout, extras: dict[str, Tensor]
    ) -> Tensor:
        if not isinstance(weight, Int8):
            raise TypeError("int8pack reads the layout int8")
        x = rounded_input(layer, x)
        out: Tensor = torch.ops.aten._weight_int8pack_mm(
            x.contiguous(), weight.weight, extras["ones"]
        )
        out = out.float() * layer.scale.float().flatten()
        if "offset" in extras:
            out += x.sum(-1, keepdim=True, dtype=torch.float32) * extras["offset"]
        if layer.bias is not None:
            out += layer.bias
        return out.to(x.dtype)
