"""Comparison: how checkpoints are related, and what was changed from the first to each of the others."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from postlude.inspection.report import Inspection
from postlude.inspection.signature import SignatureComparison
from postlude.inspection.update_report import UpdateReport

__all__ = ["Comparison"]


@dataclasses.dataclass(frozen=True)
class Comparison(Inspection):
    """How checkpoints are related: the angles between their signatures, and what was changed from the first.

    Attributes:
        signatures: see :class:`postlude.inspection.signature.SignatureComparison`.
        updates: from the first checkpoint to every other.
    """

    method: ClassVar[str] = "compare"
    signatures: SignatureComparison
    updates: tuple[UpdateReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """See :meth:`Inspection.to_dict`."""
        return {
            **self.signatures.to_dict(),
            "updates": [update.to_dict() for update in self.updates],
        }

    def summary(self) -> str:
        """See :meth:`Inspection.summary`."""
        return "\n\n".join(
            [self.signatures.summary(), *(update.summary() for update in self.updates)]
        )
