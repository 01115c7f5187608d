"""What Q-Drift needs to know of an approximate denoiser: how its output errs, at each step of one sampler.

Paired runs (arXiv:2603.18095): the sampler runs with the exact model, both models are asked at every sample it
visits, and the exact output decides where it goes next. Of the pairs ``(q, e)`` of approximate output and error, a
Gaussian is fitted for every step. Outputs are those that the scheduler gets: after guidance, and without the
channels of a learned variance.

Nothing here knows what makes a denoiser approximate: quantized, cached, pruned, any two callables.

Memory: 8 bytes for every entry of a sample, step and run.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from postlude.errors import CheckpointError, DataError, OutputExistsError, SettingsError
from postlude.numerics.diffusion import conditional_variance, fit_errors, interpolate
from postlude.runs.atomic import atomic_write
from postlude.runs.weights import read_header
from postlude.sampling.proxy import plain_scheduler

__all__ = [
    "DenoiserFunction",
    "DriftStatistics",
    "ErrorRecord",
    "PairedRun",
    "collect",
    "scheduler_config",
]

DenoiserFunction = Callable[..., Tensor]
"""``(latents, timestep, **conditions)`` to what the scheduler's ``step`` gets, guidance included."""

_FORMAT = "postlude drift statistics 1"
_TENSORS = ("timesteps", "sigmas", "mean", "covariance", "kept")


@dataclass(frozen=True, eq=False)
class PairedRun:
    """One run of the sampler.

    Attributes:
        noise: standard normal ``[batch, ...]``; the scheduler's ``init_noise_sigma`` scales it.
        conditions: what both denoisers get beside latents and timestep.
    """

    noise: Tensor
    conditions: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class DriftStatistics:
    """Gaussians of ``(approximate output, error)`` at the ``n`` steps of one sampler, for ``C`` channels or all as one.

    Attributes:
        timesteps: fp64 ``[n]``.
        sigmas: fp64 ``[n + 1]``, the scheduler's own noise levels.
        mean: fp64 ``[n, 2, C]``.
        covariance: fp64 ``[n, 2, 2, C]``.
        kept: int64 ``[n, C]``, pairs that were not trimmed.
        scheduler: class of the scheduler.
        config: its configuration.
        runs: how many paired runs.
        samples: how many samples in all of them.
        channel_axis: axis of the channels in a sample, where there is more than one Gaussian.
        reference, approximate: fingerprints of the models; empty where they have none.
        conditions: what else the outputs depend on, such as the guidance scale.
    """

    timesteps: Tensor
    sigmas: Tensor
    mean: Tensor
    covariance: Tensor
    kept: Tensor
    scheduler: str
    config: Mapping[str, Any]
    runs: int
    samples: int
    channel_axis: int = 1
    reference: str = ""
    approximate: str = ""
    conditions: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_variance(
        cls, scheduler: Any, variance: Tensor | float, *, channels: int = 1, channel_axis: int = 1
    ) -> DriftStatistics:
        """For error of a known variance that the output tells nothing of.

        Args:
            scheduler: its timesteps set.
            variance: ``V``, one number or ``[n, C]`` or what broadcasts to it.
            channels, channel_axis: see :class:`DriftStatistics`.
        """
        base = plain_scheduler(scheduler)
        timesteps, sigmas = _schedule_of(base)
        steps = len(timesteps)
        covariance = torch.zeros(steps, 2, 2, channels, dtype=torch.float64)
        covariance[:, 0, 0] = 1
        covariance[:, 1, 1] = torch.as_tensor(variance, dtype=torch.float64)
        return cls(
            timesteps=timesteps,
            sigmas=sigmas,
            mean=torch.zeros(steps, 2, channels, dtype=torch.float64),
            covariance=covariance,
            kept=torch.zeros(steps, channels, dtype=torch.int64),
            scheduler=type(base).__name__,
            config=scheduler_config(base),
            runs=0,
            samples=0,
            channel_axis=channel_axis,
        )

    @property
    def steps(self) -> int:
        """Steps of the sampler."""
        return len(self.timesteps)

    @property
    def channels(self) -> int:
        """Gaussians of a step; 1 where all channels are pooled."""
        return self.mean.shape[-1]

    def variance(self) -> Tensor:
        """``V [n, C]``: what of the error cannot be told from the output."""
        return conditional_variance(self.covariance)

    def check_scheduler(self, scheduler: Any) -> None:
        """Refuse a scheduler of another class or configuration.

        Raises:
            SettingsError: names what differs.
        """
        base = plain_scheduler(scheduler)
        name = type(base).__name__
        if name != self.scheduler:
            raise SettingsError(
                f"These drift statistics were made with {self.scheduler}, and the scheduler is {name}. "
                "Collect statistics with this scheduler, or sample with the other."
            )
        found = scheduler_config(base)
        keys = sorted(set(found) | set(self.config))
        differing = [key for key in keys if found.get(key) != self.config.get(key)]
        if differing:
            shown = ", ".join(
                f"{key} = {self.config.get(key)!r} then, {found.get(key)!r} now"
                for key in differing
            )
            raise SettingsError(
                f"These drift statistics were made with another configuration of {name}: {shown}. "
                "Collect statistics with this configuration, or sample with the other."
            )

    def check_models(self, *, reference: str = "", approximate: str = "") -> None:
        """Refuse models other than those of the paired runs; an empty fingerprint is not looked at.

        Raises:
            SettingsError: names the model.
        """
        pairs = (
            ("reference", reference, self.reference),
            ("approximate", approximate, self.approximate),
        )
        for role, found, expected in pairs:
            if found and expected and found != expected:
                raise SettingsError(
                    f"These drift statistics are of another {role} model: its fingerprint is {expected[:12]}, this "
                    f"one's is {found[:12]}. Collect statistics with this model: `postlude sample calibrate`."
                )

    def check_conditions(self, **conditions: Any) -> None:
        """Refuse what the outputs depend on, such as the guidance scale, where it is not as in the paired runs.

        Raises:
            SettingsError: names what differs.
        """
        for name, found in conditions.items():
            if name in self.conditions and self.conditions[name] != found:
                raise SettingsError(
                    f"These drift statistics were made with {name} = {self.conditions[name]!r}, and now it is "
                    f"{found!r}. Collect statistics with this value, or sample with the other."
                )

    def at(self, timesteps: Tensor) -> DriftStatistics:
        """As if collected at ``timesteps``: linearly between neighbouring ones, clamped outside."""
        at = timesteps.detach().to("cpu", torch.float64)
        return replace(
            self,
            timesteps=at,
            mean=interpolate(at, self.timesteps, self.mean),
            covariance=interpolate(at, self.timesteps, self.covariance),
        )

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write a safetensors file.

        Raises:
            OutputExistsError: it is there already and may not be replaced.
        """
        target = Path(path)
        if target.is_dir() or (target.exists() and not overwrite):
            raise OutputExistsError(
                f"{target} already exists. Choose another output, or allow it to be replaced (--overwrite)."
            )
        rest = {
            name: value
            for name, value in vars(self).items()
            if name not in _TENSORS  # what is left is a line of JSON
        }
        # One entry: safetensors writes several in an order that differs from file to file.
        header = {"statistics": json.dumps({"format": _FORMAT, **rest}, sort_keys=True)}
        target.resolve().parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as temporary:
            tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
            save_file(tensors, temporary, metadata=header)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DriftStatistics:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: no such file, a damaged one, or a safetensors file of something else.
        """
        file = Path(path)
        if not file.is_file():
            raise CheckpointError(
                f"There is no file {file}; expected drift statistics, written by `postlude sample calibrate`."
            )
        read_header(file)
        with safe_open(file, framework="pt") as store:
            header = _described(store.metadata() or {})
            found = header.pop("format", None)
            if found != _FORMAT:
                raise CheckpointError(
                    f"{file} holds no drift statistics (its format is {found!r}, expected {_FORMAT!r}). Write some "
                    "with `postlude sample calibrate`."
                )
            tensors = {name: store.get_tensor(name) for name in _TENSORS}
        return cls(**tensors, **header)


