"""Ask an index: the training examples that support a text most, and what their scores are made of.

Scores are computed shard by shard with a running list of the best, so a matrix of all queries by all examples never
exists: per layer one ``d1 x d2`` matrix a query (the query's gradient times the inverse curvature) meets the rows of
the memory map as they are read. Mean and deviation over all examples are kept along, to tell how far the best
stand out. Scores of everything at once are what ``Attributor.score`` gives.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from postlude import registry
from postlude.attribution.curvature import Dual
from postlude.attribution.data import Data, Item, is_path, open_data
from postlude.attribution.engine import Attributor, InfluenceAttributor, Queries, record_queries
from postlude.attribution.explain import Parts
from postlude.attribution.index import Index
from postlude.attribution.layer_weights import LayerWeights, Learning, learn
from postlude.attribution.outputs import Maker
from postlude.errors import SettingsError
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.documents import token_pieces
from postlude.runs.loading import load
from postlude.runs.progress import Progress

__all__ = [
    "Answer",
    "Hit",
    "Piece",
    "Ranking",
    "learn_weights",
    "method_of",
    "query",
    "rank",
    "scores",
    "stream",
]

Source = str | os.PathLike[str] | Sequence[Mapping[str, Any] | str] | Data

_NAME = "the text of the query"
_SNIPPET = 200  # characters of an example's text that are shown
# Bytes that the query side of one streaming pass may take.
_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class Piece:
    """A token, or the tokens of one character, with what it adds to a score."""

    text: str
    score: float


@dataclasses.dataclass(frozen=True)
class Hit:
    """One training example of an answer.

    Attributes:
        id: as given in the data, or its number.
        number: of the example, from 0.
        score: larger supports more.
        text: the beginning of the example.
        count, truncated: its tokens that were used, and those cut off beyond the context.
        layers: part of every layer, by module path; None where not asked for or a method has none.
        tokens, query_tokens: parts of the tokens of the example, and of those of the query; likewise.
        image: ``[channels, height, width]`` in [-1, 1], of an image that can be shown.
    """

    id: int | str
    number: int
    score: float
    text: str
    count: int
    truncated: int
    layers: dict[str, float] | None = None
    tokens: list[Piece] | None = None
    query_tokens: list[Piece] | None = None
    image: Tensor | None = dataclasses.field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        return {key: value for key, value in found.items() if value is not None and key != "image"}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What an index says to one query.

    Attributes:
        text: of the query.
        results: best first.
        count, truncated: tokens of the query that were used, and those cut off beyond the context.
        examples: of the index.
        mean, deviation: of the scores of all examples.
        unit: of a score.
        curvature: which way of inverting the curvature was taken and why; None for methods without.
        seconds: of all queries asked together, without loading the model.
        id: of the query, as given in a file, or its number.
        image: of the query, as in :class:`Hit`.
    """

    text: str
    results: list[Hit]
    count: int
    truncated: int
    examples: int
    mean: float
    deviation: float
    unit: str
    curvature: str | None
    seconds: float
    id: int | str = 0
    image: Tensor | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def tokens(self) -> list[Piece]:
        """What the tokens of the query add to the scores of all results together."""
        parts = [hit.query_tokens for hit in self.results if hit.query_tokens]
        return [
            Piece(column[0].text, sum(piece.score for piece in column))
            for column in zip(*parts, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            **{
                field.name: getattr(self, field.name)
                for field in dataclasses.fields(self)
                if field.name not in ("results", "image") and getattr(self, field.name) is not None
            },
            "results": [hit.to_dict() for hit in self.results],
        }


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The best examples of every query, found in one pass.

    Attributes:
        scores, numbers: ``[queries, top]``, best first, and equal ones in the order of the data.
        mean, deviation: fp64 ``[queries]``, over all examples.
    """

    scores: Tensor
    numbers: Tensor
    mean: Tensor
    deviation: Tensor


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
            _hit(records, checkpoint, n, float(score), one, part, example)
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
    :func:`postlude.attribution.engine.record_queries`.
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


def rank(
    method: Attributor,
    index: Index,
    queries: Queries,
    top: int,
    *,
    keep: bool = False,
    progress: Progress | None = None,
) -> Ranking:
    """The best examples of every query, in one pass over the index."""
    count = len(queries)
    best = torch.full((count, 0), -math.inf)
    numbers = torch.zeros(count, 0, dtype=torch.int64)
    total, squares, seen = torch.zeros(count).double(), torch.zeros(count).double(), 0
    for start, scores in _pieces(method, index, queries, keep, progress):
        wide = scores.double()
        # Around the first mean seen, so that the squares of large, nearly equal scores do not cancel.
        if not seen:
            centre = wide.mean(1)
        seen += scores.shape[1]
        total += (wide - centre[:, None]).sum(1)
        squares += (wide - centre[:, None]).square().sum(1)
        leading, at = scores.topk(min(top, scores.shape[1]), dim=1)
        best = torch.cat([best, leading], 1)
        numbers = torch.cat([numbers, at + start], 1)
        # By number first, then stably by score: equal scores come in the order of the data.
        order = numbers.argsort(dim=1)
        best, numbers = best.gather(1, order), numbers.gather(1, order)
        order = best.argsort(dim=1, descending=True, stable=True)[:, :top]
        best, numbers = best.gather(1, order), numbers.gather(1, order)
    mean = total / seen
    deviation = (squares / seen - mean.square()).clamp(min=0).sqrt()
    return Ranking(best, numbers, centre + mean, deviation)


def _pieces(
    method: Attributor, index: Index, queries: Queries, keep: bool, progress: Progress | None
) -> Iterator[tuple[int, Tensor]]:
    """Scores ``[queries, examples]`` of consecutive examples."""
    # The dual form is taken for small sets, scores all of them in one pass, and would need two more for matrices.
    if isinstance(method, InfluenceAttributor) and method.chosen_curvature(index)[0] is not Dual:
        yield from stream(method, index, queries, keep=keep, progress=progress)
    else:
        yield 0, method.score(index, queries, keep=keep, progress=progress).total


def stream(
    method: InfluenceAttributor,
    index: Index,
    queries: Queries,
    *,
    keep: bool = False,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """``(first example, scores [queries, examples])``, shard by shard, all layers of a shard at once."""
    weights = method.weights(index, queries)
    choice = method.chosen_curvature(index)[2]
    with progress or Progress(show=False) as shown:
        if choice is not None:
            shown.log(method.taken(index, keep=keep))
        fits = shown.iterate(method.fits(index, keep=keep), "curvature", total=len(index.layers))
        asked, factors = {}, {}
        for layer, fitted, source in fits:
            rows = method.query_rows(index, queries, layer)
            asked[layer.module] = fitted.prepared(rows, source)
            factors[layer.module] = method.layer_factors(index, layer, fitted, source)
        _, settings, _ = method.chosen_curvature(index)
        double = settings.precision == torch.float64
        sources = {module: index.layer(module) for module in asked}
        for shard in shown.iterate(index.store.shards, "shards"):
            scores = torch.zeros(len(queries), len(shard))
            for module, one in asked.items():
                for first, rows in sources[module].chunks(start=shard.start, stop=shard.stop):
                    rows = rows.double() if double else rows
                    place = slice(first - shard.start, first - shard.start + len(rows))
                    found = one.products(rows)
                    scale = factors[module]
                    if scale is not None:
                        found = found * scale[first : first + len(rows)].to(found)
                    scores[:, place] += found
            if weights is not None:
                scores *= weights[0][:, None].to(scores)
                scores *= weights[1][shard.start : shard.stop].to(scores)
            yield shard.start, scores


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


def _hit(
    records: Data,
    checkpoint: Checkpoint,
    number: int,
    score: float,
    example: Item,
    parts: Parts,
    asked: Item,
) -> Hit:
    text = records.text(number)
    return Hit(
        id=records.id(number),
        number=number,
        score=score,
        text=text if len(text) <= _SNIPPET else text[:_SNIPPET].rstrip() + " ...",
        count=example.count,
        truncated=example.cut,
        layers=parts.layers,
        tokens=_pieces_of(checkpoint, example, parts.train),
        query_tokens=_pieces_of(checkpoint, asked, parts.query),
        image=records.picture(number),
    )


def _pieces_of(checkpoint: Checkpoint, example: Any, scores: Tensor | None) -> list[Piece] | None:
    if scores is None:
        return None
    found, at = [], 0
    for text, count in token_pieces(checkpoint.tokenizer, example.tokens):
        found.append(Piece(text, float(scores[at : at + count].sum())))
        at += count
    return found
