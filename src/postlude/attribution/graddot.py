"""GradDot: the inner product of gradients, without curvature.

    score(q, i) = sum over layers of <G_q, G_i>

How much one small step of plain gradient descent on example ``i`` lowers the loss of ``q``: TracIn of one checkpoint
(arXiv:2002.08484), without its learning rate. The baseline that curvature must beat. Reads any index of loss
gradients, also one of factors. With projected gradients the scale of a layer's projection is its weight in the sum;
the ones here are scaled so that inner products are right on average.

Cost: an index of ``(I / f) (O / f)`` numbers a layer and example; a query reads it once.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from postlude.attribution.engine import InfluenceAttributor
from postlude.attribution.representation import (
    DenseRepresentation,
    GradientRepresentation,
    Representation,
)
from postlude.registry import method

__all__ = ["GradDot"]


@method("attribute", "graddot", family="influence", paper="arXiv:2002.08484", needs=("gradients",))
@dataclasses.dataclass(frozen=True)
class GradDot(InfluenceAttributor):
    """Inner product of gradients, without curvature.

    Attributes:
        projection_factor: ``f``; sides of a gradient are this many times narrower.
        format: of the stored numbers: fp32, bf16 or int8.
    """

    projection_factor: int = 4
    format: Literal["fp32", "bf16", "int8"] = "bf16"

    def __post_init__(self) -> None:
        self.representation()

    def representation(self) -> DenseRepresentation:
        return DenseRepresentation(factor=self.projection_factor, format=self.format)

    def reads(self, representation: Representation) -> bool:
        return (
            isinstance(representation, GradientRepresentation) and representation.output == "loss"
        )

    @property
    def unit(self) -> str:
        return "inner product of gradients, nats^2"
