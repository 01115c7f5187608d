"""D-TRAK: TRAK for diffusion models, with the norm of the output in place of the loss.

    f(x) = mean over timesteps, noise and pixels of eps_theta(x_t, t)^2
    score(q, i) = phi(q)^T (Phi^T Phi + lam)^-1 phi(i),      phi = projected gradient of f

The output has nothing to do with what the model was trained on; why it predicts retrained models better than the
loss does is not understood. No residual factor.

Paper: "Intriguing properties of data attribution on diffusion models" (arXiv:2311.00500), code sail-sg/D-TRAK.
Differs: every layer is projected on both sides and has a kernel of its own, where the paper projects all parameters to
one vector; the damping is a multiple of each layer's mean eigenvalue, where the paper sweeps an absolute number and
takes the best.

Cost: as LoGRA, times the number of timesteps.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from postlude.attribution.logra import LoGRA
from postlude.attribution.representation import DenseRepresentation
from postlude.registry import method

__all__ = ["DTRAK"]


@method("attribute", "d-trak", family="influence", paper="arXiv:2311.00500", needs=("gradients",))
@dataclasses.dataclass(frozen=True)
class DTRAK(LoGRA):
    """For diffusion models: influence by gradients of the norm of the output.

    Attributes:
        side: width of both sides of a projected gradient; narrower sides stay as they are.
        format: of the stored numbers: fp32, bf16 or int8.
        damping: multiplier of ``trace / D``.
        curvature: ``auto``, ``dual`` or ``exact``, which give the same numbers.
    """

    kinds: ClassVar[tuple[str, ...]] = ("diffusion",)

    def representation(self) -> DenseRepresentation:
        return DenseRepresentation(side=self.side, format=self.format, output="output-norm")

    @property
    def unit(self) -> str:
        return "influence on the norm of the output"

    def meaning(self, noun: str) -> str:
        return (
            "A score estimates, from gradients, the influence of the example on the squared norm of the model's "
            f"output at the {noun}. That norm, not the loss, is what is differentiated: a stand-in that, by the paper, "
            "foretells retrained models better. The higher, the more support."
        )
