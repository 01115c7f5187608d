"""Ask an index: the training examples that support a text most, and what their scores are made of."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from postlude import registry
from postlude.attribution.answers import Answer, hit
from postlude.attribution.data import Data, Item, is_path, open_data
from postlude.attribution.engine import Attributor, InfluenceAttributor
from postlude.attribution.explain import Parts
from postlude.attribution.index import Index
from postlude.attribution.layer_weights import LayerWeights, Learning, learn
from postlude.attribution.outputs import Maker
from postlude.attribution.queries import record_queries
from postlude.attribution.ranking import rank
from postlude.errors import SettingsError
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.loading import load
from postlude.runs.progress import Progress

__all__ = ["Source", "learn_weights", "method_of", "model_of", "query", "scores", "single"]

Source = str | os.PathLike[str] | Sequence[Mapping[str, Any] | str] | Data

_NAME = "the text of the query"


def query(
    index: Index,
    source: Source,
    *,
    top: int = 10,
    layers: bool = False,
    tokens: bool = False,
    method: Attributor | None = None,
    weights: LayerWeights | str | os.PathLike[str] | None = None,
    checkpoint: Checkpoint | None = None,
    data: Source | None = None,
    keep: bool = True,
    progress: Progress | None = None,
) -> list[Answer]:
    """Rank the training examples for every query.

    Args:
        index: to ask.
        source: a text; a list of texts or records; or a path that ends in ``.jsonl``, with a query a line. For a
            denoiser images, as in :mod:`postlude.attribution.images`.
        top: results a query.
        layers: also the parts of the layers.
        tokens: also the parts of the tokens, for which the model runs on the results again.
        method: settings other than those the index was built for, that it can answer too.
        weights: of layers, learned for this index and method, or the file that they are in.
        checkpoint: the model of the index; loaded from where it was at the build otherwise.
        data: the training examples, if they are no longer where they were.
        keep: keep what is fitted to the index beside it, for later queries.
        progress: where to show it.

    Returns:
        An answer for each query, in order.

    Raises:
        StoreError: another model than that of the index, or data that have changed since the build.
        DataError: an empty query.
        SettingsError: a number out of range, or a method that cannot read this index.
    """
    if top < 1:
        raise SettingsError(f"top is {top}; expected at least 1")
    method = method_of(index) if method is None else method
    method.check(index)
    named = _weights(weights, index, method)
    records = index.records(data)
    checkpoint = model_of(index) if checkpoint is None else checkpoint
    asked = _opened(source, checkpoint)
    started = time.perf_counter()
    with progress or Progress(show=False) as shown:
        queries = record_queries(index, checkpoint, asked).weighted(named)
        curvature = _curvature(method, index)
        found = rank(method, index, queries, min(top, len(index)), keep=keep, progress=shown)
        pairs = [(q, n) for q, row in enumerate(found.numbers.tolist()) for n in row]
        train = [_example(index, checkpoint, records, n) for _, n in pairs]
        parts = [Parts() for _ in pairs]
        if layers or tokens:
            # A patch of an image is no token to be read.
            words = tokens and checkpoint.kind == "language"
            parts = method.explain(index, queries, pairs, train, tokens=words, keep=keep)
    seconds = time.perf_counter() - started
    answers = []
    width = found.numbers.shape[1]
    for q, example in enumerate(queries.examples):
        row = slice(q * width, (q + 1) * width)
        hits = [
            hit(records, checkpoint, n, float(score), one, part, example)
            for (_, n), score, one, part in zip(
                pairs[row], found.scores[q], train[row], parts[row], strict=True
            )
        ]
        if not layers:
            hits = [dataclasses.replace(hit, layers=None) for hit in hits]
        answers.append(
            Answer(
                text=asked.text(q),
                results=hits,
                count=example.count,
                truncated=example.cut,
                examples=len(index),
                mean=float(found.mean[q]),
                deviation=float(found.deviation[q]),
                unit=method.unit,
                curvature=curvature,
                seconds=seconds,
                id=example.id,
                image=asked.picture(q),
            )
        )
    return answers


def scores(
    index: Index,
    source: Source,
    *,
    method: Attributor | None = None,
    weights: LayerWeights | str | os.PathLike[str] | None = None,
    checkpoint: Checkpoint | None = None,
    keep: bool = False,
    output: Maker | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Scores of all training examples for every query: fp32 ``[queries, examples]``; arguments as for :func:`query`.

    ``output`` is what is asked about instead of the loss of a query, see
    :func:`postlude.attribution.queries.record_queries`.
    """
    method = method_of(index) if method is None else method
    method.check(index)
    named = _weights(weights, index, method)
    checkpoint = model_of(index) if checkpoint is None else checkpoint
    queries = record_queries(index, checkpoint, _opened(source, checkpoint), output)
    return method.score(index, queries.weighted(named), keep=keep, progress=progress).total


