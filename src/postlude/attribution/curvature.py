"""Curvature of one layer: from the rows of an index to scores of queries.

Every class here turns query gradients and the rows of a layer into scores ``[Q, N]``. :class:`Plain` has no
curvature. The others invert ``H + lam I``, ``H = sum_i vec(G_i) vec(G_i)^T``:

    =============  =========================================  =====================================
    name           fit                                        memory
    =============  =========================================  =====================================
    ``exact``      ``2 N D^2 + D^3 / 3``                      ``D^2``
    ``truncated``  ``18 N D k + 16 D k^2`` (3 iterations)     ``D k``,  ``k = rank + oversampling``
    ``dual``       ``2 N^2 c^2 (d1 + d2) + N^3 / 3``          ``N^2``
    =============  =========================================  =====================================

``exact`` and ``dual`` give the same numbers; ``truncated`` is exact where its rank reaches ``D`` or ``N``.
:func:`choose` takes the one of least arithmetic that fits into memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from postlude.attribution.rows import DenseRows, Rows
from postlude.errors import SettingsError, UnknownNameError
from postlude.numerics.curvature import (
    DenseInverse,
    GramInverse,
    SpectralInverse,
    trace_damping,
)
from postlude.numerics.power_iteration import streamed_svd
from postlude.surgery.gradients import CollectedLayer

__all__ = [
    "BACKENDS",
    "Choice",
    "CurvatureSettings",
    "Dual",
    "Exact",
    "LayerCurvature",
    "Plain",
    "Source",
    "Truncated",
    "choose",
]

# Bytes that the matrices of one layer may take.
MEMORY = 8 << 30

# Rows at a time: enough for products of matrices to run at speed, few enough that a batch of dense rows stays small.
_EXACT_ROWS, _DUAL_ROWS, _LEAST_ROWS = 1024, 2048, 128
_FLAT = 1 << 20  # numbers of dense rows


class Source(Protocol):
    """Gradients of one layer of all training examples, read in chunks."""

    @property
    def layer(self) -> CollectedLayer: ...

    def __len__(self) -> int: ...

    def chunks(self, rows: int = 0) -> Iterator[tuple[int, Rows]]: ...

    def rows(self, start: int = 0, stop: int | None = None) -> Rows: ...


@dataclasses.dataclass(frozen=True)
class CurvatureSettings:
    """What decides the damped inverse of a layer.

    Attributes:
        rank, oversampling, iterations: of the streamed SVD.
        damping: multiplier of the damping rule.
        rule: ``release``: ``lam = damping * trace / D``. ``paper``: ``lam = damping * mean(s_1^2 .. s_{r+p}^2)``.
        tail: ``corrected`` or ``truncated``, see :class:`postlude.numerics.curvature.SpectralInverse`.
        seed: of the start of the SVD.
        precision: of the streamed SVD and of scoring, fp32 or fp64.
    """

    rank: int = 1024
    oversampling: int = 10
    iterations: int = 3
    damping: float = 0.5
    rule: Literal["release", "paper"] = "release"
    tail: Literal["corrected", "truncated"] = "corrected"
    seed: int = 0
    precision: torch.dtype = torch.float32


class LayerCurvature(ABC):
    """How one layer scores."""

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def fit(cls, source: Source, settings: CurvatureSettings) -> LayerCurvature:
        """From the rows of an index."""

    @abstractmethod
    def scores(self, queries: Rows, source: Source) -> Tensor:
        """``[Q, N]`` in fp32."""

    @abstractmethod
    def matrices(self, queries: Rows, source: Source) -> Tensor:
        """``(H + lam)^-1 G_q [Q, d1, d2]``: a score is the Frobenius product of it with a row."""

    def prepared(self, queries: Rows, source: Source) -> Rows:
        """Rows whose products with those of examples are the scores; narrower than ``matrices`` where that can be."""
        return DenseRows(self.matrices(queries, source))

    def leverages(self, source: Source) -> Tensor:
        """``vec(G_n)^T (H + lam)^-1 vec(G_n)`` of every row of the index itself, fp64 ``[N]``, 0 to 1."""
        parts = [
            (self.matrices(rows.double(), source) * rows.double().dense()).sum((1, 2))
            for _, rows in source.chunks()
        ]
        return torch.cat(parts)

    def state(self) -> dict[str, Tensor]:
        """What :meth:`from_state` needs, to keep a fit; in fp32, which changes scores by about 1e-6."""
        raise NotImplementedError

    @staticmethod
    def kept_bytes(count: int, layer: CollectedLayer, settings: CurvatureSettings) -> float:
        """Bytes of :meth:`state`."""
        return 0.0

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> LayerCurvature:
        raise NotImplementedError

    @staticmethod
    def cost(
        count: int, layer: CollectedLayer, columns: float, settings: CurvatureSettings
    ) -> float:
        """Floating-point operations of fitting."""
        return 0.0

    @staticmethod
    def memory(count: int, layer: CollectedLayer, settings: CurvatureSettings) -> float:
        """Bytes while fitting."""
        return 0.0


def stream(matrices: Tensor, source: Source) -> Tensor:
    """``[Q, N]`` Frobenius products of ``[Q, d1, d2]`` with every row: one pass over the layer."""
    scores = torch.empty(len(matrices), len(source), dtype=matrices.dtype)
    for first, rows in source.chunks():
        if matrices.dtype == torch.float64:
            rows = rows.double()
        scores[:, first : first + len(rows)] = rows.against(matrices)
    return scores


@dataclasses.dataclass(frozen=True)
class _Double:
    """A source in fp64."""

    source: Source

    @property
    def layer(self) -> CollectedLayer:
        return self.source.layer

    def __len__(self) -> int:
        return len(self.source)

    def chunks(self, rows: int = 0) -> Iterator[tuple[int, Rows]]:
        for first, found in self.source.chunks(rows):
            yield first, found.double()

    def rows(self, start: int = 0, stop: int | None = None) -> Rows:
        return self.source.rows(start, stop).double()


def stream_products(queries: Rows, source: Source) -> Tensor:
    """``[Q, N]`` Frobenius products of query gradients with every row: one pass over the layer."""
    parts = [queries.products(rows) for _, rows in source.chunks()]
    return torch.cat(parts, dim=1)


class Plain(LayerCurvature):
    """No curvature: the inner product of gradients."""

    name = "none"

    @classmethod
    def fit(cls, source: Source, settings: CurvatureSettings) -> Plain:
        return cls()

    def scores(self, queries: Rows, source: Source) -> Tensor:
        return stream_products(queries, source)

    def matrices(self, queries: Rows, source: Source) -> Tensor:
        return queries.dense()

    def prepared(self, queries: Rows, source: Source) -> Rows:
        return queries


_Inverse = TypeVar("_Inverse", DenseInverse, SpectralInverse)


class _Inverted(LayerCurvature, Generic[_Inverse]):
    """Any whose inverse takes gradients one by one, whatever the rows of the index."""

    def __init__(self, inverse: _Inverse) -> None:
        self.inverse: _Inverse = inverse

    def scores(self, queries: Rows, source: Source) -> Tensor:
        return stream(self.matrices(queries, source), source)

    def matrices(self, queries: Rows, source: Source) -> Tensor:
        dense = queries.dense()
        return self.inverse.apply(dense.flatten(1)).view_as(dense)


class Exact(_Inverted[DenseInverse]):
    """``(H + lam I)^-1`` by Cholesky of the ``D x D`` matrix."""

    name = "exact"

    @classmethod
    def fit(cls, source: Source, settings: CurvatureSettings) -> Exact:
        size = source.layer.size
        h = torch.zeros(size, size, dtype=torch.float64)
        for _, rows in source.chunks(_EXACT_ROWS):
            flat = rows.flat().to(settings.precision)
            h += flat.mT @ flat
        damping = _damping(
            settings, float(h.diagonal().sum()), size, len(source), lambda: torch.linalg.eigvalsh(h)
        )
        return cls(DenseInverse.of(h, damping))

    def state(self) -> dict[str, Tensor]:
        return {"lower": self.inverse.lower.float()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Exact:
        return cls(DenseInverse(state["lower"].double()))

    @staticmethod
    def kept_bytes(count: int, layer: CollectedLayer, settings: CurvatureSettings) -> float:
        return 4.0 * layer.size**2

    @staticmethod
    def cost(
        count: int, layer: CollectedLayer, columns: float, settings: CurvatureSettings
    ) -> float:
        return 2 * count * layer.size**2 + layer.size**3 / 3

    @staticmethod
    def memory(count: int, layer: CollectedLayer, settings: CurvatureSettings) -> float:
        return 3 * 8 * layer.size**2


class Truncated(_Inverted[SpectralInverse]):
    """The streamed SVD with Woodbury's identity: LoRIF."""

    name = "truncated"

    @classmethod
    def fit(cls, source: Source, settings: CurvatureSettings) -> Truncated:
        layer, precision = source.layer, settings.precision
        if settings.rank == 0:
            energy = sum(float(rows.energies().double().sum()) for _, rows in source.chunks())
            if settings.rule == "paper":
                raise SettingsError(
                    "the paper's damping rule needs singular values: curvature_rank from 1"
                )
            damping = trace_damping(energy, layer.size, settings.damping)
            spanned = min(layer.size, len(source))
            tail = energy / spanned if settings.tail == "corrected" else 0.0
            empty = torch.zeros(layer.size, 0, dtype=precision)
            return cls(SpectralInverse(empty, torch.zeros(0, dtype=torch.float64), damping, tail))
        at_a_time = max(_LEAST_ROWS, _FLAT // layer.size)
        digest = hashlib.sha256(f"sketch {settings.seed} {layer.module}".encode()).digest()
        svd = streamed_svd(
            lambda: (rows.flat().to(precision) for _, rows in source.chunks(at_a_time)),
            layer.size,
            settings.rank,
            rows=len(source),
            oversample=settings.oversampling,
            iterations=settings.iterations,
            generator=torch.Generator().manual_seed(int.from_bytes(digest[:4])),
            dtype=precision,
        )
        damping = _damping(
            settings, svd.energy, layer.size, len(source), lambda: svd.sketch_values.square()
        )
        corrected = settings.tail == "corrected"
        return cls(SpectralInverse.of(svd, damping, corrected=corrected, rows=len(source)))

    def state(self) -> dict[str, Tensor]:
        numbers = torch.tensor([self.inverse.damping, self.inverse.tail], dtype=torch.float64)
        return {
            "vectors": self.inverse.vectors,
            "squares": self.inverse.squares,
            "numbers": numbers,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Truncated:
        damping, tail = state["numbers"].tolist()
        return cls(SpectralInverse(state["vectors"], state["squares"], damping, tail))

    @staticmethod
    def kept_bytes(count: int, layer: CollectedLayer, settings: CurvatureSettings) -> float:
        return 4.0 * layer.size * min(settings.rank, layer.size, count)

    @staticmethod
    def cost(
        count: int, layer: CollectedLayer, columns: float, settings: CurvatureSettings
    ) -> float:
        k = min(settings.rank + settings.oversampling, layer.size, count)
        passes = settings.iterations + 1
        return count * layer.size * k * (4 * passes + 2) + passes * 4 * layer.size * k**2

    @staticmethod
    def memory(count: int, layer: CollectedLayer, settings: CurvatureSettings) -> float:
        k = min(settings.rank + settings.oversampling, layer.size, count)
        return 3 * 4 * layer.size * k


class Dual(LayerCurvature):
    """The ``N x N`` matrix of inner products; nothing of size ``D``."""

    name = "dual"

    def __init__(self, inverse: GramInverse) -> None:
        self.inverse = inverse

    @classmethod
    def fit(cls, source: Source, settings: CurvatureSettings) -> Dual:
        gram = torch.empty(len(source), len(source), dtype=torch.float64)
        for first, rows in source.chunks(_DUAL_ROWS):
            wide = rows.double() if settings.precision == torch.float64 else rows
            for start, others in source.chunks(_DUAL_ROWS):
                if start > first:
                    break  # the lower triangle is all that is read
                if settings.precision == torch.float64:
                    others = others.double()
                block = wide.products(others)
                gram[first : first + len(rows), start : start + len(others)] = block
        trace = float(gram.diagonal().sum())
        damping = _damping(
            settings, trace, source.layer.size, len(source), lambda: torch.linalg.eigvalsh(gram)
        )
        return cls(GramInverse.of(gram, damping))

    def scores(self, queries: Rows, source: Source) -> Tensor:
        return self.inverse.scores(stream_products(queries, source))

    def leverages(self, source: Source) -> Tensor:
        return self.inverse.leverages()

    def matrices(self, queries: Rows, source: Source) -> Tensor:
        # (H + lam)^-1 g = (g - sum_t s_t g_t) / lam with the scores s of g, by Woodbury's identity. In fp64: where
        # the training set explains a query, both terms are large and nearly equal.
        dense = queries.dense().to(torch.float64, copy=True)
        weights = self.inverse.scores(stream_products(queries.double(), _Double(source)))
        for first, rows in source.chunks():
            flat = rows.flat().double()
            dense -= (weights[:, first : first + len(rows)] @ flat).view_as(dense)
        return (dense / self.inverse.damping).to(queries.dense().dtype)

    def state(self) -> dict[str, Tensor]:
        damping = torch.tensor(self.inverse.damping, dtype=torch.float64)
        return {"lower": self.inverse.lower.float(), "damping": damping}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Dual:
        return cls(GramInverse(state["lower"].double(), float(state["damping"])))

    @staticmethod
    def kept_bytes(count: int, layer: CollectedLayer, settings: CurvatureSettings) -> float:
        return 4.0 * count**2

    @staticmethod
    def cost(
        count: int, layer: CollectedLayer, columns: float, settings: CurvatureSettings
    ) -> float:
        return 2 * (count * columns) ** 2 * (layer.in_width + layer.out_width) + count**3 / 3

    @staticmethod
    def memory(count: int, layer: CollectedLayer, settings: CurvatureSettings) -> float:
        return 2 * 8 * count**2


BACKENDS: dict[str, type[LayerCurvature]] = {one.name: one for one in (Dual, Exact, Truncated)}


def _damping(
    settings: CurvatureSettings, trace: float, size: int, count: int, spectrum: Callable[[], Tensor]
) -> float:
    """``lam`` by the rule; ``spectrum`` gives squared singular values in any order."""
    if settings.rule == "paper":
        # As many as a sketch of that rank has, whichever way the spectrum was found.
        kept = min(settings.rank + settings.oversampling, size, count)
        leading = spectrum().clamp(min=0).sort(descending=True).values[:kept]
        return trace_damping(float(leading.mean()), 1, settings.damping)
    return trace_damping(trace, size, settings.damping)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which way of inverting the curvature was taken, and why.

    Attributes:
        name: of the class.
        forced: whether it was asked for.
        costs: floating-point operations of fitting all layers, by name.
        memory: bytes that the widest layer takes, by name.
    """

    name: str
    forced: bool
    costs: dict[str, float]
    memory: dict[str, float]

    def __str__(self) -> str:
        costs = ", ".join(f"{name} {flops:.2g}" for name, flops in self.costs.items())
        why = "asked for" if self.forced else "least arithmetic of those that fit into memory"
        return f"{self.name} ({why}; operations: {costs})"


def choose(
    asked: str,
    count: int,
    layers: Sequence[CollectedLayer],
    columns: Callable[[CollectedLayer], float],
    settings: CurvatureSettings,
    memory: float = MEMORY,
    among: Sequence[str] = (),
) -> Choice:
    """The way of inverting the curvature of an index.

    Args:
        asked: ``auto``, or the name of one.
        count: training examples.
        layers: of the index.
        columns: factor columns of a layer.
        settings: rank and so on.
        memory: bytes that one layer may take; where nothing fits, the one that takes least is taken.
        among: names to choose from; all by default.

    Raises:
        UnknownNameError: no such way.
    """
    if asked != "auto" and asked not in BACKENDS:
        raise UnknownNameError("curvature", asked, ["auto", *BACKENDS])
    costs = {
        name: sum(one.cost(count, layer, columns(layer), settings) for layer in layers)
        for name, one in BACKENDS.items()
    }
    bytes_ = {
        name: max(one.memory(count, layer, settings) for layer in layers)
        for name, one in BACKENDS.items()
    }
    if asked != "auto":
        return Choice(asked, True, costs, bytes_)
    known = list(among or BACKENDS)
    fitting = [name for name in known if bytes_[name] <= memory]
    fitting = fitting or [min(known, key=bytes_.__getitem__)]
    if settings.rank == 0:
        fitting = ["truncated"]  # rank 0 asks for no curvature, which the others cannot give
    return Choice(min(fitting, key=costs.__getitem__), False, costs, bytes_)
