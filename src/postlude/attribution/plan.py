"""What an index of low-rank gradients costs, before it is built: bytes, operations, bytes read, time.

Of the layers of a model only their shapes matter. With widths ``d1, d2`` after the projection, ``D = d1 d2``, ``c`` the
rank of the factors, ``nb`` bytes of a number and ``sb`` of a scale, ``r`` the rank of the curvature, ``k = min(r + p,
D, N)``, ``N`` examples of ``T`` tokens, ``P`` weights that each token passes, sums over layers::

    index                = N sum(c (d1 + d2) nb + 2 c sb)
    dense index          = N sum(D) nb                                 LoGRA, arXiv:2405.13954
    curvature, saved     = 4 sum(D min(r, D))
    gradient pass       >= 4 P N T                                     forward, and gradients of activations
    projection           = 2 N T sum(I d1 + O d2)
    outer products       = 2 N T sum(D)
    factorisation        = N sum((4 n_fac + 2) c D)
    streamed SVD         = N sum(D k) (4 (n_svd + 1) + 2)
                         + (n_svd + 2) 2 N c sum(D)                    rebuilding rows
                         + (n_svd + 1) 4 sum(D k^2) + 2 N sum(k^2)     orthonormalising, Rayleigh-Ritz
    bytes read by a query = index to score, and (n_svd + 2) index to fit the curvature where it is not saved
    queries x examples   = 2 Q N c sum(D), and Q sum(4 D r) for the queries

All of it is arithmetic of ours on the method of arXiv:2601.21929. Left out: attention, the head, norms, everything
of order ``N``. Time is ``operations / (peak x utilisation)`` and ``bytes / bandwidth``, the larger of the two
where both happen at once, with nothing else running: an order of magnitude, to be calibrated where it matters.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from postlude.attribution.lorif import LoRIF
from postlude.errors import SettingsError, UnknownNameError
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.gradients import Projection, features_of, linear_paths

__all__ = [
    "FORMATS",
    "HARDWARE",
    "Hardware",
    "LayerShape",
    "ModelShape",
    "Plan",
    "assumed_shape",
    "parse_count",
    "plan",
    "shape_of",
    "table",
    "this_machine",
]

# Bytes of a number, and of the scale of a vector.
FORMATS: dict[str, tuple[float, int]] = {"fp32": (4, 0), "bf16": (2, 0), "int8": (1, 2)}

_DEFAULTS = LoRIF()
_TOKENS = 512.0  # of an example, where no checkpoint says how long its context is

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """A linear layer, and how many of its shape there are."""

    in_features: int
    out_features: int
    count: int = 1


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The linear layers whose gradients are collected.

    Attributes:
        layers: their shapes.
        description: what model that is.
        context: tokens at which it cuts an example, 0 if not known.
    """

    layers: tuple[LayerShape, ...]
    description: str = ""
    context: int = 0

    @property
    def parameters(self) -> int:
        """Weights of these layers."""
        return sum(one.in_features * one.out_features * one.count for one in self.layers)

    @property
    def count(self) -> int:
        """How many layers."""
        return sum(one.count for one in self.layers)


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Where it runs; all devices together.

    Attributes:
        name: what it is.
        flops: peak, operations a second.
        memory_bandwidth: bytes a second.
        disk_bandwidth: bytes a second, sequential.
        memory: bytes that hold an index while it is queried.
        utilisation: share of the peak that large matrix products of a model reach.
    """

    name: str
    flops: float
    memory_bandwidth: float
    disk_bandwidth: float
    memory: float
    utilisation: float = 0.4

    def __post_init__(self) -> None:
        for field in ("flops", "memory_bandwidth", "disk_bandwidth", "memory", "utilisation"):
            if not getattr(self, field) > 0:
                raise SettingsError(f"{field} is {getattr(self, field)}; expected more than 0")

    @property
    def rate(self) -> float:
        """Operations a second that can be counted on."""
        return self.flops * self.utilisation

    def times(self, devices: int) -> Hardware:
        """So many of them, on one disk."""
        if devices < 1:
            raise SettingsError(f"devices is {devices}; expected at least 1")
        return dataclasses.replace(
            self,
            name=f"{devices} x {self.name}" if devices > 1 else self.name,
            flops=self.flops * devices,
            memory_bandwidth=self.memory_bandwidth * devices,
            memory=self.memory * devices,
        )


# Peak of dense bf16 products, bandwidth and size of the memory by the makers' data sheets; disk and share assumed.
HARDWARE = {
    one.name: one
    for one in (
        Hardware("a100", 312e12, 2.0e12, 3e9, 80e9),
        Hardware("h100", 989e12, 3.35e12, 3e9, 80e9),
        Hardware("h200", 989e12, 4.8e12, 3e9, 141e9),
        Hardware("b200", 2250e12, 8.0e12, 3e9, 180e9),
    )
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one choice of settings costs.

    Attributes:
        tokens: mean of an example.
        factor, rank, curvature_rank, format: the settings.
        bytes: ``index``, ``dense_index`` (of the same numbers, not factorised), ``ratio`` of the two,
            ``numbers_an_example``, ``curvature`` if saved, ``curvature_layer`` of the largest layer, ``sketch_layer``
            while fitting it, ``gram_layer`` of the dual form, ``projection_entries`` (a number; made from seeds).
        flops: of the build ``gradients``, ``projection``, ``outer``, ``factorisation``; of the curvature ``svd`` and
            ``svd_other``, or ``gram``; of scoring ``query`` for each and ``pairs`` for all of them, or, where they
            become coefficients instead, ``coefficients`` of all examples, once.
        read: bytes a query set reads: ``score``, ``fit``, ``dense``.
        seconds: ``build``, ``fit``, ``score``, ``score_dense``.
    """

    tokens: float
    factor: int
    rank: int
    curvature_rank: int
    format: str
    bytes: dict[str, float]
    flops: dict[str, float]
    read: dict[str, float]
    seconds: dict[str, float]


