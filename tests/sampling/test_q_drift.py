from __future__ import annotations

import copy
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.diffusion import edm_sigmas
from postlude.sampling.drift import DriftStatistics
from postlude.sampling.q_drift import SUPPORTED, DriftWarning, QDrift, check_supported, correct
from postlude.zoo.gaussian_data import SolverBed

from .beds import (
    EULER,
    FLOW,
    SOLVER,
    corrected_on,
    outputs,
    path,
    set_to,
    solver,
    statistics_of,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*copy keyword:DeprecationWarning", "ignore:.*algorithm_type.*:FutureWarning"
)

# ---------------------------------------------------------------- the plain scheduler, to the last bit

VARIANTS = {
    **{
        f"euler {kind}": lambda kind=kind: EULER(prediction_type=kind)
        for kind in ("epsilon", "sample", "v_prediction")
    },
    "euler karras": lambda: EULER(use_karras_sigmas=True),
    "flow euler": lambda: FLOW(shift=3.0),
    **{
        f"dpm++ {order} {kind} {type_}": lambda order=order, kind=kind, type_=type_: SOLVER(
            solver_order=order, prediction_type=kind, solver_type=type_
        )
        for order in (1, 2, 3)
        for kind in ("epsilon", "sample", "v_prediction")
        for type_ in (("midpoint", "heun") if order == 2 else ("midpoint",))
    },
    **{
        f"dpm++ {order} flow": lambda order=order: SOLVER(
            solver_order=order, prediction_type="flow_prediction", use_flow_sigmas=True
        )
        for order in (1, 2, 3)
    },
    **{
        f"dpm {order} {kind}": lambda order=order, kind=kind: solver(
            order, prediction_type=kind, algorithm_type="dpmsolver"
        )
        for order in (1, 2, 3)
        for kind in ("epsilon", "sample", "v_prediction")
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_no_variance_is_the_plain_scheduler(name: str) -> None:
    make = VARIANTS[name]
    for dtype in (torch.float32, torch.bfloat16):
        plain = path(make(), dtype=dtype)
        assert plain.dtype == dtype
        for mode in ("corrected", "paper"):
            zero = correct(make(), statistics_of(set_to(make()), 0.0), QDrift(mode=mode))
            assert torch.equal(path(zero, dtype=dtype), plain)
            off = QDrift(mode=mode, qdrift_scale=0.0)
            unscaled = correct(make(), statistics_of(set_to(make()), 0.3), off)
            assert torch.equal(path(unscaled, dtype=dtype), plain)
    # Not only by leaving the step alone: the arithmetic of the correction goes there as well.
    plain = path(make())
    for mode in ("corrected", "paper"):
        least = correct(make(), statistics_of(set_to(make()), 1e-30), QDrift(mode=mode))
        assert torch.equal(path(least), plain)
        some = correct(make(), statistics_of(set_to(make()), 0.3), QDrift(mode=mode))
        assert not torch.equal(path(some), plain)
        assert path(some, dtype=torch.bfloat16).dtype == torch.bfloat16


# ---------------------------------------------------------------- the published formulas, to the last bit


def test_paper_mode_of_euler() -> None:
    scheduler = correct(EULER(), statistics_of(set_to(EULER()), 0.3), QDrift(mode="paper"))
    found, x = path(scheduler), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    sigmas = set_to(EULER()).sigmas
    variance = torch.tensor(0.3)
    for step, u in enumerate(outputs(6)):
        d = sigmas[step + 1] - sigmas[step]
        c = d.abs() * variance / (2 * sigmas[step] + 1e-12)
        # The scheduler's derivative, which is u but for rounding.
        derivative = (x - (x - sigmas[step] * u)) / sigmas[step]
        x = x + derivative * (d * (1 + c))
        assert torch.equal(found[step], x)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_paper_mode_of_flow_euler(scale: float) -> None:
    settings = QDrift(mode="paper", qdrift_scale=scale)
    scheduler = correct(FLOW(shift=3.0), statistics_of(set_to(FLOW(shift=3.0)), 0.3), settings)
    found, x = path(scheduler), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    sigmas = scheduler.sigmas
    for step, v in enumerate(outputs(6)):
        d = sigmas[step + 1] - sigmas[step]
        c = d.abs() * torch.tensor(0.3) / (2 * sigmas[step] + 1e-12)
        x = x + d * (1 + scale * c) * v
        assert torch.equal(found[step], x)


@pytest.mark.parametrize("order", [1, 2])
def test_paper_mode_of_the_solver(order: int) -> None:
    make = lambda: SOLVER(solver_order=order)  # noqa: E731
    scheduler = correct(make(), statistics_of(set_to(make()), 0.3), QDrift(mode="paper"))
    found = path(scheduler)
    base = set_to(make())
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    bars = base.sigmas.double()
    alphas, sigmas = base._sigma_to_alpha_sigma_t(bars)
    logarithm = torch.log(alphas / sigmas)
    # The clean sample (x - sigma*eps)/alpha has the error of eps times sigma/alpha.
    variance = bars[:-1] ** 2 * 0.3
    for step, (u, timestep) in enumerate(zip(outputs(6), base.timesteps, strict=True)):
        moved = base.step(u, timestep, x, return_dict=False)[0]
        h = logarithm[step + 1] - logarithm[step]
        c = alphas[step + 1] * torch.expm1(-h)
        if order == 1 or step in (0, 5):  # also the last one, with fewer than 15
            squares = c**2 * variance[step]
        else:
            r0 = (logarithm[step] - logarithm[step - 1]) / h
            first, second = -c * (1 + 1 / (2 * r0)), c / (2 * r0)
            squares = first**2 * variance[step] + second**2 * variance[step - 1]
        beta = squares / alphas[step + 1] ** 2 / (bars[step] ** 2 - bars[step + 1] ** 2).abs()
        ratio = float(alphas[step + 1] / alphas[step])
        # As published: y_s + (1 + beta)*(y_base - y_s) in y = x/alpha.
        y, y_moved = x.double() / alphas[step], moved.double() / alphas[step + 1]
        published = alphas[step + 1] * (y + (1 + beta) * (y_moved - y))
        x = moved + float(beta.float()) * (moved - ratio * x)
        torch.testing.assert_close(x.double(), published, rtol=1e-5, atol=1e-6)
        assert torch.equal(found[step], x)


# ---------------------------------------------------------------- options


def coefficients(**settings: Any) -> Tensor:
    channels = torch.tensor([0.1, 0.2, 0.6], dtype=torch.float64)
    statistics = statistics_of(set_to(EULER()), channels, channels=3)
    return set_to(correct(EULER(), statistics, QDrift(**settings))).coefficients()


def test_options() -> None:
    plain = coefficients()
    assert plain.shape == (6, 3)
    torch.testing.assert_close(coefficients(qdrift_scale=0.5), 0.5 * plain)
    torch.testing.assert_close(coefficients(scalar=True), plain.mean(-1, keepdim=True))
    torch.testing.assert_close(coefficients(cap=0.1), plain.clamp(max=0.1))
    capped = coefficients(cap=0.1, qdrift_scale=2.0)
    torch.testing.assert_close(capped, 2 * plain.clamp(max=0.1))
    last = coefficients(skip_last=True)
    assert torch.equal(last[:-1], plain[:-1]) and not bool(last[-1].any())
    # Nor is a bias subtracted there.
    statistics = with_correlation(set_to(EULER()))
    x, u = outputs(2)
    moved = []
    for scheduler in (
        EULER(),
        correct(EULER(), statistics, QDrift(bias_scale=1.0, skip_last=True)),
    ):
        set_to(scheduler).set_begin_index(5)
        scheduler.scale_model_input(x, scheduler.timesteps[5])
        moved.append(scheduler.step(u, scheduler.timesteps[5], x).prev_sample)
    assert torch.equal(*moved)


def with_correlation(scheduler: Any) -> DriftStatistics:
    """Error 0.5 + 0.2*(q - 1), and noise of variance 0.1 beside."""
    statistics = statistics_of(scheduler, 0.1 + 0.2**2)
    statistics.covariance[:, 0, 1] = statistics.covariance[:, 1, 0] = 0.2
    statistics.mean[:, 0], statistics.mean[:, 1] = 1.0, 0.5
    return statistics


def test_unconditional_takes_all_of_the_error() -> None:
    statistics = with_correlation(set_to(EULER()))
    found = [
        set_to(correct(EULER(), statistics, QDrift(unconditional=one))).coefficients()
        for one in (False, True)
    ]
    torch.testing.assert_close(found[1] / found[0], torch.full((6, 1), 1.4))


@pytest.mark.parametrize("make", [lambda: FLOW(), lambda: SOLVER(), lambda: EULER()])
def test_bias_is_subtracted_from_the_output(make: Any) -> None:
    statistics = with_correlation(set_to(make()))
    settings = QDrift(bias_scale=0.5, qdrift_scale=0.0)
    found = path(correct(make(), statistics, settings))

    class Unbiased(type(make())):  # type: ignore[misc]
        def step(self, u: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().step(u - 0.5 * (0.5 + 0.2 * (u - 1)), *args, **kwargs)

    expected = path(Unbiased.from_config(make().config))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_learned_variance_stays_out_of_the_bias() -> None:
    statistics = with_correlation(set_to(EULER()))
    scheduler = set_to(correct(EULER(), statistics, QDrift(bias_scale=1.0)))
    x, u = outputs(2, (2, 3, 4, 4))
    scheduler.scale_model_input(x, scheduler.timesteps[0])
    wide = scheduler.step(torch.cat([u, u], 1), scheduler.timesteps[0], x).prev_sample
    set_to(scheduler).scale_model_input(x, scheduler.timesteps[0])
    assert torch.equal(wide, scheduler.step(u, scheduler.timesteps[0], x).prev_sample)


def test_channels_are_corrected_one_by_one() -> None:
    channels = torch.tensor([0.0, 0.2, 0.6], dtype=torch.float64)
    for make in (EULER, FLOW, SOLVER):
        found = path(correct(make(), statistics_of(set_to(make()), channels, channels=3)))
        for channel, variance in enumerate(channels.tolist()):
            single = path(correct(make(), statistics_of(set_to(make()), variance)))
            torch.testing.assert_close(found[:, :, channel], single[:, :, channel])
        assert torch.equal(found[:, :, 0], path(make())[:, :, 0])
    # Images packed into tokens have their channels last.
    tokens = statistics_of(set_to(FLOW()), channels, channels=3, channel_axis=2)
    scheduler = set_to(correct(FLOW(), tokens))
    x, v = outputs(2, (2, 16, 3))
    moved = scheduler.step(v, scheduler.timesteps[0], x, return_dict=False)[0]
    plain = set_to(FLOW()).step(v, scheduler.timesteps[0], x, return_dict=False)[0]
    assert torch.equal(moved[..., 0], plain[..., 0]) and not torch.equal(moved, plain)
    with pytest.raises(SettingsError, match="of 3 channels, and axis 2 of the sample has 5"):
        scheduler.step(outputs(1, (2, 16, 5))[0], scheduler.timesteps[1], outputs(1, (2, 16, 5))[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "net"}, "mode is one of corrected, paper, got 'net'"),
        ({"qdrift_scale": -1.0}, "qdrift_scale is a number of at least 0, got -1"),
        ({"bias_scale": float("nan")}, "bias_scale is a number of at least 0, got nan"),
        ({"cap": 0.0}, "cap is above 0, or None for no limit"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        QDrift(**settings)


# ---------------------------------------------------------------- steps that inject noise themselves


def test_stochastic_schedulers_stay_as_they_are() -> None:
    for make in (
        lambda: FLOW(stochastic_sampling=True),
        lambda: SOLVER(algorithm_type="sde-dpmsolver++"),
    ):
        statistics = statistics_of(set_to(make()), 0.3)
        with pytest.warns(DriftWarning, match="injects noise itself: its steps stay uncorrected"):
            scheduler = correct(make(), statistics)
        x, u = outputs(2, (2, 3, 4, 4))
        moved = [
            set_to(one).step(
                u,
                one.timesteps[0],
                x,
                generator=torch.Generator().manual_seed(0),
                return_dict=False,
            )[0]
            for one in (make(), scheduler)
        ]
        assert torch.equal(*moved)


def test_stochastic_steps_stay_as_they_are() -> None:
    scheduler, plain = correct(EULER(), statistics_of(set_to(EULER()), 0.3)), EULER()
    x, u = outputs(2, (2, 3, 4, 4))
    moved = []
    for one in (plain, scheduler):
        set_to(one).scale_model_input(x, one.timesteps[0])
        noise = torch.Generator().manual_seed(0)
        moved.append(one.step(u, one.timesteps[0], x, s_churn=1.0, generator=noise).prev_sample)
    assert torch.equal(*moved)
    # The same, all arguments by position.
    set_to(scheduler).scale_model_input(x, scheduler.timesteps[0])
    noise = torch.Generator().manual_seed(0)
    (last, _) = scheduler.step(
        u, scheduler.timesteps[0], x, 1.0, 0.0, float("inf"), 1.0, noise, False
    )
    assert torch.equal(last, moved[0])
    # Timesteps of each token.
    scheduler, plain = correct(FLOW(), statistics_of(set_to(FLOW()), 0.3)), FLOW()
    x, v = outputs(2, (2, 16, 3))
    moved = [
        set_to(one)
        .step(v, one.timesteps[0], x, per_token_timesteps=torch.full((2, 16), 700.0))
        .prev_sample
        for one in (plain, scheduler)
    ]
    assert torch.equal(*moved)


# ---------------------------------------------------------------- statistics of something else


def test_statistics_of_another_scheduler() -> None:
    statistics = statistics_of(set_to(EULER()), 0.3)
    with pytest.raises(
        SettingsError, match="made with EulerDiscreteScheduler, and the scheduler is"
    ):
        correct(SOLVER(), statistics)
    with pytest.raises(SettingsError, match=r"beta_end = 0\.02 then, 0\.01 now"):
        correct(EULER(beta_end=0.01), statistics)
    with pytest.raises(SettingsError, match="solver_order = 2 then, 1 now"):
        correct(SOLVER(solver_order=1), statistics_of(set_to(SOLVER()), 0.3))


def test_statistics_of_another_number_of_steps() -> None:
    scheduler = correct(EULER(), statistics_of(set_to(EULER()), 0.3))
    with pytest.raises(
        SettingsError, match=r"of 6 steps, and the scheduler is set to 9.*interpolate"
    ):
        scheduler.set_timesteps(9)
    flow = correct(FLOW(), statistics_of(set_to(FLOW()), 0.3))
    with pytest.raises(SettingsError, match="of other timesteps than those the scheduler is set"):
        flow.set_timesteps(sigmas=torch.linspace(1, 0.2, 6).tolist())


def test_statistics_of_other_steps_are_interpolated_when_allowed() -> None:
    statistics = statistics_of(set_to(EULER()), torch.arange(1.0, 7.0)[:, None])
    scheduler = correct(EULER(), statistics, QDrift(interpolate=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error", DriftWarning)
        scheduler.set_timesteps(6)
    with pytest.warns(DriftWarning, match="interpolated between timesteps"):
        scheduler.set_timesteps(11)
    # Every second timestep of eleven is one of six.
    found = scheduler.coefficients()[:, 0]
    widths = (scheduler.sigmas[:-1] - scheduler.sigmas[1:]) / (2 * scheduler.sigmas[:-1])
    torch.testing.assert_close(found, widths * torch.linspace(1, 6, 11), rtol=1e-5, atol=0)


def test_unsupported_schedulers_are_refused() -> None:
    for base in (diffusers.DDIMScheduler(), diffusers.EulerAncestralDiscreteScheduler()):
        with pytest.raises(SettingsError, match=f"supported are {', '.join(SUPPORTED)}"):
            check_supported(base)
    statistics = statistics_of(set_to(SOLVER()), 0.3)
    with pytest.raises(SettingsError, match="thresholding=True"):
        correct(SOLVER(thresholding=True), statistics)
    with pytest.raises(SettingsError, match="invert_sigmas=True"):
        correct(FLOW(invert_sigmas=True), statistics)


# ---------------------------------------------------------------- a scheduler like any other


def test_looks_like_its_base(tmp_path: Path) -> None:
    base = SOLVER(solver_order=2)
    scheduler = correct(base, statistics_of(set_to(base), 0.3))
    assert isinstance(scheduler, SOLVER) and scheduler.__class__ is SOLVER
    assert not isinstance(scheduler, torch.nn.Module)
    assert inspect.signature(scheduler.step) == inspect.signature(base.step)
    assert inspect.signature(scheduler.set_timesteps) == inspect.signature(base.set_timesteps)
    assert scheduler.config == base.config and scheduler.order == base.order
    assert len(scheduler) == len(base)
    scheduler.set_begin_index(2)
    assert base.begin_index == 2
    scheduler.marked = True
    assert base.marked
    assert repr(scheduler).startswith("DriftCorrectedScheduler(DPMSolverMultistepScheduler")
    assert type(scheduler.from_config(scheduler.config)) is SOLVER
    # What is saved is the scheduler; statistics are a file of their own.
    scheduler.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == (
        "DPMSolverMultistepScheduler"
    )
    assert SOLVER.from_pretrained(tmp_path).config.solver_order == 2
    # Correcting it again corrects its base, once.
    assert correct(scheduler, scheduler.statistics).base is base
    with pytest.raises(AttributeError, match="no_such_thing"):
        scheduler.no_such_thing  # noqa: B018


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy])
def test_a_copy_has_a_state_of_its_own(copied: Any) -> None:
    scheduler = correct(SOLVER(), statistics_of(set_to(SOLVER()), 0.3))
    twin = copied(scheduler)
    expected = path(scheduler)
    assert torch.equal(path(twin), expected)
    assert twin.base is not scheduler.base
    set_to(twin, 6)
    assert scheduler.step_index == 6 and twin.step_index is None


def test_a_later_start() -> None:
    for make in (EULER, FLOW, SOLVER):
        scheduler, variance = correct(make(), statistics_of(set_to(make()), 0.3)), 0.3
        set_to(scheduler).set_begin_index(3)
        x, u = outputs(2, (2, 3, 4, 4))
        timestep = scheduler.timesteps[3]
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, timestep)
        moved = scheduler.step(u, timestep, x).prev_sample
        # A solver starts with order 1 wherever it starts.
        c = scheduler._plan.coefficients[1][3]
        plain = set_to(make())
        plain.set_begin_index(3)
        if hasattr(plain, "scale_model_input"):
            plain.scale_model_input(x, timestep)
        base = plain.step(u, timestep, x).prev_sample
        assert float(c) > 0 and not torch.equal(moved, base), variance


def test_what_the_base_refuses_it_refuses_itself() -> None:
    scheduler = set_to(correct(FLOW(), statistics_of(set_to(FLOW()), 0.3)))
    x, v = outputs(2, (2, 3, 4, 4))
    with pytest.raises(ValueError, match="Passing integer indices"):
        scheduler.step(v, 0, x)


def test_half_precision_is_computed_in_full() -> None:
    statistics = statistics_of(set_to(FLOW()), 0.3)
    found = path(correct(FLOW(), statistics), dtype=torch.bfloat16)
    scheduler = set_to(correct(FLOW(), statistics))
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(4)).bfloat16()
    for step, (v, timestep) in enumerate(
        zip(outputs(6).bfloat16(), scheduler.timesteps, strict=True)
    ):
        x = scheduler.step(v.float(), timestep, x.float()).prev_sample.bfloat16()
        assert torch.equal(found[step], x)


def test_the_same_schedule_again_is_not_planned_again() -> None:
    scheduler = set_to(correct(EULER(), statistics_of(set_to(EULER()), 0.3)))
    factors = scheduler._plan.factors
    assert set_to(scheduler)._plan.factors is factors


def test_sigmas_that_a_caller_sets_are_followed() -> None:
    bed = SolverBed(8)
    scheduler = corrected_on(bed, lambda: solver(1), 0.3)
    bed.place(scheduler)
    assert torch.equal(scheduler.sigmas, edm_sigmas(8, 0.05, 20.0).float())
    assert scheduler.coefficients().shape == (8, 1)
