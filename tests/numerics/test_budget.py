from __future__ import annotations

import itertools
import random

import pytest

from postlude.errors import SettingsError
from postlude.numerics.budget import Allocation, allocate, allocate_greedy


def brute_force(losses: list[list[float]], costs: list[list[int]], budget: int) -> Allocation:
    best: tuple[float, int, tuple[int, ...]] | None = None
    for options in itertools.product(*(range(len(row)) for row in losses)):
        cost = sum(costs[i][o] for i, o in enumerate(options))
        loss = 0.0
        for i, o in enumerate(options):
            loss += losses[i][o]
        if cost <= budget and (best is None or (loss, cost) < best[:2]):
            best = loss, cost, options
    assert best is not None
    return Allocation(best[2], best[1], best[0])


def problem(seed: int, items: int) -> tuple[list[list[float]], list[list[int]], int]:
    """Any losses and costs, ragged, also dominated options and equal ones."""
    rng = random.Random(seed)
    counts = [rng.randint(1, 5) for _ in range(items)]
    losses = [[rng.choice([0.0, -1.0, rng.random() * 10]) for _ in range(n)] for n in counts]
    costs = [[rng.randint(0, 12) for _ in range(n)] for n in counts]
    least = sum(map(min, costs))
    return losses, costs, rng.randint(least, max(least, sum(map(max, costs))))


@pytest.mark.parametrize("seed", range(60))
def test_exact_against_every_combination(seed: int) -> None:
    losses, costs, budget = problem(seed, items=6)
    expected, found = brute_force(losses, costs, budget), allocate(losses, costs, budget)
    assert found.loss == pytest.approx(expected.loss, abs=1e-12)
    assert found.cost <= budget
    assert found.cost == sum(costs[i][o] for i, o in enumerate(found.options))
    assert found.loss == sum((losses[i][o] for i, o in enumerate(found.options)), start=0.0)
    greedy = allocate_greedy(losses, costs, budget)
    assert greedy.cost == sum(costs[i][o] for i, o in enumerate(greedy.options)) <= budget
    assert greedy.loss >= found.loss


def test_six_layers_by_bits() -> None:
    # Halving the step quarters the error; layers differ in size and in importance.
    sizes, importance = [8, 512, 512, 64, 512, 24], [9.0, 1.0, 0.1, 30.0, 2.0, 5.0]
    bits = [2, 3, 4, 6, 8]
    losses = [[w * n * 4.0**-b for b in bits] for w, n in zip(importance, sizes, strict=True)]
    costs = [[n * b // 8 for b in bits] for n in sizes]
    found = allocate(losses, costs, sum(sizes) * 4 // 8)
    assert found == brute_force(losses, costs, sum(sizes) * 4 // 8)
    assert bits[found.options[3]] > bits[found.options[2]]


def test_many_layers_in_bytes() -> None:
    # Far too many combinations to try, and costs in the thousands: the bound has to cut.
    rng = random.Random(0)
    sizes = [rng.randint(1_000, 90_000) for _ in range(60)]
    losses = [[rng.random() * n * 4.0**-b for b in range(2, 9)] for n in sizes]
    costs = [[n * b // 8 for b in range(2, 9)] for n in sizes]
    budget = sum(sizes) // 2
    found, greedy = allocate(losses, costs, budget), allocate_greedy(losses, costs, budget)
    assert found.cost <= budget
    assert found.loss <= greedy.loss <= 1.05 * found.loss


def test_least_cost_among_equals() -> None:
    assert allocate([[1.0, 1.0, 2.0]], [[7, 3, 1]], 10) == Allocation((1,), 3, 1.0)


def test_greedy_can_miss() -> None:
    losses, costs = [[10.0, 0.0], [6.0, 0.0], [6.0, 0.0]], [[0, 6], [0, 5], [0, 5]]
    assert allocate_greedy(losses, costs, 10).options == (1, 0, 0)
    assert allocate(losses, costs, 10).options == (0, 1, 1)


@pytest.mark.parametrize(
    ("losses", "costs", "budget", "message"),
    [
        ([], [], 3, "one cost for every loss"),
        ([[1.0]], [[1, 2]], 3, "one cost for every loss"),
        ([[]], [[]], 3, "one cost for every loss"),
        ([[float("nan")]], [[1]], 3, "finite losses"),
        ([[1.0]], [[-1]], 3, "whole costs from 0"),
        ([[1.0], [1.0]], [[4], [5]], 8, "cost 9 together and the budget is 8"),
    ],
)
def test_refused(
    losses: list[list[float]], costs: list[list[int]], budget: int, message: str
) -> None:
    for one in (allocate, allocate_greedy):
        with pytest.raises(SettingsError, match=message):
            one(losses, costs, budget)