def plan(
    shape: ModelShape,
    hardware: Hardware,
    *,
    examples: int,
    tokens: float | None = None,
    queries: int = 1,
    factor: int = _DEFAULTS.projection_factor,
    rank: int = _DEFAULTS.rank,
    curvature_rank: int = _DEFAULTS.curvature_rank,
    format: str = _DEFAULTS.format,
    oversampling: int = _DEFAULTS.oversampling,
    iterations: int = _DEFAULTS.svd_iterations,
    side: int = 0,
) -> Plan:
    """Cost of one choice of settings; the defaults are those of :class:`postlude.attribution.LoRIF`.

    Args:
        shape: of the model.
        hardware: where it runs.
        examples: ``N``.
        tokens: mean of an example; by default the context of the shape, or 512 where it knows none.
        queries: ``Q``, scored together.
        factor: of the projection.
        rank: ``c``.
        curvature_rank: ``r``.
        format: of the stored numbers.
        oversampling: ``p``.
        iterations: ``n_svd``.
        side: width of both sides instead of a factor.

    Raises:
        SettingsError: a number out of range.
        UnknownNameError: a format that does not exist.
    """
    if tokens is None:
        tokens = float(shape.context or _TOKENS)
    if format not in FORMATS:
        raise UnknownNameError("format", format, FORMATS)
    for name, value in (("examples", examples), ("tokens", tokens), ("rank", rank)):
        if not value >= 1:
            raise SettingsError(f"{name} is {value}; expected at least 1")
    if curvature_rank < 0 or queries < 0:
        raise SettingsError("curvature rank and queries are counts; expected 0 or more")
    number, scale = FORMATS[format]
    n, c, r = examples, rank, curvature_rank
    projection = Projection(factor, side)
    widths = [
        (one, projection.width(one.in_features), projection.width(one.out_features))
        for one in shape.layers
    ]
    n_fac = 8 if c == 1 else 16

    def total(values: Iterable[tuple[LayerShape, float]]) -> float:
        return math.fsum(one.count * value for one, value in values)

    # A gradient of width d has no more than d directions.
    kept = total((one, min(c, d1, d2) * (d1 + d2)) for one, d1, d2 in widths)
    vectors = total((one, 2 * min(c, d1, d2)) for one, d1, d2 in widths)
    dense = total((one, d1 * d2) for one, d1, d2 in widths)
    entries = total((one, one.in_features * d1 + one.out_features * d2) for one, d1, d2 in widths)
    sizes = [(one, d1 * d2) for one, d1, d2 in widths]
    sketch = [(one, size, min(r + oversampling, size, n)) for one, size in sizes]
    index = n * (kept * number + vectors * scale)
    largest = max(size for _, size in sizes)
    flops = {
        "gradients": 4.0 * shape.parameters * n * tokens,
        "projection": 2 * n * tokens * entries,
        "outer": 2 * n * tokens * dense,
        "factorisation": n * (4 * n_fac + 2) * c * dense,
        "svd": n * total((one, size * k) for one, size, k in sketch) * (4 * (iterations + 1) + 2),
        "svd_other": (iterations + 2) * 2 * n * c * dense
        + total(
            (one, (iterations + 1) * 4 * size * k**2 + 2 * n * k**2) for one, size, k in sketch
        ),
        "gram": total((one, n**2 * c**2 * (d1 + d2) + n**3 / 3) for one, d1, d2 in widths),
        "coefficients": 2 * n * c * total((one, size * min(r, size)) for one, size in sizes),
        "query": total((one, 4.0 * size * min(r, size)) for one, size in sizes),
        "pairs": 2.0 * queries * n * c * dense,
    }
    read = {
        "score": index,
        "fit": (iterations + 2) * index,
        "dense": n * dense * number + 4 * total((one, float(size) ** 2) for one, size in sizes),
    }
    bandwidth = hardware.memory_bandwidth if index <= hardware.memory else hardware.disk_bandwidth
    wide = n * dense * number
    bandwidth_dense = (
        hardware.memory_bandwidth if wide <= hardware.memory else hardware.disk_bandwidth
    )
    build = sum(flops[name] for name in ("gradients", "projection", "outer", "factorisation"))
    return Plan(
        tokens=tokens,
        factor=factor,
        rank=c,
        curvature_rank=r,
        format=format,
        bytes={
            "index": index,
            "dense_index": wide,
            "ratio": wide / index,
            "numbers_an_example": kept,
            "curvature": 4 * total((one, size * min(r, size)) for one, size in sizes),
            "curvature_layer": 4.0 * largest * min(r, largest),
            "sketch_layer": 2.0 * 4 * largest * min(r + oversampling, largest, n),
            "gram_layer": 4.0 * n * n,
            "projection_entries": entries,
        },
        flops=flops,
        read=read,
        seconds={
            "build": max(build / hardware.rate, index / hardware.disk_bandwidth),
            "fit": max(
                (flops["svd"] + flops["svd_other"]) / hardware.rate, read["fit"] / bandwidth
            ),
            "score": max(
                (flops["pairs"] + queries * flops["query"]) / hardware.rate, index / bandwidth
            ),
            "score_dense": wide / bandwidth_dense,
        },
    )


