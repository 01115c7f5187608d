"""What Q-Drift needs to know of an approximate denoiser: how its output errs, at each step of one sampler.

A Gaussian of approximate output and error at every step (arXiv:2603.18095), what it holds for, and the file it is kept
in. :mod:`postlude.sampling.paired_runs` measures it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from postlude.errors import CheckpointError, SettingsError
from postlude.numerics.diffusion import conditional_variance, interpolate
from postlude.runs.atomic import atomic_write, check_replaceable_file
from postlude.runs.weights import read_header
from postlude.sampling.proxy import plain_scheduler

__all__ = ["DriftStatistics", "scheduler_config"]

_FORMAT = "postlude drift statistics 1"
_TENSORS = ("timesteps", "sigmas", "mean", "covariance", "kept")


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
    def of_scheduler(cls, scheduler: Any, **values: Any) -> DriftStatistics:
        """Statistics at the timesteps that are set in a scheduler; ``values`` are the other attributes."""
        base = plain_scheduler(scheduler)
        timesteps, sigmas = (
            torch.as_tensor(one).detach().to("cpu", torch.float64)
            for one in (base.timesteps, base.sigmas)
        )
        return cls(
            timesteps=timesteps,
            sigmas=sigmas,
            scheduler=type(base).__name__,
            config=scheduler_config(base),
            **values,
        )

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
        steps = len(plain_scheduler(scheduler).timesteps)
        covariance = torch.zeros(steps, 2, 2, channels, dtype=torch.float64)
        covariance[:, 0, 0] = 1
        covariance[:, 1, 1] = torch.as_tensor(variance, dtype=torch.float64)
        return cls.of_scheduler(
            scheduler,
            mean=torch.zeros(steps, 2, channels, dtype=torch.float64),
            covariance=covariance,
            kept=torch.zeros(steps, channels, dtype=torch.int64),
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
        check_replaceable_file(target, overwrite)
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
