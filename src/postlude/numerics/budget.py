"""Budget = importance x cost: choose one option for every item, total cost within a budget, total loss least.

    min  sum_i loss[i, o_i]      subject to      sum_i cost[i, o_i] <= budget

An item is a layer, an option a number of bits (or a rank, or a share of weights kept), the cost its bytes, the loss
what that layer alone does to the model at that option. Losses are taken to add up, which is an assumption about the
model and not of this file. As an integer programme over bits: "AdaQuant + IP" (arXiv:2006.10518).

:func:`allocate` is exact. States of the items so far, ``(cost, loss)``, are kept as long as no other state is cheaper
and better (dynamic programming) and as long as the relaxation of the remaining items, which may mix two options of an
item, does not already lose against the greedy choice (branch and bound). The relaxation walks the lower convex hulls
of the options, the steepest step first. :func:`allocate_greedy` is that walk alone: near the optimum where items are
many and steps small, and the usual rule of papers that rank importance per byte.

Time and memory of the exact one grow with the number of undominated states, at most ``budget + 1``: costs are whole
numbers, of a coarse unit where that matters.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from postlude.errors import SettingsError

__all__ = ["Allocation", "allocate", "allocate_greedy"]

# The relaxation adds losses in another order, which rounds differently; only what is worse by more is cut off.
_SLACK = 1e-12


@dataclasses.dataclass(frozen=True)
class Allocation:
    """One option for every item.

    Attributes:
        options: index of the option of every item.
        cost: their total cost.
        loss: their total loss, added item by item.
    """

    options: tuple[int, ...]
    cost: int
    loss: float


def allocate(
    losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int
) -> Allocation:
    """The choice of least total loss within the budget; of several, one of least cost.

    Args:
        losses: of every option of every item; items may have different numbers of options.
        costs: whole numbers of any unit, of the same shape, not negative.
        budget: most that the choices may cost together, in that unit.

    Raises:
        SettingsError: the lists do not fit each other or hold something that is no number, or the cheapest
            choice is beyond the budget; says what it would cost.
    """
    _check(losses, costs, budget)
    hulls = [_hull(*pair) for pair in zip(losses, costs, strict=True)]
    best = _greedy(losses, costs, budget, hulls).loss
    slack = _SLACK * len(losses) * max(abs(value) for row in losses for value in row)
    cost, loss = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    history: list[tuple[Tensor, Tensor]] = []
    for item, (item_losses, item_costs) in enumerate(zip(losses, costs, strict=True)):
        every_cost = (cost[:, None] + torch.tensor(item_costs)).flatten()
        every_loss = (loss[:, None] + torch.tensor(item_losses, dtype=torch.float64)).flatten()
        rest = _Relaxation(losses[item + 1 :], costs[item + 1 :], hulls[item + 1 :])
        possible = every_loss + rest.loss(budget - every_cost)
        kept = torch.nonzero(possible <= best + slack).flatten()
        kept = kept[_undominated(every_cost[kept], every_loss[kept])]
        history.append((kept // len(item_costs), kept % len(item_costs)))
        cost, loss = every_cost[kept], every_loss[kept]
    # In the order of rising cost the loss falls, so the last state is the best.
    state = len(cost) - 1
    total_cost, total_loss = int(cost[state]), float(loss[state])
    options: list[int] = []
    for before, option in reversed(history):
        options.append(int(option[state]))
        state = int(before[state])
    return Allocation(tuple(reversed(options)), total_cost, total_loss)


def allocate_greedy(
    losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int
) -> Allocation:
    """Start at the cheapest options and buy the steepest fall of loss per cost as long as something fits.

    Arguments and errors as for :func:`allocate`. The steps are those along the lower convex hull of every item's
    options; a step that does not fit is the end of its item.
    """
    _check(losses, costs, budget)
    hulls = [_hull(*pair) for pair in zip(losses, costs, strict=True)]
    return _greedy(losses, costs, budget, hulls)


def _greedy(
    losses: Sequence[Sequence[float]],
    costs: Sequence[Sequence[int]],
    budget: int,
    hulls: Sequence[Sequence[int]],
) -> Allocation:
    place = [0] * len(hulls)
    left = budget - sum(costs[item][hull[0]] for item, hull in enumerate(hulls))
    queue = [_step(losses, costs, hulls, item, 0) for item in range(len(hulls))]
    heapq.heapify(queue)
    while queue:
        slope, item, extra = heapq.heappop(queue)
        if slope == 0 or extra > left:
            continue
        left -= extra
        place[item] += 1
        heapq.heappush(queue, _step(losses, costs, hulls, item, place[item]))
    options = tuple(hull[place[item]] for item, hull in enumerate(hulls))
    total = 0.0
    for item, option in enumerate(options):
        total += losses[item][option]
    return Allocation(options, sum(costs[item][o] for item, o in enumerate(options)), total)


def _step(
    losses: Sequence[Sequence[float]],
    costs: Sequence[Sequence[int]],
    hulls: Sequence[Sequence[int]],
    item: int,
    place: int,
) -> tuple[float, int, int]:
    """Slope (negative, 0 at the end of the hull), item and extra cost of the step that leaves a vertex."""
    if place + 1 >= len(hulls[item]):
        return 0.0, item, 0
    here, there = hulls[item][place : place + 2]
    extra = costs[item][there] - costs[item][here]
    return (losses[item][there] - losses[item][here]) / extra, item, extra


def _hull(losses: Sequence[float], costs: Sequence[int]) -> list[int]:
    """Options on the lower convex hull, from the cheapest to the one of least loss."""
    hull: list[int] = []
    for option in sorted(range(len(costs)), key=lambda o: (costs[o], losses[o])):
        if hull and losses[option] >= losses[hull[-1]]:
            continue
        while len(hull) > 1 and _is_above(losses, costs, hull[-2], hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _is_above(
    losses: Sequence[float], costs: Sequence[int], first: int, middle: int, last: int
) -> bool:
    """Whether ``middle`` lies on or above the line from ``first`` to ``last``."""
    return (losses[middle] - losses[first]) * (costs[last] - costs[first]) >= (
        losses[last] - losses[first]
    ) * (costs[middle] - costs[first])


class _Relaxation:
    """Least loss of some items at any cost, where a share of a step along a hull may be bought."""

    def __init__(
        self,
        losses: Sequence[Sequence[float]],
        costs: Sequence[Sequence[int]],
        hulls: Sequence[Sequence[int]],
    ) -> None:
        starts = [(losses[item][hull[0]], costs[item][hull[0]]) for item, hull in enumerate(hulls)]
        steps = sorted(
            _step(losses, costs, hulls, item, place)
            for item, hull in enumerate(hulls)
            for place in range(len(hull) - 1)
        )
        slopes = torch.tensor([step[0] for step in steps], dtype=torch.float64)
        widths = torch.tensor([step[2] for step in steps], dtype=torch.int64)
        cheapest = sum(cost for _, cost in starts)
        first = torch.tensor([math.fsum(loss for loss, _ in starts)], dtype=torch.float64)
        # Corners of a falling, convex, piecewise linear function of the cost.
        self._costs = cheapest + torch.cat([torch.zeros(1, dtype=torch.int64), widths.cumsum(0)])
        self._losses = first + torch.cat([torch.zeros(1), (slopes * widths).cumsum(0)])
        self._slopes = torch.cat([slopes, torch.zeros(1, dtype=torch.float64)])

    def loss(self, budgets: Tensor) -> Tensor:
        """``[n]`` costs to the least losses within them; infinity where not even the cheapest options fit."""
        corner = torch.searchsorted(self._costs, budgets, right=True) - 1
        safe = corner.clamp(min=0)
        found = self._losses[safe] + self._slopes[safe] * (budgets - self._costs[safe])
        return torch.where(corner >= 0, found, torch.inf)


def _undominated(cost: Tensor, loss: Tensor) -> Tensor:
    """Indices of the states than which none is at most as dear and at most as lossy, by rising cost."""
    order = torch.argsort(loss, stable=True)
    order = order[torch.argsort(cost[order], stable=True)]
    least = torch.cummin(loss[order], dim=0).values
    better = torch.ones_like(order, dtype=torch.bool)
    better[1:] = loss[order][1:] < least[:-1]
    return order[better]


def _check(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> None:
    shapes = [len(row) for row in losses], [len(row) for row in costs]
    if not shapes[0] or shapes[0] != shapes[1] or not all(shapes[0]):
        raise SettingsError(
            f"a budget is spent on items with one cost for every loss, got {shapes[0]} losses and {shapes[1]} costs"
        )
    for item, (row, prices) in enumerate(zip(losses, costs, strict=True)):
        if not all(map(math.isfinite, row)) or not all(
            isinstance(price, int) and price >= 0 for price in prices
        ):
            raise SettingsError(
                f"item {item} has losses {list(row)} and costs {list(prices)}; expected finite losses and "
                "whole costs from 0"
            )
    least = sum(min(prices) for prices in costs)
    if least > budget:
        raise SettingsError(
            f"the cheapest options cost {least} together and the budget is {budget}: raise the budget, or "
            "allow cheaper options"
        )
