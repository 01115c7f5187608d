"""What an index keeps of an example, and what a score is computed from.

A representation is a row of named tensors per example. Those made of gradients keep, for every collected layer,
either low-rank factors (:class:`FactorRepresentation`, LoRIF) or the projected gradient itself
(:class:`DenseRepresentation`, LoGRA and others), in one of the :mod:`postlude.attribution.formats`. In memory both are
:class:`postlude.attribution.rows.Rows`. The columns of ``U`` and ``V`` are given equal lengths before they are stored,
which changes no product and keeps the scales in range.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor

from postlude import registry
from postlude.attribution.examples import Collection
from postlude.attribution.formats import Read, format_named
from postlude.attribution.outputs import Output, check_output, output_function
from postlude.attribution.rows import DenseRows, FactorRows, Rows
from postlude.errors import SettingsError, StoreError
from postlude.numerics.power_iteration import batched_power_iteration
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.gradients import (
    CollectedLayer,
    GradientCollector,
    Projection,
    linear_paths,
)

__all__ = [
    "DenseRepresentation",
    "FactorRepresentation",
    "GradientRepresentation",
    "Recorder",
    "Representation",
]

Recorder = Callable[[Any], dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class Representation(ABC):
    """What is kept of an example; its fields are part of the manifest of an index."""

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Representation]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            Representation.kinds[cls.kind] = cls

    @abstractmethod
    def recorder(
        self, checkpoint: Checkpoint, collection: Collection
    ) -> AbstractContextManager[Recorder]:
        """A context in which batches become rows of named tensors."""

    @abstractmethod
    def row_bytes(self, layers: Sequence[CollectedLayer]) -> int:
        """Bytes that one example takes."""

    def layers(self, checkpoint: Checkpoint, collection: Collection) -> tuple[CollectedLayer, ...]:
        """The layers whose gradients are kept; none for a representation without gradients."""
        return ()

    def full_precision(self) -> Representation:
        """The same in fp32: what queries are recorded in."""
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Representation:
        values = dict(data)
        kind = values.pop("kind", None)
        if kind not in Representation.kinds:
            registry.available(
                "attribute"
            )  # a method's own representation is known once its file is imported
        if kind not in Representation.kinds:
            raise StoreError(
                f"the index keeps {kind!r}, which this version of Postlude does not know; known: "
                f"{', '.join(sorted(Representation.kinds))}"
            )
        return Representation.kinds[kind](**values)


@dataclasses.dataclass(frozen=True)
class GradientRepresentation(Representation):
    """Base of what is made of projected gradients, layer by layer.

    Attributes:
        factor: every side of a gradient becomes ``ceil(features / factor)`` wide; or
        side: ``min(features, side)`` wide, where it is not 0.
        output: what is differentiated, a name in :mod:`postlude.attribution.outputs`.
        format: of the stored numbers.
    """

    factor: int = 4
    side: int = 0
    output: str = "loss"
    format: str = "bf16"

    def __post_init__(self) -> None:
        format_named(self.format)
        check_output(self.output)
        self.projection(0)

    def projection(self, seed: int) -> Projection:
        return Projection(1 if self.side else self.factor, self.side, seed)

    def layers(self, checkpoint: Checkpoint, collection: Collection) -> tuple[CollectedLayer, ...]:
        return self._collector(checkpoint, collection).layers

    def _collector(self, checkpoint: Checkpoint, collection: Collection) -> GradientCollector:
        paths = linear_paths(checkpoint.anatomy, collection.patterns)
        return GradientCollector(checkpoint.model, paths, self.projection(collection.seed))

    @contextlib.contextmanager
    def recorder(self, checkpoint: Checkpoint, collection: Collection) -> Iterator[Recorder]:
        output = output_function(self.output, checkpoint.kind)(checkpoint, collection)
        with self.recorder_of(checkpoint, collection, output) as record:
            yield record

    @contextlib.contextmanager
    def recorder_of(
        self, checkpoint: Checkpoint, collection: Collection, output: Output
    ) -> Iterator[Recorder]:
        """The recorder of the gradients of another output than the one that the index keeps."""
        collector = self._collector(checkpoint, collection)
        self.check(collector.layers)
        keep = self.keeper(collection)

        def record(batch: Any) -> dict[str, Tensor]:
            losses: list[Tensor] = []

            def total() -> Tensor:
                each, loss = output(batch)
                losses.append(loss)
                return each.sum()

            kept = collector.collect(total, len(batch), keep)
            rows = {
                f"{path}/{name}": tensor
                for path, tensors in kept.items()
                for name, tensor in tensors.items()
            }
            rows["loss"] = losses[0].detach().float()
            return rows

        with collector:
            yield record

    def check(self, layers: Sequence[CollectedLayer]) -> None:
        """Refuse layers that these settings cannot represent."""

    @abstractmethod
    def keeper(
        self, collection: Collection
    ) -> Callable[[CollectedLayer, Tensor], dict[str, Tensor]]:
        """Makes stored tensors, by name, of a layer's gradients ``[n, d1, d2]``."""

    @abstractmethod
    def rows(self, layer: CollectedLayer, read: Read, start: int, stop: int) -> Rows:
        """The gradients of a layer from stored tensors: ``read(name)`` gives all rows of one."""

    @abstractmethod
    def row_numbers(self, layer: CollectedLayer) -> int:
        """Numbers kept of one example and layer."""

    def full_precision(self) -> GradientRepresentation:
        return dataclasses.replace(self, format="fp32")


