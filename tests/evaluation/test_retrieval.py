from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from postlude.errors import DataError, SettingsError
from postlude.evaluation.retrieval import (
    noised,
    plant_facts,
    planted_sources,
    ranks_of,
    self_retrieval,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


TRAIN = list(torch.randint(0, 50, (40, 12), generator=generator()))


def overlap(queries: Sequence[Tensor]) -> Tensor:
    """How many positions agree."""
    return torch.stack([torch.stack([(q == t).sum() for t in TRAIN]) for q in queries]).double()


def alike(queries: Sequence[Tensor]) -> Tensor:
    return torch.zeros(len(queries), len(TRAIN))


def test_as_many_tokens_are_replaced_as_asked_and_each_by_another() -> None:
    pool = torch.cat(TRAIN)
    for seed in range(5):
        copy = noised(TRAIN[0], pool, 0.3, generator(seed))
        assert int((copy != TRAIN[0]).sum()) == round(0.3 * 11)
        assert copy[0] == TRAIN[0][0]
        assert torch.isin(copy, pool).all()
    assert torch.equal(noised(TRAIN[0], pool, 0, generator()), TRAIN[0])
    with pytest.raises(SettingsError, match="0 to 1"):
        noised(TRAIN[0], pool, 1.5, generator())
    with pytest.raises(DataError, match="one token only"):
        noised(torch.ones(5), torch.ones(5), 0.5, generator())


def test_equal_scores_count_as_above() -> None:
    scores = torch.tensor([[3.0, 1.0, 3.0, 2.0]])
    assert [int(ranks_of(scores, torch.tensor([i]))) for i in range(4)] == [2, 4, 2, 3]
    with pytest.raises(DataError, match="1 scores are not finite"):
        ranks_of(torch.tensor([[1.0, torch.nan]]), torch.tensor([0]))


def test_a_method_that_compares_tokens_finds_copies() -> None:
    found = self_retrieval(overlap, TRAIN, queries=20)
    assert found["exact_top1"] == found["noised_top1"] == found["noised_mrr"] == 1.0
    ruined = self_retrieval(overlap, TRAIN, queries=20, share=1.0)
    assert ruined["exact_top1"] == 1.0
    assert ruined["noised_top1"] < 0.3
    assert ruined["noised_top1_low"] <= ruined["noised_top1"] <= ruined["noised_top1_high"]


def test_a_method_that_scores_everything_alike_finds_nothing() -> None:
    found = self_retrieval(alike, TRAIN)
    assert found["exact_top1"] == found["noised_top5"] == 0.0
    assert found["noised_mrr"] == pytest.approx(1 / 40)


def test_scores_of_another_shape_are_refused() -> None:
    with pytest.raises(DataError, match=r"expected \[40, 40\]"):
        self_retrieval(lambda queries: torch.zeros(2, 3), TRAIN)
    with pytest.raises(DataError, match="no training examples"):
        self_retrieval(alike, [])


def test_facts() -> None:
    planted = plant_facts(6, seed=3)
    assert len(planted.examples) == 24 and len(planted.queries) == 6
    assert planted.sources[1] == [4, 5, 6, 7]
    assert not set(planted.queries) & set(planted.examples)
    assert len(set(planted.examples)) == 24
    for query, sources in zip(planted.queries, planted.sources, strict=True):
        # Whoever it is about is in all of them.
        words = set(query.replace(",", " ").replace(".", " ").split())
        for source in sources:
            shared = words & set(planted.examples[source].replace(",", " ").strip(".").split())
            assert len([word for word in shared if word[0].isupper()]) >= 2
    assert plant_facts(6, seed=3) == planted != plant_facts(6, seed=4)
    with pytest.raises(SettingsError, match="2 to 800"):
        plant_facts(1000)


def test_recall_counts_sources_among_the_first() -> None:
    # Of 6 examples, two are sources of each of two queries.
    scores = torch.tensor([[9.0, 8, 1, 1, 0, 0], [9.0, 1, 8, 0, 7, 1]])
    found = planted_sources(lambda queries: scores, TRAIN[:2], [[0, 1], [2, 4]], 6)
    assert found["recall"] == pytest.approx((1 + 0.5) / 2)
    assert found["recall_at_10"] == 1.0
    assert found["mrr"] == pytest.approx((1 + 1 / 2) / 2)
    with pytest.raises(DataError, match="equally many"):
        planted_sources(lambda queries: scores, TRAIN[:2], [[0, 1], [2]], 6)
