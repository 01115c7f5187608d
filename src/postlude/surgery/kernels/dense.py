"""Nothing is quantized: one product in the type of the activations.

For 16-bit low-rank branches, and for layers that only transform their input. Nothing is decoded, so this is what such
a layer is, and no simulation of it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from postlude.surgery.kernels.kernel import Kernel
from postlude.surgery.kernels.layouts import Layout
from postlude.surgery.layers import QuantizedLinear

__all__ = ["Dense"]


class Dense(Kernel):
    """Takes every weight in floating point, on every device, in every type."""

    name = "dense"
    layouts = ("stored",)

    def takes(self, layer: QuantizedLinear, dtype: torch.dtype, device: torch.device) -> str | None:
        if layer.weight_scheme is not None:
            return "takes weights in floating point"
        if layer.input_scheme is not None:
            return "takes inputs in floating point"
        return None

    def cost(self, layer: QuantizedLinear, rows: int, layout: str) -> float:
        weights = layer.in_features * layer.out_features
        return 10_000 + weights * (0.25 + 0.006 * rows)

    def run(
        self, layer: QuantizedLinear, x: Tensor, weight: Layout, extras: dict[str, Tensor]
    ) -> Tensor:
        return linear(x, layer.dense_weight().to(x.dtype), layer.bias)
