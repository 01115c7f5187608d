"""Kronecker factors of a model from its data: two passes, one for the bases and one for the eigenvalues in them.

Labels may be drawn by the model itself (the true Fisher matrix), one for each predicted position. What is drawn for an
example depends on the seed and its number alone, not on its batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from postlude.attribution.examples import Batch, Collection
from postlude.attribution.outputs import predictions
from postlude.numerics.kronecker import KroneckerBasis
from postlude.numerics.likelihood import token_log_probability
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.batches import device_of
from postlude.surgery.gradients import CollectedLayer, GradientCollector, Projection

__all__ = ["Loss", "Numbered", "drawn_losses", "eigenvalues", "moments", "sampled"]

# A batch of training examples, and the number of every row.
Numbered = tuple[Batch, list[int]]
Loss = Callable[[Batch, list[int]], Tensor]

_ROWS = 512  # positions whose distributions over the vocabulary exist at once


@torch.no_grad()
def sampled(hidden: Tensor, weight: Tensor, bias: Tensor | None, uniforms: Tensor) -> Tensor:
    """One token of every distribution, by the inverse of its cumulative sum.

    Args:
        hidden: ``[T, D]`` states that the head reads.
        weight, bias: ``[V, D]`` and ``[V]`` of the head.
        uniforms: ``[T]`` in [0, 1), what decides.

    Returns:
        int64 ``[T]``.
    """
    drawn = []
    for rows, given in zip(hidden.split(_ROWS), uniforms.split(_ROWS), strict=True):
        offset = None if bias is None else bias.float()
        logits = torch.nn.functional.linear(rows.float(), weight.float(), offset)
        reached = logits.softmax(-1).cumsum(-1)
        # Scaled by the last sum, which rounding leaves a little off one.
        goal = given.to(reached)[:, None] * reached[:, -1:]
        drawn.append(torch.searchsorted(reached, goal, right=True)[:, 0].clamp(max=len(weight) - 1))
    return torch.cat(drawn) if drawn else torch.zeros(0, dtype=torch.int64, device=hidden.device)


def drawn_losses(checkpoint: Checkpoint, collection: Collection) -> Loss:
    """The loss of labels that the model draws, one for each predicted position, summed over examples.

    What is drawn for an example depends on the seed and its number alone, not on its batch.
    """
    predict = predictions(checkpoint)

    def loss(batch: Batch, numbers: list[int]) -> Tensor:
        made = predict(batch)
        hidden, weight, bias = made.hidden, made.weight, made.bias
        counts = batch.predicts.sum(1)
        uniforms = torch.cat(
            [
                _uniforms(collection.seed, n, count)
                for n, count in zip(numbers, counts.tolist(), strict=True)
            ]
        ).to(hidden.device)
        labels = sampled(hidden.detach(), weight, bias, uniforms)
        losses = -token_log_probability(hidden, weight, labels, bias=bias)
        if collection.loss == "mean":
            losses = losses / counts.repeat_interleave(counts).to(losses)
        return losses.sum()

    return loss


def _uniforms(seed: int, number: int, count: int) -> Tensor:
    digest = hashlib.sha256(f"labels {seed} {number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4]))
    return torch.rand(count, generator=generator)


def moments(
    checkpoint: Checkpoint, paths: Sequence[str], batches: Iterable[Numbered], loss: Loss
) -> dict[str, tuple[Tensor, Tensor]]:
    """``sum x^T x`` and ``sum dy^T dy`` over all tokens, by layer, fp64 ``[I, I]`` and ``[O, O]``."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    # Only what passes is looked at; the products that a collector makes are kept to one number.
    collector = GradientCollector(checkpoint.model, paths, Projection(side=1))

    with collector:
        for batch, numbers in batches:

            def observe(
                layer: CollectedLayer, x: Tensor, dy: Tensor, real: Tensor = batch.mask
            ) -> None:
                mask = real.to(x.device)
                rows, gradients = x[mask].float(), dy[mask].float()
                sums = (
                    (rows.mT @ rows).double(),
                    (gradients.mT @ gradients).double(),
                )
                if layer.module in found:
                    for total, part in zip(found[layer.module], sums, strict=True):
                        total += part
                else:
                    found[layer.module] = sums

            collector.collect(
                lambda batch=batch, numbers=numbers: loss(batch, numbers),  # type: ignore[misc]
                len(batch),
                observer=observe,
            )
    return found


def eigenvalues(
    checkpoint: Checkpoint,
    bases: dict[str, KroneckerBasis],
    batches: Iterable[Numbered],
    loss: Loss,
) -> dict[str, Tensor]:
    """``Lambda [I, O]`` by layer: the mean over examples of squared gradients in the basis, fp64."""
    found: dict[str, Tensor] = {}
    examples = 0

    near = {path: basis.to(device_of(checkpoint.model)) for path, basis in bases.items()}

    def add(layer: CollectedLayer, gradients: Tensor) -> None:
        squares = near[layer.module].rotate(gradients.float()).square_().double().sum(0)
        found[layer.module] = found[layer.module] + squares if layer.module in found else squares

    with GradientCollector(checkpoint.model, list(bases)) as collector:
        for batch, numbers in batches:
            collector.collect(
                lambda batch=batch, numbers=numbers: loss(batch, numbers),  # type: ignore[misc]
                len(batch),
                add,
            )
            examples += len(batch)
    return {path: total / max(examples, 1) for path, total in found.items()}
