"""Gaussian data, exact predictions, white error: samplers whose output variance is known exactly.

Data is scalar, ``x0 ~ N(0, s2)``. A sampler of an exact prediction is linear in its start and in the errors added to
the predictions, so one run over the unit vectors of these gives its output variance: a sum of squares.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from postlude.numerics.diffusion import edm_sigmas
from postlude.sampling.drift import DriftStatistics, scheduler_config
from postlude.sampling.proxy import plain_scheduler
from postlude.sampling.schedulers import QDrift, correct

diffusers = pytest.importorskip("diffusers")
EULER = diffusers.EulerDiscreteScheduler
FLOW = diffusers.FlowMatchEulerDiscreteScheduler
SOLVER = diffusers.DPMSolverMultistepScheduler

LARGEST, SMALLEST = 20.0, 0.05
FLOW_STEPS = 28


def statistics_of(
    scheduler: Any, variance: Tensor | float, *, channels: int = 1, **fields: Any
) -> DriftStatistics:
    """As if the error of every step had this variance and nothing of it were told by the output."""
    steps = len(scheduler.timesteps)
    covariance = torch.zeros(steps, 2, 2, channels, dtype=torch.float64)
    covariance[:, 0, 0] = 1
    covariance[:, 1, 1] = torch.as_tensor(variance, dtype=torch.float64)
    return DriftStatistics(
        timesteps=scheduler.timesteps.double(),
        sigmas=scheduler.sigmas.double(),
        mean=torch.zeros(steps, 2, channels, dtype=torch.float64),
        covariance=covariance,
        kept=torch.full((steps, channels), 2),
        scheduler=type(scheduler).__name__,
        config=scheduler_config(scheduler),
        runs=1,
        samples=1,
        **fields,
    )


def own_levels(scheduler: Any, sigmas: Tensor) -> None:
    """Levels for a scheduler that knows only its own: set beneath a correction, which looks at them in ``step``."""
    base = plain_scheduler(scheduler)
    base.set_timesteps(len(sigmas) - 1)
    base.sigmas = sigmas.float()
    base.set_begin_index(0)  # large levels may share a timestep


class EulerBed:
    """Variance exploding, EDM grid from 20 to 0.05, no last step to 0; the output is that at 0.05."""

    def __init__(self, steps: int, s2: float = 0.5) -> None:
        self.sigmas = edm_sigmas(steps, SMALLEST, LARGEST)
        self.s2 = s2
        self.start = s2 + LARGEST**2

    def set(self, scheduler: Any) -> None:
        scheduler.set_timesteps(sigmas=self.sigmas.tolist())
        scheduler.set_begin_index(0)  # large levels share a timestep

    def predict(self, scheduler: Any, step: int, x: Tensor) -> Tensor:
        sigma = float(scheduler.sigmas[step])
        return sigma * x / (self.s2 + sigma**2)

    def output(self, variance: float) -> float:
        return variance


class SolverBed(EulerBed):
    """The same bed in the variance-preserving ``x`` of DPM-Solver, ``y = x/alpha``."""

    def __init__(self, steps: int, s2: float = 0.5) -> None:
        super().__init__(steps, s2)
        self.start /= 1 + LARGEST**2

    def set(self, scheduler: Any) -> None:
        own_levels(scheduler, self.sigmas)

    def predict(self, scheduler: Any, step: int, x: Tensor) -> Tensor:
        sigma = float(scheduler.sigmas[step])
        return sigma * x * (1 + sigma**2) ** 0.5 / (self.s2 + sigma**2)

    def output(self, variance: float) -> float:
        return variance * (1 + SMALLEST**2)


class FlowBed:
    """Flow matching, 28 steps, shift 3."""

    def __init__(self, s2: float = 0.5) -> None:
        self.s2 = s2
        self.start = 1.0

    def set(self, scheduler: Any) -> None:
        scheduler.set_timesteps(
            sigmas=torch.linspace(1, 0, FLOW_STEPS + 1, dtype=torch.float64)[:-1].tolist()
        )

    def predict(self, scheduler: Any, step: int, x: Tensor) -> Tensor:
        sigma = float(scheduler.sigmas[step])
        return x * (sigma - (1 - sigma) * self.s2) / ((1 - sigma) ** 2 * self.s2 + sigma**2)

    def output(self, variance: float) -> float:
        return variance


def output_variance(scheduler: Any, bed: Any, injected: float) -> float:
    """Of the bed's output, when error of variance ``injected`` is added to every prediction."""
    bed.set(scheduler)
    steps = len(scheduler.timesteps)
    x = torch.zeros(steps + 1, 1)
    x[0] = bed.start**0.5
    for step, timestep in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, timestep)
        u = bed.predict(scheduler, step, x)
        u[step + 1] += injected**0.5
        x = scheduler.step(u, timestep, x, return_dict=False)[0]
    return bed.output(float(x.double().square().sum()))


def trajectory_variance(scheduler: Any, bed: Any) -> Tensor:
    """Variance ``[n]`` of the predictions on the trajectory without error."""
    bed.set(scheduler)
    x = torch.full((1, 1), bed.start**0.5)
    found = []
    for step, timestep in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, timestep)
        u = bed.predict(scheduler, step, x)
        found.append(float(u.double().square()))
        x = scheduler.step(u, timestep, x, return_dict=False)[0]
    return torch.tensor(found, dtype=torch.float64)


def solver(order: int, **settings: Any) -> Any:
    return SOLVER(solver_order=order, final_sigmas_type="sigma_min", **settings)


def corrected_on(bed: Any, make: Any, injected: Tensor | float, **settings: Any) -> Any:
    """A scheduler that is told the variance of the error."""
    base = make()
    bed.set(base)
    return correct(make(), statistics_of(base, injected), QDrift(**settings))


def outputs(steps: int, shape: tuple[int, ...] = (2, 3, 4, 4)) -> Tensor:
    return torch.randn(steps, *shape, generator=torch.Generator().manual_seed(3))


def path(scheduler: Any, steps: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    """Where a sampler ends, and how it got there, for outputs that do not depend on the sample."""
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(4)).to(dtype)
    found = []
    for u, timestep in zip(outputs(steps).to(dtype), scheduler.timesteps, strict=True):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, timestep)
        x = scheduler.step(u, timestep, x, return_dict=False)[0]
        found.append(x)
    return torch.stack(found)


def set_to(scheduler: Any, steps: int = 6) -> Any:
    scheduler.set_timesteps(steps)
    return scheduler
