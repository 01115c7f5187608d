"""Weights that are a function of the target's probability ``s`` under the signal.

    sft        1                                plain supervised fine-tuning
    dft        s                                gradient of 1 - p                        (arXiv:2508.05629)
    power      s^a                              gradient of (1 - p^a) / a                (arXiv:2510.00526)
    threshold  1[s >= c] or 1[s <= c], times 1 or s; divided by the kept tokens          (arXiv:2510.00526)
    profit     1[s > tau]; divided by all tokens                                         (arXiv:2601.09195)
    talr       max(s^(1/tau), w_min)            tau = mean token loss of the step before (arXiv:2509.20758)

With the signal ``online``, ``s`` is ``p_t(y_t)`` of the model in training, detached; with ``reference`` or ``cached``
it is ``q_t(y_t)`` of the frozen reference, which turns ``dft`` into ``prift-prob``. A loss of another form than a
weighted logarithm, such as ``1 - p``, is trained through the weight that has its gradient; the value reported is that
of the weighted logarithm.

Our choices, where the papers' text was not at hand: ProFit divides by all tokens and its ``tau`` is 0.1, an example
of its readme; the temperature of TALR. The paper's is a statistic of the batch (the median of mean token losses, by
one account of it); that of a step is not known before its last micro-batch has run, so TALR here reads the mean over
the step before, which does not depend on how a step is cut, and starts with a step of plain SFT.

Cost: nothing beside plain SFT.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from postlude.errors import SettingsError, UnknownNameError
from postlude.registry import method
from postlude.tuning.weighting import RuleInputs, TokenRule

__all__ = ["DFT", "SFT", "TALR", "Power", "ProFit", "Threshold"]

FAMILY = "token weights"


@method("tune", "sft", family=FAMILY)
@dataclasses.dataclass(frozen=True)
class SFT(TokenRule):
    """Every token alike: plain supervised fine-tuning."""

    def weights(self, inputs: RuleInputs) -> Tensor:
        """Ones."""
        return torch.ones_like(inputs.online)


@method("tune", "power", family=FAMILY, paper="arXiv:2510.00526")
@dataclasses.dataclass(frozen=True)
class Power(TokenRule):
    """The target's probability to a power: the gradient of (1 - p^a) / a.

    Attributes:
        exponent: ``a``; towards 0 it is SFT, 1 is DFT. The paper uses 1, 8 and 10.
    """

    columns: ClassVar[tuple[str, ...]] = ("log_probability",)

    exponent: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.exponent < math.inf:
            raise SettingsError(f"exponent is {self.exponent}; expected 0 (plain SFT) or more.")

    def weights(self, inputs: RuleInputs) -> Tensor:
        """``s^a``."""
        if self.exponent == 0:
            # 0 * -inf would be NaN.
            return torch.ones_like(inputs.online)
        return (self.exponent * inputs.signal.log_probability).exp()


@method("tune", "dft", family=FAMILY, paper="arXiv:2508.05629")
@dataclasses.dataclass(frozen=True)
class DFT(TokenRule):
    """The target's probability under the model itself: the gradient of 1 - p."""

    columns: ClassVar[tuple[str, ...]] = ("log_probability",)

    def weights(self, inputs: RuleInputs) -> Tensor:
        """``s``."""
        return inputs.signal.log_probability.exp()


@method("tune", "threshold", family=FAMILY, paper="arXiv:2510.00526")
@dataclasses.dataclass(frozen=True)
class Threshold(TokenRule):
    """Only targets whose probability is above (or below) a cut; the loss is divided by the kept tokens.

    Attributes:
        cut: ``c``, a probability that leaves something on the side to keep.
        keep: ``above`` keeps ``s >= c``, ``below`` keeps ``s <= c``.
        loss: what is trained on the kept: ``nll``, or ``probability`` for ``1 - p``.
    """

    columns: ClassVar[tuple[str, ...]] = ("log_probability",)
    denominator: ClassVar[Literal["tokens", "kept"]] = "kept"

    cut: float = 0.1
    keep: Literal["above", "below"] = "above"
    loss: Literal["nll", "probability"] = "nll"

    def __post_init__(self) -> None:
        if not 0 <= self.cut <= 1 or self.cut == (1 if self.keep == "above" else 0):
            raise SettingsError(
                f"cut is {self.cut}; expected a probability, below 1 to keep what is above it and above 0 to keep "
                "what is below."
            )
        if self.keep not in ("above", "below"):
            raise UnknownNameError("side of the cut", self.keep, ("above", "below"))
        if self.loss not in ("nll", "probability"):
            raise UnknownNameError("loss", self.loss, ("nll", "probability"))

    def weights(self, inputs: RuleInputs) -> Tensor:
        """``1[s >= c]`` or ``1[s <= c]``, times ``p`` for the loss ``1 - p``."""
        probability = inputs.signal.log_probability.exp()
        kept = probability >= self.cut if self.keep == "above" else probability <= self.cut
        one = inputs.online.exp() if self.loss == "probability" else torch.ones_like(inputs.online)
        return torch.where(kept, one, 0)


@method("tune", "profit", family=FAMILY, paper="arXiv:2601.09195")
@dataclasses.dataclass(frozen=True)
class ProFit(TokenRule):
    """Only targets whose probability exceeds a threshold; the loss is divided by all tokens.

    Attributes:
        tau: the threshold, from 0 to below 1.
    """

    columns: ClassVar[tuple[str, ...]] = ("log_probability",)

    tau: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.tau < 1:
            raise SettingsError(f"tau is {self.tau}; expected a probability from 0 to below 1.")

    def weights(self, inputs: RuleInputs) -> Tensor:
        """``1[s > tau]``."""
        return (inputs.signal.log_probability.exp() > self.tau).to(inputs.online.dtype)


@method("tune", "talr", family=FAMILY, paper="arXiv:2509.20758")
@dataclasses.dataclass(frozen=True)
class TALR(TokenRule):
    """Down-weight targets of low probability, more softly the higher the mean loss.

    Attributes:
        tau: temperature in nats; None is the mean token loss under the signal in the step before.
        minimum: ``w_min``, the least weight.
    """

    columns: ClassVar[tuple[str, ...]] = ("log_probability",)

    tau: float | None = None
    minimum: float = 0.01

    def __post_init__(self) -> None:
        if self.tau is not None and not 0 < self.tau < math.inf:
            raise SettingsError(f"tau is {self.tau}; expected a positive number of nats, or none.")
        if not 0 <= self.minimum <= 1:
            raise SettingsError(f"minimum is {self.minimum}; expected a weight from 0 to 1.")

    def weights(self, inputs: RuleInputs) -> Tensor:
        """``max(s^(1/tau), w_min)``; ones while there is no step before."""
        log_probability = inputs.signal.log_probability
        if self.tau is not None:
            weights = (log_probability / self.tau).exp()
        elif inputs.mean_loss is None:
            return torch.ones_like(inputs.online)
        else:
            # A step without loss leaves no token to tell apart.
            tau = inputs.mean_loss.to(log_probability).clamp(min=1e-8)
            weights = (log_probability / tau).exp()
        return weights.clamp(min=self.minimum)