def learn_weights(
    index: Index,
    source: Source,
    settings: Learning | None = None,
    *,
    method: Attributor | None = None,
    checkpoint: Checkpoint | None = None,
    keep: bool = True,
    progress: Progress | None = None,
) -> LayerWeights:
    """Learn what each layer should count for, from queries alone; arguments as for :func:`query`.

    Args:
        index: to ask.
        source: the queries to learn from, ``k`` or more.
        settings: of the learning.
        method: settings other than those the index was built for.
        checkpoint: the model.
        keep: keep what is fitted to the index beside it.
        progress: where to show it.

    Raises:
        SettingsError: fewer queries or examples than ``k``, or a method without layers.
    """
    method = method_of(index) if method is None else method
    method.check(index)
    settings = settings or Learning()
    checkpoint = model_of(index) if checkpoint is None else checkpoint
    records = _opened(source, checkpoint)
    # Before the model runs: what cannot be learned from so few is refused at once.
    settings.found(len(records), min(len(index), settings.examples))
    queries = record_queries(index, checkpoint, records)
    found = learn(method, index, queries, settings, keep=keep, progress=progress)
    return dataclasses.replace(found, learned={**found.learned, "queries_hash": records.hash})


def method_of(index: Index) -> Attributor:
    """The settings that an index was built for."""
    given = index.manifest["method"]
    settings: Attributor = registry.find("attribute", given["name"]).settings(**given["settings"])
    return settings


def model_of(index: Index) -> Checkpoint:
    """The model that an index was built with, loaded from where it was.

    Raises:
        SettingsError: it existed in memory only.
        CheckpointError: it is no longer there.
    """
    path = index.manifest["model"]["path"]
    if path is None:
        raise SettingsError(
            f"{index.path} was built with a model in memory: give the model (checkpoint=, or --checkpoint on the "
            "command line)"
        )
    return load(path)


def _weights(
    given: LayerWeights | str | os.PathLike[str] | None, index: Index, method: Attributor
) -> dict[str, float] | None:
    """Weights by module path, if any are given, which must be of this index and method."""
    if given is None:
        return None
    found = given if isinstance(given, LayerWeights) else LayerWeights.load(given)
    found.check(index, method)
    return found.named()


def single(source: Any, kind: str = "texts") -> bool:
    """Whether one query is asked: a text, or the file of one image."""
    if kind == "images":
        return is_path(source) and os.fspath(source).endswith(".png")
    return isinstance(source, str) and not source.endswith(".jsonl")


def _opened(source: Any, checkpoint: Checkpoint) -> Data:
    """Queries for a model; a text becomes a list of one."""
    text = checkpoint.kind == "language" and single(source)
    return open_data([source] if text else source, checkpoint.kind, _NAME)


def _curvature(method: Attributor, index: Index) -> str | None:
    if not isinstance(method, InfluenceAttributor):
        return None
    choice = method.chosen_curvature(index)[2]
    return None if choice is None else str(choice)


def _example(index: Index, checkpoint: Checkpoint, records: Data, number: int) -> Item:
    found: Item = records.examples(checkpoint, index.collection, number, number + 1)[0]
    return found
