from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from postlude.numerics.diffusion import conditional_variance
from postlude.zoo.gaussian_data import FlowBed, NoiseBed, SolverBed, VelocitySolverBed

from .beds import EULER, FLOW, SOLVER, corrected_on, solver

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*copy keyword:DeprecationWarning", "ignore:.*algorithm_type.*:FutureWarning"
)

# The spread that printing four digits leaves.
DIGITS = 6e-5

# Steps, injected variance; output variance without error, with it, corrected by the injected variance, and by what the
# estimator makes of it. From the recursion var <- (1 + d*(1 + c)*k)^2 var + (d*(1 + c))^2 V, k = sigma/(s2 + sigma^2).
EULER_TABLE = [
    (20, 0.05, 0.4272, 0.4512, 0.4325, 0.4338),
    (20, 0.2, 0.4272, 0.5232, 0.4504, 0.4655),
    (20, 0.5, 0.4272, 0.6671, 0.4943, 0.5565),
    (40, 0.05, 0.4634, 0.4748, 0.4647, 0.4654),
    (40, 0.2, 0.4634, 0.5093, 0.4694, 0.4780),
    (40, 0.5, 0.4634, 0.5783, 0.4818, 0.5185),
    (80, 0.05, 0.4825, 0.4882, 0.4829, 0.4833),
    (80, 0.2, 0.4825, 0.5051, 0.4841, 0.4887),
    (80, 0.5, 0.4825, 0.5389, 0.4874, 0.5075),
]


@pytest.mark.parametrize(("steps", "injected", "ideal", "plain", "known", "fitted"), EULER_TABLE)
def test_euler_restores_the_variance(
    steps: int, injected: float, ideal: float, plain: float, known: float, fitted: float
) -> None:
    bed = NoiseBed(steps)
    assert bed.output_variance(EULER(), 0.0) == pytest.approx(ideal, abs=DIGITS)
    assert bed.output_variance(EULER(), injected) == pytest.approx(plain, abs=DIGITS)
    for mode in ("corrected", "paper"):
        found = bed.output_variance(corrected_on(bed, EULER, injected, mode=mode), injected)
        assert found == pytest.approx(known, abs=DIGITS)
    # Error that is independent of the truth: the output tells a part of it, Var(eps)/(Var(eps) + V).
    exact = bed.prediction_variance(EULER())
    told = conditional_variance(_independent(exact, injected))
    torch.testing.assert_close(told[:, 0], injected * exact / (exact + injected))
    through = bed.output_variance(corrected_on(bed, EULER, told), injected)
    assert through == pytest.approx(fitted, abs=DIGITS)
    assert abs(known - ideal) < abs(fitted - ideal) < abs(plain - ideal)


def _independent(exact: Tensor, injected: float) -> Tensor:
    """Covariance ``[n, 2, 2, 1]`` of (output, error) for error independent of the exact output."""
    covariance = torch.full((len(exact), 2, 2, 1), injected, dtype=torch.float64)
    covariance[:, 0, 0, 0] += exact
    return covariance


# s2, V; without error, with it, paper, exact.
FLOW_TABLE = [
    (0.5, 0.5, 0.4254, 0.4540, 0.4775, 0.4313),
    (0.05, 0.3, 0.0328, 0.0400, 0.0372, 0.0356),
    (0.5, 0.3, 0.4254, 0.4426, 0.4549, 0.4278),
    (1.0, 0.3, 0.8786, 0.9005, 0.9410, 0.8809),
    (4.0, 0.3, 3.6319, 3.6661, 3.9116, 3.6338),
]


@pytest.mark.parametrize(("s2", "injected", "ideal", "plain", "paper", "exact"), FLOW_TABLE)
def test_flow_euler_restores_the_variance_in_corrected_mode(
    s2: float, injected: float, ideal: float, plain: float, paper: float, exact: float
) -> None:
    bed = FlowBed(s2)

    def make() -> Any:
        return FLOW(shift=3.0)

    assert bed.output_variance(make(), 0.0) == pytest.approx(ideal, abs=DIGITS)
    assert bed.output_variance(make(), injected) == pytest.approx(plain, abs=DIGITS)
    for mode, expected in (("paper", paper), ("corrected", exact)):
        found = bed.output_variance(corrected_on(bed, make, injected, mode=mode), injected)
        assert found == pytest.approx(expected, abs=DIGITS)
    assert abs(exact - ideal) < abs(plain - ideal)
    # The published rule makes it worse unless the data are narrow.
    assert (abs(paper - ideal) > abs(plain - ideal)) == (s2 >= 0.5)


