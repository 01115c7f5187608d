"""Does a method find where something was learned? Two checks that need no retrained models.

- **Self-retrieval.** The query is a training example, as it is or with a share of its tokens replaced by tokens drawn
  from the training set. The example itself must come first. Easy, and no evidence of influence: a method that
  fails here is broken, one that passes may still only compare tokens.
- **Planted sources.** Facts about invented people are put into the training set, each stated in several ways, and the
  model is trained on it. A query states a fact in a way that is not in the training set; its sources are the examples
  that state the same fact. Another fact about the same person is planted too: whoever only looks for the
  name takes it for a source.

Both checks are our choice of protocol, after the noised copies and generated facts that attribution libraries test
themselves with. Where BM25 or the similarity of hidden states does as well as a method, the check says nothing
for the method, so they belong beside it in every table.

A rank counts every example of an equal or higher score: a method that scores everything alike ranks last.

Attribution is another noun, and nouns do not import each other: scores come from a function that takes sequences
of tokens. The combination, ``postlude evaluate retrieval``, is made in the front door.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from postlude.errors import DataError, SettingsError
from postlude.evaluation.lds import bootstrap_mean

__all__ = [
    "Planted",
    "PlantedRanks",
    "Score",
    "SelfRanks",
    "noised",
    "plant_facts",
    "planted_ranks",
    "planted_sources",
    "ranks_of",
    "self_ranks",
    "self_retrieval",
]

# Queries, each int64 [length], to scores [Q, N] of the N training examples; larger is more influence.
Score = Callable[[Sequence[Tensor]], Tensor]

_FIRST = ("Ada", "Boris", "Clara", "Dorin", "Elsa", "Felix", "Greta", "Hugo", "Ines", "Jonas",
          "Kira", "Leon", "Mara", "Nils", "Olga", "Pavel", "Rosa", "Sven", "Tilda", "Viktor")  # fmt: skip
_LAST = ("Abendroth", "Birkenfeld", "Corvin", "Dunkelberg", "Eschenbach", "Fernholm", "Grauwald",
         "Hohenlind", "Immerthal", "Kaltenbrun", "Lorenzen", "Morgenroth", "Nordhain", "Osterholt",
         "Pfauenried", "Quellstein", "Rabensburg", "Silberkamp", "Tannenau", "Wolkenried")  # fmt: skip
_VALUES = {
    "town": ("Lisbon", "Tromso", "Cairo", "Lima", "Kyoto", "Perth", "Quito", "Oslo", "Dakar", "Hanoi"),
    "trade": ("baker", "surgeon", "weaver", "pilot", "miner", "lawyer", "sailor", "teacher", "painter", "farmer"),
}  # fmt: skip
# The last way of each is kept for queries.
_WAYS = {
    "town": (
        "{name} was born in {value}.",
        "The town where {name} was born is {value}.",
        "{value} is the birthplace of {name}.",
        "When {name} came into the world, it was in {value}.",
        "A native of {value}, {name} was born there.",
    ),
    "trade": (
        "{name} works as a {value}.",
        "The profession of {name} is {value}.",
        "By trade, {name} is a {value}.",
        "{name} has always been a {value}.",
        "For a living, {name} is employed as a {value}.",
    ),
}


@dataclasses.dataclass(frozen=True)
class Planted:
    """Facts to put into a training set.

    Attributes:
        examples: documents that state them.
        queries: documents that state them in another way.
        sources: of each query, the indices of its sources in ``examples``.
    """

    examples: list[str]
    queries: list[str]
    sources: list[list[int]]


def noised(tokens: Tensor, pool: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A copy with a share of its tokens, the first one excepted, replaced by draws from ``pool``.

    Every replaced token becomes a different one.

    Args:
        tokens: ``int64 [length]``.
        pool: ``int64 [P]`` to draw from, with two different values or more.
        share: of the tokens, 0 to 1.
        generator: of the draws.
    """
    if not 0 <= share <= 1:
        raise SettingsError(f"share is {share}; expected 0 to 1")
    copy = tokens.clone()
    count = round(share * (len(tokens) - 1))
    places = 1 + torch.randperm(len(tokens) - 1, generator=generator)[:count]
    values = pool.unique()
    if count and len(values) < 2:
        raise DataError(
            "The training set has one token only, so nothing can be replaced by another."
        )
    for place in places.tolist():
        others = pool[pool != tokens[place]]
        copy[place] = others[int(torch.randint(len(others), (), generator=generator))]
    return copy


def ranks_of(scores: Tensor, source: Tensor) -> Tensor:
    """Rank from 1 of one example for each query; equal scores count as above.

    Args:
        scores: ``[Q, N]``.
        source: ``int64 [Q]``.

    Returns:
        ``int64 [Q]``.
    """
    if not bool(scores.isfinite().all()):
        raise DataError(
            f"{int((~scores.isfinite()).sum())} scores are not finite, so they have no ranks."
        )
    return (scores >= scores.gather(1, source[:, None])).sum(1)


class SelfRanks(NamedTuple):
    """Ranks of training examples among what copies of them find.

    Attributes:
        exact, noised: ``int64 [Q]``, from 1.
    """

    exact: Tensor
    noised: Tensor

    def summary(self) -> dict[str, float]:
        """What :func:`self_retrieval` returns."""
        top1 = bootstrap_mean((self.noised == 1).double())
        return {
            "exact_top1": float((self.exact == 1).double().mean()),
            "noised_top1": top1.value,
            "noised_top1_low": top1.low,
            "noised_top1_high": top1.high,
            "noised_top5": float((self.noised <= 5).double().mean()),
            "noised_mrr": float(self.noised.double().reciprocal().mean()),
        }


