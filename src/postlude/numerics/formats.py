"""Number formats: which values a code can stand for.

A :class:`Format` says what one code means, given a scale. Which entries share a scale, and the range it comes from,
is said by a :class:`~postlude.numerics.schemes.Scheme`.

Integer grids (``b`` bits)::

    symmetric    s = max|x| / (2^(b-1) - 1)        x_hat = s * clamp(round(x / s))
    asymmetric   s = (max - min) / (2^b - 1)       z = round(-min / s)
                 q = clamp(round(x / s) + z, 0, 2^b - 1)         x_hat = s * (q - z)

With ``range="free"`` the minimum and maximum are taken as they are, and ``z`` may lie far outside the codes:
a constant added to a whole group then costs nothing. With ``range="zero"`` the range is widened to hold 0 and
``z`` is itself a code. Every other format is a sorted list of levels and rounds to the nearest one.

Codes are unsigned on the outside (``0 .. 2^bits - 1``), so that they pack.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.described import Described

__all__ = [
    "MAX_ZERO_POINT",
    "Codebook",
    "Format",
    "Integer",
    "Logarithmic",
    "Minifloat",
    "Power",
    "Ternary",
]

# A free zero point is stored in 16 bits; the scale is kept large enough for it to fit.
MAX_ZERO_POINT = 32000


@dataclasses.dataclass(frozen=True)
class Format(Described, noun="number format"):
    """What one code means. Stateless; scales come from outside."""

    @property
    @abstractmethod
    def code_bits(self) -> int:
        """Bits of one stored code."""

    @property
    def zero_point_bits(self) -> int:
        """Bits of one stored zero point; 0 where there is none."""
        return 0

    @abstractmethod
    def scale(self, low: Tensor, high: Tensor) -> Tensor:
        """Scale for values in ``[low, high]``; not yet rounded to its stored type."""

    def zero_point(self, low: Tensor, high: Tensor, scale: Tensor) -> Tensor | None:
        """Integer zero point for the rounded scale, as a float tensor; None where there is none."""
        return None

    @abstractmethod
    def encode(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """``uint8`` codes of the values nearest to ``x``; ``scale`` broadcasts against ``x``."""

    @abstractmethod
    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Values that the codes stand for, in the type of ``scale``."""


