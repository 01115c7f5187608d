"""What an index is asked: queries, recorded as its training examples were, and their scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from postlude.attribution.curvature import Choice
from postlude.attribution.data import Data, batches, open_data
from postlude.attribution.index import Index
from postlude.attribution.outputs import Maker
from postlude.attribution.representation import GradientRepresentation, Representation
from postlude.attribution.rows import Rows
from postlude.errors import SettingsError
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.gradients import CollectedLayer

__all__ = ["Queries", "Scores", "record_queries", "record_rows"]


@dataclasses.dataclass(frozen=True)
class Queries:
    """Queries as an index's representation has them, in full precision.

    Attributes:
        examples: as the model was run on them.
        tensors: rows by name, ``[queries, ...]`` each.
        representation: how to read them.
        layers: of the index.
        checkpoint: the model they were recorded with, for methods that compute training gradients again.
        weights: what the part of every layer in a score is multiplied by, by module path; None for ones.
    """

    examples: list[Any]
    tensors: dict[str, Tensor]
    representation: Representation
    layers: tuple[CollectedLayer, ...]
    checkpoint: Checkpoint
    weights: Mapping[str, float] | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def weighted(self, weights: Mapping[str, float] | None) -> Queries:
        """The same queries with weights of layers (:mod:`postlude.attribution.layer_weights`), or without."""
        return dataclasses.replace(self, weights=weights)

    def weight(self, module: str) -> float:
        """What the part of a layer is multiplied by."""
        return 1.0 if self.weights is None else self.weights[module]

    def rows(self, layer: CollectedLayer) -> Rows:
        """The gradients of one layer."""
        if not isinstance(self.representation, GradientRepresentation):
            raise SettingsError(f"{self.representation.kind!r} has no gradients of layers")
        return self.representation.rows(
            layer, lambda name: self.tensors[f"{layer.module}/{name}"], 0, len(self)
        )


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of every training example for every query; larger supports more.

    Attributes:
        total: ``[queries, examples]`` fp32.
        layers: by module path, the part of every layer, if they were asked for.
        curvature: which one was taken and why; None for methods without.
    """

    total: Tensor
    layers: dict[str, Tensor] | None = None
    curvature: Choice | None = None


def record_queries(
    index: Index, checkpoint: Checkpoint, source: Any, output: Maker | None = None
) -> Queries:
    """Run queries through the model as the training examples were, but keep them in full precision.

    Args:
        index: what they are recorded for.
        checkpoint: the model of the index.
        source: queries, opened or as :func:`postlude.attribution.data.open_data` takes them.
        output: what is asked about instead of what the index keeps of its examples.

    Raises:
        StoreError: another model than the index was built with.
        DataError: an empty query, or one that does not fit the model.
        SettingsError: another output for an index whose examples are not kept by the gradients of their loss.
    """
    index.check_model(checkpoint)
    data: Data = open_data(source, checkpoint.kind)
    collection = index.collection
    data.check(checkpoint, collection)
    examples = data.examples(checkpoint, collection)
    full = index.representation.full_precision()
    if output is None:
        context = full.recorder(checkpoint, collection)
    elif isinstance(full, GradientRepresentation) and full.output == "loss":
        context = full.recorder_of(checkpoint, collection, output(checkpoint, collection))
    else:
        raise SettingsError(
            f"{index.path} was built for {index.manifest['method']['name']}, which keeps no gradients of the loss of "
            "its examples, so only what it was built for can be asked of it. Build one for lorif, logra, graddot or "
            "gradcos."
        )
    with context as record:
        tensors = record_rows(record, examples, collection.tokens_per_batch)
    return Queries(examples, tensors, full, index.layers, checkpoint)


def record_rows(
    record: Any, examples: Sequence[Any], tokens_per_batch: int, advance: Any = None
) -> dict[str, Tensor]:
    """Rows of named tensors of examples, in their order, batch by batch."""
    tensors: dict[str, Tensor] = {}
    for batch in batches(examples, tokens_per_batch):
        for name, rows in record(batch).items():
            kept = rows.detach().cpu()
            if name not in tensors:
                tensors[name] = kept.new_zeros(len(examples), *kept.shape[1:])
            # Rows as wide as their batch fill the front of those of the first batch, which is the widest.
            place = tensors[name] if kept.ndim < 2 else tensors[name][:, : kept.shape[1]]
            place[batch.rows] = kept
        if advance is not None:
            advance(len(batch))
    return tensors
