from __future__ import annotations

import pytest
import torch

from postlude.zoo.gaussian_data import FlowBed, NoiseBed

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:.*copy keyword:DeprecationWarning")


@pytest.mark.parametrize("injected", [0.0, 0.3])
def test_variance_is_that_of_the_recursion(injected: float) -> None:
    bed = NoiseBed(12)
    variance = bed.start
    for sigma, after in zip(bed.sigmas[:-1].tolist(), bed.sigmas[1:].tolist(), strict=True):
        d, k = after - sigma, sigma / (bed.s2 + sigma**2)
        variance = (1 + d * k) ** 2 * variance + d**2 * injected
    found = bed.output_variance(diffusers.EulerDiscreteScheduler(), injected)
    assert found == pytest.approx(variance, rel=1e-4)


def test_flow_ends_near_the_data() -> None:
    for s2 in (0.05, 0.5, 4.0):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        found = FlowBed(s2).output_variance(scheduler)
        assert 0.6 * s2 < found < s2


def test_predictions_on_the_way() -> None:
    bed = FlowBed()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    x, expected = 1.0, []
    bed.place(scheduler)
    for sigma, after in zip(
        scheduler.sigmas[:-1].tolist(), scheduler.sigmas[1:].tolist(), strict=True
    ):
        u = float(bed.predict(sigma, torch.tensor(x)))
        expected.append(u**2)
        x += (after - sigma) * u
    found = bed.prediction_variance(scheduler)
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-9
    )


def test_errors_that_are_one() -> None:
    bed, scheduler = NoiseBed(6), diffusers.EulerDiscreteScheduler()
    parts, _ = bed.run(scheduler, 0.3)
    together = bed.output_variance(scheduler, 0.3, correlation=1.0)
    assert together == pytest.approx(float(parts[0] ** 2 + parts[1:].sum() ** 2))
    apart = bed.output_variance(scheduler, 0.3)
    assert apart == pytest.approx(float(parts.square().sum()))
