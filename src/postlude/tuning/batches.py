"""Which sequences are seen when, and batches of them.

The whole run is laid out beforehand as a list of optimiser steps, each a list of micro-batches, one for every forward
pass on every device. So a step holds the same sequences however they are spread over forward passes and devices, the
end of an epoch never falls inside a step, and a resumed run knows what comes next.

A micro-batch carries no labels of the size of its rows but the flat places of the states that predict something. It
needs no attention mask when padded on the right: under causal attention no token sees what comes after it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from postlude.tuning.examples import Examples

if TYPE_CHECKING:
    from postlude.tuning.objective import TuneRun

__all__ = ["Plan", "collate", "make_plan", "model_inputs", "pack"]

_OPEN_ROWS = 64

Rows = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every micro-batch of a run.

    Attributes:
        batches: for each micro-batch its rows, and for each row the sequences in it. Those of one step follow each
            other; of those, every ``ranks``-th from the r-th on is for rank r.
        steps: optimiser steps.
        targets: learned tokens of each step, on all ranks.
        tokens: all tokens of each step, likewise.
        epochs: where in the data each step ends, in passes over it.
        padding: share of the places in all batches that hold no token.
    """

    batches: list[Rows]
    steps: int
    targets: list[int]
    tokens: list[int]
    epochs: list[float]
    padding: float


