"""``W = Q + A B``: a low-bit weight beside a low-rank branch, and how to fit the two together.

Torch layout: ``W [out_features, in_features]``, ``A`` (up) ``[out_features, rank]``, ``B`` (down)
``[rank, in_features]``; a layer computes ``y = Q x + A (B x)``. One problem, three choices::

    minimise   tr( E M E^T ),     E = W - Q - deq(A) deq(B),     Q on its grid

* the metric ``M``: the identity (error of the weight), a diagonal ``E[x_i^2]``, or the full second moment
  ``E[x x^T]`` (error of the output);
* the branch: 16 bits, or integers in groups along each factor's contraction axis (``A`` along the rank, ``B`` along
  the inputs);
* the fit: :func:`one_shot` (LoRC arXiv:2303.08302, LQER arXiv:2402.02446, QERA arXiv:2410.06040),
  :func:`alternating` (SVDQuant, arXiv:2411.05007), :func:`descend` (after LoRaQ, arXiv:2604.18117).

:func:`descend` holds the codes of ``Q`` fixed within a step and lets the scale follow the residual ``R = W - A B``::

    s = max|R_group| / qmax  (differentiable)      k = round(R / s)  (a constant)      L = || R - k s ||^2

which moves ``R`` towards its lattice points and lowers the maxima. Straight-through rounding with a constant scale
would give a gradient of exactly zero, since ``R - Q(R)`` then has the derivative ``1 - 1``.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.factorize import randomized_svd, weighted_svd
from postlude.numerics.formats import Integer
from postlude.numerics.schemes import Encoded, Granularity, Scheme

__all__ = [
    "HALF",
    "BranchFormat",
    "Corrected",
    "Factors",
    "Round",
    "alternating",
    "bottleneck_rotation",
    "descend",
    "hold_codes",
    "one_shot",
    "squared_error",
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
        if self.weights == HALF:
            return None
        return Scheme(Integer(self.weights), Granularity("group", self.group))

    @property
    def input_scheme(self) -> Scheme | None:
        """Of the input of both products; None for 16 bits."""
        if self.activations == HALF:
            return None
        return Scheme(Integer(self.activations), Granularity("group", self.group))

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


def _best_rank(
    target: Tensor, rank: int, metric: Tensor | None = None, fast: bool = False
) -> Factors:
    """The best factors of ``target`` under the metric, each component's length split evenly between them."""
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
        return _around(weight, _best_rank(weight, rank, metric, fast), branch, round_main)
    main = round_main(weight)
    factors = _best_rank(weight.double() - main.decode().double(), rank, metric, fast)
    return Corrected(main, branch.encode(factors.up), branch.encode(factors.down))


def _around(weight: Tensor, factors: Factors, branch: BranchFormat, round_main: Round) -> Corrected:
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
        current = _around(weight, _best_rank(target, rank, metric), branch, round_main)
        tried += 1
        now = measure(current)
        if not now < least:
            break
        best, least = current, now
    return dataclasses.replace(best, steps=tried)


