"""Moments and extremes of activations, and samples of their tokens, gathered while batches stream by.

Each is a :class:`~postlude.numerics.streaming.Statistic`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from postlude.errors import DataError, SettingsError
from postlude.numerics.streaming import (
    Statistic,
    beside_batch,
    beside_other,
    blocks,
    fields_of,
    positive,
    require_same,
    token_rows,
)

__all__ = ["AbsMax", "MeanVariance", "RowSample", "SecondMoment", "TopToken"]


class SecondMoment(Statistic):
    """The uncentred second moment ``E[x^T x]``, ``[width, width]``.

    Products of one block of tokens are formed in ``precision``, their sum is kept in fp64. The block is at most 4096
    tokens, so an fp32 product has a relative error near 1e-6; float64 input is always multiplied in float64.

    Args:
        width: size of the last axis.
        precision: float32 or float64.
    """

    def __init__(self, width: int, precision: torch.dtype = torch.float32) -> None:
        self.width = positive(width, "width")
        if precision not in (torch.float32, torch.float64):
            raise SettingsError(
                f"precision must be torch.float32 or torch.float64; got {precision}."
            )
        self.precision = precision
        self.count = 0
        self._sum = torch.zeros(width, width, dtype=torch.float64)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in ``x [..., width]``."""
        rows = token_rows(x, self.width)
        self._sum = beside_batch(self._sum, rows, self.count)
        precision = torch.promote_types(self.precision, rows.dtype)
        for block in blocks(rows):
            block = block.to(precision)
            self._sum += block.T @ block
        self.count += len(rows)

    def merge(self, other: Self) -> Self:
        require_same("width", self.width, other.width)
        self._sum = beside_other(self._sum, other._sum, self.count)
        self._sum = self._sum + other._sum.to(self._sum.device)
        self.count += other.count
        return self

    def value(self) -> Tensor:
        """``[width, width]`` fp64, exactly symmetric.

        Raises:
            DataError: nothing was seen, or an entry is not finite.
        """
        self._require_data(self._sum)
        return (self._sum + self._sum.T) / (2 * self.count)

    def state(self) -> dict[str, Tensor]:
        double = torch.tensor(self.precision == torch.float64)
        return {"sum": self._sum.clone(), "count": torch.tensor(self.count), "double": double}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        total, count, double = fields_of(state, "sum", "count", "double")
        new = cls(total.shape[-1], torch.float64 if bool(double) else torch.float32)
        new._sum, new.count = total.to(torch.float64, copy=True), int(count)
        return new


class AbsMax(Statistic):
    """The largest absolute value of each channel, ``[width]``."""

    def __init__(self, width: int) -> None:
        self.width = positive(width, "width")
        self.count = 0
        self._max = torch.zeros(width, dtype=torch.float32)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in ``x [..., width]``."""
        rows = token_rows(x, self.width)
        self._max = beside_batch(self._max, rows, self.count)
        if len(rows):
            # Two reductions instead of abs(), which would copy the batch.
            low, high = rows.aminmax(dim=0)
            self._max = torch.maximum(self._max, torch.maximum(-low, high))
        self.count += len(rows)

    def merge(self, other: Self) -> Self:
        require_same("width", self.width, other.width)
        self._max = beside_other(self._max, other._max, self.count)
        self._max = torch.maximum(self._max, other._max.to(self._max.device))
        self.count += other.count
        return self

    def value(self) -> Tensor:
        """``[width]``, fp32, or fp64 once fp64 input was seen."""
        self._require_data(self._max)
        return self._max.clone()

    def state(self) -> dict[str, Tensor]:
        return {"max": self._max.clone(), "count": torch.tensor(self.count)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        largest, count = fields_of(state, "max", "count")
        new = cls(largest.shape[-1])
        new._max, new.count = largest.clone(), int(count)
        return new


class MeanVariance(Statistic):
    """Mean and variance of each channel, ``[width]`` each.

    Centred sums of squares are combined pairwise (Chan, Golub, LeVeque 1983): no cancellation when the mean is large.
    """

    def __init__(self, width: int) -> None:
        self.width = positive(width, "width")
        self.count = 0
        self._mean = torch.zeros(width, dtype=torch.float64)
        self._squares = torch.zeros(width, dtype=torch.float64)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in ``x [..., width]``."""
        rows = token_rows(x, self.width)
        self._mean = beside_batch(self._mean, rows, self.count)
        self._squares = beside_batch(self._squares, rows, self.count)
        for block in blocks(rows):
            block = block.to(torch.float64)
            mean = block.mean(0)
            self._combine(len(block), mean, (block - mean).square_().sum(0))

    def merge(self, other: Self) -> Self:
        require_same("width", self.width, other.width)
        self._mean = beside_other(self._mean, other._mean, self.count)
        self._squares = beside_other(self._squares, other._squares, self.count)
        device = self._mean.device
        self._combine(other.count, other._mean.to(device), other._squares.to(device))
        return self

    def _combine(self, count: int, mean: Tensor, squares: Tensor) -> None:
        total = self.count + count
        if total:
            difference = mean - self._mean
            self._mean = self._mean + difference * (count / total)
            self._squares = (
                self._squares + squares + difference.square() * (self.count * count / total)
            )
        self.count = total

    def mean(self) -> Tensor:
        """``[width]`` fp64."""
        self._require_data(self._mean)
        return self._mean.clone()

    def variance(self) -> Tensor:
        """``[width]`` fp64, the mean squared deviation (divided by the count, not the count less one)."""
        self._require_data(self._squares)
        return self._squares / self.count

    def mean_square(self) -> Tensor:
        """``[width]`` fp64, ``E[x^2]``: the diagonal of the second moment at a fraction of its cost."""
        return self.variance() + self._mean.square()

    def state(self) -> dict[str, Tensor]:
        count = torch.tensor(self.count)
        return {"mean": self._mean.clone(), "squares": self._squares.clone(), "count": count}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        mean, squares, count = fields_of(state, "mean", "squares", "count")
        new = cls(mean.shape[-1])
        new._mean, new._squares = mean.clone(), squares.clone()
        new.count = int(count)
        return new


