"""LoRaQ: codes and a low-bit branch made for each other by gradient descent, without data.

    minimise  || W - P - Q(W - P) ||^2 / || W ||^2,     P = deq(A) deq(B)
    y = Q(W - P) Q_x(x) + deq(A) Q_a2( deq(B) Q_a1(x) )

A branch of fewer bits has more rank in the same bytes: rank 60 at 8 bits, 78 at 6, 113 at 4 for rank 32 at 16 (fewer
where groups are ragged). The gradient holds codes fixed within a step and lets scales follow, see
:mod:`postlude.numerics.low_rank`; it starts from the SVD of the weight.

Paper: "LoRaQ" (arXiv:2604.18117), of which the abstract is public knowledge here and the loss is not: that the branch
is fitted by gradient descent on the error of the weight, without data, and is itself quantized (W8A8, W6A6 and W4A8
beside W4). Objective, gradient, optimiser, groups and formats are our choice. So are two settings that are off:
``rotation`` (an orthogonal basis of the bottleneck in which factors round better) and ``weighted`` (the error weighted
by the mean square of each input channel, which needs calibration data).

Cost: ``iterations`` products and roundings of every weight, no data. Bytes: see ``bytes_as``.
"""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.formats import Scheme
from postlude.numerics.low_rank import Corrected, Round, descend
from postlude.quantization.correction import Correction, Metric
from postlude.registry import method

__all__ = ["LoRaQ"]


@method("quantize", "loraq", family="low-rank correction", paper="arXiv:2604.18117")
@dataclasses.dataclass(frozen=True)
class LoRaQ(Correction):
    """Fit codes and a quantized low-rank branch together, without data."""

    group: str | int = 64
    activation_group: str | int = 64
    branch: str = "w8a8"
    iterations: int = 300
    learning_rate: float = 0.03
    rotation: bool = False
    weighted: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.iterations, int) or self.iterations < 0:
            raise SettingsError(f"iterations is {self.iterations!r}; expected 0 or more steps")
        if not 0 < self.learning_rate < math.inf:
            raise SettingsError(
                f"learning_rate is {self.learning_rate}; expected a positive share of a factor's entries"
            )

    @property
    def metric(self) -> Metric:
        return "diagonal" if self.weighted else "identity"

    def fit(
        self, weight: Tensor, rank: int, scheme: Scheme, rounding: Round, metric: Tensor | None
    ) -> Corrected:
        return descend(
            weight,
            rank,
            self.branch_format,
            scheme,
            round_main=rounding,
            metric=metric,
            iterations=self.iterations,
            learning_rate=self.learning_rate,
            rotate=self.rotation,
        )
