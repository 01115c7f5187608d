"""How the steps of each supported diffusers scheduler are corrected; the mathematics is in ``numerics/diffusion.py``.

A rule turns the error variance of a network's output into one coefficient a step, and a coefficient into the corrected
sample. Nothing here imports diffusers: a scheduler is known by the name of its class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.diffusion import (
    drift_coefficients,
    exact_flow_step,
    lengthened_step,
    prediction_of,
    solver_drift,
)
from postlude.sampling.samplers import SAMPLERS

__all__ = ["SUPPORTED", "Rule", "rule_of"]


class Rule(ABC):
    """How one class of schedulers is corrected.

    ``sigmas`` are the scheduler's own noise levels, fp32 ``[n + 1]`` on the CPU.
    """

    scheduler: ClassVar[str]

    def refusal(self, config: Any) -> str | None:
        """A setting that rules the correction out."""
        return None

    def idle(self, config: Any) -> str | None:
        """A setting with which every step injects noise itself and stays as it is."""
        return None

    def plain(self, options: Mapping[str, Any]) -> bool:
        """Whether what ``step`` is called with leaves this step as it is."""
        return False

    def orders(self, config: Any) -> int:
        """The highest order of a step."""
        return 1

    def order(self, base: Any, index: int) -> int:
        """Order of step ``index``, before it is done."""
        return 1

    @abstractmethod
    def coefficients(
        self, base: Any, sigmas: Tensor, variance: Tensor, order: int, paper: bool
    ) -> Tensor:
        """``c`` or ``beta`` ``[n, C]`` of steps of an order, of the variance ``V [n, C]`` of the network's output."""

    @abstractmethod
    def factors(
        self, base: Any, sigmas: Tensor, coefficients: Tensor, paper: bool
    ) -> tuple[Tensor, Tensor]:
        """What :meth:`advance` needs of a step: ``[n, C]`` made of scaled coefficients, and a number ``[n]``."""

    @abstractmethod
    def advance(
        self, done: tuple[Any, ...], u: Tensor, x: Tensor, factor: Any, number: float, paper: bool
    ) -> Tensor:
        """The corrected sample; ``done`` is what the scheduler returned for output ``u`` at ``x``, all fp32."""

    def dtype(self, u: Tensor, x: Tensor) -> torch.dtype:
        """The type in which the scheduler would have returned."""
        return u.dtype


class _Euler(Rule):
    """``x`` is that of the variance-exploding process, its derivative dx/dsigma the predicted noise."""

    scheduler = "EulerDiscreteScheduler"

    def plain(self, options: Mapping[str, Any]) -> bool:
        return bool(options.get("s_churn", 0.0) > 0)

    def coefficients(
        self, base: Any, sigmas: Tensor, variance: Tensor, order: int, paper: bool
    ) -> Tensor:
        alphas = 1 / (sigmas**2 + 1) ** 0.5
        name = base.config.prediction_type.replace("original_sample", "sample")
        _, factor = prediction_of(name).noise(alphas, sigmas * alphas)
        return drift_coefficients(sigmas, factor[:-1, None] ** 2 * variance.to(sigmas))

    def factors(
        self, base: Any, sigmas: Tensor, coefficients: Tensor, paper: bool
    ) -> tuple[Tensor, Tensor]:
        return (sigmas[1:] - sigmas[:-1])[:, None] * (1 + coefficients), sigmas[:-1]

    def advance(
        self, done: tuple[Any, ...], u: Tensor, x: Tensor, factor: Any, number: float, paper: bool
    ) -> Tensor:
        derivative = (x - done[1]) / number
        return cast(Tensor, x + derivative * factor)


