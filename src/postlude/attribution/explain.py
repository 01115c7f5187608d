"""Where a score comes from: its parts by layer, and by token of the training example and of the query.

A score of an influence method is a sum over layers of ``<M, G>``, with ``M = (H + lam)^-1 G_q`` and the gradient ``G``
of the training example. ``G`` is a sum over the positions of the example, so the score is too::

    G = sum_p (x_p P_in)^T (dy_p P_out),        part of position p = (x_p P_in) M (dy_p P_out)^T

An index of factors keeps ``G V V^T`` with ``V`` orthonormal, which is linear in ``G`` again: ``M`` becomes ``M V V^T``.
The parts of a training example add up to its score, but for the rounding of stored numbers. With query and example
exchanged, the same gives the parts of the tokens of the query. Nothing per token is stored: the model runs once more
on the few examples that are shown.

The part of a position belongs to the token that is read there: through the layers, at that place, by all losses
that it has a share in. It is not the part of the loss of that token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from postlude.attribution.curvature import LayerCurvature, Source
from postlude.attribution.examples import Batch, Collection, Example, batches
from postlude.attribution.outputs import output_function
from postlude.attribution.representation import GradientRepresentation
from postlude.attribution.rows import DenseRows, FactorRows, Rows
from postlude.errors import SettingsError
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.gradients import CollectedLayer, GradientCollector

__all__ = ["Parts", "influence_parts", "token_parts"]

# ``left [d1, k]`` and ``right [d2, k]``, ``<left right^T, G>`` being the score; no right for a matrix as it is.
Factors = tuple[Tensor, Tensor | None]


@dataclasses.dataclass(frozen=True)
class Parts:
    """What one score is made of.

    Attributes:
        layers: by module path; None for a method without layers.
        train, query: fp64 ``[tokens]`` of the training example and of the query; None where there are no such parts.
    """

    layers: dict[str, float] | None = None
    train: Tensor | None = None
    query: Tensor | None = None


def influence_parts(
    checkpoint: Checkpoint,
    collection: Collection,
    representation: GradientRepresentation,
    asked: Sequence[Example],
    train: Sequence[Example],
    pairs: Sequence[tuple[int, int]],
    fits: Iterable[tuple[CollectedLayer, LayerCurvature, Source, Rows, Tensor | None]],
    weights: tuple[Tensor, Tensor] | None,
    weight: Callable[[str], float],
    *,
    tokens: bool,
) -> list[Parts]:
    """Parts of scores of the engine.

    Args:
        checkpoint, collection, representation: of the index.
        asked: the queries.
        train: the training examples of the pairs, one each.
        pairs: ``(query, example number)``.
        fits: layer, curvature, rows of the index, rows of the queries times the layer's weight, and factors on the
            layer's part for every example or None, layer by layer.
        weights: factors on the scores of a query, and of an example.
        weight: of a layer.
        tokens: also by token.
    """
    scale = [
        1.0 if weights is None else float(weights[0][q]) * float(weights[1][n]) for q, n in pairs
    ]
    layers: list[dict[str, float]] = [{} for _ in pairs]
    of_train: list[dict[str, Factors]] = [{} for _ in pairs]
    of_query: list[dict[str, Factors]] = [{} for _ in pairs]
    for layer, fitted, source, rows, factors in fits:
        if not pairs:
            break
        wanted = sorted({q for q, _ in pairs})
        matrices = dict(zip(wanted, fitted.matrices(rows.take(wanted), source), strict=True))
        for at, (q, n) in enumerate(pairs):
            row = source.rows(n, n + 1)
            row = row.double() if matrices[q].dtype == torch.float64 else row
            factor = 1.0 if factors is None else float(factors[n])
            part = factor * float(row.against(matrices[q][None]))
            layers[at][layer.module] = scale[at] * part
            if tokens:
                of_train[at][layer.module] = _onto(row, 0, factor * matrices[q])
                # The model gives the gradients of the query again, without the weight of the layer.
                matrix = factor * weight(layer.module) * fitted.matrices(row, source)[0]
                of_query[at][layer.module] = _onto(rows, q, matrix)
    if not tokens:
        return [Parts(one) for one in layers]
    train_parts = token_parts(
        checkpoint, collection, representation, train, [[one] for one in of_train]
    )
    order = sorted({q for q, _ in pairs})
    places = {q: [at for at, pair in enumerate(pairs) if pair[0] == q] for q in order}
    found = token_parts(
        checkpoint,
        collection,
        representation,
        [asked[q] for q in order],
        [[of_query[at] for at in places[q]] for q in order],
    )
    query_parts = {at: found[i][j] for i, q in enumerate(order) for j, at in enumerate(places[q])}
    return [
        Parts(layers[at], scale[at] * train_parts[at][0][0], scale[at] * query_parts[at][0])
        for at in range(len(pairs))
    ]


def token_parts(
    checkpoint: Checkpoint,
    collection: Collection,
    representation: GradientRepresentation,
    examples: Sequence[Example],
    factors: Sequence[Sequence[dict[str, Factors]]],
) -> list[list[tuple[Tensor, dict[str, float]]]]:
    """Parts of ``sum over layers of <left right^T, G>`` by token of the example.

    Args:
        checkpoint, collection, representation: how gradients are made.
        examples: to run.
        factors: for every example, any number of matrices to multiply with, by module path.

    Returns:
        For every example and each of its matrices fp64 ``[tokens]``, and the sums over tokens by layer.
    """
    projection = representation.projection(collection.seed)
    paths = list(dict.fromkeys(path for many in factors for one in many for path in one))
    output = output_function(representation.output, checkpoint.kind)(checkpoint, collection)
    sums: list[list[tuple[Tensor, dict[str, float]]]] = [
        [(torch.zeros(len(example.tokens), dtype=torch.float64), {}) for _ in many]
        for example, many in zip(examples, factors, strict=True)
    ]
    with GradientCollector(checkpoint.model, paths, projection) as collector:
        for batch in batches(examples, collection.tokens_per_batch):

            def observe(layer: CollectedLayer, x: Tensor, dy: Tensor, batch: Batch = batch) -> None:
                p_in, p_out = collector.matrices(layer, x)
                size = projection.scale(layer.in_features) * projection.scale(layer.out_features)
                reads = (x if p_in is None else x @ p_in).double().cpu()
                writes = (dy if p_out is None else dy @ p_out).double().cpu()
                for at, row in enumerate(batch.rows):
                    length = len(examples[row].tokens)
                    for (total, by_layer), one in zip(sums[row], factors[row], strict=True):
                        left, right = one[layer.module]
                        inner = reads[at, :length] @ left.double()
                        outer = writes[at, :length]
                        outer = outer if right is None else outer @ right.double()
                        part = size * (inner * outer).sum(-1)
                        total += part
                        by_layer[layer.module] = by_layer.get(layer.module, 0.0) + float(part.sum())

            collector.collect(
                lambda batch=batch: output(batch)[0].sum(),  # type: ignore[misc]
                len(batch),
                _nothing,
                observer=observe,
            )
    return sums


def _nothing(layer: CollectedLayer, gradients: Tensor) -> None:
    """Gradients are not needed, only what they are made of."""


def _onto(rows: Rows, at: int, matrix: Tensor) -> Factors:
    """A matrix as it acts on gradients that are kept as row ``at`` keeps them."""
    if isinstance(rows, DenseRows):
        return matrix, None
    if isinstance(rows, FactorRows):
        v = rows.v[at].to(matrix)
        length = v.norm(dim=-1, keepdim=True)
        basis = (v / torch.where(length > 0, length, torch.ones_like(length))).mT
        return matrix @ basis, basis
    raise SettingsError(f"{type(rows).__name__} has no parts by token")
