"""Statistics of activations that are gathered while batches stream by.

Every statistic has the same four verbs, so that a run can be split over batches, processes and restarts:

* ``update(x)`` takes a batch ``[..., width]`` (every leading axis counts as tokens);
* ``merge(other)`` adds what another one has seen, as if it had been fed here; returns ``self``;
* ``state()`` is a flat dictionary of tensors, ready for safetensors;
* ``from_state(state)`` restores it: continuing from it equals never having stopped.

Sums are kept in fp64. Buffers live on the device of the first batch; nothing here takes part in autograd.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from postlude.errors import DataError, SettingsError

__all__ = [
    "AbsMax",
    "MeanVariance",
    "Quantiles",
    "RowSample",
    "SecondMoment",
    "Statistic",
    "TopToken",
]

_BLOCK_ENTRIES = 2**22  # entries of a batch that are converted and worked on at a time


class Statistic(ABC):
    """The four verbs.

    Attributes:
        count: number of tokens seen (``Quantiles``: of values; ``TopToken``: of sequences).
    """

    count: int = 0

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Take in a batch."""

    @abstractmethod
    def merge(self, other: Self) -> Self:
        """Take in everything that ``other`` has seen; returns ``self``."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """All that was gathered, as copies."""

    @classmethod
    @abstractmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """The statistic that ``state`` was taken from."""

    def _require_data(self, *results: Tensor) -> None:
        if self.count == 0:
            raise DataError(
                f"{type(self).__name__} has seen no data; call update before reading it."
            )
        for result in results:
            if not bool(torch.isfinite(result).all()):
                raise DataError(
                    f"{type(self).__name__} holds NaN or infinity after {self.count} entries: "
                    "an activation overflowed. Run the model in float32 or bfloat16 and check its weights."
                )


class SecondMoment(Statistic):
    """The uncentred second moment ``E[x^T x]``, ``[width, width]``.

    Products of one block of tokens are formed in ``precision``, their sum is kept in fp64. The block is at most 4096
    tokens, so an fp32 product has a relative error near 1e-6; float64 input is always multiplied in float64.

    Args:
        width: size of the last axis.
        precision: float32 or float64.
    """

    def __init__(self, width: int, precision: torch.dtype = torch.float32) -> None:
        self.width = _positive(width, "width")
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
        rows = _rows(x, self.width)
        self._sum = _follow(self._sum, rows, self.count)
        precision = torch.promote_types(self.precision, _wide(rows))
        for block in _blocks(rows):
            block = block.to(precision)
            self._sum += block.T @ block
        self.count += len(rows)

    def merge(self, other: Self) -> Self:
        _same("width", self.width, other.width)
        self._sum = _meet(self._sum, other._sum, self.count)
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
        total, count, double = _fields(state, "sum", "count", "double")
        new = cls(total.shape[-1], torch.float64 if bool(double) else torch.float32)
        new._sum, new.count = total.to(torch.float64, copy=True), int(count)
        return new


class AbsMax(Statistic):
    """The largest absolute value of each channel, ``[width]``."""

    def __init__(self, width: int) -> None:
        self.width = _positive(width, "width")
        self.count = 0
        self._max = torch.zeros(width, dtype=torch.float32)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in ``x [..., width]``."""
        rows = _rows(x, self.width)
        self._max = _follow(self._max, rows, self.count)
        if len(rows):
            # Two reductions instead of abs(), which would copy the batch.
            low, high = rows.aminmax(dim=0)
            self._max = torch.maximum(self._max, torch.maximum(-low, high))
        self.count += len(rows)

    def merge(self, other: Self) -> Self:
        _same("width", self.width, other.width)
        self._max = _meet(self._max, other._max, self.count)
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
        largest, count = _fields(state, "max", "count")
        new = cls(largest.shape[-1])
        new._max, new.count = largest.clone(), int(count)
        return new


