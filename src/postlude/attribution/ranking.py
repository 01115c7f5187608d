"""The best training examples of every query, in one pass over an index.

Scores are computed shard by shard with a running list of the best, so a matrix of all queries by all examples never
exists: per layer one ``d1 x d2`` matrix a query (the query's gradient times the inverse curvature) meets the rows of
the memory map as they are read. Mean and deviation over all examples are kept along, to tell how far the best
stand out. Scores of everything at once are what ``Attributor.score`` gives.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from postlude.attribution.curvature import Dual
from postlude.attribution.engine import Attributor, InfluenceAttributor
from postlude.attribution.index import Index
from postlude.attribution.queries import Queries
from postlude.runs.progress import Progress

__all__ = ["Ranking", "rank", "stream"]


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The best examples of every query, found in one pass.

    Attributes:
        scores, numbers: ``[queries, top]``, best first, and equal ones in the order of the data.
        mean, deviation: fp64 ``[queries]``, over all examples.
    """

    scores: Tensor
    numbers: Tensor
    mean: Tensor
    deviation: Tensor


def rank(
    method: Attributor,
    index: Index,
    queries: Queries,
    top: int,
    *,
    keep: bool = False,
    progress: Progress | None = None,
) -> Ranking:
    """The best examples of every query, in one pass over the index."""
    count = len(queries)
    best = torch.full((count, 0), -math.inf)
    numbers = torch.zeros(count, 0, dtype=torch.int64)
    total, squares, seen = torch.zeros(count).double(), torch.zeros(count).double(), 0
    for start, scores in _pieces(method, index, queries, keep, progress):
        wide = scores.double()
        # Around the first mean seen, so that the squares of large, nearly equal scores do not cancel.
        if not seen:
            centre = wide.mean(1)
        seen += scores.shape[1]
        total += (wide - centre[:, None]).sum(1)
        squares += (wide - centre[:, None]).square().sum(1)
        leading, at = scores.topk(min(top, scores.shape[1]), dim=1)
        best = torch.cat([best, leading], 1)
        numbers = torch.cat([numbers, at + start], 1)
        # By number first, then stably by score: equal scores come in the order of the data.
        order = numbers.argsort(dim=1)
        best, numbers = best.gather(1, order), numbers.gather(1, order)
        order = best.argsort(dim=1, descending=True, stable=True)[:, :top]
        best, numbers = best.gather(1, order), numbers.gather(1, order)
    mean = total / seen
    deviation = (squares / seen - mean.square()).clamp(min=0).sqrt()
    return Ranking(best, numbers, centre + mean, deviation)


def _pieces(
    method: Attributor, index: Index, queries: Queries, keep: bool, progress: Progress | None
) -> Iterator[tuple[int, Tensor]]:
    """Scores ``[queries, examples]`` of consecutive examples."""
    # The dual form is taken for small sets, scores all of them in one pass, and would need two more for matrices.
    if isinstance(method, InfluenceAttributor) and method.chosen_curvature(index)[0] is not Dual:
        yield from stream(method, index, queries, keep=keep, progress=progress)
    else:
        yield 0, method.score(index, queries, keep=keep, progress=progress).total


def stream(
    method: InfluenceAttributor,
    index: Index,
    queries: Queries,
    *,
    keep: bool = False,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """``(first example, scores [queries, examples])``, shard by shard, all layers of a shard at once."""
    weights = method.weights(index, queries)
    choice = method.chosen_curvature(index)[2]
    with progress or Progress(show=False) as shown:
        if choice is not None:
            shown.log(method.taken(index, keep=keep))
        fits = shown.iterate(method.fits(index, keep=keep), "curvature", total=len(index.layers))
        asked, factors = {}, {}
        for layer, fitted, source in fits:
            rows = method.query_rows(index, queries, layer)
            asked[layer.module] = fitted.prepared(rows, source)
            factors[layer.module] = method.layer_factors(index, layer, fitted, source)
        _, settings, _ = method.chosen_curvature(index)
        double = settings.precision == torch.float64
        sources = {module: index.layer(module) for module in asked}
        for shard in shown.iterate(index.store.shards, "shards"):
            scores = torch.zeros(len(queries), len(shard))
            for module, one in asked.items():
                for first, rows in sources[module].chunks(start=shard.start, stop=shard.stop):
                    rows = rows.double() if double else rows
                    place = slice(first - shard.start, first - shard.start + len(rows))
                    found = one.products(rows)
                    scale = factors[module]
                    if scale is not None:
                        found = found * scale[first : first + len(rows)].to(found)
                    scores[:, place] += found
            if weights is not None:
                scores *= weights[0][:, None].to(scores)
                scores *= weights[1][shard.start : shard.stop].to(scores)
            yield shard.start, scores
