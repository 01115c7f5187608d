"""Grids of activations with fixed parameters, for vision transformers: uniform ones, and others for attention and
GELU.

A :class:`Scheme <postlude.numerics.schemes.Scheme>` takes its scale from the tensor at hand. Here parameters are
learned once from calibration data and stay, which is how accelerators of vision models run; and what a softmax or a
GELU gives has most of its values near 0 and the few that matter far away, which logarithmic grids suit.

    uniform     s (clip(round(x/s + z), 0, 2^b - 1) - z)     z need not be whole: it is added before rounding
    log-sqrt2   c = round(-2 log2(x/s)),  s 2^-ceil(c/2) (sqrt 2 if c odd)          RepQ-ViT, arXiv:2212.08254
    adalog      c = round(-log2(x/s) 37/q),  s 2^-floor(cq/37) T[cq mod 37]           AdaLog, arXiv:2407.12951
    shift-log   uniform in log2(x + eta), then a whole power of two, minus eta       I&S-ViT, arXiv:2311.10126
    tangent     uniform in tan(theta x/s) / tan(theta)                              DopQ-ViT, arXiv:2408.03291
    two-sided   steps of s below 0 and of 2^m s above, half of the codes each       MPTQ-ViT, arXiv:2401.14895

Codes of the logarithmic grids beyond the last one stand for 0. ``T[j]`` is ``2^(-j/37)`` in whole multiples of ``1 /
(2^(b+1) - 2)``, so that a small table is all it takes; ``q = 37`` is base 2. The forward quantizer of I&S-ViT's code
has ``2^b + 1`` codes and its search ``2^b``; both have ``2^b`` here. The tangent and the two-sided
grid are our guesses at formulas that were not found.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.described import Described

__all__ = [
    "GELU_SHIFT",
    "STEPS",
    "ActivationGrid",
    "AdaLog",
    "GridParameters",
    "LogSqrt2",
    "Score",
    "ShiftLog",
    "Tangent",
    "TwoSided",
    "Uniform",
    "log_table",
    "percentile_range",
]

GELU_SHIFT = 0.1699712
"""Minus the least value of GELU: what makes all of its outputs positive."""

STEPS = 37
"""Parts of an octave that AdaLog's bases are counted in."""

GridParameters = dict[str, Tensor]
"""By the names in :attr:`ActivationGrid.names`."""

# How bad a rounded tensor is, the smaller the better.
Score = Callable[[Tensor], float]

