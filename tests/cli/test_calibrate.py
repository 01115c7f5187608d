"""``sample calibrate``, and sampling with what it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import postlude as pl

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:.*copy keyword:DeprecationWarning")

STEPS = ("--steps", 5, "--device", "cpu")


@pytest.fixture(scope="module")
def worse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-dit at three bits, saved."""
    from postlude.quantization.rtn import RTN

    folder: Path = tmp_path_factory.mktemp("models") / "dit3"
    pl.quantize("zoo:tiny-dit", RTN(weights=3, activations=4, group=32)).save(folder)
    return folder


@pytest.fixture(scope="module")
def drift(worse: Path) -> Path:
    file = worse.parent / "drift.safetensors"
    pl.sample_calibrate(worse, "zoo:tiny-dit", sampler="dpm++", steps=5, runs=2, batch=10, out=file)
    return file


def test_options(door: Any, postlude_command: Any) -> None:
    door.results["sample_calibrate"] = {"statistics": object(), "steps": 3}
    done = postlude_command(
        "sample", "calibrate", "small", "--reference", "base", "-o", "new.safetensors", "--runs", 3, "--batch", 2,
        "--sampler", "euler", "--steps", 7, "--guidance", 1.5, "--reuse", 2, "--labels", "4,2",
        "--channelwise", "--seed", 9, "--json",
    )  # fmt: skip
    assert done.json == {"steps": 3}
    name, words, given = door.calls[-1]
    assert (name, words) == ("sample_calibrate", ("<small>", "<base>"))
    assert given == {
        "runs": 3, "batch": 2, "sampler": "euler", "steps": 7, "guidance": 1.5, "reuse": 2, "labels": [4, 2],
        "conditions": None, "channelwise": True, "seed": 9, "out": "new.safetensors", "overwrite": False,
    }  # fmt: skip


def test_calibrate(worse: Path, postlude_command: Any, tmp_path: Path) -> None:
    out = tmp_path / "drift.safetensors"
    words = (
        "sample",
        "calibrate",
        worse,
        "--reference",
        "zoo:tiny-dit",
        "--runs",
        2,
        "--batch",
        4,
        "-o",
        out,
    )
    done = postlude_command(*words, *STEPS, "--json").json
    assert done["runs"] == 2 and done["samples"] == 8 and done["output"] == str(out)
    assert done["scheduler"] == "DPMSolverMultistepScheduler" and done["sampler"] == "dpm++"
    assert len(done["error_variance"]) == len(done["coefficients"]) == 5
    assert min(done["error_variance"]) > 0
    assert done["largest_coefficient"] == max(done["coefficients"]) > 0 and "notes" not in done
    first = out.read_bytes()
    refused = postlude_command(*words, *STEPS)
    assert refused.code == 2 and "drift.safetensors already exists" in refused.err
    text = postlude_command(*words, *STEPS, "--overwrite").out
    assert "% of the output's)" in text
    assert "2 paired runs, 8 images, 5 steps of DPMSolverMultistepScheduler" in text
    assert f"postlude sample {worse} --sampler dpm++ --steps 5 --drift {out} -o grid.png" in text
    assert out.read_bytes() == first


def test_sample_with_what_was_written(
    worse: Path, drift: Path, postlude_command: Any, tmp_path: Path
) -> None:
    images = []
    for number, more in enumerate(
        ((), ("--drift", drift), ("--drift", drift, "--drift-mode", "paper"))
    ):
        out = tmp_path / f"{number}.safetensors"
        words = ("sample", worse, "--sampler", "dpm++", *STEPS, "-n", 6, "-o", out)
        assert postlude_command(*words, *more).code == 0
        images.append(load_file(out)["images"])
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])


def test_statistics_of_something_else(worse: Path, drift: Path, postlude_command: Any) -> None:
    for words, message in (
        (
            (worse, "--sampler", "dpm++", "--steps", 4),
            "are of 5 steps, and the scheduler is set to 4",
        ),
        ((worse, "--sampler", "euler", "--steps", 5), "made with DPMSolverMultistepScheduler"),
        ((worse, "--sampler", "dpm++1", "--steps", 5), "solver_order = 2 then, 1 now"),
        (("zoo:tiny-dit", "--sampler", "dpm++", "--steps", 5), "are of another approximate model"),
        ((worse, "--sampler", "dpm++", "--steps", 5, "--guidance", 2), "made with guidance = 1.0"),
    ):
        words += ("-n", 2, "-o", "never.png", "--device", "cpu")
        done = postlude_command("sample", *words, "--drift", drift)
        assert done.code == 2 and message in done.err, done.err


def test_calibrations_that_cannot_be(worse: Path, postlude_command: Any, tmp_path: Path) -> None:
    out = tmp_path / "drift.safetensors"
    for more, message in (
        (
            ("--sampler", "heun"),
            "There is no drift correction for HeunDiscreteScheduler; supported are Euler",
        ),
        (("--runs", 0), "runs is 0; expected 1 or more"),
        (("--sampler", "fm-euler"), "The sampler fm-euler is not for this model"),
    ):
        done = postlude_command(
            "sample", "calibrate", worse, "--reference", "zoo:tiny-dit", "-o", out, *STEPS, *more
        )
        assert done.code == 2 and message in done.err, done.err
    done = postlude_command("sample", "calibrate", worse, "--reference", "zoo:tiny-lm", "-o", out)
    assert done.code == 2 and "is a language model; sampling needs a diffusion model" in done.err
    done = postlude_command(
        "sample", "calibrate", worse, "--reference", "zoo:tiny-dit-flow", "-o", out
    )
    assert done.code == 2 and "The model predicts epsilon (Euler" in done.err
    assert "and the reference the velocity of a flow (FlowMatchEuler" in done.err
    picture = out.with_suffix(".png")
    done = postlude_command(
        "sample", "calibrate", worse, "--reference", "zoo:tiny-dit", "-o", picture
    )
    assert done.code == 2 and "expected a file that ends in .safetensors" in done.err
    assert not picture.exists()
    assert not out.exists()


def test_nothing_to_correct_is_said(postlude_command: Any, tmp_path: Path) -> None:
    out = tmp_path / "drift.safetensors"
    done = postlude_command(
        "sample", "calibrate", "zoo:tiny-dit", "--reference", "zoo:tiny-dit", "-o", out, "--batch", 2, "--runs", 1,
        *STEPS,
    )  # fmt: skip
    assert "note: no step becomes longer by more than 0 %" in done.out
