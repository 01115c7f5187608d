"""EAFT: learn most where the model hesitates.

    w = (H_k(p) / ln k)^a,   H_k = entropy of the k most probable words, renormalised

Where the model is sure of itself, agreement teaches little and disagreement is a conflict with what it knows; both get
little weight. Paper: EAFT (arXiv:2601.02151), k = 20, a = 1.

What differs: the divisor is exactly ``ln k``, so that a uniform top ``k`` weighs 1. LLaMA-Factory divides by the
constant
3.0 (greatest weight 0.9986), Axolotl not at all (2.9957, three times the learning rate); ``divisor=3.0`` and
``divisor=1.0`` reproduce them.

Cost: one selection of the k largest logits per token. With a frozen reference, a column of its own in the cache.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from torch import Tensor

from postlude.errors import SettingsError
from postlude.registry import method
from postlude.tuning.weighting import RuleInputs, TokenRule

__all__ = ["EAFT"]


@method("tune", "eaft", family="token weights", paper="arXiv:2601.02151")
@dataclasses.dataclass(frozen=True)
class EAFT(TokenRule):
    """The entropy of the most probable words, as a share of the greatest possible.

    Attributes:
        top: ``k``, the words whose entropy is taken.
        exponent: ``a``.
        divisor: what the entropy is divided by, in nats; None is ``ln k``.
    """

    columns: ClassVar[tuple[str, ...]] = ("top_entropy",)

    top: int = 20
    exponent: float = 1.0
    divisor: float | None = None

    def __post_init__(self) -> None:
        if self.top < 2:
            raise SettingsError(f"top is {self.top}; expected 2 words or more to have an entropy.")
        if not 0 <= self.exponent < math.inf:
            raise SettingsError(f"exponent is {self.exponent}; expected 0 (plain SFT) or more.")
        if self.divisor is not None and not 0 < self.divisor < math.inf:
            raise SettingsError(
                f"divisor is {self.divisor}; expected a positive number of nats, or none for ln {self.top}."
            )

    def weights(self, inputs: RuleInputs) -> Tensor:
        """``(H_k / ln k)^a``."""
        divisor = math.log(self.top) if self.divisor is None else self.divisor
        return (inputs.signal.column("top_entropy") / divisor).pow(self.exponent)
