"""JourneyTRAK: which training images a generated image owes its way to, not only its end.

    score(q, i) = phi_J(q)^T (Phi^T Phi + lam)^-1 phi(i)
    phi(i)   = projected gradient of the loss at images noised at random
    phi_J(q) = the same at the points of the query's own sampling trajectory

Paper: "The journey, not the destination" (arXiv:2312.06205). Differs: the trajectory is that of the deterministic
sampler, run backwards from the query, so any image can be asked about; layers are projected and have kernels one by one
(:mod:`postlude.attribution.trak`). The loss at a point of the trajectory compares with the noise that leads there from
the image (our reading).

Cost: as TRAK; a query runs the model ``K`` times in a row before its gradient.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from postlude.attribution.logra import LoGRA
from postlude.attribution.representation import DenseRepresentation, GradientRepresentation
from postlude.registry import method

__all__ = ["JourneyRepresentation", "JourneyTRAK"]


@dataclasses.dataclass(frozen=True)
class JourneyRepresentation(DenseRepresentation):
    """Projected gradients of the loss; those of queries at the points of their trajectories."""

    kind = "journey"

    def full_precision(self) -> GradientRepresentation:
        return dataclasses.replace(self, format="fp32", output="journey")


@method(
    "attribute", "journey-trak", family="influence", paper="arXiv:2312.06205", needs=("gradients",)
)
@dataclasses.dataclass(frozen=True)
class JourneyTRAK(LoGRA):
    """For diffusion models: influence on the points of a query's sampling trajectory.

    Attributes:
        side: width of both sides of a projected gradient; narrower sides stay as they are.
        format: of the stored numbers: fp32, bf16 or int8.
        damping: multiplier of ``trace / D``.
        curvature: ``auto``, ``dual`` or ``exact``, which give the same numbers.
    """

    kinds: ClassVar[tuple[str, ...]] = ("diffusion",)

    def representation(self) -> JourneyRepresentation:
        return JourneyRepresentation(side=self.side, format=self.format)

    def meaning(self, noun: str) -> str:
        return (
            "A score estimates, from gradients, how much having learned the example lowers the model's loss at the "
            f"points of the {noun}'s sampling trajectory. The higher, the more; below zero it raised it."
        )
