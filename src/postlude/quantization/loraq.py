"""LoRaQ: codes and a low-bit branch made for each other by gradient descent, without data.

    minimise  || W - P - Q(W - P) ||^2 / || W ||^2,     P = deq(A) deq(B)
    y = Q(W - P) Q_x(x) + deq(A) Q_a2( deq(B) Q_a1(x) )

A branch of fewer bits has more rank in the same bytes: rank 60 at 8 bits, 78 at 6, 113 at 4 for rank 32 at 16 (fewer
where groups are ragged). The gradient holds codes fixed within a step and lets scales follow, see
:mod:`postlude.numerics.low_rank_descent`; it starts from the SVD of the weight.

Paper: "LoRaQ" (arXiv:2604.18117), of which the abstract is public knowledge here and the loss is not: that the branch
is fitted by gradient descent on the error of the weight, without data, and is itself quantized (W8A8, W6A6 and W4A8
beside W4). Objective, gradient, optimiser, groups and formats are our choice. So are three settings that are off:
``rotation`` (an orthogonal basis of the bottleneck in which factors round better), and two that need calibration data:
``weighted`` (the error weighted by the mean square of each input channel) and ``smooth`` (SVDQuant's smoothing before
the fit, for activations that are hard to round).

Cost: ``iterations`` products and roundings of every weight, no data. Bytes: see ``bytes_as``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.low_rank import Corrected, Round
from postlude.numerics.low_rank_descent import descend
from postlude.numerics.schemes import Scheme
from postlude.quantization.correction import Correction, Metric, rounded
from postlude.quantization.engine import Rounded, Seen
from postlude.quantization.smoothing import Inputs, smoothing
from postlude.registry import method
from postlude.surgery.anatomy import Site

__all__ = ["LoRaQ"]

# Steps of the exponents of smoothing, as SVDQuant has them.
_GRID = 20


@method("quantize", "loraq", family="low-rank correction", paper="arXiv:2604.18117")
@dataclasses.dataclass(frozen=True)
class LoRaQ(Correction):
    """Fit codes and a quantized low-rank branch together, without data.

    Attributes:
        iterations: steps of the fit.
        learning_rate: of the fit, as a share of the size of a factor's entries.
        rotation: turn the bottleneck into an orthogonal basis in which factors round better.
        weighted: weigh the error by the mean square of each input channel, from calibration data.
        smooth: smooth as SVDQuant does before the fit, from calibration data.
    """

    group: str | int = 64
    activation_group: str | int = 64
    branch: str = "w8a8"
    iterations: int = 300
    learning_rate: float = 0.03
    rotation: bool = False
    weighted: bool = False
    smooth: bool = False

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

    @property
    def reads_inputs(self) -> bool:
        return super().reads_inputs or self.smooth

    def observes(self, site: Site) -> Seen:
        moment = self.weighted or self.rounding == "gptq"
        return Inputs(site.width, moment) if self.smooth else super().observes(site)

    def round_site(
        self, site: Site, weights: Sequence[Tensor], seen: Seen | None, scheme: Scheme
    ) -> list[Rounded]:
        if not isinstance(seen, Inputs):
            return super().round_site(site, weights, seen, scheme)
        ranks = [self.rank_of(*weight.shape) for weight in weights]
        nearest = dataclasses.replace(self, rounding="nearest").rounder(scheme, None)
        d = smoothing(
            seen, weights, ranks, self.input_scheme(site), self.branch_format, nearest, _GRID
        )
        moment = seen.smoothed_moment(d)
        rounding = self.rounder(scheme, moment)
        metric = moment.diagonal() if self.weighted and moment is not None else None
        return [
            rounded(self.fit(weight * d.to(weight), rank, scheme, rounding, metric), d)
            for weight, rank in zip(weights, ranks, strict=True)
        ]

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
