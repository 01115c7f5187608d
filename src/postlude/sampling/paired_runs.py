"""Paired runs: how an approximate denoiser errs at the samples that the exact one leads to (arXiv:2603.18095).

The sampler runs with the exact model, both models are asked at every sample it visits, and the exact output decides
where it goes next. Of the pairs ``(q, e)`` of approximate output and error, a Gaussian is fitted for every step.
Outputs are those that the scheduler gets: after guidance, and without the channels of a learned variance.

Nothing here knows what makes a denoiser approximate: quantized, cached, pruned, any two callables.

Memory: 8 bytes for every entry of a sample, step and run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from postlude.errors import DataError
from postlude.numerics.diffusion import fit_errors
from postlude.sampling.drift import DriftStatistics
from postlude.sampling.proxy import plain_scheduler

__all__ = ["DenoiserFunction", "ErrorRecord", "PairedRun", "collect"]

DenoiserFunction = Callable[..., Tensor]
"""``(latents, timestep, **conditions)`` to what the scheduler's ``step`` gets, guidance included."""


@dataclass(frozen=True, eq=False)
class PairedRun:
    """One run of the sampler.

    Attributes:
        noise: standard normal ``[batch, ...]``; the scheduler's ``init_noise_sigma`` scales it.
        conditions: what both denoisers get beside latents and timestep.
    """

    noise: Tensor
    conditions: Mapping[str, Any] = field(default_factory=dict)


class ErrorRecord:
    """Gathers outputs of paired runs, and fits.

    Args:
        channelwise: a Gaussian for each channel of a sample, instead of one for all.
        channel_axis: where a sample ``[batch, ...]`` has its channels.
    """

    def __init__(self, *, channelwise: bool = False, channel_axis: int = 1) -> None:
        self.channelwise = channelwise
        self.channel_axis = channel_axis
        self._pairs: dict[int, list[Tensor]] = {}

    def add(self, step: int, approximate: Tensor, exact: Tensor) -> None:
        """Take in the outputs of both models at one step of one run.

        Raises:
            DataError: they are not of one shape.
        """
        if approximate.shape != exact.shape:
            raise DataError(
                f"At step {step} the approximate model's output is {tuple(approximate.shape)}, the exact model's "
                f"{tuple(exact.shape)}; expected the same shape."
            )
        exact = exact.detach().float()
        pair = torch.stack([approximate.detach().float(), approximate.detach().float() - exact])
        rows = pair.movedim(self.channel_axis + 1, 1).flatten(2) if self.channelwise else None
        pair = pair.reshape(2, 1, -1) if rows is None else rows
        self._pairs.setdefault(step, []).append(pair.cpu())

    def fit(self, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mean ``[n, 2, C]``, covariance ``[n, 2, 2, C]`` and pairs kept ``[n, C]``.

        Raises:
            DataError: a step has no pairs, too few of them, or one that is not finite.
        """
        missing = [step for step in range(steps) if step not in self._pairs]
        if missing:
            raise DataError(
                f"No outputs were recorded at {len(missing)} of {steps} steps (the first is step {missing[0]}); "
                "expected runs over all steps."
            )
        fits = [fit_errors(*torch.cat(self._pairs[step], dim=-1)) for step in range(steps)]
        return tuple(torch.stack(parts) for parts in zip(*fits, strict=True))  # type: ignore[return-value]

    def statistics(
        self,
        scheduler: Any,
        *,
        runs: int,
        samples: int,
        fingerprints: Sequence[str] = ("", ""),
        conditions: Mapping[str, Any] | None = None,
    ) -> DriftStatistics:
        """Fit, and note what the statistics hold for.

        Args:
            scheduler: as it was in the runs, its timesteps set.
            runs, samples: how many were recorded.
            fingerprints: of the exact and the approximate model.
            conditions: see :class:`DriftStatistics`.
        """
        mean, covariance, kept = self.fit(len(plain_scheduler(scheduler).timesteps))
        return DriftStatistics.of_scheduler(
            scheduler,
            mean=mean,
            covariance=covariance,
            kept=kept,
            runs=runs,
            samples=samples,
            channel_axis=self.channel_axis,
            reference=fingerprints[0],
            approximate=fingerprints[1],
            conditions=dict(conditions or {}),
        )


@torch.no_grad()
def collect(
    reference: DenoiserFunction,
    approximate: DenoiserFunction,
    scheduler: Any,
    runs: Iterable[PairedRun],
    *,
    steps: int | Mapping[str, Any],
    channelwise: bool = False,
    channel_axis: int = 1,
    fingerprints: Sequence[str] = ("", ""),
    conditions: Mapping[str, Any] | None = None,
) -> DriftStatistics:
    """Run the sampler with ``reference`` and ask ``approximate`` at every sample that it visits.

    Args:
        reference, approximate: the two denoisers; of an output with twice the channels of the latents, the second
            half is taken for a learned variance and left out.
        scheduler: of diffusers, or with its ``set_timesteps``, ``timesteps``, ``sigmas``, ``step`` and ``config``; it
            is copied and stays as it is.
        runs: what to start from.
        steps: how many, or keyword arguments of the scheduler's ``set_timesteps``.
        channelwise, channel_axis: see :class:`ErrorRecord`.
        fingerprints: of the two models, exact one first.
        conditions: see :class:`DriftStatistics`.

    Raises:
        DataError: no runs, outputs of different shapes, or one that is not finite.
    """
    sampler = copy.deepcopy(plain_scheduler(scheduler))
    record = ErrorRecord(channelwise=channelwise, channel_axis=channel_axis)
    settings = {"num_inference_steps": steps} if isinstance(steps, int) else dict(steps)
    counts = [0, 0]
    for run in runs:
        sampler.set_timesteps(**settings)
        x = run.noise * getattr(sampler, "init_noise_sigma", 1.0)
        for step, timestep in enumerate(sampler.timesteps):
            latents = x
            if hasattr(sampler, "scale_model_input"):
                latents = sampler.scale_model_input(x, timestep)
            exact, other = (
                _without_variance(one(latents, timestep, **run.conditions), x, channel_axis)
                for one in (reference, approximate)
            )
            record.add(step, other, exact)
            x = sampler.step(exact, timestep, x, return_dict=False)[0]
        counts[0] += 1
        counts[1] += len(run.noise)
    if not counts[0]:
        raise DataError("No paired runs were given; expected at least one, and five by default.")
    return record.statistics(
        sampler, runs=counts[0], samples=counts[1], fingerprints=fingerprints, conditions=conditions
    )


def _without_variance(output: Tensor, latents: Tensor, axis: int) -> Tensor:
    width = latents.shape[axis]
    return output.narrow(axis, 0, width) if output.shape[axis] == 2 * width else output
