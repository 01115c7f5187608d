"""Rules held to the reference by a divergence over the whole vocabulary.

    asft     p(y) (-log p(y))  +  lambda KL(q || p)
    sft-kl        -log p(y)    +  lambda KL(q || p)

``q`` is the frozen reference: with adapters, the same model without them. The divergence is the forward one, summed
over every word, as in the authors' code (arXiv:2509.23753); both parts are divided by the response tokens. Another
estimate needs another lambda: a tool that samples ``KL(p || q)`` on the tokens of the data does not even estimate a
divergence, since those tokens are not drawn from ``p``.

``lambda`` is 0.05, as in the authors' readme; their script has 0.1.

Needs the reference itself, run on every micro-batch: no cache holds its distribution. Cost beside that run: its head,
and a few passes over each piece of logits.
"""

from __future__ import annotations

import dataclasses
import math

from postlude.errors import SettingsError
from postlude.registry import method
from postlude.tuning.likelihood_rules import DFT, SFT

__all__ = ["ASFT", "SFTKL"]


@method("tune", "asft", family="token weights", paper="arXiv:2509.23753", needs=("reference",))
@dataclasses.dataclass(frozen=True)
class ASFT(DFT):
    """DFT anchored to the reference by the divergence from it.

    Attributes:
        divergence: ``lambda``, the factor of ``KL(q || p)``.
    """

    divergence: float = 0.05

    def __post_init__(self) -> None:
        _check(self.divergence)


@method("tune", "sft-kl", family="token weights", paper="arXiv:2509.23753", needs=("reference",))
@dataclasses.dataclass(frozen=True)
class SFTKL(SFT):
    """Plain SFT anchored to the reference by the divergence from it.

    Attributes:
        divergence: ``lambda``, the factor of ``KL(q || p)``.
    """

    divergence: float = 0.05

    def __post_init__(self) -> None:
        _check(self.divergence)


def _check(divergence: float) -> None:
    if not 0 < divergence < math.inf:
        raise SettingsError(
            f"divergence is {divergence}; expected a positive factor. Without one, use dft or sft."
        )
