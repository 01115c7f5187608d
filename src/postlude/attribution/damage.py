"""What a model lost against the one it was made from: which texts, and as something to attribute.

A quantized, pruned or tuned model ``p`` beside its reference ``q``. Of every text, over its predicted tokens::

    kl    mean KL(q || p)                      how far the predictions moved, whatever the text says
    gap   mean of log q(y) - log p(y)          loss added; below zero where the model got better
    loss  mean of -log p(y)                    what the model finds hard; of the model alone

:func:`damage` measures them; :func:`worst` writes the texts that lost most. ``sum_t KL(q || p)`` is also an output that
can be differentiated (:func:`divergence`): asked about it, an index tells which training examples, trained on again,
would bring the model back to its reference on these texts. Near ``q = p`` the gradient of the divergence vanishes and
that of the loss does not, so what is asked about is the damage and not the text. It is summed over tokens, also where
the index averages.

Our choice of measures; healing a compressed model with data chosen by its losses is PASER's idea (arXiv:2502.12594),
by other means. Cost: one forward pass of both models; for the divergence a backward pass of the model.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postlude.attribution.data import batches
from postlude.attribution.examples import Batch, Collection, Records
from postlude.attribution.outputs import Maker, Output, predictions
from postlude.errors import SettingsError, UnknownNameError
from postlude.numerics.likelihood import kl_divergence, token_log_probability
from postlude.numerics.weighted_likelihood import Head, weighted_cross_entropy
from postlude.runs.atomic import atomic_write, check_replaceable_file
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.progress import Progress
from postlude.runs.vocabulary import check_vocabulary

__all__ = ["MEASURES", "Damage", "Worst", "check_measure", "damage", "divergence", "worst"]

MEASURES = ("kl", "gap", "loss")


def check_measure(name: str) -> None:
    """Refuse a name that no measure has.

    Raises:
        UnknownNameError: it says which there are.
    """
    if name not in MEASURES:
        raise UnknownNameError("measure", name, MEASURES)


@dataclasses.dataclass(frozen=True)
class Damage:
    """Of every text, in nats a predicted token: fp64 ``[examples]`` each, and how many tokens.

    Attributes:
        kl, gap, loss: see the top of this file.
        tokens: int64 ``[examples]``, predicted ones.
    """

    kl: Tensor
    gap: Tensor
    loss: Tensor
    tokens: Tensor

    def mean(self, name: str) -> float:
        """Over all tokens of all texts."""
        values: Tensor = getattr(self, name)
        return float((values * self.tokens).sum() / self.tokens.sum())


@dataclasses.dataclass(frozen=True)
class Worst:
    """Texts that were chosen.

    Attributes:
        numbers: of the chosen texts, the worst first.
        ids: as given in the data.
        damage: of all texts.
    """

    numbers: list[int]
    ids: list[int | str]
    damage: Damage


def divergence(reference: Checkpoint) -> Maker:
    """An output: ``sum_t KL(reference || model)`` over the predicted tokens of a text, differentiable in the model.

    Raises:
        SettingsError: when it is made for a model with another vocabulary.
    """

    def make(checkpoint: Checkpoint, collection: Collection) -> Output:
        check_vocabulary(checkpoint, reference)
        predict, expect = predictions(checkpoint), predictions(reference)

        def run(batch: Batch) -> tuple[Tensor, Tensor]:
            found = predict(batch)
            with torch.no_grad():
                expected = expect(batch)
            device = found.hidden.device
            bias = None if expected.bias is None else expected.bias.to(device)
            prior = Head(expected.hidden.to(device), expected.weight.to(device), bias)
            result = weighted_cross_entropy(
                found.hidden,
                found.weight,
                found.targets,
                torch.zeros(len(found.targets), device=device),
                bias=found.bias,
                prior=prior,
                strength=1.0,
            )
            each = result.divergence.new_zeros(len(batch))
            return result.total, each.index_add(0, found.rows, result.divergence)

        return run

    return make


@torch.no_grad()
def damage(
    checkpoint: Checkpoint,
    reference: Checkpoint,
    records: Records,
    collection: Collection | None = None,
    progress: Progress | None = None,
) -> Damage:
    """Every measure of every text.

    Args:
        checkpoint: the model.
        reference: the model that it was made from.
        records: the texts.
        collection: length, which tokens are predicted, tokens of a batch.
        progress: where to show it.

    Raises:
        SettingsError: a reference with another vocabulary.
        DataError: a text that does not fit the model.
    """
    chosen = collection or Collection()
    check_vocabulary(checkpoint, reference)
    records.check(checkpoint, chosen)
    examples = records.examples(checkpoint, chosen)
    predict, expect = predictions(checkpoint), predictions(reference)
    sums = torch.zeros(3, len(examples), dtype=torch.float64)
    tokens = torch.zeros(len(examples), dtype=torch.int64)
    with progress or Progress(show=False) as shown:
        for batch in shown.iterate(batches(examples, chosen.tokens_per_batch), "damage"):
            found, expected = predict(batch), expect(batch)
            device = found.hidden.device
            ours, theirs = (
                token_log_probability(one.hidden, one.weight, one.targets, bias=one.bias)
                for one in (found, expected)
            )
            kl, _ = kl_divergence(
                expected.hidden.to(device),
                expected.weight.to(device),
                found.hidden,
                found.weight,
                bias_p=None if expected.bias is None else expected.bias.to(device),
                bias_q=found.bias,
            )
            values = torch.stack([kl, theirs.to(device) - ours, -ours]).double().cpu()
            rows = torch.as_tensor(batch.rows)[found.rows.cpu()]
            sums.index_add_(1, rows, values)
            tokens.index_add_(0, rows, torch.ones_like(rows))
    kl_, gap, loss = sums / tokens
    return Damage(kl_, gap, loss, tokens)


def worst(
    checkpoint: Checkpoint,
    reference: Checkpoint,
    source: Any,
    out: str | os.PathLike[str],
    *,
    top: int,
    by: str = "kl",
    collection: Collection | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Worst:
    """Write the texts that lost most to a ``.jsonl`` file.

    Args:
        checkpoint, reference, collection, progress: see :func:`damage`.
        source: texts: a ``.jsonl`` file, or records, or strings.
        out: the file; its records are those of the texts, in their order.
        top: how many are chosen.
        by: a name in ``MEASURES``.
        overwrite: replace the file.

    Raises:
        UnknownNameError: no such measure.
        SettingsError: more texts than there are.
        OutputExistsError: the file exists.
    """
    check_measure(by)
    check_replaceable_file(Path(os.path.realpath(out)), overwrite)
    records = Records.open(source)
    if not 1 <= top <= len(records):
        raise SettingsError(f"top is {top}; expected 1 to {len(records)}, the texts that there are")
    found = damage(checkpoint, reference, records, collection, progress)
    order = getattr(found, by).argsort(descending=True, stable=True)
    numbers = order[:top].tolist()
    chosen = set(numbers)
    with atomic_write(out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for number, record in enumerate(records.slice(0, len(records))):
            if number in chosen:
                file.write(json.dumps(dict(record), ensure_ascii=False) + "\n")
    return Worst(numbers, [records.id(number) for number in numbers], found)
