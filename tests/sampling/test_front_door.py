"""``postlude.sample`` with the statistics of ``postlude.sample_calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import postlude as pl
from postlude.errors import CheckpointError, SettingsError

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:.*copy keyword:DeprecationWarning")


@pytest.fixture(scope="module")
def exact() -> Any:
    return pl.load("zoo:tiny-dit", device="cpu")


@pytest.fixture(scope="module")
def coarse(exact: Any) -> Any:
    """The model with its weights rounded to a grid."""
    model = pl.load("zoo:tiny-dit", device="cpu")
    with torch.no_grad():
        for weight in model.model.parameters():
            weight.copy_((weight * 64).round() / 64)
    return model


@pytest.fixture(scope="module")
def drift(exact: Any, coarse: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("drift") / "drift.safetensors"
    pl.sample_calibrate(coarse, exact, runs=2, batch=4, sampler="dpm++1", steps=4, out=file)
    return file


def test_the_sampler_is_that_of_the_statistics(coarse: Any, drift: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    corrected = pl.sample(coarse, count=4, steps=4, drift=drift, out=out)
    assert corrected["sampler"] == "dpm++1" and out.is_file()
    plain = pl.sample(coarse, count=4, steps=4, sampler="dpm++1")
    difference = (corrected["samples"].images - plain["samples"].images).abs()
    assert 0 < float(difference.max()) < 2
    paper = pl.sample(coarse, count=4, steps=4, drift=drift, drift_mode="paper")
    assert torch.equal(
        paper["samples"].images, corrected["samples"].images
    )  # the same rule at order 1
    judged = pl.evaluate_samples(coarse, count=4, drift=drift)
    assert judged["steps"] == 4  # of the statistics
    assert judged["sampler"] == "dpm++1" and judged["drift"] == drift


def test_a_quantized_model_beside_the_float_one(exact: Any) -> None:
    from postlude.quantization import RTN

    small = pl.quantize(pl.load("zoo:tiny-dit", device="cpu"), RTN(weights=8, activations=8))
    drawn = pl.sample(small, compare=exact, count=8, steps=5)
    assert 25 < drawn["psnr_db"] < 80
    again = pl.sample(exact, count=8, steps=5)
    assert torch.equal(drawn["compared"].images, again["samples"].images)


def test_statistics_of_something_else_are_refused(exact: Any, coarse: Any, drift: Path) -> None:
    few = {"count": 2, "drift": drift}
    with pytest.raises(
        SettingsError, match="made with DPMSolverMultistepScheduler, and the scheduler is Euler"
    ):
        pl.sample(coarse, **few, steps=4, sampler="euler")
    with pytest.raises(SettingsError, match="of 4 steps, and the scheduler is set to 5"):
        pl.sample(coarse, **few, steps=5)
    with pytest.raises(SettingsError, match="of another approximate model"):
        pl.sample(exact, **few, steps=4)
    with pytest.raises(SettingsError, match="guidance"):
        pl.sample(coarse, **few, steps=4, guidance=2.0)
    with pytest.raises(SettingsError, match="mode is one of corrected, paper, got 'papr'"):
        pl.sample(coarse, **few, steps=4, drift_mode="papr")
    with pytest.raises(
        CheckpointError, match="is a language model; sampling needs a diffusion model"
    ):
        pl.sample("zoo:tiny-lm", **few)
