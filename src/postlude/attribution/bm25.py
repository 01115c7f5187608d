"""BM25: which training examples share rare tokens with the query. Knows no model.

    score(q, d) = sum over tokens t of q of  idf(t) tf (k1 + 1) / (tf + k1 (1 - b + b |d| / avgdl))
    idf(t)      = ln(1 + (n - df + 0.5) / (df + 0.5))

The control that a method must beat before anybody believes that it sees learning rather than shared tokens. Over
the token ids of the model's tokenizer, so it needs that and nothing else of the model. Tokens that the tokenizer puts
before every text, or that are in every example, count next to nothing by their ``idf``. Where facts are asked for it is
strong (arXiv:2410.17413). The formula and its statistics are in :mod:`postlude.numerics.bm25`.

Cost: four bytes a token on disk; the statistics are made once for each opened index.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from postlude.attribution.engine import Attributor
from postlude.attribution.examples import Collection, Example
from postlude.attribution.explain import Parts
from postlude.attribution.index import Index
from postlude.attribution.queries import Queries, Scores
from postlude.attribution.representation import Recorder, Representation
from postlude.errors import SettingsError
from postlude.numerics.bm25 import Postings
from postlude.registry import method
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.progress import Progress
from postlude.surgery.gradients import CollectedLayer

__all__ = ["BM25", "TokenRepresentation"]


@dataclasses.dataclass(frozen=True)
class TokenRepresentation(Representation):
    """The token ids themselves, padded with zeros to the longest example of a shard."""

    kind = "tokens"

    @contextlib.contextmanager
    def recorder(self, checkpoint: Checkpoint, collection: Collection) -> Iterator[Recorder]:
        yield lambda batch: {"ids": batch.ids.to(torch.int32)}

    def row_bytes(self, layers: Sequence[CollectedLayer]) -> int:
        raise SettingsError("the size of tokens is that of the text, not of layers")


@method("attribute", "bm25", family="control")
@dataclasses.dataclass(frozen=True)
class BM25(Attributor):
    """Shared rare tokens: a control that knows no model.

    Attributes:
        k1: how soon further occurrences of a token count less.
        b: how much long examples are held against, 0 to 1.
    """

    k1: float = 1.5
    b: float = 0.75

    def __post_init__(self) -> None:
        if not 0 <= self.k1 < math.inf:
            raise SettingsError(f"bm25: k1 is {self.k1}; expected a number from 0")
        if not 0 <= self.b <= 1:
            raise SettingsError(f"bm25: b is {self.b}; expected 0 to 1")

    def representation(self) -> TokenRepresentation:
        return TokenRepresentation()

    def score(
        self,
        index: Index,
        queries: Queries,
        *,
        per_layer: bool = False,
        keep: bool = False,
        progress: Progress | None = None,
    ) -> Scores:
        self.check(index)
        postings = self._postings(index)
        rows = [postings.scores(torch.tensor(one.tokens)) for one in queries.examples]
        return Scores(torch.stack(rows).float())

    def explain(
        self,
        index: Index,
        queries: Queries,
        pairs: Sequence[tuple[int, int]],
        train: Sequence[Example],
        *,
        tokens: bool = False,
        keep: bool = False,
    ) -> list[Parts]:
        if not tokens:
            return [Parts() for _ in pairs]
        postings = self._postings(index)
        found = []
        for (q, n), example in zip(pairs, train, strict=True):
            asked, given = torch.tensor(queries.examples[q].tokens), torch.tensor(example.tokens)
            of_query, _ = postings.token_values(n, asked)
            # What a token is worth is shared by its occurrences.
            values, counts = postings.token_values(n, given)
            repeats = (given[:, None] == asked).sum(1)
            found.append(Parts(None, values * repeats / counts.clamp(min=1), of_query))
        return found

    def _postings(self, index: Index) -> Postings:
        return index.cached(
            f"postings {self.k1} {self.b}",
            lambda one: Postings.of(_documents(one), self.k1, self.b),
        )

    @property
    def unit(self) -> str:
        return "BM25"


def _documents(index: Index) -> Iterator[Tensor]:
    for shard in index.store.shards:
        ids, lengths = shard.tensor("ids"), shard.tensor("tokens")
        for row, length in zip(ids, lengths.tolist(), strict=True):
            yield row[:length].long()
