"""The reconstruction loop: train what a rounded block is made of until the block gives what the exact one gave.

    minimise  mean over batches || f(variables; x) - y ||^2 + penalty

by Adam, one batch a step, the rate falling as a cosine to 0. What ``f`` is, the caller says: weights rounded straight
through (I&S-ViT, arXiv:2311.10126), or a choice between two neighbours for every entry (AdaRound, arXiv:2004.10568;
blocks at a time: BRECQ, arXiv:2102.05426). Every now and then the loss over all batches is measured as it will be once
everything is decided, and the variables of the least one are what remains: never worse on these batches than the start.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from postlude.errors import SettingsError

__all__ = ["Reconstruction", "mean_squared_error", "reconstruct"]

# How often the whole loss is looked at.
_LOOKS = 10

# What the block gives for the batch of that number.
Output = Callable[[int], Tensor]


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """What a reconstruction achieved.

    Attributes:
        before, after: mean squared error over all batches, as decided; ``after <= before``.
    """

    before: float
    after: float


@torch.no_grad()
def mean_squared_error(output: Output, targets: Sequence[Tensor]) -> float:
    """Over all entries of all batches."""
    total = sum(
        float((output(index) - target).double().square().sum())
        for index, target in enumerate(targets)
    )
    return total / max(1, sum(target.numel() for target in targets))


def reconstruct(
    variables: Sequence[Tensor],
    output: Output,
    targets: Sequence[Tensor],
    *,
    iterations: int,
    learning_rate: float,
    generator: torch.Generator,
    decided: Output | None = None,
    penalty: Callable[[float], Tensor] | None = None,
    scale: float = 1.0,
) -> Reconstruction:
    """Train variables in place.

    Args:
        variables: leaves that require gradients; at the end those of the least error that was seen.
        output: what the block gives for a batch, differentiable in the variables.
        targets: what it should give, by batch.
        iterations: steps.
        learning_rate: at the start.
        generator: draws the batch of every step; on the CPU.
        decided: what it gives once trained variables are stored, where that is not ``output``.
        penalty: of a step that is this share of all; added to ``scale`` times the mean squared error of a batch.
        scale: see above.

    Raises:
        SettingsError: steps or rate make no sense.
    """
    if iterations < 0 or not 0 < learning_rate < math.inf:
        raise SettingsError(
            f"a reconstruction takes 0 or more steps at a positive rate, got {iterations} at {learning_rate}"
        )
    judged = decided or output
    before = least = mean_squared_error(judged, targets)
    if not iterations or not variables:
        return Reconstruction(before, before)
    best = [variable.detach().clone() for variable in variables]
    optimizer = torch.optim.Adam(list(variables), lr=learning_rate)
    every = max(1, iterations // _LOOKS)
    for step in range(1, iterations + 1):
        share = (step - 1) / iterations
        optimizer.param_groups[0]["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * share))
        index = int(torch.randint(len(targets), (1,), generator=generator))
        with torch.enable_grad():
            loss = scale * (output(index) - targets[index]).square().mean()
            if penalty is not None:
                loss = loss + penalty(share)
        # Of these variables alone: what else the block holds is not to be given gradients.
        gradients = torch.autograd.grad(loss, list(variables), allow_unused=True)
        for variable, gradient in zip(variables, gradients, strict=True):
            variable.grad = gradient
        optimizer.step()
        if step % every and step != iterations:
            continue
        now = mean_squared_error(judged, targets)
        if now < least:
            least, best = now, [variable.detach().clone() for variable in variables]
    with torch.no_grad():
        for variable, kept in zip(variables, best, strict=True):
            variable.copy_(kept)
            variable.grad = None
    return Reconstruction(before, least)
