"""The reference: decode the whole weight, round the input, multiply in floating point."""

from __future__ import annotations

import torch
from torch import Tensor

from postlude.surgery.kernels.kernel import Kernel, rounding_cost
from postlude.surgery.kernels.layouts import LAYOUTS, Layout
from postlude.surgery.layers import QuantizedLinear

__all__ = ["Simulate"]


class Simulate(Kernel):
    """Takes every layer; what all others are tested against."""

    name = "simulate"
    layouts = tuple(LAYOUTS)

    def takes(self, layer: QuantizedLinear, dtype: torch.dtype, device: torch.device) -> str | None:
        return None

    def cost(self, layer: QuantizedLinear, rows: int, layout: str) -> float:
        weights = layer.in_features * layer.out_features
        return 150_000 + weights * (1.2 + 0.006 * rows) + rounding_cost(layer, rows)

    def run(
        self, layer: QuantizedLinear, x: Tensor, weight: Layout, extras: dict[str, Tensor]
    ) -> Tensor:
        return layer.simulate(x)
