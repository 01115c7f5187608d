"""Linear datamodeling score: does a sum of influence scores tell what a model trained on a subset will lose?

    draw subsets S_1 .. S_M of the training set, each a random half
    losses[m, q]      = loss on query q of the model trained on S_m, mean over seeds
    predictions[m, q] = sum over i in S_m of scores[q, i]
    LDS               = mean over q of Spearman_m(predictions[:, q], -losses[:, q])

The score is due to arXiv:2303.14186, its interval by a bootstrap over queries (5000 resamples, 95 %) to
arXiv:2601.21929.

Every model of the bank starts from the same checkpoint and is trained by the same plain loop: AdamW, rate falling
linearly to 0, a number of epochs, the mean loss over the tokens of a batch, dropout off. A seed decides the order
of the examples and nothing else. The model whose predictions are explained is trained alike, on everything; scores
must come from that one.

LDS depends strongly on the training recipe: compare methods on the same bank only. It cannot reach 1 where a second
seed of the same subset already gives other losses; :func:`reliability` measures that.

Attribution is another noun, and nouns do not import each other: scores come in as a tensor. The combination of
both, ``postlude evaluate lds``, is made in the front door.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from postlude.errors import DataError, NonFiniteError, SettingsError
from postlude.evaluation.perplexity import Sequences, sequence_losses
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.progress import Progress

__all__ = [
    "LDS",
    "Retraining",
    "above",
    "bootstrap_mean",
    "draw_subsets",
    "lds",
    "note_on_halves",
    "reliability",
    "retrain",
    "retraining_bank",
    "spearman",
]

_RESAMPLES = 5000
_FEW_HALVES = 30

Unit = Callable[[str, Callable[[], Mapping[str, Tensor]]], dict[str, Tensor]]


class LDS(NamedTuple):
    """A mean rank correlation over queries.

    Attributes:
        value: the mean.
        low, high: its 95 % interval, by a bootstrap over queries.
        per_query: ``float64 [Q]``.
    """

    value: float
    low: float
    high: float
    per_query: Tensor


@dataclasses.dataclass(frozen=True)
class Retraining:
    """How every model of a bank is trained.

    Attributes:
        epochs: passes over the subset.
        rate: learning rate of the first step; it falls linearly to 0.
        batch: sequences of a step.
        weight_decay: of AdamW.
    """

    epochs: int = 2
    rate: float = 5e-4
    batch: int = 8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not self.rate > 0:
            raise SettingsError(f"rate is {self.rate}; expected a learning rate above 0")


def draw_subsets(examples: int, subsets: int, seed: int = 0, fraction: float = 0.5) -> Tensor:
    """Random subsets of equal size, each drawn without replacement.

    Returns:
        ``bool [subsets, examples]``; subset ``m`` does not depend on how many are drawn after it.

    Raises:
        SettingsError: a fraction that leaves out nothing or everything, or less than two subsets.
    """
    size = round(fraction * examples)
    if not 0 < size < examples:
        raise SettingsError(
            f"a fraction of {fraction:g} of {examples} examples is {size}; expected some but not all"
        )
    if subsets < 2:
        raise SettingsError(f"subsets is {subsets}; a correlation needs at least 2")
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(subsets, examples, dtype=torch.bool)
    for mask in masks:
        mask[torch.randperm(examples, generator=generator)[:size]] = True
    return masks


def lds(scores: Tensor, subsets: Tensor, losses: Tensor, *, seed: int = 0) -> LDS:
    """Linear datamodeling score of a matrix of scores.

    Args:
        scores: ``[Q, N]``; the larger, the more the example lowers the loss on the query.
        subsets: ``bool [M, N]``.
        losses: ``[M, Q]`` of the models trained on the subsets.
        seed: of the bootstrap.

    Raises:
        DataError: shapes that do not fit, or scores or losses that are not finite.
    """
    if scores.ndim != 2 or subsets.ndim != 2 or losses.ndim != 2:
        raise DataError("Expected scores [Q, N], subsets [M, N] and losses [M, Q].")
    expected = (subsets.shape[0], scores.shape[0])
    if scores.shape[1] != subsets.shape[1] or tuple(losses.shape) != expected:
        raise DataError(
            f"Scores are {tuple(scores.shape)}, subsets {tuple(subsets.shape)} and losses "
            f"{tuple(losses.shape)}; expected [Q, N], [M, N] and [M, Q]."
        )
    for name, values in (("scores", scores), ("losses", losses)):
        if not bool(values.isfinite().all()):
            raise DataError(
                f"{int((~values.isfinite()).sum())} of {values.numel()} {name} are not finite, so there is "
                "nothing to rank: look for what overflowed."
            )
    predictions = subsets.double() @ scores.double().T
    return bootstrap_mean(spearman(predictions, -losses), seed=seed)


def reliability(losses: Tensor, *, seed: int = 0) -> LDS:
    """Rank correlation over subsets between the losses of two seeds, mean over pairs of seeds and queries.

    It is what a single seed's losses say about another's, the honest scale to read an LDS on. It is no bound on it:
    scores that predict the mean over seeds can exceed it.

    Args:
        losses: ``[M, S, Q]`` with two seeds or more.
        seed: of the bootstrap.

    Raises:
        DataError: fewer than two seeds.
    """
    if losses.ndim != 3 or losses.shape[1] < 2:
        raise DataError(
            f"Losses are {tuple(losses.shape)}; expected [subsets, seeds, queries] with 2 seeds or more."
        )
    pairs = itertools.combinations(range(losses.shape[1]), 2)
    found = torch.stack([spearman(losses[:, a], losses[:, b]) for a, b in pairs])
    return bootstrap_mean(found.mean(0), seed=seed)


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Rank correlation of each column, ties at their mean rank.

    Args:
        first, second: ``[M, Q]``.

    Returns:
        ``float64 [Q]``; 0 where a column has one value only, which predicts nothing.
    """
    a, b = (_ranks(values) - (values.shape[0] + 1) / 2 for values in (first, second))
    size = (a.square().sum(0) * b.square().sum(0)).sqrt()
    return torch.where(size > 0, (a * b).sum(0) / size.clamp(min=1e-300), 0.0)


