"""Sets of intervals on a line: union, intersection, length, and how far two of them agree.

An interval is ``(start, end)`` with ``start <= end``; a set is any iterable of them, overlapping or not, in any order.
Results are unions: sorted, disjoint, touching ones joined. An interval of no length holds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from postlude.errors import DataError

__all__ = ["Interval", "Intervals", "intersection", "iou", "length", "union"]

Interval = tuple[float, float]
Intervals = tuple[Interval, ...]


def union(intervals: Iterable[Interval]) -> Intervals:
    """The same points as disjoint intervals, sorted.

    Raises:
        DataError: an end before its start, or a number that is not finite.
    """
    found: list[Interval] = []
    for start, end in sorted(map(_checked, intervals)):
        if start == end:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return tuple(found)


def intersection(a: Iterable[Interval], b: Iterable[Interval]) -> Intervals:
    """The points that are in both."""
    first, second = union(a), union(b)
    found: list[Interval] = []
    i = j = 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            found.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return tuple(found)


def length(intervals: Iterable[Interval]) -> float:
    """How much of the line they cover."""
    return math.fsum(end - start for start, end in union(intervals))


def iou(a: Iterable[Interval], b: Iterable[Interval], *, both_empty: float) -> float:
    """Length of the intersection over the length of the union; 0 where exactly one of them is empty.

    Args:
        a: intervals.
        b: others.
        both_empty: the value where neither holds anything. A reward says 1 (silence about nothing is right), a metric
            NaN (such a pair says nothing about times and is left out); the two must not be mixed up.
    """
    a, b = union(a), union(b)
    if not (a or b):
        return both_empty
    return length(intersection(a, b)) / length((*a, *b))


def _checked(interval: Interval) -> Interval:
    start, end = interval
    if not (math.isfinite(start) and math.isfinite(end) and start <= end):
        raise DataError(
            f"{start:g} to {end:g} is no interval; expected two finite numbers, the start not after the end"
        )
    return float(start), float(end)