def make_plan(examples: Examples, run: TuneRun, max_length: int, *, ranks: int = 1) -> Plan:
    """Lay a run out.

    Each epoch has its own order, drawn from ``run.seed``. The rows of a step are sorted by length before they are
    divided into micro-batches: that changes nothing but the padding. Examples of one recording stand together where
    the batch has room for several recordings, so that each is encoded once.

    Args:
        examples: the data.
        run: length and batch.
        max_length: of a packed row.
        ranks: devices.
    """
    parts = run.accumulate * ranks
    whole = run.batch_size * parts
    lengths = examples.lengths.tolist()
    counts = examples.target_starts.diff().tolist()
    batches: list[Rows] = []
    targets: list[int] = []
    tokens: list[int] = []
    epochs: list[float] = []
    places = 0
    epoch = 0
    while len(targets) < run.steps if run.steps is not None else epoch < run.epochs:
        generator = torch.Generator().manual_seed(run.seed * 1_000_003 + epoch)
        order = torch.randperm(len(examples), generator=generator).tolist()
        if examples.recordings is not None:
            order = examples.recordings.together(order, run.batch_size)
        rows = pack(order, lengths, max_length) if run.packing else [[index] for index in order]
        steps = math.ceil(len(rows) / whole)
        if run.steps is not None:
            steps = min(steps, run.steps - len(targets))
        elif run.epochs - epoch < 1:
            steps = math.ceil((run.epochs - epoch) * steps)
        for number in range(steps):
            start = number * whole
            sized = [
                (sum(lengths[index] for index in row), row) for row in rows[start : start + whole]
            ]
            sized.sort(key=lambda one: -one[0])
            for part in range(parts):
                chosen = sized[len(sized) * part // parts : len(sized) * (part + 1) // parts]
                batches.append([row for _, row in chosen])
                places += len(chosen) * max((size for size, _ in chosen), default=0)
            tokens.append(sum(size for size, _ in sized))
            targets.append(sum(counts[index] for _, row in sized for index in row))
            epochs.append(epoch + min(1.0, (start + whole) / len(rows)))
        epoch += 1
    padding = 1 - sum(tokens) / max(places, 1)
    return Plan(batches, len(targets), targets, tokens, epochs, padding)


def pack(order: Sequence[int], lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Put sequences into rows of at most ``max_length`` tokens: each into the fullest open row that has room.

    At most 64 rows are open; the fullest is closed for a new one, so rows stay near the given order.
    """
    done: list[list[int]] = []
    rows: list[tuple[int, list[int]]] = []
    for index in order:
        room = [
            (used, at) for at, (used, _) in enumerate(rows) if used + lengths[index] <= max_length
        ]
        if room:
            used, at = max(room)
            rows[at][1].append(index)
            rows[at] = (used + lengths[index], rows[at][1])
            continue
        if len(rows) == _OPEN_ROWS:
            done.append(rows.pop(max(range(len(rows)), key=lambda at: rows[at][0]))[1])
        rows.append((lengths[index], [index]))
    return done + [row for _, row in rows]


def collate(
    examples: Examples,
    rows: Rows,
    columns: Mapping[str, Tensor] | None = None,
    *,
    padding: Literal["right", "left"] = "right",
) -> dict[str, Tensor]:
    """A batch of rows, on the CPU.

    Args:
        examples: the data.
        rows: the sequences of each row; none at all gives a batch of one token that predicts nothing.
        columns: numbers for every learned token of ``examples``, in their order.
        padding: where rows are filled up.

    Returns:
        ``input_ids [R, S]``; ``attention_mask`` where padded on the left; ``position_ids`` where it is needed or a row
        holds several sequences, which then do not see each other. For the ``T`` learned tokens: ``predictors [T]``,
        the place of the state that predicts each in ``[R * S]``; ``targets [T]``; ``sequences [T]``, the number of
        its sequence in this batch; and each column ``[T]`` under ``column.NAME``. What is heard of recordings is under
        ``audio.NAME``, and which rows of it are equal under ``recordings``.
    """
    ids = [torch.cat([examples.ids(index) for index in row]) for row in rows]
    longest = max((len(row) for row in ids), default=1)
    input_ids = torch.zeros(max(len(rows), 1), longest, dtype=torch.int64)
    position_ids = torch.arange(longest).repeat(len(input_ids), 1)
    attended = torch.zeros_like(input_ids)
    predictors, sequences, number = [], [], 0
    for at, (row, tokens) in enumerate(zip(rows, ids, strict=True)):
        start = longest - len(tokens) if padding == "left" else 0
        input_ids[at, start : start + len(tokens)] = tokens
        attended[at, start : start + len(tokens)] = 1
        for index in row:
            marks = examples.targets(index)
            length = len(marks)
            position_ids[at, start : start + length] = torch.arange(length)
            found = marks.nonzero()[:, 0] - 1 + at * longest + start
            predictors.append(found)
            sequences.append(torch.full_like(found, number))
            number += 1
            start += length
        if padding == "right":
            # A sequence of its own, so that nothing is appended to the last one.
            position_ids[at, start:] = torch.arange(longest - start)
    flat = torch.cat(predictors) if predictors else torch.zeros(0, dtype=torch.int64)
    batch = {
        "input_ids": input_ids,
        "predictors": flat,
        "targets": input_ids.view(-1)[flat + 1] if len(flat) else flat,
        "sequences": torch.cat(sequences) if sequences else flat,
    }
    if any(len(row) > 1 for row in rows):
        batch["position_ids"] = position_ids
    elif padding == "left" and not bool(attended.all()):
        batch["position_ids"], batch["attention_mask"] = position_ids, attended
    if examples.recordings is not None:
        batch |= examples.recordings.inputs([index for row in rows for index in row])
    if columns:
        bounds = examples.target_starts.tolist()
        chosen = [slice(bounds[i], bounds[i + 1]) for row in rows for i in row]
        for name, column in columns.items():
            pieces = [column[one] for one in chosen]
            batch[f"column.{name}"] = torch.cat(pieces) if pieces else column[:0]
    return batch


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch goes to :meth:`postlude.surgery.head.LanguageHead.states`."""
    names = ("input_ids", "attention_mask", "position_ids", "recordings")
    heard = {n.partition(".")[2]: v for n, v in batch.items() if n.startswith("audio.")}
    return {**{name: batch[name] for name in names if name in batch}, **heard}
