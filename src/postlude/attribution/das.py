"""DAS: how far the output at a query moves when an image is left out.

    phi(x)   = projected mean over timesteps of g_t / |g_t|,     g_t = gradient of mean eps_theta(x_t, t)
    r_n      = mean over timesteps of RMSE_t(n) / mean over n of RMSE_t(n)            what is left to learn of image n
    score(q, n) = r_n phi(q)^T K phi(n) / (1 - h_n),     h_n = phi(n)^T K phi(n),     K = (Phi^T Phi + lam)^-1

``h`` is the leverage of a training image, from products of training images with each other; the released code takes
another matrix for it. For least squares with the signed residual the formula is exact leave-one-out.

Paper: "Diffusion Attribution Score" (arXiv:2410.18639), code Jinxu-Lin/DAS. Differs: every layer has a projection, a
kernel and a leverage of its own, so each layer is one linear model, and their scores are added; lengths ``|g_t|`` are
of the projected gradient over all layers, which is right on average; residuals come from the ``K`` timesteps of the
index, where the paper takes about a thousand; how it normalises them across timesteps is our reading. The squared
variant is left out: it is no sum over layers.

Cost: as LoGRA times the number of timesteps; the projected gradients of all timesteps and layers of a batch exist at
once. The leverages take one inverse of the curvature a layer, once for each opened index.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from postlude.attribution.curvature import LayerCurvature
from postlude.attribution.denoising import denoised
from postlude.attribution.examples import Collection
from postlude.attribution.index import Index, LayerSource
from postlude.attribution.logra import LoGRA
from postlude.attribution.queries import Queries
from postlude.attribution.representation import DenseRepresentation, Recorder
from postlude.registry import method
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.gradients import CollectedLayer

__all__ = ["DAS", "StepRepresentation", "residuals"]


@dataclasses.dataclass(frozen=True)
class StepRepresentation(DenseRepresentation):
    """Projected gradients of the mean output, each timestep's of unit length; beside them the error of each."""

    kind = "steps"
    output: str = "output-mean"

    @contextlib.contextmanager
    def recorder(self, checkpoint: Checkpoint, collection: Collection) -> Iterator[Recorder]:
        collector = self._collector(checkpoint, collection)
        keep = self.keeper(collection)
        work = denoised(checkpoint, collection)
        draws = collection.draws

        def record(batch: Any) -> dict[str, Tensor]:
            errors: list[Tensor] = []

            def total() -> Tensor:
                made = work(batch)
                errors.append(made.errors().detach())
                return made.predicted.flatten(2).mean(2).sum()

            found: dict[str, Tensor] = collector.collect(total, len(batch) * draws)
            squares = torch.stack([one.square().sum((1, 2)) for one in found.values()])
            length = squares.sum(0).sqrt()
            unit = torch.where(length > 0, 1 / length.clamp(min=1e-30), 0.0)[:, None, None]
            rows = {}
            for layer in collector.layers:
                steps = found[layer.module] * unit
                mean = steps.view(len(batch), draws, *steps.shape[1:]).mean(1)
                for name, tensor in keep(layer, mean).items():
                    rows[f"{layer.module}/{name}"] = tensor
            rows["loss"] = errors[0].mean(1).float()
            # Draws of one timestep stand next to each other.
            per_step = errors[0].view(len(batch), collection.timesteps, collection.noises)
            rows["errors"] = per_step.mean(2).sqrt().float()
            return rows

        with collector:
            yield record


@method("attribute", "das", family="influence", paper="arXiv:2410.18639", needs=("gradients",))
@dataclasses.dataclass(frozen=True)
class DAS(LoGRA):
    """For diffusion models: how far the output moves when an image is left out.

    Attributes:
        side: width of both sides of a projected gradient; narrower sides stay as they are.
        format: of the stored numbers: fp32, bf16 or int8.
        damping: multiplier of ``trace / D``.
        curvature: ``auto``, ``dual`` or ``exact``, which give the same numbers.
        leverage: divide by ``1 - h``.
    """

    leverage: bool = True

    kinds: ClassVar[tuple[str, ...]] = ("diffusion",)

    def representation(self) -> StepRepresentation:
        return StepRepresentation(side=self.side, format=self.format)

    def weights(self, index: Index, queries: Queries) -> tuple[Tensor, Tensor]:
        """The residuals of the training images."""
        return torch.ones(len(queries)), residuals(index)

    def layer_factors(
        self, index: Index, layer: CollectedLayer, fitted: LayerCurvature, source: LayerSource
    ) -> Tensor | None:
        if not self.leverage:
            return None
        name = f"leverages {layer.module} {self.damping}"
        found = index.cached(name, lambda _: fitted.leverages(source))
        # Rounding can bring a leverage to 1, where leaving the image out would leave nothing.
        return 1 / (1 - found).clamp(min=1e-6)

    @property
    def unit(self) -> str:
        return "change of the output"

    def meaning(self, noun: str) -> str:
        return (
            "A score estimates, from gradients, how far the model's mean output at the "
            f"{noun} would move if it had been trained without the example: the output, not the loss. The higher, the "
            "more support; below zero the example pulled the other way."
        )


def residuals(index: Index) -> Tensor:
    """fp64 ``[examples]`` of mean 1: errors of every timestep over their mean, averaged over timesteps."""

    def make(one: Index) -> Tensor:
        errors = one.tensor("errors").double()
        return (errors / errors.mean(0).clamp(min=1e-300)).mean(1)

    return index.cached("residuals", make)
