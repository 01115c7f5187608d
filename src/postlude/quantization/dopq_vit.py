"""DopQ-ViT: steps of attention that shrink towards 1, and a centre of channel ranges that outliers do not move.

Paper: "DopQ-ViT: Towards Distribution-Friendly and Outlier-Aware Post-Training Quantization for Vision Transformers"
(arXiv:2408.03291), of which the abstract and second-hand reports were read. TanQ compands with a tangent; the formula
was not found, and ``tan(theta a / s) / tan(theta)`` with a searched ``theta`` is our guess. MOSF replaces RepQ-ViT's
mean of channel scales; reports differ, and the median, which has the least mean absolute deviation, is our choice.
Needs calibration images.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from postlude.numerics.activation_grids import ActivationGrid, Tangent
from postlude.quantization.vision import VisionQuantizer
from postlude.registry import method

__all__ = ["DopQViT"]


@method(
    "quantize",
    "dopq-vit",
    family="scale re-parameterisation and a grid",
    paper="arXiv:2408.03291",
    needs=("calibration",),
)
@dataclasses.dataclass(frozen=True)
class DopQViT(VisionQuantizer):
    """Median of channel ranges in the norm; a tangent grid for attention."""

    output_error: bool = True

    def centre(self, values: Tensor) -> Tensor:
        return values.median()

    def post_softmax(self) -> ActivationGrid:
        return Tangent(self.activations)
