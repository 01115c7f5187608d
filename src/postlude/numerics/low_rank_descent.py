"""A low-bit weight and its low-rank branch fitted together by gradient descent (after LoRaQ, arXiv:2604.18117).

The problem, its layout and its other fits are in :mod:`postlude.numerics.low_rank`. :func:`descend` holds the codes of
``Q`` fixed within a step and lets the scale follow the residual ``R = W - A B``::

    s = max|R_group| / qmax  (differentiable)      k = round(R / s)  (a constant)      L = || R - k s ||^2

which moves ``R`` towards its lattice points and lowers the maxima. Straight-through rounding with a constant scale
would give a gradient of exactly zero, since ``R - Q(R)`` then has the derivative ``1 - 1``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from postlude.numerics.low_rank import (
    HALF,
    BranchFormat,
    Corrected,
    Factors,
    Round,
    best_factors,
    squared_error,
    store_around,
)
from postlude.numerics.schemes import Scheme

__all__ = ["bottleneck_rotation", "descend", "hold_codes"]


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
        metric: see :func:`~postlude.numerics.low_rank.squared_error`.
        iterations: steps.
        learning_rate: as a share of the root mean square of a factor's entries.
        rotate: start in the bottleneck basis of :func:`bottleneck_rotation`.
        start: factors to start from; the SVD of the weight by default. That of the rounding error stays in the basin
            of the first rounding and ends worse.
    """
    target = weight.detach().float()
    first = best_factors(target, rank, metric) if start is None else start
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
    found = store_around(target, best, branch, round_main or scheme.encode)
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
