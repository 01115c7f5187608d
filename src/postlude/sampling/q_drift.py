"""Q-Drift: schedulers of diffusers that make up for the error of an approximate denoiser.

    pipe.scheduler = correct(pipe.scheduler, DriftStatistics.load("drift.safetensors"))

An approximate model adds error to every step; what of it cannot be told from the output acts like injected noise of a
known variance, which ``numerics/diffusion.py`` turns into a longer step. Direction unchanged, nothing injected
(arXiv:2603.18095). Cost: a few elementwise operations a step. Needs statistics of paired runs (``drift.py``).

Differs from the paper: ``mode="corrected"`` repairs the rules for flow matching and for solvers of order 2 and 3,
which do not restore the variance of Gaussian data; ``mode="paper"`` has them as published. ``skip_last`` and ``cap``
are ours. A step whose statistics are zero is the plain scheduler's, to the last bit.

Steps that inject noise themselves stay as they are: ``s_churn`` of Euler, ``stochastic_sampling`` and per-token
timesteps of flow matching, the ``sde-`` algorithms of DPM-Solver.
"""

from __future__ import annotations

import inspect
import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.diffusion import regression
from postlude.registry import method
from postlude.sampling.drift import DriftStatistics
from postlude.sampling.proxy import SchedulerProxy, plain_scheduler
from postlude.sampling.step_rules import SUPPORTED, rule_of

__all__ = [
    "MODES",
    "SUPPORTED",
    "DriftCorrectedScheduler",
    "DriftWarning",
    "QDrift",
    "check_supported",
    "correct",
]

MODES = ("corrected", "paper")
"""Of :class:`QDrift`, the default first."""


class DriftWarning(UserWarning):
    """The correction is applied less than exactly, or not at all."""