class _FlowEuler(Rule):
    scheduler = "FlowMatchEulerDiscreteScheduler"

    def refusal(self, config: Any) -> str | None:
        return "invert_sigmas=True" if config.get("invert_sigmas") else None

    def idle(self, config: Any) -> str | None:
        return "stochastic_sampling=True" if config.get("stochastic_sampling") else None

    def plain(self, options: Mapping[str, Any]) -> bool:
        return options.get("per_token_timesteps") is not None

    def coefficients(
        self, base: Any, sigmas: Tensor, variance: Tensor, order: int, paper: bool
    ) -> Tensor:
        return drift_coefficients(sigmas, variance.to(sigmas))

    def factors(
        self, base: Any, sigmas: Tensor, coefficients: Tensor, paper: bool
    ) -> tuple[Tensor, Tensor]:
        widths = (sigmas[1:] - sigmas[:-1])[:, None]
        return widths * (1 + coefficients if paper else coefficients), sigmas[:-1]

    def advance(
        self, done: tuple[Any, ...], u: Tensor, x: Tensor, factor: Any, number: float, paper: bool
    ) -> Tensor:
        return x + factor * u if paper else exact_flow_step(done[0], x, u, number, factor)


class _Solver(Rule):
    scheduler = "DPMSolverMultistepScheduler"

    def refusal(self, config: Any) -> str | None:
        return "thresholding=True" if config.thresholding else None

    def idle(self, config: Any) -> str | None:
        name = config.algorithm_type
        return f"algorithm_type={name!r}" if name.startswith("sde-") else None

    def orders(self, config: Any) -> int:
        return cast(int, config.solver_order)

    def order(self, base: Any, index: int) -> int:
        """As ``DPMSolverMultistepScheduler.step`` chooses it."""
        config, last = base.config, len(base.timesteps) - 1
        few = config.lower_order_final and last + 1 < 15
        first_at_last = few or config.euler_at_final or config.final_sigmas_type == "zero"
        if base.lower_order_nums < 1 or (index == last and first_at_last):
            return 1
        limit = 2 if base.lower_order_nums < 2 or (index == last - 1 and few) else 3
        return min(limit, self.orders(config))

    def coefficients(
        self, base: Any, sigmas: Tensor, variance: Tensor, order: int, paper: bool
    ) -> Tensor:
        config = base.config
        alphas, scaled = base._sigma_to_alpha_sigma_t(sigmas.double())
        prediction = prediction_of(config.prediction_type)
        # The velocity of a flow is multiplied with the scheduler's own level, whatever that is of.
        flow = config.prediction_type == "flow_prediction"
        convert = prediction.sample if config.algorithm_type == "dpmsolver++" else prediction.noise
        _, factor = convert(alphas, sigmas.double() if flow else scaled)
        converted = factor[:-1, None] ** 2 * variance.double()
        kind = config.algorithm_type, config.solver_type
        return solver_drift(alphas, scaled, converted, order, *kind, net=not paper)

    def factors(
        self, base: Any, sigmas: Tensor, coefficients: Tensor, paper: bool
    ) -> tuple[Tensor, Tensor]:
        alphas = base._sigma_to_alpha_sigma_t(sigmas.double())[0]
        return coefficients, alphas[1:] / alphas[:-1]

    def advance(
        self, done: tuple[Any, ...], u: Tensor, x: Tensor, factor: Any, number: float, paper: bool
    ) -> Tensor:
        return lengthened_step(done[0], x, number, factor)

    def dtype(self, u: Tensor, x: Tensor) -> torch.dtype:
        return torch.promote_types(u.dtype, x.dtype)


_RULES: dict[str, Rule] = {rule.scheduler: rule for rule in (_Euler(), _FlowEuler(), _Solver())}
SUPPORTED = tuple(_RULES)
"""Classes of diffusers for which there is a rule."""


def rule_of(scheduler: Any) -> Rule:
    """The rule for a scheduler that wraps no other.

    Raises:
        SettingsError: there is none for its class, or for one of its settings.
    """
    name = type(scheduler).__name__
    if name not in _RULES:
        raise SettingsError(
            f"There is no drift correction for {name}; supported are {', '.join(SUPPORTED)}: `--sampler "
            f"{', '.join(_sampler_names())}`, or from Python DPMSolverMultistepScheduler.from_config(scheduler.config)."
        )
    rule = _RULES[name]
    setting = rule.refusal(scheduler.config)
    if setting is not None:
        raise SettingsError(
            f"There is no drift correction for {name} with {setting}; make the scheduler without it."
        )
    return rule


def _sampler_names() -> list[str]:
    """Names of the command line whose schedulers all have a rule."""
    return [
        name
        for name, sampler in SAMPLERS.items()
        if all(kind in _RULES for kind, _ in sampler.schedulers.values())
    ]
