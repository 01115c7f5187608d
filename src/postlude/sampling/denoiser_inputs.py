"""What a denoiser is given while it samples: the calibration data of a diffusion model.

The float model samples by its own scheduler, from noise, balanced over its classes. From every path one input is
kept, ``(x_t, t, condition)``, so that inputs are independent and spread over the timesteps:

    uniform   equal counts at every step (Q-Diffusion, arXiv:2302.04304)
    skewed    t ~ N(0.4 T, (T/2)^2), clipped to [0, T], at the nearest step: more of the small t, where inputs look like
              images (PTQ4DM, arXiv:2211.15736, says: mean at most T/2; 0.4 is our choice)

Cost: ``count`` samples by the float model; the memory of ``count`` inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from postlude.errors import SettingsError, UnknownNameError
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.progress import Progress
from postlude.sampling.sample import sample
from postlude.surgery.batches import Batch, joined, rows_of
from postlude.surgery.capture import recorded_inputs

__all__ = ["SPREADS", "denoiser_inputs"]

# Where the mean of the skewed spread is, as a fraction of all timesteps.
_SKEWED_MEAN = 0.4

# (number of inputs, timesteps of the path, all timesteps of training, generator) to a step for each input.
Spread = Callable[[int, Tensor, float, torch.Generator], Tensor]


def _uniform(count: int, timesteps: Tensor, total: float, generator: torch.Generator) -> Tensor:
    # A random order, so that the step of an input says nothing about its class.
    return (torch.arange(count) % len(timesteps))[torch.randperm(count, generator=generator)]


def _skewed(count: int, timesteps: Tensor, total: float, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(count, generator=generator) * total / 2 + _SKEWED_MEAN * total
    return (drawn.clamp(0, total)[:, None] - timesteps[None].float()).abs().argmin(1)


SPREADS: dict[str, Spread] = {"uniform": _uniform, "skewed": _skewed}


def denoiser_inputs(
    checkpoint: Checkpoint,
    count: int = 128,
    *,
    steps: int = 20,
    spread: str = "uniform",
    seed: int = 0,
    conditions: Mapping[str, Tensor] | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[Batch]:
    """Inputs of a denoiser, one from each of ``count`` paths.

    Args:
        checkpoint: a float diffusion model with its scheduler.
        count: of inputs.
        steps: of the sampler.
        spread: over the timesteps, a name of :data:`SPREADS`.
        seed: of noise and spread.
        conditions: for a model without classes, one row per path; see :class:`postlude.sampling.sample.GuidedDenoiser`.
        batch_size: inputs in one batch.
        progress: where to show it.

    Returns:
        Keyword arguments of the model's forward, ``ceil(count / batch_size)`` batches on the CPU in the order of the
        paths.

    Raises:
        SettingsError: a number that cannot be.
        UnknownNameError: another spread.
        CheckpointError, ArchitectureError: a model that does not sample by itself.
    """
    if spread not in SPREADS:
        raise UnknownNameError("spread of timesteps", spread, SPREADS)
    if count < 1 or batch_size < 1:
        raise SettingsError(f"count is {count} and batch_size {batch_size}; expected 1 or more")
    picker = _Picker(count, batch_size, SPREADS[spread], seed)
    with recorded_inputs(checkpoint.model, picker.look):
        sample(
            checkpoint,
            count=count,
            steps=steps,
            seed=seed,
            conditions=conditions,
            batch_size=batch_size,
            wrap=picker.follow,
            progress=progress,
            title="calibration inputs",
        )
    return picker.batches()


class _Picker:
    """Keeps from every path the one input that the spread chose."""

    def __init__(self, count: int, batch_size: int, spread: Spread, seed: int) -> None:
        self._count, self._batch_size, self._spread = count, batch_size, spread
        self._generator = torch.Generator().manual_seed(seed)
        self._scheduler: Any = None
        self._chosen: Tensor | None = None
        self._calls = 0
        self._kept: list[Batch | None] = [None] * count

    def follow(self, scheduler: Any) -> Any:
        self._scheduler = scheduler
        return scheduler

    def look(self, batch: Batch) -> None:
        timesteps = self._scheduler.timesteps.cpu()
        if self._chosen is None:
            total = float(self._scheduler.config.num_train_timesteps)
            self._chosen = self._spread(self._count, timesteps, total, self._generator)
        part, step = divmod(self._calls, len(timesteps))
        self._calls += 1
        first = part * self._batch_size
        for row in (self._chosen[first : first + self._batch_size] == step).nonzero().flatten():
            self._kept[first + int(row)] = rows_of(batch, slice(int(row), int(row) + 1))

    def batches(self) -> list[Batch]:
        kept = [one for one in self._kept if one is not None]
        starts = range(0, len(kept), self._batch_size)
        return [joined(kept[start : start + self._batch_size]) for start in starts]