@method(
    "sample",
    "q-drift",
    family="sampler correction",
    paper="arXiv:2603.18095",
    needs=("drift statistics",),
)
@dataclass(frozen=True)
class QDrift:
    """Longer steps that make up for the variance which a denoiser's error adds.

    Attributes:
        mode: ``corrected``, or ``paper``: the published rules. They differ for flow matching and for orders 2 and 3.
        qdrift_scale: multiplies the correction.
        bias_scale: how much of the error to be expected, given the output, is subtracted from it.
        scalar: average the variance over channels.
        unconditional: use the variance of the error, not what of it the output does not tell; an ablation.
        skip_last: leave the last step as it is. There the factor is largest and the error least like noise.
        cap: upper limit of a step's factor (before ``qdrift_scale``); None for none.
        interpolate: accept statistics of other timesteps, with a warning, and interpolate between them.
    """

    mode: str = "corrected"
    qdrift_scale: float = 1.0
    bias_scale: float = 0.0
    scalar: bool = False
    unconditional: bool = False
    skip_last: bool = False
    cap: float | None = None
    interpolate: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SettingsError(f"mode is one of {', '.join(MODES)}, got {self.mode!r}")
        for name in ("qdrift_scale", "bias_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise SettingsError(f"{name} is a number of at least 0, got {value}")
        if self.cap is not None and not self.cap > 0:
            raise SettingsError(f"cap is above 0, or None for no limit, got {self.cap}")


def correct(
    scheduler: Any, statistics: DriftStatistics, settings: QDrift | None = None
) -> DriftCorrectedScheduler:
    """A scheduler like ``scheduler``, for any pipeline of it, that corrects its steps by ``statistics``.

    Args:
        scheduler: of a class in :data:`SUPPORTED`. It is not copied: its state is that of the new one.
        statistics: of this scheduler, this number of steps and this model.
        settings: how to correct.

    Raises:
        SettingsError: a scheduler that is not supported, or statistics of another one.
    """
    return DriftCorrectedScheduler(scheduler, statistics, settings)


def check_supported(scheduler: Any) -> None:
    """Refuse a scheduler for which there is no rule.

    Raises:
        SettingsError: names those for which there is one, or the setting that rules it out.
    """
    rule_of(plain_scheduler(scheduler))


@dataclass(frozen=True, eq=False)
class _Plan:
    """One schedule, and what its steps are multiplied with.

    Attributes:
        timesteps, sigmas: the tensors of the scheduler that this was made for.
        coefficients, factors: by order, fp32 ``[n, C]``; see :class:`Rule`.
        numbers: of each step, see :meth:`Rule.factors`.
        intercept, slope: of the error to be expected, fp32 ``[n, C]``, ``bias_scale`` included.
        acts: by order, whether a step differs from the plain one.
    """

    timesteps: Tensor
    sigmas: Tensor
    coefficients: dict[int, Tensor]
    factors: dict[int, Tensor]
    numbers: list[float]
    intercept: Tensor
    slope: Tensor
    acts: dict[int, list[bool]]


class DriftCorrectedScheduler(SchedulerProxy):
    """See :func:`correct`. Everything but ``step`` and ``set_timesteps`` is the scheduler's that it wraps.

    Attributes:
        base: that scheduler.
        statistics: what the correction is made of.
        settings: how.
    """

    overrides = ("step", "set_timesteps")

    def __init__(
        self, base: Any, statistics: DriftStatistics, settings: QDrift | None = None
    ) -> None:
        base = plain_scheduler(base)
        rule = rule_of(base)
        statistics.check_scheduler(base)
        super().__init__(base)
        idle = rule.idle(base.config)
        self.__dict__.update(
            statistics=statistics, settings=settings or QDrift(), _rule=rule, _idle=idle, _plan=None
        )
        if idle:
            warnings.warn(
                f"{type(base).__name__} with {idle} injects noise itself: its steps stay uncorrected.",
                DriftWarning,
                stacklevel=3,
            )

    def coefficients(self) -> Tensor:
        """``c`` or ``beta`` of the steps, fp32 ``[n, C]``, capped and scaled; the timesteps must be set.

        Of a multistep solver those of the highest order that the steps before allow.
        """
        found = self._planned().coefficients
        rows = [found[min(order, max(found))] for order in range(1, len(found[1]) + 1)]
        return torch.stack([row[step] for step, row in enumerate(rows)])

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        self.base.set_timesteps(*args, **kwargs)
        if not self._idle:
            self._planned()

    def _step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        base, rule = self.base, self._rule
        if args:
            call = inspect.signature(base.step).bind(
                model_output, timestep, sample, *args, **kwargs
            )
            kwargs = dict(list(call.arguments.items())[3:])
        index = None if self._idle or rule.plain(kwargs) else self._index(timestep)
        if index is None:
            return base.step(model_output, timestep, sample, **kwargs)
        plan, order = self._planned(), rule.order(base, index)
        if not plan.acts[order][index]:
            return base.step(model_output, timestep, sample, **kwargs)
        u, x = model_output.float(), sample.float()
        factor = self._row(plan.factors[order], index, x)
        if self.settings.bias_scale:
            u = self._without_bias(plan, u, index, x)
        result = base.step(u, timestep, x, **kwargs)
        done = result if isinstance(result, tuple) else tuple(result.values())
        paper = self.settings.mode == "paper"
        moved = rule.advance(done, u, x, factor, plan.numbers[index], paper)
        moved = moved.to(rule.dtype(model_output, sample))
        if isinstance(result, tuple):
            return (moved, *result[1:])
        result.prev_sample = moved
        return result

    def _without_bias(self, plan: _Plan, u: Tensor, index: int, x: Tensor) -> Tensor:
        axis = self.statistics.channel_axis
        if u.shape[axis] == 2 * x.shape[axis]:  # the second half is a learned variance
            u = u.narrow(axis, 0, x.shape[axis])
        intercept, slope = (self._row(one, index, x) for one in (plan.intercept, plan.slope))
        return u - (intercept + slope * u)

    def _row(self, values: Tensor, index: int, x: Tensor) -> Any:
        """Values ``[C]`` of a step, to broadcast against a sample; a number where channels are pooled."""
        row = values[index]
        if len(row) == 1:
            return row.item()
        axis = self.statistics.channel_axis
        if x.shape[axis] != len(row):
            raise SettingsError(
                f"These drift statistics are of {len(row)} channels, and axis {axis} of the sample has "
                f"{x.shape[axis]}. Collect statistics with this model, or from Python average them, "
                "QDrift(scalar=True)."
            )
        shape = [1] * x.dim()
        shape[axis] = -1
        return row.reshape(shape).to(x.device)

    def _index(self, timestep: Any) -> int | None:
        """The step that comes next; None where the scheduler itself is to say what is wrong with ``timestep``."""
        base = self.base
        if base.step_index is not None:
            return cast(int, base.step_index)
        if base.begin_index is not None:
            return cast(int, base.begin_index)
        if isinstance(timestep, Tensor):
            timestep = timestep.to(base.timesteps.device)
        try:
            return cast(int, base.index_for_timestep(timestep))
        except IndexError:
            return None

    def _planned(self) -> _Plan:
        """The plan of the schedule that is set."""
        plan = cast("_Plan | None", self.__dict__["_plan"])
        base = self.base
        if plan is not None and plan.timesteps is base.timesteps and plan.sigmas is base.sigmas:
            return plan
        if (
            plan is not None
            and _equal(plan.timesteps, base.timesteps)
            and _equal(plan.sigmas, base.sigmas)
        ):
            plan = replace(plan, timesteps=base.timesteps, sigmas=base.sigmas)
        else:
            plan = self._make_plan()
        self._plan = plan
        return plan

    def _make_plan(self) -> _Plan:
        base, rule, settings = self.base, self._rule, self.settings
        here = self._statistics_here()
        covariance = here.covariance
        variance = covariance[:, 1, 1] if settings.unconditional else here.variance()
        if settings.scalar:
            variance = variance.mean(-1, keepdim=True)
        sigmas = base.sigmas.detach().to("cpu", torch.float32)
        paper = settings.mode == "paper"
        intercept, slope = (
            (settings.bias_scale * part).float() for part in regression(here.mean, covariance)
        )
        biased = ((intercept != 0) | (slope != 0)).any(-1)
        if settings.skip_last:
            biased[-1] = False
        coefficients: dict[int, Tensor] = {}
        factors: dict[int, Tensor] = {}
        acts: dict[int, list[bool]] = {}
        numbers = torch.empty(0)
        for order in range(1, rule.orders(base.config) + 1):
            found = rule.coefficients(base, sigmas, variance, order, paper).float()
            found = settings.qdrift_scale * found.clamp(0, settings.cap)
            if settings.skip_last:
                found[-1] = 0
            coefficients[order] = found
            factors[order], numbers = rule.factors(base, sigmas, found, paper)
            acts[order] = ((found != 0).any(-1) | biased).tolist()
        return _Plan(
            base.timesteps,
            base.sigmas,
            coefficients,
            factors,
            numbers.tolist(),
            intercept,
            slope,
            acts,
        )

    def _statistics_here(self) -> DriftStatistics:
        """The statistics at the timesteps that are set."""
        base, found = self.base, self.statistics
        timesteps, sigmas = (
            one.detach().to("cpu", torch.float64) for one in (base.timesteps, base.sigmas)
        )
        if _close(timesteps, found.timesteps) and _close(sigmas, found.sigmas):
            return cast(DriftStatistics, found)
        what = (
            f"of {found.steps} steps, and the scheduler is set to {len(timesteps)}"
            if len(timesteps) != found.steps
            else "of other timesteps than those the scheduler is set to"
        )
        if not self.settings.interpolate:
            raise SettingsError(
                f"These drift statistics are {what}. Take {found.steps} steps and the scheduler they were made with, "
                "or collect statistics for this schedule (`postlude sample calibrate`). From Python, "
                "QDrift(interpolate=True) interpolates between the timesteps that are known."
            )
        warnings.warn(
            f"These drift statistics are {what}: they are interpolated between timesteps.",
            DriftWarning,
            stacklevel=5,
        )
        return cast(DriftStatistics, found.at(timesteps))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-8)
