"""Schedulers of diffusers, and paths of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from postlude.sampling.drift import DriftStatistics
from postlude.sampling.q_drift import QDrift, correct
from postlude.zoo.gaussian_data import Bed

diffusers = pytest.importorskip("diffusers")
EULER = diffusers.EulerDiscreteScheduler
FLOW = diffusers.FlowMatchEulerDiscreteScheduler
SOLVER = diffusers.DPMSolverMultistepScheduler

statistics_of = DriftStatistics.of_variance


def solver(order: int, **settings: Any) -> Any:
    return SOLVER(solver_order=order, final_sigmas_type="sigma_min", **settings)


def corrected_on(bed: Bed, make: Any, injected: Tensor | float, **settings: Any) -> Any:
    """A scheduler that is told the variance of the error."""
    base = make()
    bed.place(base)
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
