from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from postlude.errors import DataError, SettingsError, UnknownNameError
from postlude.numerics import diffusion

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*copy keyword:DeprecationWarning", "ignore:.*algorithm_type.*:FutureWarning"
)
F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ---------------------------------------------------------------- schedules and predictions


def test_edm_grid() -> None:
    steps, low, high = 9, 0.03, 30.0
    expected = [
        (high ** (1 / 7) + i / steps * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        for i in range(steps + 1)
    ]
    found = diffusion.edm_sigmas(steps, low, high)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_shifted_flow_grid() -> None:
    found = diffusion.flow_sigmas(4, shift=3.0)
    assert found.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "alpha", "sigma"),
    [
        ("epsilon", 1.0, 3.0),
        ("epsilon", 0.8, 0.6),
        ("sample", 0.8, 0.6),
        ("v_prediction", 0.8, 0.6),
        ("flow_prediction", 0.7, 0.3),
    ],
)
def test_predictions_are_converted_back(name: str, alpha: float, sigma: float) -> None:
    x0, eps = normal(5), normal(5, seed=1)
    u = {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": alpha * eps - sigma * x0,
        "flow_prediction": eps - x0,
    }[name]
    levels = torch.tensor(alpha, dtype=F64), torch.tensor(sigma, dtype=F64)
    x = alpha * x0 + sigma * eps
    torch.testing.assert_close(diffusion.sample_of(name, x, u, *levels), x0)
    torch.testing.assert_close(diffusion.noise_of(name, x, u, *levels), eps)
    torch.testing.assert_close(diffusion.score_of(name, x, u, *levels), -eps / sigma)


def test_score_of_a_flow_is_the_gradient_of_the_density() -> None:
    s2, sigma = 0.5, 0.4
    x = normal(6).requires_grad_()
    variance = (1 - sigma) ** 2 * s2 + sigma**2
    (gradient,) = torch.autograd.grad((-0.5 * x**2 / variance).sum(), x)
    velocity = x.detach() * (sigma - (1 - sigma) * s2) / variance
    levels = torch.tensor(1 - sigma, dtype=F64), torch.tensor(sigma, dtype=F64)
    found = diffusion.score_of("flow_prediction", x.detach(), velocity, *levels)
    torch.testing.assert_close(found, gradient)


def test_unknown_prediction() -> None:
    with pytest.raises(UnknownNameError, match=r"No prediction type named 'v'.*v_prediction"):
        diffusion.prediction_of("v")


# ---------------------------------------------------------------- the statistic


def slow_fit(outputs: list[float], errors: list[float], trim: float) -> tuple[list[float], Tensor]:
    """Loops."""
    centre = math.fsum(errors) / len(errors)
    width = math.sqrt(math.fsum((e - centre) ** 2 for e in errors) / (len(errors) - 1))
    kept = [(q, e) for q, e in zip(outputs, errors, strict=True) if abs(e - centre) <= trim * width]
    means = [math.fsum(pair[i] for pair in kept) / len(kept) for i in (0, 1)]
    covariance = torch.tensor(
        [
            [
                math.fsum((p[i] - means[i]) * (p[j] - means[j]) for p in kept) / (len(kept) - 1)
                for j in (0, 1)
            ]
            for i in (0, 1)
        ],
        dtype=F64,
    )
    return means, covariance


def test_fit_is_that_of_loops() -> None:
    outputs, errors = normal(3, 200) + 100, 0.1 * normal(3, 200, seed=1) + 5
    errors[1, 7], errors[2, 3] = 50.0, -40.0
    found = diffusion.fit_errors(outputs.float(), errors.float())
    assert found.kept.tolist() == [200, 199, 199]
    for channel in range(3):
        means, covariance = slow_fit(
            outputs.float()[channel].tolist(), errors.float()[channel].tolist(), 4.0
        )
        assert found.mean[:, channel].tolist() == pytest.approx(means, rel=1e-12)
        torch.testing.assert_close(found.covariance[:, :, channel], covariance)


def test_what_the_output_tells_is_not_variance() -> None:
    q, n = normal(1, 200_000), normal(1, 200_000, seed=1)
    fit = diffusion.fit_errors(q, 0.3 * q + 0.2 * n, trim=10)
    assert float(diffusion.conditional_variance(fit.covariance)) == pytest.approx(0.04, abs=3e-4)
    at = torch.tensor([[2.0]], dtype=F64)
    expected = diffusion.conditional_mean(fit.mean, fit.covariance, at)
    assert float(expected) == pytest.approx(0.6, abs=3e-3)


def test_statistics_that_do_not_vary() -> None:
    covariance = torch.zeros(2, 2, 3, dtype=F64)
    covariance[0, 0] = torch.tensor([1.0, 0.0, 1.0])
    covariance[1, 1] = torch.tensor([0.0, 0.5, 0.5])
    covariance[0, 1, 2] = covariance[1, 0, 2] = 1.0  # more than perfect by rounding
    found = diffusion.conditional_variance(covariance)
    assert found.tolist() == pytest.approx([0.0, 0.5, 0.5 * (1 - 0.9999**2)])
    mean = torch.ones(2, 3, dtype=F64)
    at = torch.zeros(3, dtype=F64)
    assert bool(torch.isfinite(diffusion.conditional_mean(mean, covariance, at)).all())