class MeanVariance(Statistic):
    """Mean and variance of each channel, ``[width]`` each.

    Centred sums of squares are combined pairwise (Chan, Golub, LeVeque 1983): no cancellation when the mean is large.
    """

    def __init__(self, width: int) -> None:
        self.width = _positive(width, "width")
        self.count = 0
        self._mean = torch.zeros(width, dtype=torch.float64)
        self._squares = torch.zeros(width, dtype=torch.float64)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in ``x [..., width]``."""
        rows = _rows(x, self.width)
        self._mean = _follow(self._mean, rows, self.count)
        self._squares = _follow(self._squares, rows, self.count)
        for block in _blocks(rows):
            block = block.to(torch.float64)
            mean = block.mean(0)
            self._combine(len(block), mean, (block - mean).square_().sum(0))

    def merge(self, other: Self) -> Self:
        _same("width", self.width, other.width)
        self._mean = _meet(self._mean, other._mean, self.count)
        self._squares = _meet(self._squares, other._squares, self.count)
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
        mean, squares, count = _fields(state, "mean", "squares", "count")
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
        self.width = _positive(width, "width")
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
        _same("width", self.width, other.width)
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
        (rows,) = _fields(state, "rows")
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
            _positive(width, "width"),
            _positive(limit, "limit"),
            seed,
        )
        self.count = 0
        self._kept = torch.zeros(0, width, dtype=torch.float32)
        self._keys = torch.zeros(0, dtype=torch.float64)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in ``x [..., width]``."""
        rows = _rows(x, self.width)
        self._kept = _follow(self._kept, rows, self.count)
        # Drawn anew for every batch from where it starts, so that nothing but the count has to be kept.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.count) % 2**32)
        keys = torch.rand(len(rows), dtype=torch.float64, generator=generator)
        self._take(rows.to(_wide(rows)), keys)
        self.count += len(rows)

    def _take(self, rows: Tensor, keys: Tensor) -> None:
        keys = torch.cat([self._keys, keys])
        order = torch.argsort(keys, stable=True)[: self.limit]
        rows = torch.cat([self._kept, rows.to(self._kept.device)])
        self._kept, self._keys = rows[order.to(rows.device)], keys[order]

    def merge(self, other: Self) -> Self:
        _same("width", self.width, other.width)
        _same("limit", self.limit, other.limit)
        self._kept = _meet(self._kept, other._kept, self.count)
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
        rows, keys, count, limit, seed = _fields(state, "rows", "keys", "count", "limit", "seed")
        new = cls(rows.shape[-1], int(limit), int(seed))
        new._kept, new._keys, new.count = rows.clone(), keys.clone(), int(count)
        return new