def table(
    shape: ModelShape,
    hardware: Hardware,
    *,
    factors: Sequence[int] = (4, 16, 64),
    ranks: Sequence[int] = (1, 4),
    formats: Sequence[str] = ("bf16", "int8"),
    **settings: Any,
) -> list[Plan]:
    """A plan for every combination; see :func:`plan` for the other settings."""
    return [
        plan(shape, hardware, factor=f, rank=c, format=kind, **settings)
        for f in factors
        for c in ranks
        for kind in formats
    ]


def shape_of(checkpoint: Checkpoint, layers: str | Sequence[str] = "*") -> ModelShape:
    """The shape of a checkpoint's layers that match a pattern, or one of several."""
    counts: dict[tuple[int, int], int] = {}
    for path in linear_paths(checkpoint.anatomy, layers):
        features = features_of(checkpoint.model.get_submodule(path), path)
        counts[features] = counts.get(features, 0) + 1
    shapes = tuple(LayerShape(i, o, count) for (i, o), count in counts.items())
    name = str(checkpoint.path or type(checkpoint.model).__name__)
    context = checkpoint.context if checkpoint.kind == "language" else 0
    return ModelShape(shapes, name, context)


def assumed_shape(parameters: float) -> ModelShape:
    """A Llama-like shape of about so many parameters, where there is no checkpoint to look at.

    At 70e9: 80 blocks of width 8192, keys and values 1024 wide, MLP 28,672 wide with gate, up and down. Others have the
    same proportions, with blocks and width growing by the cube root of the count (our choice).
    """
    if not parameters >= 1e6:
        raise SettingsError(
            f"parameters is {parameters:g}; expected a million or more (write 70B, 350M). For a smaller model "
            "name its checkpoint."
        )
    scale = (parameters / 70e9) ** (1 / 3)
    blocks = max(1, round(80 * scale))
    width = max(64, 64 * round(8192 / 64 * scale))
    narrow, wide = width // 8, width * 7 // 2
    shapes = (
        LayerShape(width, width, 2 * blocks),
        LayerShape(width, narrow, 2 * blocks),
        LayerShape(width, wide, 2 * blocks),
        LayerShape(wide, width, blocks),
    )
    words = f"{blocks} blocks of width {width}, keys and values {narrow}, MLP {wide} with gate, up and down"
    return ModelShape(shapes, f"assumed Llama-like: {words}")


def parse_count(text: str, option: str = "a count") -> float:
    """``"70B"`` is 70e9, ``"5M"`` 5e6, ``"600"`` 600.

    Raises:
        SettingsError: anything else.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([KMBGT]?)\s*", text, re.IGNORECASE)
    if not match:
        raise SettingsError(f"{option} is {text!r}; expected a number such as 600, 5M or 70B")
    return float(match[1]) * _UNITS[match[2].upper()]


def this_machine(disk_bandwidth: float = 1e9) -> Hardware:
    """The machine that this runs on, measured in a second: fp32 products and a large copy, with the threads set.

    The disk is not measured; 1 GB/s is assumed.
    """
    size = 1024
    a = torch.ones(size, size)
    rate = _best(lambda: a @ a, 2.0 * size**3)
    big = torch.zeros(1 << 26)  # 256 MiB, beyond the caches
    other = torch.zeros_like(big)
    copied = _best(lambda: other.copy_(big), 2.0 * big.numel() * big.element_size())
    threads = torch.get_num_threads()
    name = f"this CPU, {threads} thread{'s' if threads != 1 else ''}, measured"
    return Hardware(name, rate, copied, disk_bandwidth, _memory())


def _best(work: Any, amount: float, seconds: float = 0.3) -> float:
    work()
    best, started = 0.0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        before = time.perf_counter()
        work()
        best = max(best, amount / (time.perf_counter() - before))
    return best


def _memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
