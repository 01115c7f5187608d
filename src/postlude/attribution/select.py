"""Choose training examples by what queries say of them: those that support the queries most, or all the others.

Queries differ in the size of their scores, so every query's scores are divided by their deviation over the examples
after their mean is taken off, and an example is ranked by its mean over the queries (our choice). With ``drop`` the
chosen ones are left out: what supports answers that are not wanted. Without it they are kept alone: what supports
answers that were lost.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postlude.attribution.damage import divergence
from postlude.attribution.engine import Attributor
from postlude.attribution.examples import Records
from postlude.attribution.index import Index
from postlude.attribution.query import Source, scores
from postlude.errors import DataError, SettingsError
from postlude.runs.atomic import atomic_write, check_replaceable_file
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.progress import Progress

__all__ = ["Selection", "select", "strength"]


@dataclasses.dataclass(frozen=True)
class Selection:
    """Examples that were chosen.

    Attributes:
        numbers: of the chosen examples, strongest first.
        ids: as given in the data.
        strengths: of each, in deviations of a query's scores, averaged over the queries.
        written: examples in the file.
        dropped: whether the file holds the others instead.
    """

    numbers: list[int]
    ids: list[int | str]
    strengths: list[float]
    written: int
    dropped: bool


def strength(scores: Tensor) -> Tensor:
    """How strongly all queries together point at each example.

    Args:
        scores: ``[queries, examples]``.

    Returns:
        fp64 ``[examples]``, without a unit; a query that scores every example alike has no say.
    """
    wide = scores.double()
    centred = wide - wide.mean(1, keepdim=True)
    deviation = centred.square().mean(1, keepdim=True).sqrt()
    return torch.where(deviation > 0, centred / deviation.clamp_min(1e-300), 0.0).mean(0)


def select(
    index: Index,
    source: Source,
    out: str | os.PathLike[str],
    *,
    top: int,
    drop: bool = False,
    method: Attributor | None = None,
    checkpoint: Checkpoint | None = None,
    reference: Checkpoint | None = None,
    data: Source | None = None,
    keep: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Selection:
    """Write the training examples that queries point at most, or all but those, to a ``.jsonl`` file.

    Args:
        index: of texts.
        source: queries.
        out: the file; its records are those of the training data, in their order.
        top: how many examples are chosen.
        drop: leave them out rather than keep them alone.
        method, checkpoint, data, keep, progress: see :func:`postlude.attribution.query.query`.
        reference: ask which examples lower the divergence of the queries from this model, rather than their loss; see
            :mod:`postlude.attribution.damage`.
        overwrite: replace the file.

    Raises:
        SettingsError: more examples than there are, or none.
        DataError: an index of images.
        OutputExistsError: the file exists.
        StoreError: another model than that of the index, or data that have changed since the build.
    """
    check_replaceable_file(Path(os.path.realpath(out)), overwrite)
    if not 1 <= top <= len(index):
        raise SettingsError(f"top is {top}; expected 1 to {len(index)}, the examples of the index")
    if drop and top == len(index):
        raise SettingsError(f"all {top} examples of the index would be dropped; choose fewer")
    records = index.records(data)
    if not isinstance(records, Records):
        raise DataError(
            f"{index.path} is an index of {records.kind}, and only records of texts can be written"
        )
    found = scores(
        index,
        source,
        method=method,
        checkpoint=checkpoint,
        keep=keep,
        output=None if reference is None else divergence(reference),
        progress=progress,
    )
    values, order = strength(found).sort(descending=True, stable=True)
    numbers = order[:top].tolist()
    chosen = set(numbers)
    written = 0
    with atomic_write(out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        record: Mapping[str, Any]
        for number, record in enumerate(records.slice(0, len(records))):
            if (number in chosen) != drop:
                file.write(json.dumps(dict(record), ensure_ascii=False) + "\n")
                written += 1
    return Selection(
        numbers,
        [records.id(number) for number in numbers],
        values[:top].tolist(),
        written,
        drop,
    )