# Steps, V; order 2: without error, with it, paper, net; order 1: the same, corrected.
SOLVER_TABLE = [
    (15, 0.05, 0.5241, 0.5516, 0.4583, 0.5160, 0.4048, 0.4377, 0.4099),
    (15, 0.2, 0.5241, 0.6339, 0.3340, 0.5006, 0.4048, 0.5365, 0.4301),
    (15, 0.5, 0.5241, 0.7986, 0.2841, 0.5029, 0.4048, 0.7342, 0.4878),
    (30, 0.05, 0.5078, 0.5223, 0.4812, 0.5062, 0.4510, 0.4665, 0.4522),
    (30, 0.2, 0.5078, 0.5657, 0.4170, 0.5032, 0.4510, 0.5132, 0.4572),
    (30, 0.5, 0.5078, 0.6525, 0.3430, 0.5047, 0.4510, 0.6064, 0.4731),
    (60, 0.05, 0.5038, 0.5111, 0.4917, 0.5034, 0.4760, 0.4836, 0.4763),
    (60, 0.2, 0.5038, 0.5331, 0.4591, 0.5028, 0.4760, 0.5063, 0.4776),
    (60, 0.5, 0.5038, 0.5771, 0.4084, 0.5033, 0.4760, 0.5517, 0.4817),
]


@pytest.mark.parametrize("row", SOLVER_TABLE, ids=str)
def test_solver_restores_the_variance_in_corrected_mode(row: tuple[float, ...]) -> None:
    steps, injected = int(row[0]), row[1]
    bed = SolverBed(steps)
    for order, (ideal, plain, paper, net) in ((2, row[2:6]), (1, (*row[6:9], row[8]))):

        def make(order: int = order) -> Any:
            return solver(order)

        assert bed.output_variance(make(), 0.0) == pytest.approx(ideal, abs=DIGITS)
        assert bed.output_variance(make(), injected) == pytest.approx(plain, abs=DIGITS)
        for mode, expected in (("paper", paper), ("corrected", net)):
            found = bed.output_variance(corrected_on(bed, make, injected, mode=mode), injected)
            assert found == pytest.approx(expected, abs=DIGITS)
        assert abs(net - ideal) < abs(plain - ideal)


@pytest.mark.parametrize(
    "make",
    [
        lambda: solver(3),
        lambda: solver(2, solver_type="heun"),
        lambda: solver(1, algorithm_type="dpmsolver"),
        lambda: solver(2, algorithm_type="dpmsolver"),
        lambda: solver(3, algorithm_type="dpmsolver"),
    ],
    ids=["++3", "++2 heun", "plain 1", "plain 2", "plain 3"],
)
def test_other_solvers_restore_the_variance_too(make: Any) -> None:
    bed, injected = SolverBed(30), 0.2
    ideal, plain, known = (
        bed.output_variance(one, added)
        for one, added in (
            (make(), 0.0),
            (make(), injected),
            (corrected_on(bed, make, injected), injected),
        )
    )
    assert abs(known - ideal) < 0.3 * abs(plain - ideal)


def test_solver_on_a_flow_restores_the_variance() -> None:
    # The third way of flow matching: longer increments of x/alpha.
    def make() -> Any:
        return SOLVER(
            solver_order=1,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=3.0,
            final_sigmas_type="zero",
        )

    for s2, injected, expected in (
        (0.5, 0.5, 0.4288),
        (0.05, 0.3, 0.0343),
        (1.0, 0.3, 0.8787),
        (4.0, 0.3, 3.6320),
    ):
        bed = VelocitySolverBed(s2)
        found = bed.output_variance(corrected_on(bed, make, injected), injected)
        assert found == pytest.approx(expected, abs=DIGITS)
