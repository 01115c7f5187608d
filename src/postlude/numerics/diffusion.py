"""Schedules and predictions of diffusion models, and the drift that makes up for the error of an approximate one.

A sample at one noise level is ``x = alpha*x0 + sigma*eps``: variance exploding (``alpha = 1``), variance preserving
(``alpha^2 + sigma^2 = 1``) or flow matching (``alpha = 1 - sigma``, noise at ``sigma = 1``). ``y = x/alpha`` and
``sbar = sigma/alpha``; the score is ``-eps/sigma`` in each of them.

Q-Drift (arXiv:2603.18095): a quantized denoiser predicts ``u + e``. What of ``e`` cannot be told from the prediction,
of variance ``V = E[Var(e | u + e)]``, acts like noise that the step injects, and noise belongs in a sampler only with
the matching drift along the score. So a step, which is a multiple of the score itself, is made longer:

    Euler           x' = x + dsigma*(1 + c)*u,   c = |dsigma| V / (2 sigma)
    DPM-Solver      y' = y + (1 + beta)*(y_base - y),   beta = Var(y_base - y) / |sbar^2 - sbar'^2|

Two of the published rules do not restore the variance of Gaussian data, whose truth is known; each has a second form:

    flow matching   paper: x' = x + dsigma*(v + c v), though the velocity v is not a multiple of the score
                    exact: x' = x + dsigma*(v + c (x + (1 - sigma)*v)), whose bracket is eps
    order 2 and 3   paper: Var sums over the outputs of all steps that the update reads, as if an error were not read
                    again, with opposite sign, by the next update
                    net:   Var of the update's first-order part alone

``exact`` and ``net`` are our choice. Everything here takes and returns tensors; those over the steps of a sampler
have the steps first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from postlude.errors import DataError, SettingsError, UnknownNameError

__all__ = [
    "PREDICTIONS",
    "ErrorFit",
    "Prediction",
    "conditional_mean",
    "conditional_variance",
    "drift_coefficients",
    "edm_sigmas",
    "exact_flow_step",
    "fit_errors",
    "flow_sigmas",
    "interpolate",
    "lengthened_step",
    "noise_of",
    "prediction_of",
    "regression",
    "sample_of",
    "score_of",
    "solver_coefficients",
    "solver_drift",
]

# ---------------------------------------------------------------- schedules and predictions


def edm_sigmas(steps: int, smallest: float, largest: float, rho: float = 7.0) -> Tensor:
    """``[steps + 1]`` fp64 noise levels from ``largest`` to ``smallest`` (arXiv:2206.00364, equation 5)."""
    ramp = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    first, last = largest ** (1 / rho), smallest ** (1 / rho)
    return torch.pow(first + ramp * (last - first), rho)


def flow_sigmas(steps: int, shift: float = 1.0) -> Tensor:
    """``[steps + 1]`` fp64 noise levels from 1 to 0, shifted towards noise: ``shift*q / (1 + (shift - 1)*q)``."""
    q = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift * q / (1 + (shift - 1) * q)


class Prediction(NamedTuple):
    """What a network predicts: how clean sample and noise are linear in its input ``x`` and output ``u``.

    Attributes:
        sample: from ``(alpha, sigma)`` the factors of ``x`` and ``u`` in ``x0``.
        noise: the same for ``eps``.
    """

    sample: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    noise: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _one(like: Tensor) -> Tensor:
    return torch.ones_like(like)


def _none(like: Tensor) -> Tensor:
    return torch.zeros_like(like)


PREDICTIONS = {
    "epsilon": Prediction(
        sample=lambda alpha, sigma: (1 / alpha, -sigma / alpha),
        noise=lambda alpha, sigma: (_none(sigma), _one(sigma)),
    ),
    "sample": Prediction(
        sample=lambda alpha, sigma: (_none(sigma), _one(sigma)),
        noise=lambda alpha, sigma: (1 / sigma, -alpha / sigma),
    ),
    # alpha*eps - sigma*x0, of a variance-preserving process
    "v_prediction": Prediction(
        sample=lambda alpha, sigma: (alpha, -sigma),
        noise=lambda alpha, sigma: (sigma, alpha),
    ),
    # eps - x0, of flow matching
    "flow_prediction": Prediction(
        sample=lambda alpha, sigma: (_one(sigma), -sigma),
        noise=lambda alpha, sigma: (_one(sigma), 1 - sigma),
    ),
}
"""By the names of diffusers."""


def prediction_of(name: str) -> Prediction:
    """The row of :data:`PREDICTIONS`.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in PREDICTIONS:
        raise UnknownNameError("prediction type", name, PREDICTIONS)
    return PREDICTIONS[name]


