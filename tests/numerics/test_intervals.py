import math

import numpy as np
import pytest

from postlude.errors import DataError
from postlude.numerics.intervals import intersection, iou, length, union

# A time axis of thousandths: every end falls on a border of its cells.
CELLS = 4000


def drawn(generator: np.random.Generator) -> list[tuple[float, float]]:
    ends = generator.integers(0, CELLS, size=(generator.integers(0, 6), 2))
    return [(min(pair) / 1000, max(pair) / 1000) for pair in ends.tolist()]


def sampled(intervals: list[tuple[float, float]]) -> np.ndarray:
    middles = (np.arange(CELLS) + 0.5) / 1000
    inside = np.zeros(CELLS, bool)
    for start, end in intervals:
        inside |= (middles > start) & (middles < end)
    return inside


@pytest.mark.parametrize("seed", range(40))
def test_sampled_time_axis(seed: int) -> None:
    generator = np.random.default_rng(seed)
    a, b = drawn(generator), drawn(generator)
    first, second = sampled(a), sampled(b)
    assert length(a) == pytest.approx(first.sum() / 1000)
    assert length(intersection(a, b)) == pytest.approx((first & second).sum() / 1000)
    assert (sampled(list(union(a))) == first).all()
    either = (first | second).sum()
    expected = (first & second).sum() / either if either else 1.0
    assert iou(a, b, both_empty=1.0) == pytest.approx(expected)
    assert iou(a, b, both_empty=1.0) == iou(b, a, both_empty=1.0)


def test_union_is_sorted_and_disjoint() -> None:
    assert union([(2, 3), (0, 1), (1, 1.5), (2.5, 2.6), (4, 4)]) == ((0, 1.5), (2, 3))


def test_empty_sets() -> None:
    assert iou([], [], both_empty=1.0) == 1.0
    assert math.isnan(iou([], [(1, 1)], both_empty=math.nan))
    assert iou([], [(0, 1)], both_empty=1.0) == 0.0
    assert iou([(0, 1)], [(2, 3)], both_empty=1.0) == 0.0
    assert iou([(0, 2)], [(1, 2)], both_empty=1.0) == 0.5


@pytest.mark.parametrize("bad", [(2, 1), (0, math.inf), (math.nan, 1)])
def test_no_interval(bad: tuple[float, float]) -> None:
    with pytest.raises(DataError, match="is no interval"):
        union([bad])