@dataclasses.dataclass(frozen=True)
class Integer(Format):
    """Uniform grid of ``bits`` bits.

    Attributes:
        bits: 1 to 8 (2 to 8 when symmetric).
        symmetric: no zero point.
        range: ``"free"`` or ``"zero"``, see the module; asymmetric only.
        narrow: symmetric only; leave out the lowest code, so that ``-x`` is always encodable.
    """

    kind = "integer"
    bits: int = 4
    symmetric: bool = True
    range: Literal["free", "zero"] = "zero"
    narrow: bool = False

    def __post_init__(self) -> None:
        if not (2 if self.symmetric else 1) <= self.bits <= 8:
            raise SettingsError(
                f"{'symmetric' if self.symmetric else 'asymmetric'} integers take "
                f"{2 if self.symmetric else 1} to 8 bits, got {self.bits}"
            )
        if self.range not in ("free", "zero"):
            raise SettingsError(f"range is 'free' or 'zero', got {self.range!r}")

    @property
    def code_bits(self) -> int:
        return self.bits

    @property
    def zero_point_bits(self) -> int:
        if self.symmetric:
            return 0
        return 16 if self.range == "free" else 8

    @property
    def highest(self) -> int:
        """Largest code of a symmetric grid (signed)."""
        return int(2 ** (self.bits - 1) - 1)

    def scale(self, low: Tensor, high: Tensor) -> Tensor:
        if self.symmetric:
            return torch.maximum(low.abs(), high.abs()) / self.highest
        if self.range == "zero":
            low, high = low.clamp(max=0), high.clamp(min=0)
        step: Tensor = (high - low) / (2**self.bits - 1)
        if self.range == "free":
            step = torch.maximum(step, torch.maximum(low.abs(), high.abs()) / MAX_ZERO_POINT)
        return step

    def zero_point(self, low: Tensor, high: Tensor, scale: Tensor) -> Tensor | None:
        if self.symmetric:
            return None
        if self.range == "zero":
            return torch.round(-low.clamp(max=0) / scale).clamp(0, 2**self.bits - 1)
        return torch.round(-low / scale).clamp(-(2**15), 2**15 - 1)

    def encode(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        codes = torch.round(x / scale)
        if zero_point is not None:
            return codes.add_(zero_point).clamp_(0, 2**self.bits - 1).to(torch.uint8)
        lowest = -self.highest if self.narrow else -self.highest - 1
        return codes.clamp_(lowest, self.highest).add_(self.highest + 1).to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        offset = self.highest + 1 if zero_point is None else zero_point
        return (codes.to(scale.dtype) - offset) * scale


@dataclasses.dataclass(frozen=True)
class _Grid(Format):
    """A sorted list of levels; the largest magnitude is mapped to the largest entry of a group."""

    @abstractmethod
    def levels(self) -> tuple[float, ...]:
        """Values of the codes 0, 1, ..., ascending."""

    def boundaries(self) -> tuple[float, ...]:
        """Where rounding changes from one level to the next: midway, unless a format says otherwise."""
        levels = self.levels()
        return tuple((a + b) / 2 for a, b in itertools.pairwise(levels))

    @property
    def code_bits(self) -> int:
        return max(1, (len(self.levels()) - 1).bit_length())

    def scale(self, low: Tensor, high: Tensor) -> Tensor:
        return torch.maximum(low.abs(), high.abs()) / max(map(abs, self.levels()))

    def encode(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        levels, boundaries = _tables(self, x.dtype, x.device)
        value = (x / scale).contiguous()
        index = torch.bucketize(value, boundaries)
        # Ties go to the even neighbour, counted from zero, as in IEEE rounding.
        tie = value == boundaries[index.clamp(max=len(boundaries) - 1)]
        odd = (index - int(torch.searchsorted(levels, 0.0))) % 2 == 1
        return (index + (tie & odd)).to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        levels, _ = _tables(self, scale.dtype, scale.device)
        return levels[codes.long()] * scale


@functools.lru_cache(maxsize=64)
def _tables(grid: _Grid, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    levels = torch.tensor(grid.levels(), dtype=dtype, device=device)
    return levels, torch.tensor(grid.boundaries(), dtype=dtype, device=device)


@dataclasses.dataclass(frozen=True)
class Minifloat(_Grid):
    """ExMy with subnormals, no infinity or NaN, saturating (arXiv:2311.12359).

    ``bias = 2^(x-1) - 1``. The all-ones exponent encodes normal numbers unless ``reserve_top`` keeps it free;
    E2M1 with the default has the levels 0, .5, 1, 1.5, 2, 3, 4, 6.
    """

    kind = "minifloat"
    exponent_bits: int = 2
    mantissa_bits: int = 1
    reserve_top: bool = False

    def __post_init__(self) -> None:
        if self.exponent_bits < 1 or self.mantissa_bits < 0 or self.code_bits > 8:
            raise SettingsError(
                f"a minifloat has at least 1 exponent bit and at most 8 bits with its sign, got "
                f"E{self.exponent_bits}M{self.mantissa_bits}"
            )

    @property
    def code_bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    def levels(self) -> tuple[float, ...]:
        bias = 2 ** (self.exponent_bits - 1) - 1
        steps = 2**self.mantissa_bits
        positive = [m / steps * 2.0 ** (1 - bias) for m in range(steps)]
        for exponent in range(1, 2**self.exponent_bits - int(self.reserve_top)):
            positive += [(1 + m / steps) * 2.0 ** (exponent - bias) for m in range(steps)]
        return tuple(sorted({-v for v in positive} | set(positive)))


@dataclasses.dataclass(frozen=True)
class Power(_Grid):
    """``round(qmax * sign(x) |x|^a / max|x|^a)``, inverted by ``|q / qmax|^(1/a)`` (arXiv:2308.05600).

    Rounds in the power domain, so the boundaries are not midway between levels; ``a = 1`` is the symmetric
    integer grid without its lowest code.
    """

    kind = "power"
    bits: int = 4
    exponent: float = 0.5

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or not 0 < self.exponent <= 1:
            raise SettingsError(
                f"power grids take 2 to 8 bits and an exponent in (0, 1], got {self.bits} and {self.exponent}"
            )

    def _value(self, code: float) -> float:
        top = 2 ** (self.bits - 1) - 1
        return float((abs(code) / top) ** (1 / self.exponent) * (1 if code >= 0 else -1))

    def levels(self) -> tuple[float, ...]:
        top = 2 ** (self.bits - 1) - 1
        return tuple(self._value(code) for code in range(-top, top + 1))

    def boundaries(self) -> tuple[float, ...]:
        top = 2 ** (self.bits - 1) - 1
        return tuple(self._value(code + 0.5) for code in range(-top, top))


@dataclasses.dataclass(frozen=True)
class Logarithmic(_Grid):
    """Zero and ``+- base^-k``: the levels of a logarithmic grid; ``signed=False`` for softmax outputs."""

    kind = "logarithmic"
    bits: int = 4
    base: float = 2.0
    signed: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or self.base <= 1:
            raise SettingsError(
                f"logarithmic grids take 2 to 8 bits and a base above 1, got {self.bits} and {self.base}"
            )

    def levels(self) -> tuple[float, ...]:
        count = 2 ** (self.bits - int(self.signed)) - 1
        positive = [self.base**-k for k in range(count)]
        return tuple(sorted([0.0, *positive, *([-v for v in positive] if self.signed else [])]))


@dataclasses.dataclass(frozen=True)
class Ternary(_Grid):
    """-1, 0, 1."""

    kind = "ternary"

    def levels(self) -> tuple[float, ...]:
        return (-1.0, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Codebook(_Grid):
    """Any ascending list of 2 to 256 levels."""

    kind = "codebook"
    values: tuple[float, ...] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(float(v) for v in self.values))
        if not 2 <= len(self.values) <= 256 or list(self.values) != sorted(set(self.values)):
            raise SettingsError("a codebook has 2 to 256 distinct ascending values")

    def levels(self) -> tuple[float, ...]:
        return self.values
