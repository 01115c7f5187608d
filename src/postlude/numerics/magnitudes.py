"""Streaming quantiles of magnitudes, to one part in a thousand, whatever the scale.

The sign aside, the bits of a float32 are ordered as the numbers are. Their leading 18 (8 of the exponent, 10 of the
mantissa) name a bin, so a fixed histogram of 2^18 counts holds the whole distribution: no range to choose, no random
sampling, nothing to sort, and two histograms merge by adding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.streaming import Statistic, fields_of

__all__ = ["MagnitudeHistogram"]

_DROPPED = 13  # mantissa bits of a float32 beyond the tenth
_BINS = 1 << (31 - _DROPPED)
_CHUNK = 1 << 22  # entries turned into bin numbers at a time


class MagnitudeHistogram(Statistic):
    """Distribution of ``|x|`` over everything seen.

    Args:
        device: where the counts live.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.count = 0
        self._counts = torch.zeros(_BINS, dtype=torch.int64, device=device)

    def update(self, x: Tensor) -> None:
        """Take in ``x`` of any shape; larger formats are rounded to float32."""
        for part in x.detach().reshape(-1).split(_CHUNK):
            bins = part.float().abs().view(torch.int32) >> _DROPPED
            self._counts += torch.bincount(bins, minlength=_BINS)
        self.count += x.numel()

    def merge(self, other: Self) -> Self:
        """Take in everything ``other`` has seen; returns ``self``."""
        self._counts += other._counts.to(self._counts.device)
        self.count += other.count
        return self

    def quantile(self, q: float) -> float:
        """The magnitude below which a fraction ``q`` of the numbers lies, within 0.1 %.

        Raises:
            SettingsError: ``q`` is not between 0 and 1.
            DataError: nothing was seen.
        """
        if not 0 <= q <= 1:
            raise SettingsError(f"A quantile of {q} does not exist: give a fraction from 0 to 1.")
        self._require_data()
        below = self._counts.cpu().cumsum(0)
        rank = q * (self.count - 1)
        index = int(torch.searchsorted(below, torch.tensor(rank, dtype=torch.float64), right=True))
        edges = torch.tensor([index, index + 1], dtype=torch.int32) << _DROPPED
        low, high = edges.view(torch.float32).tolist()
        inside = int(self._counts[index])
        share = (rank - (int(below[index]) - inside) + 0.5) / inside
        return float(low + (high - low) * share) if index else 0.0

    def state(self) -> dict[str, Tensor]:
        """Everything needed to continue, as tensors."""
        return {"counts": self._counts.clone()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Continue from :meth:`state`."""
        (counts,) = fields_of(state, "counts")
        made = cls(counts.device)
        made._counts = counts.clone()
        made.count = int(made._counts.sum())
        return made
