"""QERA-exact: the low-rank correction of least expected output error, in closed form.

    minimise  E || x (E - A B)^T ||^2,   E = W - Q(W),   M = E[x x^T] = R R^T
    U S V^T = svd(E R)                   A B = U_r S_r V_r^T R^-1

Any root ``R`` gives the same ``A B``. Output error falls below that of qera-approx and lorc, and the error of the
weight rises above theirs: do not judge by the latter. Paper and differences: see qera_approx.

Cost: that of qera-approx, and ``in^2`` fp64 numbers and a Cholesky factorisation a site.
"""

from __future__ import annotations

import dataclasses

from postlude.quantization.correction import Metric
from postlude.quantization.qera_approx import QERAApprox
from postlude.registry import method

__all__ = ["QERAExact"]


@method(
    "quantize",
    "qera-exact",
    family="low-rank correction",
    paper="arXiv:2410.06040",
    needs=("calibration",),
)
@dataclasses.dataclass(frozen=True)
class QERAExact(QERAApprox):
    """Give back the rounding error where inputs are, by their full second moment."""

    @property
    def metric(self) -> Metric:
        return "full"