class TopToken(Statistic):
    """In each sequence the one token of largest L-infinity norm (OffQ, arXiv:2606.07116).

    Normalised activations all have the same L2 norm; the L-infinity norm tells the spiky ones, the carriers of the
    outlier direction, apart. Of equal norms, one of the tokens is kept.
    """

    def __init__(self, width: int) -> None:
        self.width = positive(width, "width")
        self.count = 0
        self._rows: list[Tensor] = []

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in ``x [batch, length, width]``, whole sequences."""
        if x.ndim != 3 or x.shape[-1] != self.width or x.shape[1] == 0:
            raise DataError(
                f"TopToken of width {self.width} got a tensor of shape {tuple(x.shape)}; "
                "expected [batch, length, width] with at least one token."
            )
        low, high = x.detach().aminmax(dim=-1)
        top = torch.maximum(-low, high).argmax(dim=1)
        self._rows.append(x.detach()[torch.arange(len(x), device=x.device), top])
        self.count += len(x)

    def merge(self, other: Self) -> Self:
        require_same("width", self.width, other.width)
        self._rows = [*self._rows, *other._rows]
        self.count += other.count
        return self

    def rows(self) -> Tensor:
        """``[sequences, width]`` in the dtype of the input, in the order of arrival."""
        rows = self._stacked()
        self._require_data(rows)
        return rows

    def _stacked(self) -> Tensor:
        if not self._rows:
            return torch.zeros(0, self.width)
        return torch.cat([rows.to(self._rows[0].device) for rows in self._rows])

    def state(self) -> dict[str, Tensor]:
        return {"rows": self._stacked()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        (rows,) = fields_of(state, "rows")
        new = cls(rows.shape[-1])
        if len(rows):
            new._rows, new.count = [rows.clone()], len(rows)
        return new


class RowSample(Statistic):
    """A uniform sample of tokens, without replacement: for errors that no moment decides.

    Every token draws a number and those with the smallest stay, so every token seen so far is in the sample with the
    same probability, and the sample of two is a sample of their union.

    Args:
        width: size of the last axis.
        limit: tokens that are kept.
        seed: of the draws.
    """

    def __init__(self, width: int, limit: int = 512, seed: int = 0) -> None:
        self.width, self.limit, self.seed = (
            positive(width, "width"),
            positive(limit, "limit"),
            seed,
        )
        self.count = 0
        self._kept = torch.zeros(0, width, dtype=torch.float32)
        self._keys = torch.zeros(0, dtype=torch.float64)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in ``x [..., width]``."""
        rows = token_rows(x, self.width)
        self._kept = beside_batch(self._kept, rows, self.count)
        # Drawn anew for every batch from where it starts, so that nothing but the count has to be kept.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.count) % 2**32)
        keys = torch.rand(len(rows), dtype=torch.float64, generator=generator)
        self._take(rows.to(torch.promote_types(rows.dtype, torch.float32)), keys)
        self.count += len(rows)

    def _take(self, rows: Tensor, keys: Tensor) -> None:
        keys = torch.cat([self._keys, keys])
        order = torch.argsort(keys, stable=True)[: self.limit]
        rows = torch.cat([self._kept, rows.to(self._kept.device)])
        self._kept, self._keys = rows[order.to(rows.device)], keys[order]

    def merge(self, other: Self) -> Self:
        require_same("width", self.width, other.width)
        require_same("limit", self.limit, other.limit)
        self._kept = beside_other(self._kept, other._kept, self.count)
        self._take(other._kept, other._keys)
        self.count += other.count
        return self

    def rows(self) -> Tensor:
        """``[tokens, width]``, at most ``limit``, fp32, or fp64 once fp64 input was seen."""
        self._require_data(self._kept)
        return self._kept.clone()

    def state(self) -> dict[str, Tensor]:
        numbers = {"count": self.count, "limit": self.limit, "seed": self.seed}
        found = {name: torch.tensor(value) for name, value in numbers.items()}
        return {**found, "rows": self._kept.clone(), "keys": self._keys.clone()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        rows, keys, count, limit, seed = fields_of(state, "rows", "keys", "count", "limit", "seed")
        new = cls(rows.shape[-1], int(limit), int(seed))
        new._kept, new._keys, new.count = rows.clone(), keys.clone(), int(count)
        return new
