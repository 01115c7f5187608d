"""Defect guard: keep the few down-projections that make and remove massive activations in 16 bit.

A massive activation is written by one down-projection (the explosion layer) and taken away by another (the
decay layer). Those two matrices, and what they read, are what per-tensor 8-bit quantization breaks; left in
floating point, most of the loss is gone, and nearly all weights are still in 8 bit.

Source: application of "Demystifying Singular Defects in LLMs" (arXiv:2502.07004), W8A8 per tensor. The layers
are found by the inspection method ``singular-defects``, run on the calibration text: this file combines the two,
through the registry. Symmetric, dynamic activations (the paper does not say). A model in which no massive
activation is found is refused rather than quantized as if it were guarded.

Cost: that of the inspection, plus that of the base method. Extra bytes: the kept matrices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from postlude import registry
from postlude.errors import SettingsError, UnknownNameError
from postlude.quantization.engine import FLOAT, Quantizer
from postlude.quantization.rtn import RTN
from postlude.quantization.smoothquant import SmoothQuant
from postlude.registry import method
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import Block, Kind, Site
from postlude.surgery.batches import Calibration

__all__ = ["DefectGuard"]

_SAMPLES_PER_CHANNEL = 16
_BASES: dict[str, type[Quantizer]] = {"rtn": RTN, "smoothquant": SmoothQuant}


@method(
    "quantize",
    "defect-guard",
    family="mixed precision",
    paper="arXiv:2502.07004",
    needs=("calibration",),
)
@dataclasses.dataclass(frozen=True)
class DefectGuard(Quantizer):
    """Per-tensor W8A8 with the down-projections of singular defects kept in 16 bit.

    Attributes:
        base: the method that rounds everything else: rtn or smoothquant.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("language",)

    weights: int = 8
    activations: int = 8
    kv: int = FLOAT
    group: str | int = "tensor"
    activation_group: str | int = "tensor"
    base: str = "rtn"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base not in _BASES:
            raise UnknownNameError("base of defect-guard", self.base, _BASES)
        self._base()  # refuses what it cannot do

    def _base(self) -> Quantizer:
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(Quantizer)}
        return _BASES[self.base](**shared)

    def fold(self, checkpoint: Checkpoint) -> None:
        self._base().fold(checkpoint)

    def statistics(
        self, checkpoint: Checkpoint, calibration: Calibration | None, seed: int
    ) -> Mapping[str, Tensor]:
        # Only the layers are wanted: their leading directions need far fewer samples than a report on them.
        inspection = registry.find("inspect", "singular-defects").settings(
            samples=_SAMPLES_PER_CHANNEL * checkpoint.anatomy.hidden_size, paths=False
        )
        report = inspection.inspect(checkpoint, calibration, seed)
        kept = sorted({*report.explosion_layers, *report.decay_layers})
        if not kept:
            raise SettingsError(
                "defect-guard found no layer where massive activations appear or vanish, so there is nothing to "
                f"guard; use {self.base} itself"
            )
        base = dict(self._base().statistics(checkpoint, calibration, seed))
        return {**base, "guarded": torch.tensor(kept, dtype=torch.int64)}

    def rewrite(self, checkpoint: Checkpoint, statistics: Mapping[str, Tensor], seed: int) -> None:
        self._base().rewrite(checkpoint, statistics, seed)

    def skips(self, block: Block, site: Site, statistics: Mapping[str, Tensor]) -> bool:
        return site.name == "down_in" and block.index in statistics["guarded"].tolist()
