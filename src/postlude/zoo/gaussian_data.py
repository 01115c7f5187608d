"""Gaussian data, for which the exact denoiser is a formula and the variance that a sampler ends with is known.

Data is scalar, ``x0 ~ N(0, s2)``. Error of a given variance is added to every prediction. A sampler of an exact
prediction is linear in its start and in these errors, so one run over their unit vectors gives how much of each is in
the output, and with that the output's variance, without drawing a number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from postlude.numerics.diffusion import edm_sigmas, flow_sigmas

__all__ = ["Bed", "FlowBed", "NoiseBed", "SolverBed", "VelocitySolverBed"]

LARGEST, SMALLEST = 20.0, 0.05
FLOW_STEPS, SHIFT = 28, 3.0


class Bed(ABC):
    """One process and one grid of noise levels, to be driven with a scheduler of diffusers.

    Attributes:
        s2: variance of the data.
        start: variance of what the sampler starts from.
    """

    s2: float
    start: float

    @abstractmethod
    def place(self, scheduler: Any) -> None:
        """Set the noise levels of a scheduler, to its first step."""

    @abstractmethod
    def predict(self, sigma: float, x: Tensor) -> Tensor:
        """The exact prediction at a level of the scheduler."""

    def scale(self) -> float:
        """Factor from the sampler's last sample to the one whose variance is looked at."""
        return 1.0

    def run(self, scheduler: Any, injected: float = 0.0) -> tuple[Tensor, Tensor]:
        """How much of the start and of each step's error is in the output, and in the predictions.

        Returns:
            Output ``[n + 1]``, of the start first, in standard deviations; predictions ``[n, n + 1]`` before the error
            of their own step is added.
        """
        self.place(scheduler)
        steps = len(scheduler.timesteps)
        x = torch.zeros(steps + 1, 1)
        x[0] = self.start**0.5
        predictions = []
        for step, timestep in enumerate(scheduler.timesteps):
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, timestep)
            u = self.predict(float(scheduler.sigmas[step]), x)
            predictions.append(u[:, 0].double())
            u = u.clone()
            u[step + 1] += injected**0.5
            x = scheduler.step(u, timestep, x, return_dict=False)[0]
        return x[:, 0].double() * self.scale(), torch.stack(predictions)

    def output_variance(
        self, scheduler: Any, injected: float = 0.0, correlation: float = 0.0
    ) -> float:
        """Of the output, with errors of variance ``injected`` that correlate by ``correlation**k`` over ``k`` steps."""
        parts = self.run(scheduler, injected)[0]
        errors = torch.arange(len(parts) - 1)
        together = torch.pow(correlation, (errors[:, None] - errors).abs().double())
        return float(parts[0] ** 2 + parts[1:] @ together @ parts[1:])

    def prediction_variance(self, scheduler: Any) -> Tensor:
        """Of the predictions ``[n]`` on the trajectory without error."""
        return self.run(scheduler)[1][:, 0] ** 2


def _levels(scheduler: Any, sigmas: Tensor) -> None:
    """Levels for a scheduler that knows only its own; beneath what wraps it."""
    base = getattr(scheduler, "base", scheduler)
    base.set_timesteps(len(sigmas) - 1)
    base.sigmas = sigmas.float()
    base.set_begin_index(0)  # large levels may share a timestep


class NoiseBed(Bed):
    """Variance exploding, for ``EulerDiscreteScheduler``: EDM grid from 20 to 0.05, the output is that at 0.05."""

    def __init__(self, steps: int, s2: float = 0.5) -> None:
        self.sigmas = edm_sigmas(steps, SMALLEST, LARGEST)
        self.s2 = s2
        self.start = s2 + LARGEST**2

    def place(self, scheduler: Any) -> None:
        scheduler.set_timesteps(sigmas=self.sigmas.tolist())
        scheduler.set_begin_index(0)

    def predict(self, sigma: float, x: Tensor) -> Tensor:
        return sigma * x / (self.s2 + sigma**2)


class SolverBed(NoiseBed):
    """The same in the variance-preserving ``x`` of ``DPMSolverMultistepScheduler``; the output is ``x/alpha``."""

    def __init__(self, steps: int, s2: float = 0.5) -> None:
        super().__init__(steps, s2)
        self.start /= 1 + LARGEST**2

    def place(self, scheduler: Any) -> None:
        _levels(scheduler, self.sigmas)

    def predict(self, sigma: float, x: Tensor) -> Tensor:
        return super().predict(sigma, x * (1 + sigma**2) ** 0.5)

    def scale(self) -> float:
        return float((1 + SMALLEST**2) ** 0.5)


class FlowBed(Bed):
    """Flow matching in 28 steps with shift 3, for ``FlowMatchEulerDiscreteScheduler(shift=3.0)``."""

    def __init__(self, s2: float = 0.5) -> None:
        self.s2 = s2
        self.start = 1.0

    def place(self, scheduler: Any) -> None:
        scheduler.set_timesteps(sigmas=flow_sigmas(FLOW_STEPS)[:-1].tolist())

    def predict(self, sigma: float, x: Tensor) -> Tensor:
        variance = (1 - sigma) ** 2 * self.s2 + sigma**2
        return x * (sigma - (1 - sigma) * self.s2) / variance


class VelocitySolverBed(FlowBed):
    """The same for ``DPMSolverMultistepScheduler`` with flow prediction."""

    def place(self, scheduler: Any) -> None:
        _levels(scheduler, flow_sigmas(FLOW_STEPS, SHIFT))
