"""LoRIF: low-rank influence functions, from an index of a few hundred bytes per layer and example.

Influence needs projected gradients of every training example and an inverse of their covariance. LoRIF keeps the
gradients ``G [d1, d2]`` as rank-``c`` factors and the covariance as its leading ``r`` directions::

    G_i ~ U_i V_i^T                                              block power iteration, 8 or 16 steps
    H = sum_i vec(G_i) vec(G_i)^T ~ Psi S^2 Psi^T                streamed randomised SVD of the factors
    score(q, t) = sum over layers of
        (<G_q, G_t> - a.b) / (lam + tail) + sum_j a_j b_j / (lam + s_j^2),     a, b = Psi^T vec(G_q), Psi^T vec(G_t)

    lam = damping * trace(H) / D            (rule "release"; "paper": damping * mean of the leading s^2)

Paper: LoRIF (arXiv:2601.21929); Li, Le, Xu, Salzmann. What differs here, and why:

* the directions outside of ``Psi`` are weighted by their mean (``tail="corrected"``); the release divides by ``lam``
  alone (``tail="truncated"``), which at small ``r`` weighs them far too much. With fewer examples than dimensions
  the mean is over the directions that the examples span, not over all ``D``: claims/lorif.py shows the difference;
* ``H`` is inverted exactly, by the dual form or a ``D x D`` Cholesky, where that is cheaper (``curvature="auto"``);
* factors can be stored in int8, one scale a vector;
* a side of ``n`` features is ``ceil(n / projection_factor)`` wide: the paper does not say how it rounds.

Cost: one forward and one backward pass without weight gradients, plus ``2 / projection_factor`` of a forward pass for
the projections; ``c (d1 + d2)`` numbers per example and layer. A query reads the index once if the curvature is kept,
else six times. Needs gradients.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from postlude.attribution.curvature import (
    BACKENDS,
    Choice,
    CurvatureSettings,
    LayerCurvature,
    choose,
)
from postlude.attribution.engine import InfluenceAttributor
from postlude.attribution.index import Index
from postlude.attribution.representation import FactorRepresentation
from postlude.errors import SettingsError
from postlude.registry import method
from postlude.surgery.gradients import CollectedLayer

__all__ = ["LoRIF"]


@method("attribute", "lorif", family="influence", paper="arXiv:2601.21929", needs=("gradients",))
@dataclasses.dataclass(frozen=True)
class LoRIF(InfluenceAttributor):
    """Influence from rank-c factors of projected gradients and a truncated spectrum.

    Attributes:
        rank: columns ``c`` of the factors.
        projection_factor: ``f``; sides of a gradient are this many times narrower.
        format: of the factors: fp32, bf16 or int8.
        factor_iterations: of the power iteration; 0 for 8 (rank 1) or 16.
        curvature: ``auto``, ``dual``, ``exact`` or ``truncated``.
        curvature_rank: ``r``, directions of the truncated curvature.
        oversampling, svd_iterations: of its randomised SVD.
        damping: multiplier; the release uses 0.5 with its rule, the paper 0.1 with its own.
        rule: ``release`` or ``paper``.
        tail: ``corrected`` or ``truncated``.
    """

    rank: int = 1
    projection_factor: int = 4
    format: Literal["fp32", "bf16", "int8"] = "bf16"
    factor_iterations: int = 0
    curvature: Literal["auto", "dual", "exact", "truncated"] = "auto"
    curvature_rank: int = 1024
    oversampling: int = 10
    svd_iterations: int = 3
    damping: float = 0.5
    rule: Literal["release", "paper"] = "release"
    tail: Literal["corrected", "truncated"] = "corrected"

    def __post_init__(self) -> None:
        for name, least in (("curvature_rank", 0), ("oversampling", 0), ("svd_iterations", 0)):
            if getattr(self, name) < least:
                raise SettingsError(
                    f"lorif: {name} is {getattr(self, name)}; expected from {least}"
                )
        if not 0 < self.damping < math.inf:
            raise SettingsError(f"lorif: damping is {self.damping}; expected a positive multiplier")
        for name, known in (
            ("rule", ("release", "paper")),
            ("tail", ("corrected", "truncated")),
            ("curvature", ("auto", *BACKENDS)),
        ):
            if getattr(self, name) not in known:
                raise SettingsError(
                    f"lorif: {name} is {getattr(self, name)!r}; expected {', '.join(known)}"
                )
        self.representation()

    def representation(self) -> FactorRepresentation:
        return FactorRepresentation(
            factor=self.projection_factor,
            format=self.format,
            rank=self.rank,
            iterations=self.factor_iterations,
        )

    def chosen_curvature(
        self, index: Index
    ) -> tuple[type[LayerCurvature], CurvatureSettings, Choice]:
        settings = CurvatureSettings(
            rank=self.curvature_rank,
            oversampling=self.oversampling,
            iterations=self.svd_iterations,
            damping=self.damping,
            rule=self.rule,
            tail=self.tail,
            seed=index.collection.seed,
        )

        def columns(layer: CollectedLayer) -> int:
            return min(self.rank, layer.in_width, layer.out_width)

        choice = choose(self.curvature, len(index), index.layers, columns, settings)
        return BACKENDS[choice.name], settings, choice
