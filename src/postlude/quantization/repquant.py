"""RepQuant: RepQ-ViT with channel ranges clipped on each side, and weights rounded against the output.

Paper: "RepQuant: Towards Accurate Post-Training Quantization of Large Transformer Models via Scale
Reparameterization" (arXiv:2402.05628), of which the abstract was read: learnable per-channel dual clipping, and
reconstruction of quantized weights that alternates corrections of the output error. What differs: the two clips of
a channel are searched by squared error rather than trained, and the weights are corrected column by column by GPTQ
(arXiv:2210.17323), which reconstructs the same output in closed form. Needs calibration images.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from postlude.numerics.activation_grids import ActivationGrid, LogSqrt2, Uniform
from postlude.quantization.vision import VisionQuantizer
from postlude.registry import method

__all__ = ["RepQuant", "dual_clipping"]

_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)


def dual_clipping(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point for each column of ``[rows, columns]``: low and high clipped by the shares that lose least.

    The high end first, then the low end at that high end, then the high end again (a coordinate search).
    """
    values = rows.double()
    low, high = values.amin(0), values.amax(0)
    middle = (low + high) / 2
    grid = Uniform(bits)

    def parameters(down: Tensor, up: Tensor) -> dict[str, Tensor]:
        bottom, top = middle + (low - middle) * down, middle + (high - middle) * up
        scale = ((top - bottom) / (2**bits - 1)).clamp(min=1e-12)
        return {"scale": scale, "zero_point": torch.round(-bottom / scale)}

    down, up = torch.ones_like(low), torch.ones_like(low)
    for side in ("up", "down", "up"):
        best = torch.full_like(low, torch.inf)
        chosen = torch.ones_like(low)
        for share in _SHARES:
            tried = torch.full_like(low, share)
            pair = (down, tried) if side == "up" else (tried, up)
            error = (grid.round_trip(values, parameters(*pair)) - values).square().mean(0)
            chosen = torch.where(error < best, tried, chosen)
            best = torch.minimum(best, error)
        down, up = (down, chosen) if side == "up" else (chosen, up)
    found = parameters(down, up)
    return found["scale"], found["zero_point"]


@method(
    "quantize",
    "repquant",
    family="scale re-parameterisation and a grid",
    paper="arXiv:2402.05628",
    needs=("calibration",),
)
@dataclasses.dataclass(frozen=True)
class RepQuant(VisionQuantizer):
    """RepQ-ViT, channels clipped on both sides, weights corrected against the output."""

    rounding: Literal["nearest", "gptq"] = "gptq"

    def channel_range(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return dual_clipping(rows, self.activations)

    def post_softmax(self) -> ActivationGrid:
        return LogSqrt2(self.activations)
