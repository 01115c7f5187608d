"""QERA-approx: the low-rank correction that is best for inputs whose channels do not correlate.

    minimise  E || x (E - A B)^T ||^2,   E = W - Q(W),   with E[x x^T] taken as D = diag(E[x_i^2])
    U S V^T = svd(E D^1/2)               A B = U_r S_r V_r^T D^-1/2

Paper: "QERA: an Analytical Framework for Quantization Error Reconstruction" (arXiv:2410.06040); the closed form is
:func:`postlude.numerics.factorize.weighted_svd`. The moment is that of inputs behind the layers already
rounded, as GPTQ's; the paper takes the float model's. Its repository rounds to MXINT4 in blocks of 32; here integers
with float16 scales per group of 32.

Cost: a forward pass of the calibration text (about two and a half, see gptq) and one SVD a layer; the branch takes
``16 * rank * (in + out)`` bits.
"""

from __future__ import annotations

import dataclasses

from postlude.quantization.correction import Metric
from postlude.quantization.lorc import LoRC
from postlude.registry import method

__all__ = ["QERAApprox"]


@method(
    "quantize",
    "qera-approx",
    family="low-rank correction",
    paper="arXiv:2410.06040",
    needs=("calibration",),
)
@dataclasses.dataclass(frozen=True)
class QERAApprox(LoRC):
    """Give back the rounding error, channels weighted by their mean square."""

    own_rank = 32

    group: str | int = 32
    branch: str = "16"

    @property
    def metric(self) -> Metric:
        return "diagonal"
