"""What a build at hand will take, told before it starts: bytes within a few percent, time by formulas."""

from __future__ import annotations

import dataclasses

import torch

from postlude.attribution.data import Data
from postlude.attribution.engine import Attributor
from postlude.attribution.examples import Collection
from postlude.attribution.plan import Hardware, plan, shape_of
from postlude.attribution.representation import FactorRepresentation, GradientRepresentation
from postlude.runs.checkpoint import Checkpoint

__all__ = ["Forecast", "duration", "forecast", "readable_bytes"]

_SAMPLE = 64  # records whose tokens are counted
_ROW = 12  # bytes of the two counts and the loss that every row carries
_ENTRY = 75  # bytes that describe a tensor in the header of a file, beside its name


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Expected cost of a build.

    Attributes:
        examples: of the data.
        tokens: mean of an example, by a sample; of an image patches of the model.
        bytes: of the index.
        seconds: of the passes over the data where nothing else runs, an order of magnitude.
        draws: how often an image goes through the model, once for each timestep and draw of noise; 0 for texts.
    """

    examples: int
    tokens: float
    bytes: int
    seconds: float
    draws: int = 0

    def __str__(self) -> str:
        size = f"about {self.tokens:.0f} tokens"
        if self.draws:
            size = f"{self.tokens:.0f} patches, each {self.draws} time{'s' * (self.draws != 1)} through the model"
        return (
            f"expected: {self.examples:,} example{'s' * (self.examples != 1)} of {size}, "
            f"index {readable_bytes(self.bytes)} "
            f"({readable_bytes(self.bytes / self.examples)} an example), "
            f"about {duration(self.seconds)} on an idle machine"
        )


def forecast(
    checkpoint: Checkpoint,
    records: Data,
    method: Attributor,
    collection: Collection,
    hardware: Hardware,
) -> Forecast | None:
    """The cost of an index of gradients; None for methods that keep something else."""
    representation = method.representation()
    if not isinstance(representation, GradientRepresentation):
        return None
    step = max(1, len(records) // _SAMPLE)
    draws = collection.draws if records.kind == "images" else 0
    lengths = [
        records.examples(checkpoint, collection, n, n + 1)[0].count
        for n in range(0, len(records), step)
    ]
    tokens = sum(lengths) / len(lengths)
    layers = representation.layers(checkpoint, collection)
    factors = isinstance(representation, FactorRepresentation)
    cost = plan(
        shape_of(checkpoint, collection.patterns),
        hardware,
        examples=len(records),
        tokens=max(draws, 1) * tokens,
        factor=1 if representation.side else representation.factor,
        side=representation.side,
        rank=representation.rank if isinstance(representation, FactorRepresentation) else 1,
        format=representation.format,
    )
    # What is stored of a layer has the same names in all of them.
    first = layers[0]
    stored = representation.keeper(collection)(
        first, torch.zeros(1, first.in_width, first.out_width)
    )
    names = [f"{layer.module}/{name}" for layer in layers for name in stored]
    header = sum(len(name) + _ENTRY for name in [*names, "tokens", "cut", "loss"])
    shards = -(-len(records) // collection.shard_examples)
    passes = ("gradients", "projection", "outer", *(("factorisation",) if factors else ()))
    return Forecast(
        examples=len(records),
        tokens=tokens,
        bytes=len(records) * (representation.row_bytes(layers) + _ROW) + shards * header,
        seconds=sum(cost.flops[name] for name in passes) / hardware.rate,
        draws=draws,
    )


def readable_bytes(number: float) -> str:
    """Bytes for a person: ``4.2 GB``."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"


def duration(seconds: float) -> str:
    """A time for a person: ``3.1 hours``."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else "< 1 s"
