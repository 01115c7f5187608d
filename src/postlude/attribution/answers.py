"""What an index says: the training examples that support a query most, and what their scores are made of."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from postlude.attribution.data import Data, Item
from postlude.attribution.explain import Parts
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.documents import token_pieces

__all__ = ["Answer", "Hit", "Piece", "hit"]

_SNIPPET = 200  # characters of an example's text that are shown


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


def hit(
    records: Data,
    checkpoint: Checkpoint,
    number: int,
    score: float,
    example: Item,
    parts: Parts,
    asked: Item,
) -> Hit:
    """One example of an answer.

    Args:
        records: the training examples.
        checkpoint: the model of the index.
        number: of the example.
        score: what it got.
        example, asked: it and the query, tokenized.
        parts: of the score.
    """
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
