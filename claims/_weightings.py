"""Every registered rule that weights tokens, each with every signal it can read, and the same loop for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from postlude import registry
from postlude.numerics.weighted_likelihood import Head, TokenColumns
from postlude.tuning.weighting import StepStatistics, TargetTokens, TokenWeighting

__all__ = ["FAMILY", "PAIRS", "Batch", "fit", "variants"]

FAMILY = "token weights"

# Where a default would repeat another rule.
SETTINGS: Mapping[str, Mapping[str, Any]] = {"power": {"exponent": 0.5}}

# Rules that are one rule with the other signal; the tables call them by the name that the paper gives them.
PAIRS = {"dft": "prift-prob", "nucleus": "prift-mass"}


@dataclasses.dataclass(frozen=True)
class Batch:
    """One optimiser step's tokens, flat.

    Attributes:
        inputs: what the model is given.
        tokens: targets, which of them are learned, and their sequences.
        reference: the frozen model on the same tokens, its head or its stored columns; None if it is not needed.
    """

    inputs: Any
    tokens: TargetTokens
    reference: Head | TokenColumns | None


def variants(frozen: str = "reference") -> dict[str, TokenWeighting]:
    """Every rule with every signal: ``RULE`` where there is no choice, ``RULE, online`` and ``RULE, reference``.

    Args:
        frozen: whether what is read of the reference is computed on every batch (``reference``) or stored (``cached``).
            A rule with a divergence from the reference needs the former.
    """
    found: dict[str, TokenWeighting] = {}
    partners = {theirs: ours for ours, theirs in PAIRS.items()}
    for info in registry.available("tune"):
        if info.family != FAMILY:
            continue
        rule = info.settings(**SETTINGS.get(info.name, {}))
        signal = "reference" if rule.divergence else frozen
        if rule.compares:
            found[info.name] = TokenWeighting(rule, signal=signal)
        elif not rule.reads:
            found[info.name] = TokenWeighting(rule)
        elif info.name in partners:
            found[info.name] = TokenWeighting(rule, signal=signal)
            found.setdefault(partners[info.name], TokenWeighting(rule, signal="online"))
        elif info.name in PAIRS:
            found[info.name] = TokenWeighting(rule, signal="online")
        else:
            found[f"{info.name}, online"] = TokenWeighting(rule, signal="online")
            found[f"{info.name}, reference"] = TokenWeighting(rule, signal=signal)
    return dict(sorted(found.items(), key=lambda item: (item[0] != "sft", item[0])))


def fit(
    parameters: Iterator[nn.Parameter],
    head: Callable[[Any], Head],
    weighting: TokenWeighting,
    batches: Iterator[Batch],
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], float] = lambda step: 1.0,
    clip: float = 1.0,
) -> list[float]:
    """Train, one batch a step.

    Args:
        parameters: what is trained.
        head: the model: from inputs to the states its head reads, and its head.
        weighting: rule and signal.
        batches: as many as there are steps.
        optimizer: of the parameters.
        schedule: factor of the learning rate in each step.
        clip: largest norm of the gradient.

    Returns:
        Plain loss of each step.
    """
    trained = list(parameters)
    rates = [group["lr"] for group in optimizer.param_groups]
    previous: StepStatistics | None = None
    losses = []
    for step, batch in enumerate(batches):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step)
        states = head(batch.inputs)
        result = weighting(
            states.hidden,
            states.weight,
            batch.tokens,
            bias=states.bias,
            reference=batch.reference,
            previous=previous,
        )
        previous = result.statistics
        losses.append(float(previous.mean_loss))
        if previous.empty:
            continue
        optimizer.zero_grad()
        result.loss.backward()
        if weighting.rescales:
            _scale(trained, previous.gradient_scale)
        nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
    return losses


def _scale(parameters: list[nn.Parameter], factor: Tensor) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad *= factor