def _described(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the header of a file says of its statistics; empty where it says nothing."""
    try:
        value = json.loads(metadata.get("statistics", "{}"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """The settings of a scheduler that decide what it computes, as JSON would give them back."""
    settings = {
        key: value.tolist() if hasattr(value, "tolist") else value
        for key, value in dict(scheduler.config).items()
        if not key.startswith("_")
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


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
        base = plain_scheduler(scheduler)
        timesteps, sigmas = _schedule_of(base)
        mean, covariance, kept = self.fit(len(timesteps))
        return DriftStatistics(
            timesteps=timesteps,
            sigmas=sigmas,
            mean=mean,
            covariance=covariance,
            kept=kept,
            scheduler=type(base).__name__,
            config=scheduler_config(base),
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


def _schedule_of(scheduler: Any) -> tuple[Tensor, Tensor]:
    """Timesteps ``[n]`` and noise levels ``[n + 1]`` that are set, fp64 on the CPU."""
    timesteps, sigmas = (
        torch.as_tensor(one).detach().to("cpu", torch.float64)
        for one in (scheduler.timesteps, scheduler.sigmas)
    )
    return timesteps, sigmas


def _without_variance(output: Tensor, latents: Tensor, axis: int) -> Tensor:
    width = latents.shape[axis]
    return output.narrow(axis, 0, width) if output.shape[axis] == 2 * width else output
