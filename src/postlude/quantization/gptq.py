"""GPTQ: round column by column and let the columns still to come make up for the error.

    H = 2/n sum x x^T + damping,   H^-1 = U^T U,   e = (w_i - q_i) / U_ii,   W[:, i:] -= e U[i, i:]

Paper: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (arXiv:2210.17323).
The compensation is :func:`postlude.numerics.rounding.gptq`. Within a block Q, K, V come first, then O, then gate
and up, then down; each sees the ones before it quantized, and the next block sees the quantized block.

Cost: one forward pass of the calibration text (a little over two and a half, since a block is entered once for
each of its four sites and left early), one Cholesky factorisation per site. No extra bytes over RTN.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from postlude.quantization.engine import Quantizer
from postlude.registry import method

__all__ = ["GPTQ"]


@method(
    "quantize",
    "gptq",
    family="compensated rounding",
    paper="arXiv:2210.17323",
    needs=("calibration",),
)
@dataclasses.dataclass(frozen=True)
class GPTQ(Quantizer):
    """Compensate each rounding error in the weights still to be rounded."""

    rounding: Literal["nearest", "gptq"] = "gptq"