class Quantiles(Statistic):
    """Quantiles of all values (not per channel): exact for few values, a merging t-digest for many.

    Up to ``exact`` values are kept as they are. Beyond, sorted values are averaged in bins that narrow towards both
    ends (t-digest, arXiv:1902.04023, scale function k1): the error of a quantile ``q``, measured as the share of
    values between the estimate and the truth, is of the order of ``sqrt(q (1 - q)) / resolution``. Minimum and
    maximum are always exact.

    Args:
        resolution: number of bins is at most this.
        exact: number of values kept before averaging starts.
    """

    def __init__(self, resolution: int = 2000, exact: int = 65536) -> None:
        self.resolution = _positive(resolution, "resolution")
        self.exact = _positive(exact, "exact")
        self.count = 0
        self._values = torch.zeros(0, dtype=torch.float64)
        self._weights = torch.zeros(0, dtype=torch.float64)
        self._ends = torch.tensor([math.inf, -math.inf], dtype=torch.float64)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in all entries of ``x``, of any shape.

        Raises:
            DataError: an entry is not finite; it would have no place in an order.
        """
        if not x.is_floating_point():
            raise DataError(f"Quantiles needs a floating-point tensor; got {x.dtype}.")
        flat = x.detach().reshape(-1)
        for start in range(0, flat.numel(), _BLOCK_ENTRIES):
            block = flat[start : start + _BLOCK_ENTRIES]
            block = block.to(_wide(block))
            if not bool(torch.isfinite(block).all()):
                raise DataError("Quantiles got NaN or infinity. Check the weights of the model.")
            self._add(
                block, torch.ones((), dtype=torch.float64, device=block.device).expand(block.shape)
            )

    def merge(self, other: Self) -> Self:
        if other.count:
            self._add(other._values, other._weights)
            self._ends[0] = torch.minimum(self._ends[0], other._ends[0].to(self._ends.device))
            self._ends[1] = torch.maximum(self._ends[1], other._ends[1].to(self._ends.device))
        return self

    def _add(self, values: Tensor, weights: Tensor) -> None:
        device = self._values.device if self.count else values.device
        values, weights = values.to(device), weights.to(device)
        low, high = values.aminmax()
        ends = self._ends.to(device)
        self._ends = torch.stack([torch.minimum(ends[0], low), torch.maximum(ends[1], high)])
        self.count += round(float(weights.sum()))
        if len(values) > self.exact:
            values, weights = self._binned(values, weights)
        values = torch.cat([self._values.to(device), values.to(torch.float64)])
        weights = torch.cat([self._weights.to(device), weights])
        if len(values) > self.exact:
            values, weights = self._binned(values, weights)
        self._values, self._weights = values, weights

    def _binned(self, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        values, order = values.sort()
        weights = weights[order]
        share = (weights.cumsum(0) - weights / 2) / weights.sum()
        scale = torch.asin((2 * share - 1).clamp(-1, 1)) / math.pi + 0.5
        bins = (scale * self.resolution).long().clamp(0, self.resolution - 1)
        total = torch.zeros(self.resolution, dtype=torch.float64, device=values.device)
        mean = torch.zeros_like(total).index_add_(0, bins, values.to(torch.float64) * weights)
        total.index_add_(0, bins, weights)
        used = total > 0
        return mean[used] / total[used], total[used]

    def value(self, q: float | Sequence[float]) -> Tensor:
        """Quantiles at the shares ``q`` in [0, 1]: fp64, ``[len(q)]``, or ``[]`` for one number.

        Linear interpolation between values, as ``torch.quantile`` does, while all values are kept.
        """
        self._require_data(self._values)
        shares = torch.as_tensor(q, dtype=torch.float64, device=self._values.device)
        if bool(((shares < 0) | (shares > 1)).any()):
            raise SettingsError(f"Quantiles are asked for at shares between 0 and 1; got {q}.")
        values, order = self._values.sort()
        if self.is_exact:
            knots = torch.arange(self.count, dtype=torch.float64, device=values.device) / max(
                self.count - 1, 1
            )
        else:
            weights = self._weights[order]
            inner = (weights.cumsum(0) - weights / 2) / self.count
            knots = torch.cat([inner.new_zeros(1), inner, inner.new_ones(1)])
            values = torch.cat([self._ends[:1], values, self._ends[1:]])
        right = torch.searchsorted(knots, shares.reshape(-1)).clamp(max=len(knots) - 1)
        left = (right - 1).clamp(min=0)
        gap = (knots[right] - knots[left]).clamp(min=torch.finfo(torch.float64).tiny)
        part = ((shares.reshape(-1) - knots[left]) / gap).clamp(0, 1)
        return torch.lerp(values[left], values[right], part).reshape(shares.shape)

    @property
    def is_exact(self) -> bool:
        """Whether every value seen is still kept."""
        return len(self._values) == self.count

    def state(self) -> dict[str, Tensor]:
        return {
            "values": self._values.clone(),
            "weights": self._weights.clone(),
            "ends": self._ends.clone(),
            "settings": torch.tensor([self.resolution, self.exact, self.count]),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        values, weights, ends, settings = _fields(state, "values", "weights", "ends", "settings")
        resolution, exact, count = (int(number) for number in settings)
        new = cls(resolution, exact)
        new._values, new._weights, new._ends = values.clone(), weights.clone(), ends.clone()
        new.count = count
        return new


def _positive(number: int, name: str) -> int:
    if number < 1:
        raise SettingsError(f"{name} must be at least 1; got {number}.")
    return number


def _same(name: str, ours: int, theirs: int) -> None:
    if ours != theirs:
        raise SettingsError(
            f"Cannot merge statistics of {name} {ours} and {theirs}; they must be equal."
        )


def _rows(x: Tensor, width: int) -> Tensor:
    """``x`` as ``[tokens, width]``."""
    if x.ndim < 1 or x.shape[-1] != width:
        raise DataError(
            f"A statistic of width {width} got a tensor of shape {tuple(x.shape)}; the last dimension must be {width}."
        )
    if not x.is_floating_point():
        raise DataError(f"A statistic needs a floating-point tensor; got {x.dtype}.")
    return x.detach().reshape(-1, width)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _blocks(rows: Tensor) -> Iterator[Tensor]:
    """Pieces of ``rows [tokens, width]``: large enough for a fast product, small enough to convert."""
    step = min(max(_BLOCK_ENTRIES // rows.shape[1], 256), 4096)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _follow(buffer: Tensor, rows: Tensor, count: int) -> Tensor:
    """An empty buffer moves to the device of the first batch; a used one asks for the same device."""
    if buffer.device == rows.device:
        return buffer
    if count == 0:
        return buffer.to(rows.device)
    raise DataError(
        f"A statistic gathered on {buffer.device} got a batch on {rows.device}; "
        "keep one statistic per device and merge them."
    )


def _meet(ours: Tensor, theirs: Tensor, count: int) -> Tensor:
    """Our buffer, on the device of theirs if it is still empty."""
    return ours.to(theirs.device) if count == 0 else ours


def _fields(state: Mapping[str, Tensor], *names: str) -> tuple[Tensor, ...]:
    if set(state) != set(names):
        raise DataError(
            f"The state of a statistic has the entries {sorted(state)}; expected {sorted(names)}. "
            "It was saved by another statistic or version."
        )
    return tuple(state[name] for name in names)