class _HeldCodes(torch.autograd.Function):
    """``s k`` of :func:`hold_codes`, or with ``rest`` ``s (k - R / s)``, the bracket a constant.

    One pass of each kind instead of autograd's many.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scheme: Scheme, rest: bool) -> Tensor:
        grouped = scheme.granularity.split(x)
        low, low_at = grouped.min(-1)
        high, high_at = grouped.max(-1)
        with torch.enable_grad():
            low.requires_grad_()
            high.requires_grad_()
            scale, zero = scheme.parameters_of(low, high)
        zero = None if zero is None else zero.detach()
        wide = scale.detach().unsqueeze(-1)
        wide_zero = None if zero is None else zero.unsqueeze(-1)
        codes = scheme.format.encode(grouped, wide, wide_zero)
        unit = scheme.format.decode(codes, torch.ones_like(wide), wide_zero)
        if rest:
            unit -= grouped / wide
        ctx.scheme, ctx.parts = scheme, (low, high, scale, low_at, high_at, unit)
        ctx.groups = grouped.shape
        return scheme.granularity.join(unit * wide, x.shape)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = outputs
        scheme: Scheme = ctx.scheme
        low, high, scale, low_at, high_at, unit = ctx.parts
        # Zeros in the entries that only fill up a short last group.
        filled = gradient
        missing = -gradient.shape[-1] % (scheme.granularity.size or 1)
        if missing:
            filled = torch.nn.functional.pad(gradient, (0, missing))
        grouped = scheme.granularity.split(filled)
        with torch.enable_grad():
            ends = torch.autograd.grad(
                scale, (low, high), (grouped * unit).sum(-1), allow_unused=True
            )
        out = torch.zeros_like(grouped)
        for end, at in zip(ends, (low_at, high_at), strict=True):
            if end is not None:
                out.scatter_add_(-1, at.unsqueeze(-1), end.unsqueeze(-1))
        if missing:
            # The filling repeats the last entry, and may have been found as the extreme one.
            flat = out.flatten(-2)
            width = gradient.shape[-1]
            flat[..., width - 1] += flat[..., width:].sum(-1)
            return flat[..., :width], None, None
        return scheme.granularity.join(out, gradient.shape), None, None


def hold_codes(x: Tensor, scheme: Scheme) -> Tensor:
    """``Q(x)`` to differentiate through: codes and zero points are constants, scales follow the extremes of ``x``.

    Args:
        x: ``[..., width]``.
        scheme: the grid.
    """
    return _HeldCodes.apply(x, scheme, False)  # type: ignore[no-any-return]


def _straight_through(factor: Tensor, branch: BranchFormat) -> Tensor:
    """The stored factor; rounding counts as the identity, and the scale follows the extremes."""
    scheme = branch.factor_scheme
    if scheme is None:
        return factor + (branch.round_trip(factor.detach()) - factor.detach())
    error: Tensor = _HeldCodes.apply(factor, scheme, True)
    return factor + error


def descend(
    weight: Tensor,
    rank: int,
    branch: BranchFormat,
    scheme: Scheme,
    *,
    round_main: Round | None = None,
    metric: Tensor | None = None,
    iterations: int = 300,
    learning_rate: float = 0.03,
    rotate: bool = False,
    start: Factors | None = None,
) -> Corrected:
    """Both factors by gradient descent on the error of the deployed weight.

    Adam on the whole matrix in fp32, its rate falling as a cosine; the iterate of least true error is kept, so the
    result is never worse than the SVD it starts from.

    Args:
        weight: ``[out_features, in_features]``.
        rank: of the branch.
        branch: its format; factors are rounded straight through.
        scheme: grid of the main weight.
        round_main: rounds the final remainder (GPTQ, say); to nearest by default.
        metric: see :func:`squared_error`.
        iterations: steps.
        learning_rate: as a share of the root mean square of a factor's entries.
        rotate: start in the bottleneck basis of :func:`bottleneck_rotation`.
        start: factors to start from; the SVD of the weight by default. That of the rounding error stays in the basin
            of the first rounding and ends worse.
    """
    target = weight.detach().float()
    first = _best_rank(target, rank, metric) if start is None else start
    first = Factors(first.up.float(), first.down.float())
    if rotate:
        turn = bottleneck_rotation(first, branch).to(target)
        first = Factors(first.up @ turn, turn.T @ first.down)
    metric = None if metric is None else metric.to(target)
    whole = float(squared_error(target, metric)) or 1.0
    factors = Factors(*(part.clone().requires_grad_() for part in first))
    rates = [learning_rate * float(part.square().mean().sqrt()) or learning_rate for part in first]
    optimizer = torch.optim.Adam(
        [{"params": [part], "lr": rate} for part, rate in zip(factors, rates, strict=True)],
        betas=(0.9, 0.99),
    )
    least, best = math.inf, first
    for step in range(iterations + 1):
        rest = target - Factors(*(_straight_through(part, branch) for part in factors)).product()
        loss = squared_error(rest - hold_codes(rest, scheme), metric) / whole
        now = float(loss.detach())
        if now < least:
            least, best = now, Factors(*(part.detach().clone() for part in factors))
        if step == iterations or not math.isfinite(now):
            break
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / iterations))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = _around(target, best, branch, round_main or scheme.encode)
    return dataclasses.replace(found, steps=iterations)


def bottleneck_rotation(
    factors: Factors, branch: BranchFormat, *, steps: int = 150, learning_rate: float = 0.02
) -> Tensor:
    """An orthogonal ``R [rank, rank]``: ``(A R)(R^T B)`` is the same product and rounds with less error.

    ``R = (I - S)(I + S)^-1`` with ``S`` skew-symmetric (Cayley), from the identity, by Adam with straight-through
    rounding on ``|| A B - deq(A R) deq(R^T B) ||^2``; the best one seen, so never worse than none. Costs nothing at
    run time: it is folded into the factors.
    """
    up, down = factors.up.detach().float(), factors.down.detach().float()
    eye = torch.eye(up.shape[1], device=up.device)
    if branch.weights == HALF:
        return eye
    product = up @ down
    free = torch.zeros_like(eye, requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=learning_rate)
    least, best = math.inf, eye
    for step in range(steps + 1):
        skew = free - free.T
        turn = torch.linalg.solve(eye + skew, eye - skew)
        turned = Factors(up @ turn, turn.T @ down)
        stored = Factors(*(_straight_through(part, branch) for part in turned))
        loss = (product - stored.product()).square().sum()
        now = float(loss.detach())
        if now < least:
            least, best = now, turn.detach().clone()
        if step == steps or not math.isfinite(now):
            break
        optimizer.zero_grad()
        (loss / product.square().sum().clamp_min(1e-30)).backward()
        optimizer.step()
    return best
