"""RepQ-ViT: channel ranges behind a LayerNorm become one range, and attention is rounded to powers of sqrt 2.

Both quantizers are complex while calibrating (one range for each channel; base sqrt 2) and simple at run time (one
range, by moving the rest into the norm and the next weights, see :mod:`postlude.quantization.vision`; shifts).

Paper: "RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision Transformers" (arXiv:2212.08254).
What differs: the zero point of the whole tensor, which is a mean, is added before rounding. The authors' quantizer
adds it after; then codes are not whole, and up to a step away from those of the channel's own range. Ranges of weights
are searched rather than taken from percentiles. Needs calibration images (32 in the paper). Cost: one pass.
"""

from __future__ import annotations

import dataclasses

from postlude.numerics.activation_grids import ActivationGrid, LogSqrt2
from postlude.quantization.vision import VisionQuantizer
from postlude.registry import method

__all__ = ["RepQViT"]


@method(
    "quantize",
    "repq-vit",
    family="scale re-parameterisation and a grid",
    paper="arXiv:2212.08254",
    needs=("calibration",),
)
@dataclasses.dataclass(frozen=True)
class RepQViT(VisionQuantizer):
    """Mean of channel ranges in the norm; powers of sqrt 2 for attention."""

    def post_softmax(self) -> ActivationGrid:
        return LogSqrt2(self.activations)
