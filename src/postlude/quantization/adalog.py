"""AdaLog: a logarithmic grid whose base is searched, for attention and behind GELU.

    c = round(-log2(x / s) 37 / q)        x_hat = s 2^-floor(c q / 37) T[c q mod 37]

A whole ``q`` gives the base ``2^(q/37)``; ``T`` is a table of 37 entries, so decoding is a look-up and a shift. Behind
GELU the values are shifted by 0.16997 to be positive, and the shift leaves the bias of the next linear. ``q``, and
behind GELU the scale, are those of the least error after the next matrix product; base 2 is always among the
candidates.

Paper: "AdaLog: Post-Training Quantization for Vision Transformers with Adaptive Logarithm Quantizer"
(arXiv:2407.12951), its calibrated variant. What differs: the search behind GELU refines the best of a coarse grid
twice, where the paper keeps 32 candidates for six rounds; ranges of inputs behind a LayerNorm come from RepQ-ViT's
re-parameterisation; no block reconstruction. Needs calibration images (32 in the paper).
"""

from __future__ import annotations

import dataclasses

from postlude.numerics.activation_grids import GELU_SHIFT, ActivationGrid, AdaLog
from postlude.quantization.vision import VisionQuantizer
from postlude.registry import method

__all__ = ["AdaLogViT"]


@method(
    "quantize",
    "adalog",
    family="scale re-parameterisation and a grid",
    paper="arXiv:2407.12951",
    needs=("calibration",),
)
@dataclasses.dataclass(frozen=True)
class AdaLogViT(VisionQuantizer):
    """A logarithmic grid with a searched base for attention and GELU."""

    output_error: bool = True

    def post_softmax(self) -> ActivationGrid:
        return AdaLog(self.activations)

    def post_gelu(self) -> ActivationGrid:
        return AdaLog(self.activations, shift=GELU_SHIFT, search_scale=True)
