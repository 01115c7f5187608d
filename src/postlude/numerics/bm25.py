"""BM25: how well documents match a query by the tokens they share, and by nothing else.

    score(q, d) = sum over tokens t of q of  idf(t) tf (k1 + 1) / (tf + k1 (1 - b + b |d| / avgdl))
    idf(t)      = ln(1 + (n - df + 0.5) / (df + 0.5))

``tf`` is how often ``t`` is in ``d``, ``df`` in how many of the ``n`` documents it is, ``avgdl`` their mean length.
A token that is in the query twice counts twice. Never negative. Robertson and Zaragoza, "The Probabilistic
Relevance Framework" (2009); this ``idf`` is the variant with 1 added, which has no negative values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from postlude.errors import DataError

__all__ = ["Postings"]


@dataclasses.dataclass(frozen=True)
class Postings:
    """For every token, the documents that hold it and what it is worth there.

    Attributes:
        documents: int64 ``[entries]``, by token and then by document.
        values: fp64 ``[entries]``, what one occurrence of the token in a query adds to the document's score.
        counts: int64 ``[entries]``, ``tf``.
        starts: int64 ``[tokens + 1]``, where the entries of a token begin.
        size: number of documents.
    """

    documents: Tensor
    values: Tensor
    counts: Tensor
    starts: Tensor
    size: int

    @classmethod
    def of(cls, documents: Iterable[Tensor], k1: float, b: float) -> Postings:
        """From the token ids of documents, each int64 ``[length]``.

        Raises:
            DataError: no documents, or none with a token.
        """
        rows = list(documents)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        if not bool(lengths.any()):
            raise DataError(f"None of the {len(rows)} documents has a token: give documents.")
        tokens = torch.cat(rows)
        owners = torch.repeat_interleave(torch.arange(len(rows)), lengths)
        # One number for each pair sorts by token first, and by document within it.
        pairs, counts = torch.unique(tokens * len(rows) + owners, return_counts=True)
        token, document = pairs // len(rows), pairs % len(rows)
        frequency = torch.bincount(token)  # df
        starts = torch.cat([frequency.new_zeros(1), frequency.cumsum(0)])
        idf = torch.log1p((len(rows) - frequency + 0.5) / (frequency.double() + 0.5))
        relative = lengths.double() / lengths.double().mean()
        tf = counts.double()
        values = idf[token] * tf * (k1 + 1) / (tf + k1 * (1 - b + b * relative[document]))
        return cls(document, values, counts, starts, len(rows))

    def entries(self, token: int) -> slice:
        """Where the entries of a token are; an empty slice for a token that no document holds."""
        if not 0 <= token < len(self.starts) - 1:
            return slice(0, 0)
        return slice(int(self.starts[token]), int(self.starts[token + 1]))

    def scores(self, query: Tensor) -> Tensor:
        """fp64 ``[documents]`` for token ids int64 ``[length]``."""
        total = torch.zeros(self.size, dtype=torch.float64)
        tokens, repeats = torch.unique(query, return_counts=True)
        for token, repeat in zip(tokens.tolist(), repeats.tolist(), strict=True):
            found = self.entries(token)
            total.index_add_(0, self.documents[found], repeat * self.values[found])
        return total

    def token_values(self, document: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What tokens are worth in one document, and how often they are in it: fp64 and int64 ``[tokens]``."""
        values = torch.zeros(len(tokens), dtype=torch.float64)
        counts = torch.zeros(len(tokens), dtype=torch.int64)
        for place, token in enumerate(tokens.tolist()):
            found = self.entries(token)
            at = int(torch.searchsorted(self.documents[found], document))
            if at < found.stop - found.start and int(self.documents[found][at]) == document:
                values[place] = self.values[found][at]
                counts[place] = self.counts[found][at]
        return values, counts
