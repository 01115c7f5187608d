"""I&S-ViT: attention rounded to whole powers of two of ``a + eta``; ranges of channels, then one range.

Paper: "I&S-ViT: An Inclusive & Stable Method for Pushing the Limit of Post-Training ViTs Quantization"
(arXiv:2311.10126). Its shift-uniform-log2 grid is ``shift-log`` in :mod:`postlude.numerics.activation_grids`; 2^bits
codes in search and use, where the authors' code uses one more. What differs: its three stages of training a block's
weights (float weights with rounded channels; re-parameterisation; rounded weights) become two closed steps,
re-parameterisation and GPTQ (arXiv:2210.17323) on the weights. By squared error of the values its grid is not better
than powers of two; the paper's gain comes with the training. Needs calibration images (1024 in the paper).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from postlude.numerics.activation_grids import ActivationGrid, ShiftLog
from postlude.quantization.vision import VisionQuantizer
from postlude.registry import method

__all__ = ["IandSViT"]


@method(
    "quantize",
    "iands-vit",
    family="scale re-parameterisation and a grid",
    paper="arXiv:2311.10126",
    needs=("calibration",),
)
@dataclasses.dataclass(frozen=True)
class IandSViT(VisionQuantizer):
    """Powers of two of the shifted attention; weights corrected against the output."""

    rounding: Literal["nearest", "gptq"] = "gptq"

    def post_softmax(self) -> ActivationGrid:
        return ShiftLog(self.activations)