def bootstrap_mean(values: Tensor, *, seed: int = 0, resamples: int = _RESAMPLES) -> LDS:
    """Mean of ``[Q]`` values and its 95 % interval when the values are drawn again with replacement."""
    values = values.double().cpu()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)
    means = values[drawn].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return LDS(float(values.mean()), low, high, values)


def above(values: Tensor, control: Tensor, *, seed: int = 0) -> bool:
    """Whether values exceed a control's on the same queries: the 95 % interval of the mean difference lies above 0.

    Args:
        values, control: ``[Q]``.
        seed: of the bootstrap.
    """
    return bootstrap_mean(values.double() - control.double(), seed=seed).low > 0


def note_on_halves(subsets: int) -> str | None:
    """What is to be said of an interval where there are fewer than 30 halves (our choice), None otherwise."""
    if subsets >= _FEW_HALVES:
        return None
    return (
        f"{subsets} halves are few: the interval is over queries and leaves out the noise of few halves, which moves "
        f"all queries alike; take {_FEW_HALVES} or more before believing a difference."
    )


def retrain(
    checkpoint: Checkpoint, tokens: Sequence[Tensor], settings: Retraining, seed: int = 0
) -> Checkpoint:
    """A copy of a model, trained on sequences of tokens.

    Args:
        checkpoint: where to start; it is left as it is.
        tokens: each ``int64 [length]``, 2 tokens or more.
        settings: of the training.
        seed: of the order.

    Raises:
        DataError: no sequences.
        NonFiniteError: the loss is not finite, so the rate is too high or the dtype too narrow.
    """
    if not tokens:
        raise DataError("There is nothing to train on: expected at least one sequence.")
    model = copy.deepcopy(checkpoint.model)
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.rate, weight_decay=settings.weight_decay, fused=True
    )
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat(
        [torch.randperm(len(tokens), generator=generator) for _ in range(settings.epochs)]
    ).tolist()
    # An epoch ends inside a batch where its size does not divide: every example is still seen as often.
    starts = range(0, len(order), settings.batch)
    model.eval()
    with torch.enable_grad():
        for step, start in enumerate(starts):
            for group in optimizer.param_groups:
                group["lr"] = settings.rate * (1 - step / len(starts))
            loss = _loss(model, [tokens[i] for i in order[start : start + settings.batch]])
            if not bool(loss.isfinite()):
                raise NonFiniteError(
                    f"The loss is {float(loss.detach())} at step {step} of {len(starts)}; expected a finite one. "
                    'Choose a lower rate, or load the model with dtype="float32".'
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    model.requires_grad_(False)
    return dataclasses.replace(checkpoint, model=model, path=None)


def retraining_bank(
    checkpoint: Checkpoint,
    train: Sequence[Tensor],
    queries: Sequence[Tensor],
    subsets: Tensor,
    settings: Retraining,
    *,
    seeds: int = 1,
    unit: Unit | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Query losses of the models trained on each subset with each seed.

    Args:
        checkpoint: where every training starts.
        train: ``N`` sequences of tokens.
        queries: ``Q`` sequences of tokens.
        subsets: ``bool [M, N]``.
        settings: of the trainings.
        seeds: trainings of each subset.
        unit: keeps finished trainings, :meth:`postlude.runs.directory.RunDirectory.unit`; nothing is kept otherwise.
        progress: where to show it.

    Returns:
        ``float64 [M, S, Q]``, mean nats per token.
    """
    if subsets.shape[1] != len(train):
        raise DataError(
            f"The subsets choose among {subsets.shape[1]} examples; there are {len(train)}."
        )
    keep = unit if unit is not None else _without_keeping
    losses = torch.empty(len(subsets), seeds, len(queries), dtype=torch.float64)
    asked = Sequences(list(queries), "documents")

    def compute(subset: int, seed: int) -> dict[str, Tensor]:
        chosen = [train[i] for i in subsets[subset].nonzero()[:, 0].tolist()]
        trained = retrain(checkpoint, chosen, settings, seed)
        return {"losses": torch.tensor(sequence_losses(trained, asked), dtype=torch.float64)}

    # All subsets once, then all again: whatever is finished is a whole bank of fewer seeds.
    work = list(itertools.product(range(seeds), range(len(subsets))))
    shown = contextlib.nullcontext(progress) if progress is not None else Progress(show=False)
    with shown as display:
        for seed, subset in display.iterate(work, "retrain on halves"):
            name = f"subset-{subset:04d}-seed-{seed}"
            losses[subset, seed] = keep(name, lambda s=subset, t=seed: compute(s, t))["losses"]  # type: ignore[misc]
    return losses


def _without_keeping(name: str, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return dict(compute())


def _loss(model: Any, rows: Sequence[Tensor]) -> Tensor:
    """Mean over the predicted tokens of rows, which are padded on the right."""
    longest = max(len(row) for row in rows)
    ids = torch.stack([functional.pad(row, (0, longest - len(row))) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(longest)[None] < lengths[:, None]
    labels = ids.masked_fill(~mask, -100)[:, 1:].to(model.device)
    attention = None if bool(mask.all()) else mask.to(model.device)
    logits = model(input_ids=ids.to(model.device), attention_mask=attention, use_cache=False).logits
    return functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=-100
    )


def _ranks(values: Tensor) -> Tensor:
    """``float64 [M, Q]``: ranks from 1 within each column, ties at their mean."""
    columns = values.double().T.contiguous()
    ordered = columns.sort(1).values
    below = torch.searchsorted(ordered, columns, right=False)
    up_to = torch.searchsorted(ordered, columns, right=True)
    return ((below + up_to + 1).double() / 2).T
