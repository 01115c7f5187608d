"""LoGRA: influence from gradients that are projected on both sides and kept whole.

    G = (X P_in)^T (dY P_out)  [k, k],      H = mean of vec(G) vec(G)^T,      lam = damping * trace(H) / k^2
    score(q, i) = sum over layers of  vec(G_q)^T (H + lam)^-1 vec(G_i)

The paper inserts a ``k x k`` matrix of zeros between the projections and takes its gradient, which is ``G``: no
separate code is needed. LoRIF with full rank and an exact curvature is this method; its scores differ by the factor
``N`` (a mean here, a sum there) and by the default damping.

Paper: LoGRA (arXiv:2405.13954), code LogIX. Differs: the projections are seeded signs, not a random or a PCA start of
an adapter's weights; of the scores of the code only ``dot`` is here.

Cost: ``k^2`` numbers a layer and example, ``k^4`` for the curvature of a layer; a query reads the index once.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from postlude.attribution.curvature import (
    BACKENDS,
    Choice,
    CurvatureSettings,
    LayerCurvature,
    choose,
)
from postlude.attribution.engine import InfluenceAttributor
from postlude.attribution.index import Index
from postlude.attribution.queries import Queries
from postlude.attribution.representation import DenseRepresentation
from postlude.errors import SettingsError
from postlude.registry import method

__all__ = ["LoGRA"]


@method("attribute", "logra", family="influence", paper="arXiv:2405.13954", needs=("gradients",))
@dataclasses.dataclass(frozen=True)
class LoGRA(InfluenceAttributor):
    """Influence from projected gradients kept whole, with the exact curvature.

    Attributes:
        side: ``k``, width of both sides of a projected gradient; narrower sides stay as they are.
        format: of the stored numbers: fp32, bf16 or int8.
        damping: multiplier of ``trace(H) / k^2``.
        curvature: ``auto``, ``dual`` or ``exact``, which give the same numbers.
    """

    side: int = 64
    format: Literal["fp32", "bf16", "int8"] = "bf16"
    damping: float = 0.1
    curvature: Literal["auto", "dual", "exact"] = "auto"

    def __post_init__(self) -> None:
        if self.side < 1:
            raise SettingsError(f"{self.name}: side is {self.side}; expected at least 1")
        if not 0 < self.damping < math.inf:
            raise SettingsError(
                f"{self.name}: damping is {self.damping}; expected a positive multiplier"
            )
        if self.curvature not in ("auto", "dual", "exact"):
            raise SettingsError(
                f"{self.name}: curvature is {self.curvature!r}; expected auto, dual or exact"
            )
        self.representation()

    def representation(self) -> DenseRepresentation:
        return DenseRepresentation(side=self.side, format=self.format)

    def chosen_curvature(
        self, index: Index
    ) -> tuple[type[LayerCurvature], CurvatureSettings, Choice]:
        settings = CurvatureSettings(damping=self.damping, seed=index.collection.seed)
        choice = choose(
            self.curvature,
            len(index),
            index.layers,
            # An inner product of whole gradients costs D, where one of factors costs columns^2 (d1 + d2).
            lambda layer: math.sqrt(layer.size / (layer.in_width + layer.out_width)),
            settings,
            among=("dual", "exact"),
        )
        return BACKENDS[choice.name], settings, choice

    def weights(self, index: Index, queries: Queries) -> tuple[Tensor, Tensor]:
        """``N`` times the score of a sum of outer products is that of their mean."""
        return torch.full((len(queries),), float(len(index))), torch.ones(len(index))
