"""What an index keeps of an example, and what a score is computed from.

A representation is a row of named tensors per example. Those made of gradients keep, for every collected layer,
either low-rank factors (:class:`FactorRepresentation`, LoRIF) or the projected gradient itself
(:class:`DenseRepresentation`, LoGRA and others). In memory both are :class:`Rows`: a layer's gradients of some
examples, in fp32, with the few products that scoring is made of.

Formats of stored numbers: ``fp32``; ``bf16``; ``int8``, symmetric, with one bf16 scale for every vector (a column of
``U`` or ``V`` of one example and layer; for dense gradients a row of ``G``). The columns of ``U`` and ``V`` are
first given equal lengths, which changes no product and keeps the scales in range. fp16 is refused: gradients leave
its range.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from postlude import registry
from postlude.attribution.examples import Collection
from postlude.attribution.outputs import Output, check_output, output_function
from postlude.errors import SettingsError, StoreError
from postlude.numerics.formats import Integer
from postlude.numerics.power_iteration import batched_power_iteration
from postlude.numerics.schemes import Granularity, Scheme
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.gradients import (
    CollectedLayer,
    GradientCollector,
    Projection,
    linear_paths,
)

__all__ = [
    "FORMATS",
    "DenseRepresentation",
    "DenseRows",
    "FactorRepresentation",
    "FactorRows",
    "GradientRepresentation",
    "Recorder",
    "Representation",
    "Rows",
    "VectorFormat",
]

Recorder = Callable[[Any], dict[str, Tensor]]
Read = Callable[[str], Tensor]


class Rows(ABC):
    """Gradients of one layer of some examples, ``n`` matrices ``G [d1, d2]`` in fp32 or fp64."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def dense(self) -> Tensor:
        """``[n, d1, d2]``."""

    @abstractmethod
    def against(self, matrices: Tensor) -> Tensor:
        """``[m, n]`` Frobenius products with ``[m, d1, d2]``."""

    @abstractmethod
    def products(self, other: Rows) -> Tensor:
        """``[len(self), len(other)]`` Frobenius products."""

    @abstractmethod
    def energies(self) -> Tensor:
        """``[n]`` squared Frobenius norms."""

    @abstractmethod
    def scaled(self, factor: float) -> Self:
        """Times a number."""

    def double(self) -> Self:
        """The same in fp64."""
        return self._map(Tensor.double)

    def flat(self) -> Tensor:
        """``[n, d1 * d2]``, row-major."""
        return self.dense().flatten(1)

    def take(self, which: slice | Sequence[int]) -> Self:
        """Some of them."""
        chosen = which if isinstance(which, slice) else list(which)
        return self._map(lambda one: one[chosen])

    def followed_by(self, others: Sequence[Self]) -> Self:
        """These and others of the same kind, in order."""
        fields = [vars(one) for one in (self, *others)]
        return type(self)(
            **{
                name: None if value is None else torch.cat([one[name] for one in fields])
                for name, value in vars(self).items()
            }
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(
            **{name: None if x is None else change(x) for name, x in vars(self).items()}
        )


@dataclasses.dataclass(frozen=True)
class FactorRows(Rows):
    """``G_i = sum_x scale[i, x] * outer(u[i, x], v[i, x])``.

    Attributes:
        u: ``[n, c, d1]``.
        v: ``[n, c, d2]``.
        scale: ``[n, c]``, or None for ones. Stored codes are multiplied by it after a product, not before.
    """

    u: Tensor
    v: Tensor
    scale: Tensor | None = None

    def __len__(self) -> int:
        return len(self.u)

    def dense(self) -> Tensor:
        return self._scaled().mT @ self.v

    def against(self, matrices: Tensor) -> Tensor:
        n, c, d1 = self.u.shape
        m, _, d2 = matrices.shape
        left, right = self.u.reshape(n * c, d1), self.v.reshape(n * c, d2)
        found = [torch.linalg.vecdot(left @ one, right) for one in matrices]
        stacked = torch.stack(found) if found else left.new_zeros(0, n * c)
        if self.scale is not None:
            stacked *= self.scale.flatten()
        return stacked if c == 1 else stacked.view(m, n, c).sum(-1)

    def products(self, other: Rows) -> Tensor:
        if not isinstance(other, FactorRows):
            return other.products(self).mT
        (n, c, d1), (m, k, _) = self.u.shape, other.u.shape
        found = self.u.reshape(n * c, d1) @ other.u.reshape(m * k, d1).mT
        found *= self.v.reshape(n * c, -1) @ other.v.reshape(m * k, -1).mT
        if self.scale is not None:
            found *= self.scale.reshape(n * c, 1)
        if other.scale is not None:
            found *= other.scale.reshape(1, m * k)
        return found if c == k == 1 else found.view(n, c, m, k).sum((1, 3))

    def energies(self) -> Tensor:
        u = self._scaled()
        return ((u @ u.mT) * (self.v @ self.v.mT)).sum((1, 2))

    def scaled(self, factor: float) -> FactorRows:
        return dataclasses.replace(self, u=self.u * factor)

    def _scaled(self) -> Tensor:
        return self.u if self.scale is None else self.u * self.scale.unsqueeze(-1)


@dataclasses.dataclass(frozen=True)
class DenseRows(Rows):
    """Gradients as they are, ``[n, d1, d2]``."""

    g: Tensor

    def __len__(self) -> int:
        return len(self.g)

    def dense(self) -> Tensor:
        return self.g

    def against(self, matrices: Tensor) -> Tensor:
        return matrices.flatten(1).to(self.g) @ self.g.flatten(1).mT

    def products(self, other: Rows) -> Tensor:
        if isinstance(other, DenseRows):
            return self.g.flatten(1) @ other.g.flatten(1).mT
        return other.against(self.g)

    def energies(self) -> Tensor:
        return self.g.square().sum((1, 2))

    def scaled(self, factor: float) -> DenseRows:
        return DenseRows(self.g * factor)


@dataclasses.dataclass(frozen=True)
class VectorFormat:
    """How vectors are stored: a name, its type, whether vectors carry a scale."""

    name: str
    dtype: torch.dtype
    scaled: bool = False

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """``[n, k, width]`` as stored tensors, by suffix."""
        if not self.scaled:
            return {"": x.to(self.dtype)}
        encoded = _INT8.encode(x)
        codes = (encoded.codes.to(torch.int16) - 128).to(torch.int8)
        return {"": codes, ".scale": encoded.scale.squeeze(-1)}

    def decode(self, read: Read, start: int, stop: int) -> Tensor:
        """fp32 ``[rows, k, width]``."""
        x, scale = self.read(read, start, stop)
        return x if scale is None else x * scale.unsqueeze(-1)

    def read(self, read: Read, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """fp32 ``[rows, k, width]``, still to be multiplied by ``[rows, k]`` where that is not None."""
        x = read("")[start:stop].float()
        return x, read(".scale")[start:stop].float() if self.scaled else None

    def bytes(self, vectors: int, width: int) -> int:
        """Bytes of so many vectors."""
        return vectors * (width * self.dtype.itemsize + (2 if self.scaled else 0))


# Scales in bf16: fp16 would lose the smallest gradients, and codes are made for the scale that is stored.
_INT8 = Scheme(Integer(8, narrow=True), Granularity("channel"), "bfloat16")

FORMATS = {
    one.name: one
    for one in (
        VectorFormat("fp32", torch.float32),
        VectorFormat("bf16", torch.bfloat16),
        VectorFormat("int8", torch.int8, scaled=True),
    )
}


def _format(name: str) -> VectorFormat:
    if name in ("fp16", "float16"):
        raise SettingsError(
            "format is 'fp16', whose range gradients leave; expected bf16, int8 (smaller still) or fp32"
        )
    if name not in FORMATS:
        raise SettingsError(f"format is {name!r}; expected {', '.join(FORMATS)}")
    return FORMATS[name]


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
        _format(self.format)
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
        stored = _format(self.format)
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
        stored = _format(self.format)
        u, left = stored.read(lambda key: read(f"u{key}"), start, stop)
        v, right = stored.read(lambda key: read(f"v{key}"), start, stop)
        return FactorRows(u, v, None if left is None or right is None else left * right)

    def row_numbers(self, layer: CollectedLayer) -> int:
        return self.columns(layer) * (layer.in_width + layer.out_width)

    def row_bytes(self, layers: Sequence[CollectedLayer]) -> int:
        stored = _format(self.format)
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
        stored = _format(self.format)

        def keep(_: CollectedLayer, gradients: Tensor) -> dict[str, Tensor]:
            return {f"g{key}": x for key, x in stored.encode(gradients).items()}

        return keep

    def rows(self, layer: CollectedLayer, read: Read, start: int, stop: int) -> DenseRows:
        return DenseRows(_format(self.format).decode(lambda key: read(f"g{key}"), start, stop))

    def row_numbers(self, layer: CollectedLayer) -> int:
        return layer.size

    def row_bytes(self, layers: Sequence[CollectedLayer]) -> int:
        stored = _format(self.format)
        return sum(stored.bytes(layer.in_width, layer.out_width) for layer in layers)


def _normal(seed: int, module: str, rows: int, columns: int) -> Tensor:
    digest = hashlib.sha256(f"start {seed} {module}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4]))
    return torch.randn(rows, columns, generator=generator)
