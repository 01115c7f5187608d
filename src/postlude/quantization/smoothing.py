"""Smoothing for layers with a low-rank branch: one factor an input channel, chosen by what the layers put out.

    d = max|x|^p / max|W|^q                     W <- W diag(d),  x <- x / d

Maxima are per input channel, of the calibration inputs and of all weights that read the site. Of the pairs ``(0, 0)``,
``(p, 0)``, ``(p, 1 - p)`` with ``p = 1/grid ... (grid - 1)/grid`` the one of least output error is taken, with rounded
inputs and a branch by one SVD in place (SVDQuant, arXiv:2411.05007). The error is measured on 512 random tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from postlude.numerics.low_rank import BranchFormat, Corrected, Round, one_shot
from postlude.numerics.moments import AbsMax, RowSample, SecondMoment
from postlude.numerics.schemes import Scheme

__all__ = ["Inputs", "output_error", "smoothing", "smoothing_candidates"]


class Inputs:
    """What one site's inputs are like: maxima, a sample of tokens, and the second moment where GPTQ wants it."""

    def __init__(self, width: int, moment: bool) -> None:
        self.maximum, self.sample = AbsMax(width), RowSample(width)
        self.moment = SecondMoment(width) if moment else None

    def update(self, x: Tensor) -> None:
        """Take in ``x [..., width]``."""
        for part in (self.maximum, self.sample, self.moment):
            if part is not None:
                part.update(x)

    def smoothed_moment(self, d: Tensor) -> Tensor | None:
        """``E[x x^T]`` of the inputs divided by ``d``; None where it was not gathered."""
        if self.moment is None:
            return None
        inverse = 1 / d.double()
        return self.moment.value() * inverse * inverse[:, None]


def smoothing_candidates(span_x: Tensor, span_w: Tensor, grid: int) -> Iterator[Tensor]:
    """Every ``d [in_features]``, fp64: ones first, then ``2 (grid - 1)`` more; one where either maximum is zero.

    Args:
        span_x, span_w: largest magnitude of each input channel, in the inputs and in the weights.
        grid: steps of the exponents between 0 and 1.
    """
    usable = (span_x > 0) & (span_w > 0)
    ones = torch.ones_like(span_x, dtype=torch.float64)
    x, w = (torch.where(usable, span.double(), ones) for span in (span_x, span_w))
    yield ones
    for step in range(1, grid):
        p = step / grid
        for q in (0.0, 1 - p):
            d = x**p / w**q
            yield d / d.log().mean().exp()


def _apply_branch(x: Tensor, fit: Corrected, format: BranchFormat) -> Tensor:
    """The branch's output for ``x [tokens, in_features]``."""
    for factor in (fit.down, fit.up):
        if format.input_scheme is not None:
            x = format.input_scheme.round_trip(x)
        values = factor if isinstance(factor, Tensor) else factor.decode()
        x = x @ values.to(x).T
    return x


def output_error(
    x: Tensor, weight: Tensor, d: Tensor, inputs: Scheme | None, format: BranchFormat
) -> Callable[[Corrected], float]:
    """How far a fit of ``weight diag(d)`` puts out something else than ``weight``, squared and summed.

    Args:
        x: ``[tokens, in_features]``, not smoothed.
        weight: ``[out_features, in_features]``, not smoothed.
        d: ``[in_features]``.
        inputs: how inputs of the main weight are rounded.
        format: of the branch.
    """
    wanted, smooth = x @ weight.float().T, x / d.to(x)
    read = smooth if inputs is None else inputs.round_trip(smooth)

    def measure(fit: Corrected) -> float:
        out = read @ fit.main.decode().T + _apply_branch(smooth, fit, format)
        return float((out - wanted).square().sum())

    return measure


def smoothing(
    seen: Inputs,
    stacks: Sequence[Tensor],
    ranks: Sequence[int],
    inputs: Scheme | None,
    format: BranchFormat,
    nearest: Round,
    grid: int,
) -> Tensor:
    """The best ``d [in_features]``, fp32, as a layer keeps it.

    Args:
        seen: the site's inputs.
        stacks: weights that read the site, ``[out_features, in_features]`` each.
        ranks: of their branches.
        inputs: how inputs of the main weights are rounded.
        format: of the branches.
        nearest: rounds the main weights.
        grid: see :func:`smoothing_candidates`.
    """
    x, span_x = seen.sample.rows().float(), seen.maximum.value()
    span_w = torch.stack([stack.abs().amax(0) for stack in stacks]).amax(0)
    best, least = torch.ones_like(span_x, dtype=torch.float64), math.inf
    for d in smoothing_candidates(span_x, span_w, grid):
        total = 0.0
        for stack, rank in zip(stacks, ranks, strict=True):
            fit = one_shot(stack * d.to(stack), rank, format, nearest, fast=True)
            total += output_error(x, stack, d, inputs, format)(fit)
        if total < least:
            best, least = d, total
    return best.float()
