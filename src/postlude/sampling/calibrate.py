"""Drift statistics of two checkpoints: an approximate diffusion model beside the one that it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from postlude.errors import CheckpointError, SettingsError
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.progress import Progress
from postlude.sampling.drift import DriftStatistics
from postlude.sampling.paired_runs import PairedRun, collect
from postlude.sampling.q_drift import check_supported
from postlude.sampling.sample import (
    GuidedDenoiser,
    check_diffusion,
    first_noise,
    generators,
    image_shape,
    labels_of,
)
from postlude.sampling.samplers import FLOW, build_scheduler, process_of

__all__ = ["calibrate"]

# Noise of paired runs comes from seeds that samples cannot have: those end at 2**32.
_SEEDS_OF_RUNS = 2**32


def calibrate(
    checkpoint: Checkpoint,
    reference: Checkpoint,
    *,
    runs: int = 5,
    batch: int = 16,
    sampler: str | None = "dpm++",
    steps: int = 20,
    labels: Sequence[int] | Tensor | None = None,
    guidance: float = 1.0,
    conditions: Mapping[str, Tensor] | None = None,
    reuse: int = 1,
    channelwise: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> DriftStatistics:
    """Run the sampler with ``reference`` and note how ``checkpoint`` errs at every sample that it visits.

    Args:
        checkpoint: the approximate model, whatever makes it one; its scheduler is the one that is calibrated.
        reference: the exact model; with ``reuse`` it may be the same.
        runs: paired runs (arXiv:2603.18095: five are enough).
        batch: samples of a run. A sample of few pixels needs more of them.
        sampler, steps, labels, guidance, conditions: as they will be sampled with; a sampler None is the checkpoint's
            own, and the others see
            :func:`postlude.sampling.sample.sample`; ``conditions`` have ``runs * batch`` rows.
        reuse: the blocks of the approximate model run at every so many timesteps.
        channelwise: a statistic for each channel, instead of one for all.
        seed: of the noise, which is none that samples start from.
        progress: where to show it.

    Raises:
        CheckpointError: one is no diffusion model, or the two predict different things or draw images of different
            shapes.
        SettingsError, UnknownNameError: a sampler or a number that cannot be, or a scheduler without a rule.
    """
    for name, value in (("runs", runs), ("batch", batch), ("steps", steps)):
        if value < 1:
            raise SettingsError(f"{name} is {value}; expected 1 or more")
    for one in (checkpoint, reference):
        check_diffusion(one)
    shape = image_shape(checkpoint.model)
    if shape != image_shape(reference.model):
        raise CheckpointError(
            f"The model draws images of shape {shape}, and the reference {image_shape(reference.model)}; expected the "
            "model that the first was made from."
        )
    _check_predictions(checkpoint.scheduler, reference.scheduler)
    scheduler = build_scheduler(checkpoint.scheduler, sampler)
    check_supported(scheduler)
    classes = labels_of(checkpoint.model, labels, runs * batch)
    exact, approximate = (
        GuidedDenoiser(one, labels=classes, conditions=conditions, guidance=guidance, reuse=every)
        for one, every in ((reference, 1), (checkpoint, reuse))
    )
    device = reference.model.device
    sources = generators(_SEEDS_OF_RUNS + seed, runs * batch)

    def paired() -> Iterator[PairedRun]:
        for first in range(0, len(sources), batch):
            rows = slice(first, first + batch)
            yield PairedRun(first_noise(shape, sources[rows]).to(device), {"rows": rows})

    with progress or Progress(False) as shown:
        return collect(
            exact,
            approximate,
            scheduler,
            shown.iterate(paired(), "paired runs", runs),
            steps={"num_inference_steps": steps, "device": device},
            channelwise=channelwise,
            fingerprints=(reference.fingerprint(), checkpoint.fingerprint()),
            conditions={"guidance": guidance, "reuse": reuse},
        )


def _check_predictions(scheduler: Any, reference: Any) -> None:
    """The error of an output is a difference of outputs, so both must be of one kind."""
    mine, other = (_prediction(one) for one in (scheduler, reference))
    if mine != other:
        raise CheckpointError(
            f"The model predicts {mine} ({type(scheduler).__name__}), and the reference {other} "
            f"({type(reference).__name__}); expected the model that the first was made from."
        )


def _prediction(scheduler: Any) -> str:
    if process_of(scheduler) == FLOW:
        return "the velocity of a flow"
    return str(scheduler.config.get("prediction_type", "epsilon"))
