"""``sample`` and ``evaluate samples``, on a stand-in and on the packaged diffusion transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:.*copy keyword:DeprecationWarning")

FEW = ("-n", 12, "--steps", 3, "--device", "cpu")


def test_options_of_sample(door: Any, postlude_command: Any, tmp_path: Path) -> None:
    save_file({"encoder_hidden_states": torch.ones(3, 2)}, tmp_path / "told.safetensors")
    door.results["sample"] = {"samples": object(), "compared": object(), "count": 3}
    done = postlude_command(
        "sample", "ckpt", "-o", "grid.png", "--sampler", "dpm++", "--steps", 7, "-n", 3, "--labels", "4,2",
        "--guidance", 1.5, "--reuse", 2, "--compare", "other",
        "--drift", "d.safetensors", "--drift-mode", "paper", "--drift-bias", 0.5,
        "--conditions", tmp_path / "told.safetensors", "--batch-size", 2, "--seed", 9, "--overwrite", "--json",
    )  # fmt: skip
    assert done.json == {"count": 3}
    name, words, given = door.calls[-1]
    assert (name, words) == ("sample", ("<ckpt>",))
    assert given.pop("conditions")["encoder_hidden_states"].shape == (3, 2)
    assert given == {
        "count": 3, "sampler": "dpm++", "steps": 7, "labels": [4, 2], "seed": 9, "guidance": 1.5, "reuse": 2,
        "compare": "<other>",
        "drift": "d.safetensors", "drift_mode": "paper", "drift_bias": 0.5, "batch_size": 2, "out": "grid.png",
        "overwrite": True,
    }  # fmt: skip


def test_options_of_evaluate_samples(door: Any, postlude_command: Any, tmp_path: Path) -> None:
    save_file({"images": torch.ones(3, 1, 8, 8)}, tmp_path / "real.safetensors")
    numbers = {
        f"{name}{end}": None
        for name in ("frechet", "frechet_pixels", "class_accuracy")
        for end in ("", "_reference", "_floor", "_real", "_by_class")
    }
    settings = {
        "count": 30,
        "sampler": "euler",
        "steps": 5,
        "seed": 1,
        "drift": None,
        "seconds": 1.0,
    }
    door.results["evaluate_samples"] = {**numbers, **settings, "psnr_db": None, "notes": ["small"]}
    done = postlude_command(
        "evaluate", "samples", "ckpt", "--reference", "base", "-n", 30, "--sampler", "euler", "--steps", 5,
        "--guidance", 2, "--reuse", 3, "--drift", "d", "--drift-mode", "paper", "--drift-bias", 0.5,
        "--real", tmp_path / "real.safetensors",
        "--seed", 1, "--json", "-o", tmp_path / "result.json",
    )  # fmt: skip
    assert done.json["notes"] == ["small"]
    assert json.loads((tmp_path / "result.json").read_text()) == done.json
    name, words, given = door.calls[-1]
    assert (name, words) == ("evaluate_samples", ("<ckpt>",))
    assert given.pop("real").shape == (3, 1, 8, 8)
    assert given == {
        "reference": "<base>", "count": 30, "sampler": "euler", "steps": 5, "seed": 1, "guidance": 2.0, "reuse": 3,
        "drift": "d", "drift_mode": "paper", "drift_bias": 0.5,
    }  # fmt: skip


def test_sample_writes_a_grid_and_tensors(postlude_command: Any, tmp_path: Path) -> None:
    from PIL import Image

    out = tmp_path / "new" / "grid.png"
    words = (
        "sample",
        "zoo:tiny-dit",
        "--compare",
        "zoo:tiny-dit-flow",
        "--sampler",
        "dpm++",
        *FEW,
        "-o",
        out,
    )
    done = postlude_command(*words, "--json").json
    assert done["grid"] == str(out) and done["tensors"] == str(out.with_suffix(".safetensors"))
    assert done["sampler"] == "dpm++" and done["count"] == 12 and done["drift"] is None
    assert 0 < done["psnr_db_lowest"] < done["psnr_db"] < 40
    tensors = load_file(done["tensors"])
    assert {name: list(one.shape) for name, one in tensors.items()} == {
        "images": [12, 1, 8, 8], "compared": [12, 1, 8, 8], "labels": [12],
    }  # fmt: skip
    with safe_open(done["tensors"], framework="pt") as store:
        assert '"steps": 3' in store.metadata()["sample"]
    with Image.open(out) as picture:
        assert picture.width > 3 * 100 and picture.height > 10 * 48
    again = postlude_command(*words)
    assert again.code == 2
    assert "grid.png already exists. Choose another output, or pass --overwrite" in again.err
    text = postlude_command(*words, "--overwrite").out
    assert "psnr_db" in text and "dpm++" in text
    assert torch.equal(load_file(done["tensors"])["images"], tensors["images"])


def test_tensors_alone(postlude_command: Any, tmp_path: Path) -> None:
    out = tmp_path / "digits.safetensors"
    done = postlude_command("sample", "zoo:tiny-dit", *FEW, "-o", out, "--json").json
    assert done["grid"] is None and done["tensors"] == str(out)
    assert [file.name for file in tmp_path.iterdir()] == ["digits.safetensors"]


def test_equal_models(postlude_command: Any) -> None:
    done = postlude_command(
        "sample", "zoo:tiny-dit", "--compare", "zoo:tiny-dit", *FEW, "--json"
    ).json
    assert done["psnr_db"] is None and "grid" not in done
    words = ("sample", "zoo:tiny-dit", "--compare", "zoo:tiny-dit-flow", *FEW, "--json")
    other = postlude_command(*words).json
    assert (other["sampler"], other["sampler_compared"]) == ("euler", "fm-euler")


def test_evaluate_samples(postlude_command: Any) -> None:
    words = (
        "evaluate",
        "samples",
        "zoo:tiny-dit-flow",
        "--reference",
        "zoo:tiny-dit",
        "--sampler",
        "dpm++",
        *FEW,
    )
    done = postlude_command(*words, "--json").json
    for key in ("frechet", "frechet_reference", "class_accuracy", "psnr_db", "frechet_floor"):
        assert done[key] > 0
    assert done["notes"] == [
        "12 samples: a Frechet distance of fewer than about 1000 is mostly their number's"
    ]
    text = postlude_command(*words).out
    assert text.splitlines()[0].split() == ["model", "reference", "real"]
    for line in (
        "Frechet distance, features",
        "right class",
        "PSNR to the reference",
        "12 samples, dpm++, 3 steps",
    ):
        assert line in text
    alone = postlude_command("evaluate", "samples", "zoo:tiny-dit", *FEW).out
    assert "PSNR" not in alone and "right by class" in alone


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["zoo:tiny-dit", "--sampler", "eular"], "No sampler named 'eular'. Did you mean 'euler'"),
        (["zoo:tiny-dit", "--steps", "0"], "steps is 0; expected 1 or more"),
        (["zoo:tiny-dit", "-n", "0"], "count is 0; expected 1 or more"),
        (["zoo:tiny-dit", "--labels", "a"], "--labels is 'a'; expected classes with commas between, as in 3,7"),
        (["zoo:tiny-dit", "--labels", "11"], "labels are [11]; expected classes from 0 to 9"),
        (["zoo:tiny-dit", "-o", "grid.jpg"], "the output is grid.jpg; expected a file that ends in .png"),
        (["zoo:tiny-dit", "--conditions", "no.safetensors"], "There is no file no.safetensors"),
        (["zoo:tiny-dit", "--drift", "no.safetensors"], "There is no file no.safetensors; expected drift statistics"),
        (["zoo:tiny-lm"], "is a language model; sampling needs a diffusion model: a diffusers directory"),
        (["zoo:tiny-dit", "--drift-mode", "paper"], "'paper', and there are no drift statistics to correct by"),
        (["zoo:tiny-dit", "--guidance", "-1"], "guidance is -1; expected a number of at least 0"),
        (["zoo:tiny-dit", "--guidance", "nan"], "guidance is nan; expected a number of at least 0"),
        (["calibrat", "small"], "Did you mean `postlude sample calibrate`?"),
    ],
)  # fmt: skip
def test_bad_input(postlude_command: Any, words: list[str], message: str) -> None:
    out = () if "-o" in words else ("-o", "never.png")
    done = postlude_command("sample", *words, *out, *FEW[4:])
    assert done.code == 2
    assert message in done.err


def test_nowhere_to_write(postlude_command: Any) -> None:
    done = postlude_command("sample", "zoo:tiny-dit", *FEW)
    assert done.code == 2 and "there is no output" in done.err and "-o grid.png" in done.err
    assert "postlude sample calibrate" in " ".join(postlude_command("sample", "--help").out.split())


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "zoo:tiny-dit", "Once"),
        ("inspect", "zoo:tiny-dit"),
        ("export", "zoo:tiny-dit", "--to", "gguf", "-o", "x.gguf"),
    ],
)
def test_commands_for_language_models_point_here(
    postlude_command: Any, words: tuple[str, ...]
) -> None:
    done = postlude_command(*words)
    assert (
        done.code == 2 and "is a diffusion model (dit); this works on language models" in done.err
    )
    assert "`postlude sample` draws its images, `postlude evaluate samples` judges" in done.err


def test_bad_files_of_evaluate_samples(postlude_command: Any, tmp_path: Path) -> None:
    few = {f"w{i}": torch.ones(1) for i in range(9)}
    save_file({"pictures": torch.ones(3, 1, 8, 8)}, tmp_path / "real.safetensors")
    save_file(few, tmp_path / "many.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    words = ("evaluate", "samples", "zoo:tiny-dit", "--real")
    done = postlude_command(*words, tmp_path / "real.safetensors")
    assert done.code == 2 and "holds pictures; expected a tensor `images`" in done.err
    done = postlude_command(*words, tmp_path / "many.safetensors")
    assert "w4, ... (9 tensors); expected a tensor `images`" in done.err and "w5" not in done.err
    done = postlude_command(*words[:3], "-n", 1)
    assert done.code == 2 and "count is 1; expected 2 or more" in done.err
    done = postlude_command(*words, tmp_path / "text.safetensors")
    assert done.code == 2 and "is no .safetensors file" in done.err
