from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from postlude.errors import DataError
from postlude.sampling.paired_runs import PairedRun, collect
from postlude.sampling.q_drift import correct
from postlude.zoo.gaussian_data import NoiseBed

from .beds import EULER, FLOW, SOLVER, set_to

pytestmark = pytest.mark.filterwarnings("ignore:.*copy keyword:DeprecationWarning")


def exact(latents: Tensor, timestep: Tensor, **conditions: Any) -> Tensor:
    return 0.5 * latents + 0.001 * timestep


def approximate(latents: Tensor, timestep: Tensor, **conditions: Any) -> Tensor:
    return exact(latents, timestep) + 0.1 * torch.sin(7 * latents)


def runs(count: int = 5, shape: tuple[int, ...] = (4, 3, 2, 2)) -> list[PairedRun]:
    source = torch.Generator().manual_seed(0)
    return [PairedRun(torch.randn(shape, generator=source)) for _ in range(count)]


@pytest.mark.parametrize("make", [EULER, FLOW, SOLVER])
@pytest.mark.parametrize("channelwise", [False, True])
def test_paired_runs_follow_the_exact_model(make: Any, channelwise: bool) -> None:
    found = collect(exact, approximate, make(), runs(), steps=6, channelwise=channelwise)
    pairs: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for run in runs():
        scheduler = set_to(make())
        x = run.noise * getattr(scheduler, "init_noise_sigma", 1.0)
        for step, t in enumerate(scheduler.timesteps):
            seen = scheduler.scale_model_input(x, t) if make is not FLOW else x
            u, q = exact(seen, t), approximate(seen, t)
            pairs.setdefault(step, []).append((q, q - u))
            x = scheduler.step(u, t, x).prev_sample
    assert found.steps == 6 and found.runs == 5 and found.samples == 20
    assert found.channels == (3 if channelwise else 1)
    for step, values in pairs.items():
        # No error of this kind is beyond four standard deviations.
        both = torch.stack([torch.cat(one) for one in zip(*values, strict=True)]).double()
        rows = both.transpose(1, 2).flatten(2) if channelwise else both.reshape(2, 1, -1)
        for channel in range(found.channels):
            torch.testing.assert_close(
                found.covariance[step, :, :, channel],
                torch.cov(rows[:, channel]),
                rtol=1e-6,
                atol=0,
            )
            torch.testing.assert_close(
                found.mean[step, :, channel], rows[:, channel].mean(-1), rtol=1e-5, atol=1e-9
            )
        assert found.kept[step].tolist() == [rows.shape[-1]] * found.channels


def test_collecting_leaves_the_scheduler_alone() -> None:
    scheduler = set_to(EULER(), 3)
    before = copy.deepcopy(scheduler)
    statistics = collect(exact, approximate, scheduler, runs(1), steps=6)
    assert torch.equal(scheduler.timesteps, before.timesteps)
    assert scheduler.step_index is None
    # A corrected scheduler is calibrated as the plain one that it wraps.
    again = collect(exact, approximate, correct(EULER(), statistics), runs(1), steps=6)
    assert torch.equal(again.covariance, statistics.covariance)


def test_a_learned_variance_is_left_out() -> None:
    def wide(latents: Tensor, timestep: Tensor) -> Tensor:
        return torch.cat([approximate(latents, timestep), torch.full_like(latents, 1e6)], dim=1)

    found = collect(exact, wide, EULER(), runs(2), steps=4)
    expected = collect(exact, approximate, EULER(), runs(2), steps=4)
    assert torch.equal(found.covariance, expected.covariance)


def test_conditions_reach_both() -> None:
    seen = []

    def told(latents: Tensor, timestep: Tensor, *, label: int) -> Tensor:
        seen.append(label)
        return exact(latents, timestep)

    pairs = [PairedRun(run.noise, {"label": i}) for i, run in enumerate(runs(2))]
    collect(told, told, FLOW(), pairs, steps=2)
    assert seen == [0, 0, 0, 0, 1, 1, 1, 1]


def test_the_estimator_on_independent_error() -> None:
    # What is told by the output is not variance: V = Vinj*Var(eps)/(Var(eps) + Vinj), less what trimming takes.
    bed, injected = NoiseBed(8), 0.2
    source = torch.Generator().manual_seed(1)
    at = {"step": 0}

    def true(latents: Tensor, timestep: Tensor) -> Tensor:
        x = latents * (bed.sigmas[at["step"]].float() ** 2 + 1) ** 0.5
        return bed.predict(float(bed.sigmas[at["step"]]), x)

    def noisy(latents: Tensor, timestep: Tensor) -> Tensor:
        u = true(latents, timestep)
        at["step"] += 1
        return u + injected**0.5 * torch.randn(u.shape, generator=source)

    scheduler = EULER()
    bed.place(scheduler)

    class Placed(EULER):  # type: ignore[valid-type, misc]
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            bed_scheduler = super()
            bed_scheduler.set_timesteps(*args, **kwargs)
            self.set_begin_index(0)

    noise = torch.randn(100_000, 1, generator=source)
    start = noise * bed.start**0.5 / float(scheduler.init_noise_sigma)
    found = collect(
        true,
        noisy,
        Placed(),
        [PairedRun(start)],
        steps={"sigmas": bed.sigmas.tolist()},
    )
    prediction = bed.prediction_variance(EULER())
    expected = injected * prediction / (prediction + injected)
    torch.testing.assert_close(found.variance()[:, 0], expected, rtol=0.02, atol=0)


def test_a_few_runs_are_refused_when_they_are_none_or_nothing() -> None:
    with pytest.raises(DataError, match="No paired runs were given"):
        collect(exact, approximate, EULER(), [], steps=4)

    def broken(latents: Tensor, timestep: Tensor) -> Tensor:
        return latents * float("nan")

    with pytest.raises(DataError, match="NaN or infinity"):
        collect(exact, broken, EULER(), runs(1), steps=4)
    with pytest.raises(DataError, match="expected the same shape"):
        collect(exact, lambda x, t: x[:1], EULER(), runs(1), steps=4)
