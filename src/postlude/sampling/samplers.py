"""The samplers by name: each a diffusers scheduler, made from the settings of the checkpoint's own.

A model either predicts noise (or the image, or v) on a variance-preserving schedule, or the velocity of a straight
flow. The noise schedule is the model's and is kept; the sampler decides how the path is followed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from postlude.errors import CheckpointError, MissingDependencyError, SettingsError, UnknownNameError

__all__ = [
    "DIFFUSION",
    "FLOW",
    "SAMPLERS",
    "Sampler",
    "build_scheduler",
    "check_steps",
    "process_of",
    "sampler_named",
    "sampler_of",
]

DIFFUSION, FLOW = "diffusion", "flow"
_WHAT = {
    DIFFUSION: "predicts noise on a variance-preserving schedule",
    FLOW: "predicts the velocity of a flow",
}


@dataclass(frozen=True)
class Sampler:
    """One way to follow the path from noise to image.

    Attributes:
        name: of the command line.
        schedulers: of which process, the name of the diffusers class and the settings that make it this sampler.
        summary: one line.
    """

    name: str
    schedulers: Mapping[str, tuple[str, Mapping[str, Any]]] = field(repr=False)
    summary: str


def _table(*rows: Sampler) -> dict[str, Sampler]:
    return {row.name: row for row in rows}


_DPM, _UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
_FLOW_SIGMAS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def _dpm(order: int) -> dict[str, tuple[str, Mapping[str, Any]]]:
    common = {"algorithm_type": "dpmsolver++", "solver_order": order, "solver_type": "midpoint"}
    return {DIFFUSION: (_DPM, common), FLOW: (_DPM, common | _FLOW_SIGMAS)}


SAMPLERS = _table(
    Sampler("euler", {DIFFUSION: ("EulerDiscreteScheduler", {})}, "Euler in sigma (arXiv:2206.00364)"),
    Sampler("euler-a", {DIFFUSION: ("EulerAncestralDiscreteScheduler", {})}, "Euler with fresh noise at every step"),
    Sampler("ddim", {DIFFUSION: ("DDIMScheduler", {"clip_sample": False})}, "DDIM (arXiv:2010.02502)"),
    Sampler("heun", {DIFFUSION: ("HeunDiscreteScheduler", {}), FLOW: ("FlowMatchHeunDiscreteScheduler", {})},
            "Heun: two evaluations a step (arXiv:2206.00364)"),
    Sampler("fm-euler", {FLOW: ("FlowMatchEulerDiscreteScheduler", {})}, "Euler on a flow"),
    Sampler("dpm++", _dpm(2), "DPM-Solver++ of order 2, midpoint (arXiv:2211.01095)"),
    Sampler("dpm++1", _dpm(1), "DPM-Solver++ of order 1"),
    Sampler("unipc", {DIFFUSION: (_UNIPC, {}), FLOW: (_UNIPC, _FLOW_SIGMAS)}, "UniPC of order 2 (arXiv:2302.04867)"),
)  # fmt: skip
"""Name to sampler."""


def process_of(scheduler: Any) -> str:
    """``"diffusion"`` or ``"flow"``: what a model with this diffusers scheduler predicts."""
    straight = scheduler.config.get("prediction_type") == "flow_prediction"
    return FLOW if straight or type(scheduler).__name__.startswith("FlowMatch") else DIFFUSION


def sampler_of(scheduler: Any) -> str | None:
    """The name of the sampler that a scheduler is; None for one that has no name here."""
    return sampler_named(process_of(scheduler), type(scheduler).__name__, scheduler.config)


def sampler_named(process: str, kind: str, config: Mapping[str, Any]) -> str | None:
    """The name of the sampler that a scheduler of this class and configuration is; None where it has none here."""
    for name, sampler in SAMPLERS.items():
        found, settings = sampler.schedulers.get(process, ("", {}))
        if kind == found and all(config.get(key) == settings[key] for key in settings):
            return name
    return None


def build_scheduler(base: Any, sampler: str | None = None) -> Any:
    """A fresh scheduler for the noise schedule of ``base``.

    Args:
        base: the checkpoint's own diffusers scheduler; it is not changed.
        sampler: a name of :data:`SAMPLERS`; None for the class and the settings of ``base``.

    Raises:
        CheckpointError: the checkpoint has no scheduler.
        UnknownNameError: no sampler has this name.
        SettingsError: the sampler is not one for what the model predicts.
    """
    if base is None:
        raise CheckpointError(
            "This checkpoint has no scheduler, so nothing says how its images were noised; expected a "
            "diffusers directory with scheduler/scheduler_config.json"
        )
    if sampler is None:
        return type(base).from_config(base.config)
    if sampler not in SAMPLERS:
        raise UnknownNameError("sampler", sampler, SAMPLERS)
    process = process_of(base)
    if process not in SAMPLERS[sampler].schedulers:
        fitting = [name for name, row in SAMPLERS.items() if process in row.schedulers]
        raise SettingsError(
            f"The sampler {sampler} is not for this model, which {_WHAT[process]}; expected one of "
            f"{', '.join(fitting)}"
        )
    kind, settings = SAMPLERS[sampler].schedulers[process]
    scheduler = _diffusers_class(kind)
    known = inspect.signature(scheduler.__init__).parameters
    kept = {key: base.config[key] for key in known if key in base.config}
    if type(base).__name__ != kind:
        # What one class means by a flag of that name, another does differently; only the noise schedule is the model's.
        kept = {key: value for key, value in kept.items() if key in _SCHEDULE}
    shift = base.config.get("shift", base.config.get("flow_shift", 1.0))
    kept |= {key: shift for key in _SHIFT if process == FLOW and key in known}
    return scheduler(**(kept | dict(settings)))


def check_steps(scheduler: Any, steps: int) -> None:
    """Refuse what a scheduler cannot be set to.

    Raises:
        SettingsError: no steps, more than the model has timesteps, or a schedule that depends on the image's size.
    """
    timesteps = scheduler.config.get("num_train_timesteps", steps)
    if not 1 <= steps <= timesteps:
        limit = (
            "1 or more" if steps < 1 else f"at most {timesteps}, the timesteps that the model knows"
        )
        raise SettingsError(f"steps is {steps}; expected {limit}")
    if scheduler.config.get("use_dynamic_shifting"):
        raise SettingsError(
            f"The {type(scheduler).__name__} of this checkpoint shifts its noise levels by the size of the image "
            "(use_dynamic_shifting), which its own pipeline knows: put the model in place of `transformer` there."
        )


_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "timestep_spacing",
    "steps_offset",
)
_SHIFT = ("shift", "flow_shift")


def _diffusers_class(name: str) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise MissingDependencyError(
            "Sampling needs diffusers, which is not installed: pip install 'postlude[diffusion]'"
        ) from error
    return getattr(diffusers, name)
