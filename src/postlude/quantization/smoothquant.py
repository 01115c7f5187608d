"""SmoothQuant: move outliers from activations into weights, channel by channel.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)         X <- X / s        W <- diag(s) W

``W_j`` is input channel ``j`` over every linear that reads the site. ``1/s`` is absorbed by the norm that feeds
the site (in a diffusion transformer by the rows of the adaLN linear that scale and shift that norm's output), so the
model's function does not change and nothing is added at run time. Only sites fed by such a norm are smoothed.

Paper: "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models"
(arXiv:2211.10438). Scales where either maximum is zero are left at one.

Cost: one forward pass of the calibration data. No extra bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.moments import AbsMax
from postlude.quantization.engine import FLOAT, Quantizer
from postlude.registry import method
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.batches import Calibration, forward_batches
from postlude.surgery.capture import observe
from postlude.surgery.rewrite import scale_norm_site

__all__ = ["SmoothQuant", "smoothing_scale"]


def smoothing_scale(activation_max: Tensor, weight_max: Tensor, alpha: float) -> Tensor:
    """``max|X_j|^alpha / max|W_j|^(1 - alpha)``, fp64 ``[width]``; one where either maximum is zero."""
    scale = activation_max.double() ** alpha / weight_max.double() ** (1 - alpha)
    usable = (activation_max > 0) & (weight_max > 0)
    return torch.where(usable, scale, torch.ones_like(scale))


@method(
    "quantize",
    "smoothquant",
    family="scale absorption",
    paper="arXiv:2211.10438",
    needs=("calibration",),
)
@dataclasses.dataclass(frozen=True)
class SmoothQuant(Quantizer):
    """Balance the ranges of activations and weights per channel, then round to nearest.

    Attributes:
        alpha: how much of the range of activations moves into the weights, 0 to 1.
    """

    weights: int = 8
    activations: int = 8
    kv: int = FLOAT
    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise SettingsError(f"alpha is between 0 and 1, got {self.alpha}")
        if self.activations == FLOAT:
            raise SettingsError(
                "smoothquant makes activations easier to quantize, but activations stay at 16 bits; "
                "use rtn or gptq, or give activation bits (a8)"
            )

    def statistics(
        self, checkpoint: Checkpoint, calibration: Calibration | None, seed: int
    ) -> Mapping[str, Tensor]:
        model, anatomy = checkpoint.model, checkpoint.anatomy
        if calibration is None:
            raise ValueError("smoothquant needs calibration data")
        maxima = {
            (block.index, site.name): AbsMax(site.width)
            for block, site in anatomy.sites()
            if site.norm
        }
        if not maxima:
            raise SettingsError(
                f"smoothquant lets the norms of a model take its scales in, and no norm of this {anatomy.family} "
                "model has a gain of its own; use a method that scales inputs at run time, such as svdquant"
            )
        observe(
            model,
            anatomy,
            forward_batches(calibration),
            {key: maximum.update for key, maximum in maxima.items()},
        )
        scales = {}
        for (index, name), maximum in maxima.items():
            site = anatomy.blocks[index].site(name)
            columns = torch.stack([reader.weight(model).abs().amax(0) for reader in site.readers])
            scales[f"{index}.{name}"] = smoothing_scale(
                maximum.value(), columns.amax(0), self.alpha
            )
        return scales

    def rewrite(self, checkpoint: Checkpoint, statistics: Mapping[str, Tensor], seed: int) -> None:
        for block, site in checkpoint.anatomy.sites():
            if site.norm:
                device = site.readers[0].weight(checkpoint.model).device
                scale = statistics[f"{block.index}.{site.name}"].to(device)
                scale_norm_site(checkpoint.model, site, scale)
