"""``W = Q + A B``: a low-bit weight beside a low-rank branch, and how to fit the two together.

Torch layout: ``W [out_features, in_features]``, ``A`` (up) ``[out_features, rank]``, ``B`` (down)
``[rank, in_features]``; a layer computes ``y = Q x + A (B x)``. One problem, three choices::

    minimise   tr( E M E^T ),     E = W - Q - deq(A) deq(B),     Q on its grid

* the metric ``M``: the identity (error of the weight), a diagonal ``E[x_i^2]``, or the full second moment
  ``E[x x^T]`` (error of the output);
* the branch: 16 bits, or integers in groups along each factor's contraction axis (``A`` along the rank, ``B`` along
  the inputs);
* the fit: :func:`one_shot` (LoRC arXiv:2303.08302, LQER arXiv:2402.02446, QERA arXiv:2410.06040),
  :func:`alternating` (SVDQuant, arXiv:2411.05007), both here, or gradient descent
  (:mod:`postlude.numerics.low_rank_descent`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.factorize import weighted_svd
from postlude.numerics.formats import Integer
from postlude.numerics.power_iteration import randomized_svd
from postlude.numerics.schemes import Encoded, Granularity, Scheme

__all__ = [
    "HALF",
    "BranchFormat",
    "Corrected",
    "Factors",
    "Round",
    "alternating",
    "best_factors",
    "one_shot",
    "squared_error",
    "store_around",
]

# Bits that mean "a floating-point number of 16 bits".
HALF = 16
# Directions that a randomised SVD carries along.
_OVERSAMPLE = 8

# Rounds a weight onto its grid.
Round = Callable[[Tensor], Encoded]


class Factors(NamedTuple):
    """``up [out_features, rank]`` and ``down [rank, in_features]``."""

    up: Tensor
    down: Tensor

    def product(self) -> Tensor:
        """``[out_features, in_features]``."""
        return self.up @ self.down


@dataclasses.dataclass(frozen=True)
class BranchFormat:
    """How the two factors of a branch are stored, and what they multiply.

    Attributes:
        weights: bits of both factors, 2 to 8, or 16 for float16.
        activations: bits of the inputs of both products, rounded at run time; 16 leaves them alone.
        group: entries that share a scale of 16 bits, along the contraction axis of each product.
    """

    weights: int = HALF
    activations: int = HALF
    group: int = 32

    def __post_init__(self) -> None:
        for part in ("weights", "activations"):
            bits = getattr(self, part)
            if bits != HALF and not 2 <= bits <= 8:
                raise SettingsError(
                    f"the {part} of a branch have 2 to 8 bits, or {HALF}; got {bits}"
                )
        if self.group < 1:
            raise SettingsError(f"a group of a branch has at least one entry; got {self.group}")

    @classmethod
    def parse(cls, text: str) -> BranchFormat:
        """``"w8a8"``, ``"w4a8g64"`` or ``"16"``; activations left out stay in floating point.

        Raises:
            SettingsError: anything else.
        """
        found = re.fullmatch(r"w?(\d+)(?:a(\d+))?(?:g(\d+))?", str(text).strip().lower(), re.ASCII)
        if found is None:
            raise SettingsError(
                f"branch {text!r} is not understood: expected the bits of factors and activations as in w8a8, "
                "w4a8 or w4a8g64 (groups of 64), or 16 for a branch in floating point"
            )
        weights, activations, group = found.groups()
        return cls(int(weights), int(activations or HALF), int(group or cls.group))

    def __str__(self) -> str:
        if self.weights == self.activations == HALF:
            return "16"
        group = "" if self.group == BranchFormat.group else f"g{self.group}"
        return f"w{self.weights}a{self.activations}{group}"

    @property
    def factor_scheme(self) -> Scheme | None:
        """Of both factors; None for 16 bits."""
        return self._scheme(self.weights)

    @property
    def input_scheme(self) -> Scheme | None:
        """Of the input of both products; None for 16 bits."""
        return self._scheme(self.activations)

    def _scheme(self, bits: int) -> Scheme | None:
        return None if bits == HALF else Scheme(Integer(bits), Granularity("group", self.group))

    @property
    def entry_bits(self) -> float:
        """Bits of one entry with its share of a scale, where whole groups fit."""
        return HALF if self.weights == HALF else self.weights + 16 / self.group

    def stored_bits(self, out_features: int, in_features: int, rank: int) -> int:
        """Bits on disk of both factors: codes padded to bytes by row, and every scale, ragged groups included."""
        scheme = self.factor_scheme
        if scheme is None:
            return HALF * rank * (out_features + in_features)
        return scheme.stored_bits(out_features, rank) + scheme.stored_bits(rank, in_features)

    def equal_rank(self, rank: int, like: BranchFormat, *, scales: bool = True) -> int:
        """The rank of this format in the bytes of ``rank`` in another: arithmetic that no shape enters.

        Rank 32 of 16 bits is 60, 78, 113 of 8, 6, 4 bits with a scale every 32, and 64, 85, 128 ``scales`` not
        counted. :meth:`rank_within` counts the ragged groups of a real shape too.
        """
        mine, other = (self.entry_bits, like.entry_bits) if scales else (self.weights, like.weights)
        return int(rank * other / mine)

    def rank_within(self, bits: int, out_features: int, in_features: int) -> int:
        """The largest rank whose :meth:`stored_bits` are at most ``bits``; never above the smaller side, may be 0."""
        most = min(out_features, in_features)
        rank = min(most, int(bits / self.entry_bits / (out_features + in_features)) + 1)
        while rank and self.stored_bits(out_features, in_features, rank) > bits:
            rank -= 1
        return rank

    def encode(self, factor: Tensor) -> Encoded | Tensor:
        """One factor as it is stored: codes and scales, or float16."""
        scheme = self.factor_scheme
        return factor.to(torch.float16) if scheme is None else scheme.encode(factor)

    def round_trip(self, factor: Tensor) -> Tensor:
        """What :meth:`encode` stands for, in the type of ``factor``."""
        scheme = self.factor_scheme
        if scheme is None:
            return factor.to(torch.float16).to(factor.dtype)
        return scheme.round_trip(factor)


@dataclasses.dataclass(frozen=True)
class Corrected:
    """A weight as it is stored.

    Attributes:
        main: codes of ``W - up down`` (of ``W`` itself where the branch was fitted to its error).
        up, down: the factors, encoded or in float16.
        steps: improvements tried by the fit.
    """

    main: Encoded
    up: Encoded | Tensor
    down: Encoded | Tensor
    steps: int = 0

    def branch(self) -> Tensor:
        """``up @ down`` of the stored factors, fp32."""
        return _decoded(self.up) @ _decoded(self.down)

    def decode(self) -> Tensor:
        """``[out_features, in_features]`` fp32: what the layer multiplies with."""
        return self.main.decode() + self.branch()


def _decoded(factor: Encoded | Tensor) -> Tensor:
    return factor.float() if isinstance(factor, Tensor) else factor.decode()


def squared_error(error: Tensor, metric: Tensor | None = None) -> Tensor:
    """``tr(E M E^T)``.

    Args:
        error: ``[out_features, in_features]``.
        metric: ``[in_features]`` (a diagonal), ``[in_features, in_features]``, or None for the identity.
    """
    if metric is None:
        return error.square().sum()
    metric = metric.to(error)
    if metric.ndim == 1:
        return (error.square() @ metric).sum()
    return (error @ metric * error).sum()


def best_factors(
    target: Tensor, rank: int, metric: Tensor | None = None, fast: bool = False
) -> Factors:
    """The best factors of ``target`` under the metric, each component's length split evenly between them.

    Args:
        target: ``[out_features, in_features]``.
        rank: of the branch.
        metric: see :func:`squared_error`.
        fast: see :func:`one_shot`.
    """
    if fast and metric is None and 2 * (rank + _OVERSAMPLE) < min(target.shape):
        generator = torch.Generator().manual_seed(0)
        u, s, vh = randomized_svd(target, rank, _OVERSAMPLE, iterations=2, generator=generator)
        up, down = u, s[:, None] * vh
    else:
        up, down = weighted_svd(target, rank, right=metric)
    a, b = up.norm(dim=0), down.norm(dim=1)
    tiny = torch.finfo(up.dtype).tiny
    ratio = (b.clamp_min(tiny) / a.clamp_min(tiny)).sqrt()
    ratio = torch.where((a > 0) & (b > 0), ratio, torch.ones_like(ratio))
    return Factors(up * ratio, down / ratio[:, None])


def one_shot(
    weight: Tensor,
    rank: int,
    branch: BranchFormat,
    round_main: Round,
    *,
    of: Literal["weight", "error"] = "weight",
    metric: Tensor | None = None,
    fast: bool = False,
) -> Corrected:
    """One SVD: of the weight, whose remainder is rounded, or of the error that rounding the weight leaves.

    Args:
        weight: ``[out_features, in_features]``.
        rank: of the branch.
        branch: its format.
        round_main: rounds what the main layer stores.
        of: ``"weight"`` or ``"error"``.
        metric: see :func:`squared_error`.
        fast: a randomised SVD where the rank is far below both sides and there is no metric; for comparing many.
    """
    if of == "weight":
        return store_around(weight, best_factors(weight, rank, metric, fast), branch, round_main)
    main = round_main(weight)
    factors = best_factors(weight.double() - main.decode().double(), rank, metric, fast)
    return Corrected(main, branch.encode(factors.up), branch.encode(factors.down))


def store_around(
    weight: Tensor, factors: Factors, branch: BranchFormat, round_main: Round
) -> Corrected:
    """Store the factors, then round what the stored ones leave of the weight."""
    up, down = branch.encode(factors.up), branch.encode(factors.down)
    rest = weight - (_decoded(up) @ _decoded(down)).to(weight.dtype)
    return Corrected(round_main(rest), up, down)


def alternating(
    weight: Tensor,
    rank: int,
    branch: BranchFormat,
    round_main: Round,
    *,
    metric: Tensor | None = None,
    iterations: int = 100,
    score: Callable[[Corrected], float] | None = None,
) -> Corrected:
    """``L_1 = SVD(W)``, ``q_t = Q(W - L_t)``, ``L_{t+1} = SVD(W - q_t)``: keep the best, stop when it gets worse.

    Args:
        weight: ``[out_features, in_features]``.
        rank, branch, round_main, metric: as for :func:`one_shot`.
        iterations: at most this many factorisations.
        score: what to keep the best of; :func:`squared_error` of the weight by default.
    """

    def weight_error(candidate: Corrected) -> float:
        return float(squared_error(weight - candidate.decode().to(weight.dtype), metric))

    measure = score or weight_error
    best = one_shot(weight, rank, branch, round_main, metric=metric)
    least, tried = measure(best), 1
    current = best
    while tried < iterations:
        target = weight.double() - current.main.decode().double()
        current = store_around(weight, best_factors(target, rank, metric), branch, round_main)
        tried += 1
        now = measure(current)
        if not now < least:
            break
        best, least = current, now
    return dataclasses.replace(best, steps=tried)
