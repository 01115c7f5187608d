"""PriFT: what a frozen pretrained model thinks of the demonstration decides how much of it is learned.

    prift-prob   w = q(y)
    prift-mass   w = 1[u >= tau],   u = sum over v with q(v) <= q(y) of q(v) = 1 - (mass strictly above q(y))

DFT reads the probability from the model in training, so weights follow the drift that they cause; PriFT reads it from
the checkpoint that tuning starts from, so weights are constant and can be computed once (``postlude tune prior``).
The loss is divided by all response tokens, not by the kept ones.

Paper: "PriFT" (arXiv:2606.09396). What differs here from the authors' code: the denominator is that of the whole
optimiser step (theirs averages the means of micro-batches), and ties. Their final readme counts the whole group of
words tied with the target (``le``, the default here: it does not depend on the order of words and keeps exactly the
targets with at most ``1 - tau`` of mass above them); their code counts the target alone (``strict``). The two differ
where logits are equal, as logits in bfloat16 often are; to compare with their code, form the reference's logits in
bfloat16 as well.

A target at the border ``u = tau`` is kept, within 1e-6 of it: there rounding would decide.

A token that the reference gives no chance is never learned: new formats, added tokens, the end of sequence of a base
model. ``TokenWeighting(always_keep_ids=..., floor=...)`` protects them.

Needs a reference: one forward pass of it over the data, or one per step.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from torch import Tensor

from postlude.errors import SettingsError, UnknownNameError
from postlude.registry import method
from postlude.tuning.weighting import RuleInputs, TokenRule

__all__ = ["PriFTMass", "PriFTProb"]

_BORDER = 1e-6


@method(
    "tune", "prift-prob", family="token weights", paper="arXiv:2606.09396", needs=("reference",)
)
@dataclasses.dataclass(frozen=True)
class PriFTProb(TokenRule):
    """The target's probability under a frozen reference."""

    columns: ClassVar[tuple[str, ...]] = ("log_probability",)
    signal: ClassVar[str] = "reference"

    def weights(self, inputs: RuleInputs) -> Tensor:
        """``q(y)``."""
        return inputs.signal.log_probability.exp()


@method(
    "tune", "prift-mass", family="token weights", paper="arXiv:2606.09396", needs=("reference",)
)
@dataclasses.dataclass(frozen=True)
class PriFTMass(TokenRule):
    """Only targets that a frozen reference finds plausible: at most 1 - tau of its mass lies above them.

    Attributes:
        tau: the least mass at or below the target, from 0 (keep all) to 1 (keep the top word alone).
        tie: ``le`` counts all words tied with the target, ``strict`` the target alone.
    """

    columns: ClassVar[tuple[str, ...]] = ("mass_above", "mass_tied")
    signal: ClassVar[str] = "reference"

    tau: float = 0.5
    tie: Literal["le", "strict"] = "le"

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise SettingsError(f"tau is {self.tau}; expected a probability mass from 0 to 1.")
        if self.tie not in ("le", "strict"):
            raise UnknownNameError("tie rule", self.tie, ("le", "strict"))

    @property
    def reads(self) -> tuple[str, ...]:
        """The mass of tied words only where they are counted out."""
        return self.columns if self.tie == "strict" else self.columns[:1]

    def weights(self, inputs: RuleInputs) -> Tensor:
        """``1[u >= tau]``."""
        mass = 1 - inputs.signal.column("mass_above")
        if self.tie == "strict":
            mass = mass - inputs.signal.column("mass_tied")
        return (mass >= self.tau - _BORDER).to(mass.dtype)