def test_fit_refuses() -> None:
    with pytest.raises(DataError, match="at least 2: use more runs"):
        diffusion.fit_errors(torch.zeros(1, 1), torch.zeros(1, 1))
    with pytest.raises(DataError, match="NaN or infinity"):
        diffusion.fit_errors(torch.tensor([[1.0, math.nan]]), torch.zeros(1, 2))


def test_interpolation_is_that_of_numpy() -> None:
    known = torch.tensor([900.0, 500.0, 100.0], dtype=F64)
    values = normal(3, 2, 4)
    at = torch.tensor([999.0, 900.0, 640.0, 100.0, 3.0], dtype=F64)
    found = diffusion.interpolate(at, known, values)
    for i in range(2):
        for j in range(4):
            expected = np.interp(at.numpy(), known.flip(0).numpy(), values[:, i, j].flip(0).numpy())
            assert found[:, i, j].tolist() == pytest.approx(expected.tolist())
    assert diffusion.interpolate(at, known[:1], values[:1]).shape == (5, 2, 4)


# ---------------------------------------------------------------- the correction


def test_drift_of_euler() -> None:
    sigmas = torch.tensor([4.0, 1.0, 0.0], dtype=F64)
    variance = torch.tensor([[0.2, 0.1], [0.4, 0.0]], dtype=F64)
    found = diffusion.drift_coefficients(sigmas, variance)
    expected = [[3 * 0.2 / 8, 3 * 0.1 / 8], [0.4 / 2, 0.0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=F64))


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_solver_coefficients_are_those_of_diffusers(
    order: int, algorithm: str, solver: str
) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type=algorithm, solver_type=solver, solver_order=3, final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(6)
    step = 3
    scheduler._step_index = step
    alphas, sigmas = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas.double())
    found = diffusion.solver_coefficients(alphas, sigmas, order, algorithm, solver)[step]
    zero = torch.zeros(1, dtype=F64)
    for place in range(order):
        outputs = [zero, zero, zero]
        outputs[2 - place] = zero + 1
        if order == 1:
            moved = scheduler.dpm_solver_first_order_update(outputs[2], sample=zero)
        elif order == 2:
            moved = scheduler.multistep_dpm_solver_second_order_update(outputs, sample=zero)
        else:
            moved = scheduler.multistep_dpm_solver_third_order_update(outputs, sample=zero)
        assert float(found[place]) == pytest.approx(float(moved), rel=2e-4, abs=1e-6)


def test_order_one_is_the_trapezoid_of_eulers_rule() -> None:
    sigmas = diffusion.edm_sigmas(12, 0.05, 20.0)
    variance = normal(12, 2).square()
    # The clean sample x - sigma*eps has the error of eps times sigma.
    converted = sigmas[:-1, None] ** 2 * variance
    ones = torch.ones_like(sigmas)
    for net in (False, True):
        found = diffusion.solver_drift(ones, sigmas, converted, 1, "dpmsolver++", "midpoint", net)
        width, total = (sigmas[:-1] - sigmas[1:])[:, None], (sigmas[:-1] + sigmas[1:])[:, None]
        torch.testing.assert_close(found, width * variance / total)


@pytest.mark.parametrize("net", [False, True])
def test_drift_is_zero_where_it_is_not_defined(net: bool) -> None:
    def drift(sigmas: list[float], order: int) -> list[float]:
        levels = torch.tensor(sigmas, dtype=F64)
        variance = torch.full((len(sigmas) - 1, 1), 0.3, dtype=F64)
        found = diffusion.solver_drift(
            1 - levels, levels, variance, order, "dpmsolver++", "midpoint", net
        )
        return found[:, 0].tolist()

    # No y at alpha = 0, and no width between equal levels.
    undefined = drift([1.0, 0.7, 0.7, 0.2, 0.0], 1)
    assert undefined[:2] == [0, 0] and min(undefined[2:]) > 0
    # No step before the first one.
    early = drift([0.9, 0.4, 0.1], 2)
    assert early[0] == 0 and early[1] > 0


def test_longer_step_in_y() -> None:
    x, base = normal(4), normal(4, seed=1)
    alphas, beta = (0.3, 0.8), 0.07
    y, y_base = x / alphas[0], base / alphas[1]
    expected = alphas[1] * (y + (1 + beta) * (y_base - y))
    found = diffusion.lengthened_step(base, x, alphas[1] / alphas[0], beta)
    torch.testing.assert_close(found, expected)
    assert torch.equal(diffusion.lengthened_step(base, x, 2.0, 0.0), base)


def test_exact_flow_step_follows_the_score() -> None:
    x, v = normal(4), normal(4, seed=1)
    sigma, after, variance = 0.6, 0.5, 0.3
    d = after - sigma
    c = float(
        diffusion.drift_coefficients(torch.tensor([sigma, after]), torch.tensor([[variance]]))
    )
    found = diffusion.exact_flow_step(x + d * v, x, v, sigma, c * d)
    expected = x + d * v - d**2 * variance / 2 * (x + (1 - sigma) * v) / sigma
    torch.testing.assert_close(found, expected)


def test_solver_refuses() -> None:
    ones = torch.ones(3, dtype=F64)
    with pytest.raises(SettingsError, match="order 1, 2 or 3, got 4"):
        diffusion.solver_coefficients(ones, ones, 4)
    with pytest.raises(UnknownNameError, match="No algorithm named 'deis'"):
        diffusion.solver_coefficients(ones, ones, 1, "deis")
    with pytest.raises(UnknownNameError, match="No solver named 'bh1'"):
        diffusion.solver_coefficients(ones, ones, 1, "dpmsolver", "bh1")