def sample_of(name: str, x: Tensor, u: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The clean sample of a prediction ``u`` of type ``name`` at ``x``; levels broadcast against both."""
    of_x, of_u = prediction_of(name).sample(alpha, sigma)
    return of_x * x + of_u * u


def noise_of(name: str, x: Tensor, u: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise of a prediction ``u`` of type ``name`` at ``x``."""
    of_x, of_u = prediction_of(name).noise(alpha, sigma)
    return of_x * x + of_u * u


def score_of(name: str, x: Tensor, u: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """``grad log p(x)`` at the noise level: ``-eps/sigma``."""
    return -noise_of(name, x, u, alpha, sigma) / sigma


# ---------------------------------------------------------------- the statistic of one step


class ErrorFit(NamedTuple):
    """A Gaussian of ``(approximate output, error)``, one for each of ``C`` channels, fp64.

    Attributes:
        mean: ``[2, C]``.
        covariance: ``[2, 2, C]``, unbiased.
        kept: int64 ``[C]``, pairs that were not trimmed.
    """

    mean: Tensor
    covariance: Tensor
    kept: Tensor


_LARGEST_CORRELATION = 0.9999


def fit_errors(outputs: Tensor, errors: Tensor, trim: float = 4.0) -> ErrorFit:
    """Fit the Gaussian, without the pairs whose error is beyond ``trim`` standard deviations from its mean.

    Args:
        outputs: of the approximate model, ``[C, n]``; one channel pools all.
        errors: approximate minus exact output, ``[C, n]``.
        trim: in standard deviations of the channel.

    Raises:
        DataError: fewer than two pairs, or one that is not finite.
    """
    pair = torch.stack([outputs, errors]).double()
    if pair.shape[-1] < 2:
        raise DataError(
            f"{pair.shape[-1]} pair of outputs; a covariance needs at least 2: use more runs."
        )
    if not bool(torch.isfinite(pair).all()):
        raise DataError(
            "A model's output holds NaN or infinity; expected finite outputs. Run both models in float32 or bfloat16."
        )
    error = pair[1]
    centre, width = error.mean(-1, keepdim=True), error.std(-1, keepdim=True)
    keep = ((error - centre).abs() <= trim * width).double()
    count = keep.sum(-1)
    mean = (pair * keep).sum(-1) / count
    residual = (pair - mean[..., None]) * keep
    covariance = torch.einsum("icn,jcn->ijc", residual, residual) / (count - 1)
    return ErrorFit(mean, covariance, count.long())


def conditional_variance(covariance: Tensor) -> Tensor:
    """``V = var_e (1 - rho^2)``, what of the error an output does not tell: ``[..., 2, 2, C]`` to ``[..., C]``."""
    output, error = covariance[..., 0, 0, :], covariance[..., 1, 1, :]
    return error * (1 - _correlation(covariance, output, error) ** 2)


def conditional_mean(mean: Tensor, covariance: Tensor, outputs: Tensor) -> Tensor:
    """The error to be expected at ``outputs [..., C]``: ``mu_e + rho std_e/std_q (q - mu_q)``.

    ``mean [..., 2, C]`` and ``covariance [..., 2, 2, C]`` broadcast against it.
    """
    intercept, slope = regression(mean, covariance)
    return intercept + slope * outputs


def regression(mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Intercept and slope ``[..., C]`` of :func:`conditional_mean` as a line in the output."""
    output, error = covariance[..., 0, 0, :], covariance[..., 1, 1, :]
    safe = torch.where(output > 0, output, 1)
    slope = _correlation(covariance, output, error) * (error.clamp(min=0) / safe).sqrt()
    return mean[..., 1, :] - slope * mean[..., 0, :], slope


def _correlation(covariance: Tensor, output: Tensor, error: Tensor) -> Tensor:
    """Clipped; 0 where one of the two does not vary."""
    product = (output * error).clamp(min=0).sqrt()
    rho = covariance[..., 0, 1, :] / torch.where(product > 0, product, 1)
    return torch.where(product > 0, rho, 0).clamp(-_LARGEST_CORRELATION, _LARGEST_CORRELATION)


def interpolate(at: Tensor, timesteps: Tensor, values: Tensor) -> Tensor:
    """``values [n, ...]`` known at ``timesteps [n]``, linearly between neighbours at ``at [m]``; clamped outside."""
    order = torch.argsort(timesteps, stable=True)
    known, values = timesteps[order], values[order]
    if len(known) == 1:
        return values.expand(len(at), *values.shape[1:]).clone()
    upper = torch.searchsorted(known, at.clamp(known[0], known[-1])).clamp(1, len(known) - 1)
    lower = upper - 1
    gap = known[upper] - known[lower]
    share = (at.clamp(known[0], known[-1]) - known[lower]) / torch.where(gap > 0, gap, 1)
    share = share.reshape(-1, *[1] * (values.dim() - 1)).to(values)
    return values[lower] + share * (values[upper] - values[lower])


# ---------------------------------------------------------------- the correction of a step


def drift_coefficients(sigmas: Tensor, variance: Tensor) -> Tensor:
    """``c = |dsigma| V / (2 sigma)`` of Euler steps, ``[n, C]``.

    Args:
        sigmas: ``[n + 1]``, noise levels at the start of each step and at the end of the last.
        variance: ``[n, C]``, ``V`` of the derivative dx/dsigma: of ``eps`` in the variance-exploding process, of the
            velocity in flow matching. That of a network which predicts something else is multiplied by the square of
            its factor in the derivative.
    """
    width = (sigmas[1:] - sigmas[:-1]).abs()
    return width[:, None] * variance / (2 * sigmas[:-1, None] + 1e-12)


def exact_flow_step(
    base: Tensor, x: Tensor, v: Tensor, sigma: float, extra: Tensor | float
) -> Tensor:
    """``base + extra*(x + (1 - sigma)*v)`` with ``extra = c*dsigma``: a step of flow matching and its drift.

    ``base`` is ``x + dsigma*v``; the bracket is the noise that the velocity implies, ``-sigma`` times the score.
    """
    return base + extra * (x + (1 - sigma) * v)


def lengthened_step(base: Tensor, x: Tensor, shrink: float, beta: Tensor | float) -> Tensor:
    """``y' = y + (1 + beta)*(y_base - y)`` in ``x``: ``base + beta*(base - shrink*x)``, ``shrink = alpha'/alpha``.

    In this form nothing is divided by a small ``alpha``, and ``beta = 0`` gives ``base`` to the last bit.
    """
    return base + beta * (base - shrink * x)


class _Parts(NamedTuple):
    """Factors of ``D0, D1, D2`` in the update of one algorithm, ``[n]`` each."""

    first: Callable[[Tensor, Tensor, Tensor], Tensor]
    second: Callable[[Tensor, Tensor, Tensor], Tensor]
    third: Callable[[Tensor, Tensor, Tensor], Tensor]


# By (alpha', sigma', h); arXiv:2211.01095 and arXiv:2206.00927 as diffusers has them.
_ALGORITHMS = {
    "dpmsolver++": _Parts(
        first=lambda alpha, sigma, h: -alpha * torch.expm1(-h),
        second=lambda alpha, sigma, h: alpha * (torch.expm1(-h) / h + 1),
        third=lambda alpha, sigma, h: -alpha * ((torch.expm1(-h) + h) / h**2 - 0.5),
    ),
    "dpmsolver": _Parts(
        first=lambda alpha, sigma, h: -sigma * torch.expm1(h),
        second=lambda alpha, sigma, h: -sigma * (torch.expm1(h) / h - 1),
        third=lambda alpha, sigma, h: -sigma * ((torch.expm1(h) - h) / h**2 - 0.5),
    ),
}
_SOLVERS = ("midpoint", "heun")


def solver_coefficients(
    alphas: Tensor,
    sigmas: Tensor,
    order: int,
    algorithm: str = "dpmsolver++",
    solver: str = "midpoint",
) -> Tensor:
    """``C`` of the update ``x' = A x + sum_j C_j m_j`` over the last ``order`` converted outputs, fp64 ``[n, order]``.

    ``j = 0`` is the step's own output. Rows of steps that have not ``order - 1`` steps before them are NaN.

    Args:
        alphas, sigmas: ``[n + 1]``.
        order: 1, 2 or 3.
        algorithm: ``dpmsolver++``, on outputs converted to clean samples; or ``dpmsolver``, on noise.
        solver: ``midpoint`` or ``heun``; only order 2 knows the difference.
    """
    if algorithm not in _ALGORITHMS:
        raise UnknownNameError("algorithm", algorithm, _ALGORITHMS)
    if solver not in _SOLVERS:
        raise UnknownNameError("solver", solver, _SOLVERS)
    if order not in (1, 2, 3):
        raise SettingsError(f"A multistep solver has order 1, 2 or 3, got {order}.")
    parts = _ALGORITHMS[algorithm]
    alphas, sigmas = alphas.double(), sigmas.double()
    logarithm = torch.log(alphas) - torch.log(sigmas)
    h = logarithm[1:] - logarithm[:-1]
    at = alphas[1:], sigmas[1:], h
    first = parts.first(*at)
    if order == 1:
        return first[:, None]
    r0 = _earlier(h, 1) / h
    second = 0.5 * first if order == 2 and solver == "midpoint" else parts.second(*at)
    if order == 2:
        return torch.stack([first + second / r0, -second / r0], dim=1)
    r1, third = _earlier(h, 2) / h, parts.third(*at)
    weight, total = r0 / (r0 + r1), r0 + r1
    own = first + second * (1 + weight) / r0 + third / (r0 * total)
    last = -second * ((1 + weight) / r0 + weight / r1) - third * (1 / r0 + 1 / r1) / total
    return torch.stack([own, last, second * weight / r1 + third / (r1 * total)], dim=1)


def solver_drift(
    alphas: Tensor,
    sigmas: Tensor,
    variance: Tensor,
    order: int,
    algorithm: str,
    solver: str,
    net: bool,
) -> Tensor:
    """``beta`` of steps of a multistep solver, fp64 ``[n, C]``; 0 where it is not defined.

    That is at ``alpha = 0``, where ``y`` is not, and for steps without ``order - 1`` steps before them.

    Args:
        alphas, sigmas: ``[n + 1]``.
        variance: ``[n, C]``, ``V`` of the outputs after their conversion to clean samples or noise.
        order, algorithm, solver: see :func:`solver_coefficients`.
        net: count the error of a step's own output once, by the first-order coefficient; else sum over all outputs
            that the update reads, as published.
    """
    factors = solver_coefficients(alphas, sigmas, 1 if net else order, algorithm, solver) ** 2
    alphas, sigmas, variance = alphas.double(), sigmas.double(), variance.double()
    total = sum(
        factors[:, place, None] * _earlier(variance, place) for place in range(factors.shape[1])
    )
    bars = (sigmas / alphas) ** 2
    beta = total / alphas[1:, None] ** 2 / (bars[:-1] - bars[1:]).abs()[:, None]
    if net:
        beta[: order - 1] = 0
    return torch.where(torch.isfinite(beta), beta, 0)


def _earlier(values: Tensor, steps: int) -> Tensor:
    """``values [n, ...]`` of ``steps`` steps before; NaN for the first ones."""
    missing = torch.full_like(values[:steps], torch.nan)
    return torch.cat([missing, values[: len(values) - steps]])