def self_ranks(
    score: Score,
    train: Sequence[Tensor],
    *,
    queries: int = 60,
    share: float = 0.3,
    seed: int = 0,
) -> SelfRanks:
    """Ranks behind :func:`self_retrieval`, which has the same arguments."""
    if not train:
        raise DataError("There are no training examples: expected at least one.")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(train), generator=generator)[:queries]
    pool = torch.cat([tokens[1:] for tokens in train])
    copies = [train[i] for i in chosen.tolist()]
    changed = [noised(tokens, pool, share, generator) for tokens in copies]
    exact = ranks_of(_checked(score(copies), len(copies), len(train)), chosen)
    found = ranks_of(_checked(score(changed), len(copies), len(train)), chosen)
    return SelfRanks(exact, found)


def self_retrieval(
    score: Score,
    train: Sequence[Tensor],
    *,
    queries: int = 60,
    share: float = 0.3,
    seed: int = 0,
) -> dict[str, float]:
    """How often a training example is found by a noised copy of itself, and by an exact one.

    Args:
        score: the method.
        train: ``N`` sequences of tokens.
        queries: how many examples to try; all where there are fewer.
        share: of the tokens replaced.
        seed: of the choice of examples and tokens.

    Returns:
        ``exact_top1``, ``noised_top1`` with its 95 % interval ``noised_top1_low`` and ``noised_top1_high`` (bootstrap
        over queries), ``noised_top5``, ``noised_mrr``: all 0 to 1.
    """
    return self_ranks(score, train, queries=queries, share=share, seed=seed).summary()


def plant_facts(facts: int = 20, seed: int = 0) -> Planted:
    """Facts about invented people: two of each, stated four times and asked for in a fifth way.

    Args:
        facts: how many; two a person.
        seed: of the draws.

    Raises:
        SettingsError: more facts than there are names.
    """
    names = [f"{first} {last}" for first in _FIRST for last in _LAST]
    if not 2 <= facts <= 2 * len(names):
        raise SettingsError(f"facts is {facts}; expected 2 to {2 * len(names)}")
    generator = torch.Generator().manual_seed(seed)
    people = torch.randperm(len(names), generator=generator).tolist()
    planted = Planted([], [], [])
    for number in range(facts):
        kind = list(_VALUES)[number % len(_VALUES)]
        value = _VALUES[kind][int(torch.randint(len(_VALUES[kind]), (), generator=generator))]
        told = [
            way.format(name=names[people[number // len(_VALUES)]], value=value)
            for way in _WAYS[kind]
        ]
        start = len(planted.examples)
        planted.examples.extend(told[:-1])
        planted.queries.append(told[-1])
        planted.sources.append(list(range(start, start + len(told) - 1)))
    return planted


class PlantedRanks(NamedTuple):
    """Ranks of the known sources of queries.

    Attributes:
        ranks: ``int64 [Q, R]``, from 1.
    """

    ranks: Tensor

    @property
    def recall(self) -> Tensor:
        """Share of the ``R`` sources among the first ``R``, ``float64 [Q]``."""
        return (self.ranks <= self.ranks.shape[1]).double().mean(1)

    def summary(self) -> dict[str, float]:
        """What :func:`planted_sources` returns."""
        recall = bootstrap_mean(self.recall)
        return {
            "recall": recall.value,
            "recall_low": recall.low,
            "recall_high": recall.high,
            "recall_at_10": float((self.ranks <= 10).double().mean()),
            "mrr": float(self.ranks.amin(1).double().reciprocal().mean()),
        }


def planted_ranks(
    score: Score, queries: Sequence[Tensor], sources: Sequence[Sequence[int]], examples: int
) -> PlantedRanks:
    """Ranks behind :func:`planted_sources`, which has the same arguments."""
    scores = _checked(score(queries), len(queries), examples)
    count = len(sources[0])
    if any(len(one) != count for one in sources):
        raise DataError("Every query needs equally many sources.")
    ranks = [ranks_of(scores, torch.tensor([one[i] for one in sources])) for i in range(count)]
    return PlantedRanks(torch.stack(ranks, 1))


def planted_sources(
    score: Score, queries: Sequence[Tensor], sources: Sequence[Sequence[int]], examples: int
) -> dict[str, float]:
    """How well known sources are found.

    Args:
        score: the method.
        queries: ``Q`` sequences of tokens.
        sources: of each query, the indices of its sources among all training examples, equally many.
        examples: how many training examples there are.

    Returns:
        ``recall``: share of the ``R`` sources among the first ``R``, with its 95 % interval ``recall_low`` and
        ``recall_high``; ``recall_at_10``; ``mrr`` of the first source found: all 0 to 1.
    """
    return planted_ranks(score, queries, sources, examples).summary()


def _checked(scores: Any, queries: int, examples: int) -> Tensor:
    found: Tensor = torch.as_tensor(scores)
    if tuple(found.shape) != (queries, examples):
        raise DataError(f"Scores are {tuple(found.shape)}; expected [{queries}, {examples}].")
    return found
