from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from postlude.errors import DataError
from postlude.numerics.bm25 import Postings

K1, B = 1.5, 0.75


def slow(documents: list[list[int]], query: list[int]) -> list[float]:
    """The formula, word by word."""
    n, mean = len(documents), sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for token in query:
            df = sum(token in other for other in documents)
            tf = document.count(token)
            idf = math.log(1 + (n - df + 0.5) / (df + 0.5))
            score += idf * tf * (K1 + 1) / (tf + K1 * (1 - B + B * len(document) / mean))
        scores.append(score)
    return scores


@pytest.fixture
def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 30, (17,), generator=generator).tolist()
    return [torch.randint(0, 40, (length,), generator=generator).tolist() for length in lengths]


def tensors(rows: list[list[int]]) -> list[Tensor]:
    return [torch.tensor(row, dtype=torch.int64) for row in rows]


# 77 is in no document; 3 counts twice.
QUERY = [3, 3, 5, 8, 77, 21, 0, 39]


def test_equals_the_formula(documents: list[list[int]]) -> None:
    postings = Postings.of(tensors(documents), K1, B)
    found = postings.scores(torch.tensor(QUERY))
    torch.testing.assert_close(found, torch.tensor(slow(documents, QUERY), dtype=torch.float64))
    assert (found >= 0).all()


def test_values_of_the_tokens_add_up_to_the_score(documents: list[list[int]]) -> None:
    postings = Postings.of(tensors(documents), K1, B)
    query = torch.tensor(QUERY)
    scores = postings.scores(query)
    for index, document in enumerate(documents):
        values, counts = postings.token_values(index, query)
        assert float(values.sum()) == pytest.approx(float(scores[index]))
        assert counts.tolist() == [document.count(token) for token in QUERY]


def test_a_query_of_unknown_tokens_matches_nothing(documents: list[list[int]]) -> None:
    postings = Postings.of(tensors(documents), K1, B)
    assert not postings.scores(torch.tensor([77, 1000])).any()
    assert not postings.scores(torch.tensor([], dtype=torch.int64)).any()


def test_no_documents_are_refused() -> None:
    with pytest.raises(DataError, match="None of the 2 documents has a token"):
        Postings.of(tensors([[], []]), K1, B)
