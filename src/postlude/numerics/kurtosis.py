"""Streaming kurtosis: how heavy the tails of a tensor's entries are.

Kurtosis is Pearson's ``E[(x - mean)^4] / E[(x - mean)^2]^2``: 3 for a Gaussian, 1.8 for a uniform, and up to the
number of entries when a single one carries everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from postlude.numerics.streaming import Statistic, fields_of, positive, require_same, token_rows

__all__ = ["ChannelKurtosis", "row_kurtosis"]


def row_kurtosis(x: Tensor) -> Tensor:
    """Kurtosis along the last axis of ``x`` ``[..., width]``, float64 ``[...]``; NaN where a row is constant."""
    x = x.double()
    # Scaling leaves the kurtosis as it is and keeps fourth powers in range.
    centred = x - x.mean(-1, keepdim=True)
    centred = centred / centred.abs().amax(-1, keepdim=True)
    square = centred.square()
    return square.square().mean(-1) / square.mean(-1).square()


class ChannelKurtosis(Statistic):
    """Kurtosis of every channel over all rows seen, from central moments merged by Pebay's formulas.

    Args:
        width: number of channels.
        device: where the sums live.
    """

    def __init__(self, width: int, device: torch.device | str | None = None) -> None:
        self.count = 0
        self._moments = torch.zeros(
            4, positive(width, "width"), dtype=torch.float64, device=device
        )  # mean, M2, M3, M4

    @property
    def width(self) -> int:
        """Number of channels."""
        return self._moments.shape[1]

    def update(self, x: Tensor) -> None:
        """Take in ``x`` ``[..., width]``."""
        rows = token_rows(x, self.width).double()
        if not len(rows):
            return
        mean = rows.mean(0)
        centred = rows - mean
        square = centred.square()
        moments = torch.stack(
            [mean, square.sum(0), (square * centred).sum(0), square.square().sum(0)]
        )
        self._merge(len(rows), moments)

    def merge(self, other: Self) -> Self:
        """Take in everything ``other`` has seen; returns ``self``."""
        require_same("width", self.width, other.width)
        self._merge(other.count, other._moments.to(self._moments.device))
        return self

    def _merge(self, count: int, moments: Tensor) -> None:
        if not count:
            return
        a, b, n = self.count, count, self.count + count
        mean_a, m2_a, m3_a, m4_a = self._moments
        mean_b, m2_b, m3_b, m4_b = moments
        d = mean_b - mean_a
        m4 = (
            m4_a
            + m4_b
            + d**4 * (a * b * (a * a - a * b + b * b) / n**3)
            + 6 * d**2 * (a * a * m2_b + b * b * m2_a) / n**2
            + 4 * d * (a * m3_b - b * m3_a) / n
        )
        m3 = m3_a + m3_b + d**3 * (a * b * (a - b) / n**2) + 3 * d * (a * m2_b - b * m2_a) / n
        m2 = m2_a + m2_b + d**2 * (a * b / n)
        self._moments = torch.stack([mean_a + d * (b / n), m2, m3, m4])
        self.count = n

    def value(self) -> Tensor:
        """Kurtosis ``[width]``, float64; NaN for channels that are constant."""
        self._require_data()
        fourth, second = self._moments[3], self._moments[1]
        return fourth.mul(self.count).div(second.square())

    def state(self) -> dict[str, Tensor]:
        """Everything needed to continue, as tensors."""
        return {"count": torch.tensor(self.count), "moments": self._moments.clone()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Continue from :meth:`state`."""
        count, moments = fields_of(state, "count", "moments")
        made = cls(moments.shape[1], moments.device)
        made._moments, made.count = moments.clone(), int(count)
        return made
