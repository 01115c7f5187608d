"""Drift statistics of two diffusers pipelines, whatever they are conditioned on.

The exact pipeline runs with a scheduler that notes every output it is given; the approximate one from the same seed
with a scheduler that compares what it is given, and goes on with the noted output. So both models see the same
samples (teacher forcing), and guidance, text encoders and learned variances are the pipelines' own affair.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from postlude.errors import DataError
from postlude.sampling.drift import DriftStatistics
from postlude.sampling.paired_runs import ErrorRecord
from postlude.sampling.proxy import SchedulerProxy, plain_scheduler

__all__ = ["collect_from_pipelines"]


def collect_from_pipelines(
    reference: Any,
    approximate: Any,
    calls: Iterable[Mapping[str, Any]],
    *,
    seed: int = 0,
    channelwise: bool = False,
    channel_axis: int = 1,
    fingerprints: Sequence[str] = ("", ""),
    conditions: Mapping[str, Any] | None = None,
) -> DriftStatistics:
    """Statistics for ``correct(approximate.scheduler, ...)``.

    Both pipelines are left as they were. ``approximate`` may share all but its denoiser with ``reference``
    (``type(reference).from_pipe(reference, transformer=small)``).

    Args:
        reference, approximate: the two pipelines, of one scheduler.
        calls: of each paired run the arguments of the pipelines, with the same number of steps in all.
        seed: run ``i`` is started with a generator of seed ``seed + i``.
        channelwise, channel_axis, fingerprints, conditions: see :func:`postlude.sampling.paired_runs.collect`; the
            axis is that of what the scheduler gets, 2 for pipelines that pack images into tokens.

    Raises:
        DataError: no calls, or pipelines that do not come to the same samples.
    """
    record = ErrorRecord(channelwise=channelwise, channel_axis=channel_axis)
    base = copy.deepcopy(plain_scheduler(approximate.scheduler))
    counts = [0, 0]
    for call in calls:
        notes = _Notes(copy.deepcopy(base))
        _run(reference, notes, call, seed + counts[0])
        compared = _Compared(base, notes.outputs, notes.samples, record)
        _run(approximate, compared, call, seed + counts[0])
        counts[0] += 1
        counts[1] += len(notes.outputs[0])
    if not counts[0]:
        raise DataError("No calls were given; expected at least one, and five by default.")
    return record.statistics(
        base, runs=counts[0], samples=counts[1], fingerprints=fingerprints, conditions=conditions
    )


def _run(pipeline: Any, scheduler: Any, call: Mapping[str, Any], seed: int) -> None:
    before = pipeline.scheduler
    pipeline.scheduler = scheduler
    try:
        pipeline(**call, generator=torch.Generator().manual_seed(seed))
    finally:
        pipeline.scheduler = before


class _Notes(SchedulerProxy):
    """Keeps samples and outputs of every step."""

    overrides = ("step",)

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        self.__dict__.update(outputs=[], samples=[])

    def _step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        self.outputs.append(model_output.detach().cpu())
        self.samples.append(sample.detach().cpu())
        return self.base.step(model_output, timestep, sample, *args, **kwargs)


class _Compared(SchedulerProxy):
    """Records the difference to the outputs that were noted, and goes on with those."""

    done: int
    overrides = ("step",)

    def __init__(
        self, base: Any, outputs: list[Tensor], samples: list[Tensor], record: ErrorRecord
    ) -> None:
        super().__init__(base)
        self.__dict__.update(outputs=outputs, samples=samples, record=record, done=0)

    def _step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        step = self.done
        if step >= len(self.outputs) or not torch.equal(sample.detach().cpu(), self.samples[step]):
            raise DataError(
                f"At step {step} the two pipelines do not have the same sample; expected pipelines that differ in "
                "the denoiser alone, called with the same arguments and numbers of a fixed seed."
            )
        self.done = step + 1
        self.record.add(step, model_output.detach().cpu(), self.outputs[step])
        exact = self.outputs[step].to(model_output.device)
        return self.base.step(exact, timestep, sample, *args, **kwargs)