@dataclasses.dataclass(frozen=True)
class FactorRepresentation(GradientRepresentation):
    """Rank-``rank`` factors by block power iteration (arXiv:2601.21929).

    Attributes:
        rank: columns of ``U`` and ``V``; a layer with a narrower side gets as many as that.
        iterations: of the power iteration; 0 for 8 with one column and 16 with more.
    """

    kind = "factors"
    rank: int = 1
    iterations: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or self.iterations < 0:
            raise SettingsError(
                f"rank is {self.rank} and iterations {self.iterations}; expected a rank from 1, iterations from 0 "
                "(the default of the rank)"
            )

    def columns(self, layer: CollectedLayer) -> int:
        """Columns kept of a layer."""
        return min(self.rank, layer.in_width, layer.out_width)

    def keeper(
        self, collection: Collection
    ) -> Callable[[CollectedLayer, Tensor], dict[str, Tensor]]:
        steps = self.iterations or (8 if self.rank == 1 else 16)
        stored = format_named(self.format)
        starts: dict[str, Tensor] = {}

        def keep(layer: CollectedLayer, gradients: Tensor) -> dict[str, Tensor]:
            start = starts.get(layer.module)
            if start is None:
                # One start per layer: rows depend neither on their batch nor on what was done before.
                start = _normal(collection.seed, layer.module, layer.out_width, self.columns(layer))
                starts[layer.module] = start = start.to(gradients)
            u, v = batched_power_iteration(gradients, start, steps)
            u, v = u.mT, v.mT
            length = u.norm(dim=-1, keepdim=True)
            root = length.sqrt()
            u, v = u / torch.where(length > 0, root, 1.0), v * root
            named = {f"u{key}": x for key, x in stored.encode(u).items()}
            return named | {f"v{key}": x for key, x in stored.encode(v).items()}

        return keep

    def rows(self, layer: CollectedLayer, read: Read, start: int, stop: int) -> FactorRows:
        stored = format_named(self.format)
        u, left = stored.read(lambda key: read(f"u{key}"), start, stop)
        v, right = stored.read(lambda key: read(f"v{key}"), start, stop)
        return FactorRows(u, v, None if left is None or right is None else left * right)

    def row_numbers(self, layer: CollectedLayer) -> int:
        return self.columns(layer) * (layer.in_width + layer.out_width)

    def row_bytes(self, layers: Sequence[CollectedLayer]) -> int:
        stored = format_named(self.format)
        return sum(
            stored.bytes(self.columns(layer), layer.in_width)
            + stored.bytes(self.columns(layer), layer.out_width)
            for layer in layers
        )


@dataclasses.dataclass(frozen=True)
class DenseRepresentation(GradientRepresentation):
    """Projected gradients as they are."""

    kind = "dense"

    def keeper(
        self, collection: Collection
    ) -> Callable[[CollectedLayer, Tensor], dict[str, Tensor]]:
        stored = format_named(self.format)

        def keep(_: CollectedLayer, gradients: Tensor) -> dict[str, Tensor]:
            return {f"g{key}": x for key, x in stored.encode(gradients).items()}

        return keep

    def rows(self, layer: CollectedLayer, read: Read, start: int, stop: int) -> DenseRows:
        return DenseRows(format_named(self.format).decode(lambda key: read(f"g{key}"), start, stop))

    def row_numbers(self, layer: CollectedLayer) -> int:
        return layer.size

    def row_bytes(self, layers: Sequence[CollectedLayer]) -> int:
        stored = format_named(self.format)
        return sum(stored.bytes(layer.in_width, layer.out_width) for layer in layers)


def _normal(seed: int, module: str, rows: int, columns: int) -> Tensor:
    digest = hashlib.sha256(f"start {seed} {module}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4]))
    return torch.randn(rows, columns, generator=generator)