_PERCENTILES = (0.999, 0.9999, 0.99999)
_SHIFTS = range(9)
_ETAS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclasses.dataclass(frozen=True)
class ActivationGrid(Described, noun="grid of activations"):
    """What codes of ``bits`` bits stand for.

    Parameters are tensors that broadcast against what is rounded, by the names in ``names``.
    """

    names: ClassVar[tuple[str, ...]]

    bits: int = 4

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SettingsError(f"a grid of activations has 2 to 8 bits, got {self.bits}")

    @abstractmethod
    def round_trip(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """``x`` in codes and back, in the type of ``x``."""

    @abstractmethod
    def fit(self, x: Tensor, score: Score | None = None) -> GridParameters:
        """Parameters for values like ``x``, one set for all of it.

        Args:
            x: any shape.
            score: what is to be small; the mean squared error where there is none.
        """

    def _best(
        self, x: Tensor, candidates: list[GridParameters], score: Score | None
    ) -> GridParameters:
        """The first of the candidates with the least score."""
        judge = score or (lambda rounded: float((rounded - x).square().mean()))
        scores = [judge(self.round_trip(x, candidate)) for candidate in candidates]
        return candidates[scores.index(min(scores))]


def percentile_range(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point (not whole) for each column of ``[rows, columns]``, fp64 ``[columns]``.

    Of three pairs of percentiles, the one with the least squared error of that column.
    """
    ordered = rows.double().sort(0).values
    best = torch.full((rows.shape[1],), torch.inf, dtype=torch.float64, device=rows.device)
    scale, zero = torch.ones_like(best), torch.zeros_like(best)
    grid = Uniform(bits)
    for share in _PERCENTILES:
        low, high = _quantile(ordered, 1 - share), _quantile(ordered, share)
        step = (high - low) / (2**bits - 1)
        # A column of one value has no range; any step holds it.
        step = torch.where(step > 0, step, high.abs().clamp(min=1e-8) / 2**bits)
        parameters = {"scale": step, "zero_point": torch.round(-low / step)}
        error = (grid.round_trip(ordered, parameters) - ordered).square().mean(0)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, step, scale)
        zero = torch.where(better, parameters["zero_point"], zero)
    return scale, zero


def _quantile(ordered: Tensor, share: float) -> Tensor:
    """Of every column of sorted rows; torch.quantile refuses large tensors."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    found: Tensor = ordered[below] + (place - below) * (ordered[above] - ordered[below])
    return found


def _largest(x: Tensor) -> list[Tensor]:
    """What the largest values are taken to be, fp32 ``[1]`` each: at some percentiles, and the maximum."""
    ordered = x.reshape(-1, 1).double().sort(0).values
    return [_quantile(ordered, share).clamp(min=1e-8).float() for share in (*_PERCENTILES, 1.0)]


@dataclasses.dataclass(frozen=True)
class Uniform(ActivationGrid):
    """Equal steps; the zero point may be any number."""

    kind = "uniform"
    names = ("scale", "zero_point")

    def round_trip(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        scale, zero = (parameters[name].to(x.dtype) for name in self.names)
        codes = torch.round(x / scale + zero).clamp(0, 2**self.bits - 1)
        return (codes - zero) * scale

    def fit(self, x: Tensor, score: Score | None = None) -> GridParameters:
        scale, zero = percentile_range(x.reshape(-1, 1), self.bits)
        return {"scale": scale.float(), "zero_point": zero.float()}


@dataclasses.dataclass(frozen=True)
class LogSqrt2(ActivationGrid):
    """Powers of the square root of two, for values from 0."""

    kind = "log-sqrt2"
    names = ("scale",)

    def round_trip(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        scale = parameters["scale"].to(x.dtype)
        codes = torch.round(-2 * torch.log2((x / scale).clamp(min=1e-15)))
        kept = codes.clamp(0, 2**self.bits - 1)
        odd = torch.where(kept % 2 == 1, 2**0.5, 1.0).to(x.dtype)
        value = scale * torch.exp2(-torch.ceil(kept / 2)) * odd
        return torch.where(codes < 2**self.bits, value, torch.zeros_like(value))

    def fit(self, x: Tensor, score: Score | None = None) -> GridParameters:
        return self._best(x, [{"scale": top} for top in _largest(x)], score)


def log_table(bits: int) -> Tensor:
    """``T[j]``, ``2^(-j/37)`` rounded to multiples of ``1 / (2^(bits+1) - 2)``, fp64 ``[37]``."""
    unit = 2 ** (bits + 1) - 2
    powers = torch.exp2(-torch.arange(STEPS, dtype=torch.float64) / STEPS)
    table: Tensor = torch.round(powers * unit) / unit
    return table


@dataclasses.dataclass(frozen=True)
class AdaLog(ActivationGrid):
    """Powers of ``2^(q/37)`` for a whole ``q`` that is searched.

    Attributes:
        shift: added before and taken away after, for values from ``-shift``. An integer machine folds it: the shifted
            values are multiplied, and ``shift * W 1`` leaves the bias.
        search_scale: whether the scale is searched too; 1 where it is not, as for a softmax.
    """

    kind = "adalog"
    names = ("scale", "base")

    shift: float = 0.0
    search_scale: bool = False

    def round_trip(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        scale, base = parameters["scale"].to(x.dtype), parameters["base"].to(x.dtype)
        ratio = ((x + self.shift) / scale).clamp(1e-15, 1)
        codes = torch.round(-torch.log2(ratio) * STEPS / base)
        exponent = codes * base
        table = log_table(self.bits).to(x)
        value = scale * torch.exp2(-torch.floor(exponent / STEPS))
        value = value * table[(exponent % STEPS).long()]
        return torch.where(codes < 2**self.bits, value, torch.zeros_like(value)) - self.shift

    def fit(self, x: Tensor, score: Score | None = None) -> GridParameters:
        def candidate(scale: float, base: int) -> GridParameters:
            return {
                "scale": torch.tensor([scale], device=x.device),
                "base": torch.tensor([float(base)], device=x.device),
            }

        if not self.search_scale:
            # The paper starts at 10; with 8 bits there are codes enough for finer bases.
            return self._best(x, [candidate(1.0, q) for q in (STEPS, *range(1, 138))], score)
        positive = (x + self.shift)[x > 0]
        if not len(positive):
            return candidate(max(self.shift, 1e-8), STEPS)
        ordered = positive.reshape(-1, 1).double().sort(0).values
        low, high = (float(_quantile(ordered, share)) for share in (0.9, 1.0))
        scales = [low + (high - low) * i / 15 for i in range(16)]
        # Coarse first, then twice finer around the best; base 2 stays among them.
        bases = sorted({STEPS, 2, 5, *range(10, 74, 9)})
        best = self._best(x, [candidate(s, q) for q in bases for s in scales], score)
        step, width = (high - low) / 15, 4
        for _ in range(2):
            scale, base = float(best["scale"]), int(best["base"])
            near = [scale + step * (i - 2) / 4 for i in range(5)]
            around = range(max(1, base - width), min(137, base + width) + 1, max(1, width // 2))
            finer = [candidate(max(s, 1e-8), q) for q in around for s in near]
            best = self._best(x, [best, *finer], score)
            step, width = step / 4, max(1, width // 2)
        return best


@dataclasses.dataclass(frozen=True)
class ShiftLog(ActivationGrid):
    """Whole powers of two of ``x + eta`` (SULQ)."""

    kind = "shift-log"
    names = ("eta", "low", "high")

    def round_trip(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        eta, low, high = (parameters[name].to(x.dtype) for name in self.names)
        step = (high - low) / (2**self.bits - 1)
        codes = torch.round((torch.log2((x + eta).clamp(min=1e-15)) - low) / step)
        return torch.exp2(torch.round(codes.clamp(0, 2**self.bits - 1) * step + low)) - eta

    def fit(self, x: Tensor, score: Score | None = None) -> GridParameters:
        candidates = []
        for eta in _ETAS:
            logs = torch.log2((x + eta).clamp(min=1e-15))
            low, high = logs.min(), torch.maximum(logs.max(), logs.min() + 1e-6)
            shift = torch.tensor([eta], device=x.device)
            candidates.append({"eta": shift, "low": low.reshape(1), "high": high.reshape(1)})
        return self._best(x, candidates, score)


@dataclasses.dataclass(frozen=True)
class Tangent(ActivationGrid):
    """Steps that shrink towards the largest value; ``theta`` near 0 is the uniform grid."""

    kind = "tangent"
    names = ("scale", "theta")

    def round_trip(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        scale, theta = (parameters[name].to(x.dtype) for name in self.names)
        most = 2**self.bits - 1
        bent = torch.tan(theta * (x / scale).clamp(0, 1)) / torch.tan(theta)
        return torch.atan(torch.round(bent * most) / most * torch.tan(theta)) * scale / theta

    def fit(self, x: Tensor, score: Score | None = None) -> GridParameters:
        top = x.max().clamp(min=1e-8).reshape(1).float()
        thetas = (1e-3, *(0.1 * i for i in range(1, 15)))
        candidates = [{"scale": top, "theta": torch.tensor([t], device=x.device)} for t in thetas]
        return self._best(x, candidates, score)


@dataclasses.dataclass(frozen=True)
class TwoSided(ActivationGrid):
    """Equal steps on each side of 0, those above it ``2^m`` times as wide: a GELU is flat below and steep above."""

    kind = "two-sided"
    names = ("scale", "shift")

    def round_trip(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        scale, shift = (parameters[name].to(x.dtype) for name in self.names)
        step = torch.where(x < 0, scale, scale * torch.exp2(shift))
        most = 2 ** (self.bits - 1) - 1
        return torch.round(x / step).clamp(-most, most) * step

    def fit(self, x: Tensor, score: Score | None = None) -> GridParameters:
        most = 2 ** (self.bits - 1) - 1
        candidates = [
            {
                "scale": top / most / 2.0**m,
                "shift": torch.tensor([float(m)], device=x.device),
            }
            for top in _largest(x.abs())
            for m in _SHIFTS
        ]
        return self._best(x, candidates, score)
