from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

import postlude as pl
from postlude.cli import run
from postlude.errors import ArchitectureError, CheckpointError, DataError
from postlude.evaluation.pose import constant_pose, evaluate_pose
from postlude.zoo.fastpose_vit import data as sets
from postlude.zoo.fastpose_vit.making import make
from postlude.zoo.fastpose_vit.network import Backbone, build
from postlude.zoo.fastpose_vit.spacecraft import own_spacecraft
from postlude.zoo.fastpose_vit.training import measure, save

SHAPE = Backbone(image_size=16, patch=8, width=16, depth=1, heads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network in ``pose`` and a set in ``test``."""
    base = tmp_path_factory.mktemp("pose")
    sets.write(make(own_spacecraft(), 9, seed=0), base / "test")
    save(build(SHAPE), base / "pose", {})
    return base


def test_numbers_are_those_of_the_network(folder: Path) -> None:
    found = pl.evaluate_pose(folder / "pose", folder / "test")
    data = sets.load(folder / "test")
    errors = measure(pl.load(folder / "pose").model, data)
    assert found["e_t"] == pytest.approx(float(errors.relative_translation.mean()))
    assert found["e_r_degrees"] == pytest.approx(math.degrees(float(errors.rotation.mean())))
    assert found["score"] == pytest.approx(found["e_t"] + math.radians(found["e_r_degrees"]))
    assert found["pictures"] == 9 and found["target"] == "apparent"
    rows = found["by_distance"]
    assert sum(row["pictures"] for row in rows) == 9
    mean = sum(row["pictures"] * row["e_r_degrees"] for row in rows) / 9
    assert mean == pytest.approx(found["e_r_degrees"])
    assert found["bytes"] > 0
    assert pl.evaluate_pose(folder / "pose", folder / "test", limit=4)["pictures"] == 4


def test_the_command_prints_one_object(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "pose", str(folder / "pose"), "--data", str(folder / "test")]
    assert run([*arguments, "--json"]) == 0
    assert {"e_t", "e_r_degrees", "score"} <= set(json.loads(capsys.readouterr().out))
    assert run(arguments) == 0
    printed = capsys.readouterr().out
    assert "a constant pose" in printed and "error in metres" in printed


def test_a_constant_pose_scores_what_a_sum_says(folder: Path) -> None:
    data = sets.load(folder / "test")
    same = dataclasses.replace(
        data,
        rotations=data.rotations[:1].expand(9, 3, 3),
        translations=data.translations[:1].expand(9, 3),
    )
    assert constant_pose(same).score() == pytest.approx(0, abs=1e-6)
    mean = data.translations.mean(0)
    e_t = sum(float((mean - t).norm() / t.norm()) for t in data.translations) / 9
    errors = constant_pose(data)
    assert float(errors.relative_translation.mean()) == pytest.approx(e_t)
    # No attitude of the set is nearer to all of them: |R - S|^2 = 8 sin^2(angle / 2).
    best = float((errors.rotation / 2).sin().square().sum())
    for one in data.rotations:
        cosines = ((one.mT @ data.rotations).diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2
        assert best <= float(((1 - cosines) / 2).sum())


def test_an_exported_network_takes_no_device(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "pose", "x.onnx", "--data", str(folder / "test"), "--device", "cuda"]
    assert run(arguments) == 2
    assert "on the CPU" in capsys.readouterr().err


def test_what_cannot_be_judged_is_refused(folder: Path, tmp_path: Path) -> None:
    data = sets.load(folder / "test")
    other = dataclasses.replace(data, camera=dataclasses.replace(data.camera, fx=100.0))
    with pytest.raises(DataError, match="was trained for Camera"):
        evaluate_pose(pl.load(folder / "pose"), other)
    with pytest.raises(DataError, match="there is no folder"):
        pl.evaluate_pose(folder / "pose", tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="there is no file"):
        pl.evaluate_pose(tmp_path / "none.onnx", folder / "test")
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match="ONNX Runtime cannot load"):
        pl.evaluate_pose(tmp_path / "bad.onnx", folder / "test")


def test_a_folder_of_sets_is_not_calibrated_on(folder: Path) -> None:
    # It would be, on the pictures of the test set.
    with pytest.raises(DataError, match="data sets below it: test"):
        pl.quantize(folder / "pose", "adalog", calibration=folder, samples=2)


def test_a_model_without_a_cache_has_no_bits_for_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "small")
    for words in (["--bits", "w4a4kv4"], ["--set", "kv=4"]):
        assert run(["quantize", str(folder / "pose"), "-o", out, *words]) == 2
        assert "a vision model has none" in capsys.readouterr().err


def test_the_bits_of_sites_are_printed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "quantize",
        str(folder / "pose"),
        "-m",
        "mptq-greedy",
        "--bits",
        "w4a8",
        "--no-check",
    ]
    arguments += ["--calibration", str(folder / "test"), "--samples", "2", "--set", "lowest=4"]
    assert run([*arguments, "--set", "highest=5", "-o", str(tmp_path / "small")]) == 0
    assert "0.mlp.fc1" in capsys.readouterr().out
    assert run(["inspect", "kernels", str(tmp_path / "small")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "a static grid rounds these" in printed and "stay in floating point" not in printed


def test_models_that_see_no_poses_are_refused(
    folder: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArchitectureError, match="predicts no poses"):
        pl.evaluate_pose(tiny_llama_dir, folder / "test")
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes: dict[str, Any] = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1]}
    ResNetForImageClassification(ResNetConfig(**sizes)).save_pretrained(tmp_path / "resnet")
    with pytest.raises(ArchitectureError, match=r"no anatomy describes models of type 'resnet'"):
        pl.evaluate_pose(tmp_path / "resnet", folder / "test")


def test_quantizing_a_pose_network_calibrates_on_crops(folder: Path) -> None:
    import torch

    from postlude.zoo.fastpose_vit.augmentation import turned_crops
    from postlude.zoo.fastpose_vit.training import calibration_crops

    model = pl.load(folder / "pose").model
    crops = calibration_crops(model, folder / "test", 5, 3)
    every = turned_crops(sets.load(folder / "test"), 16).pixels
    rows = [int((every - one).abs().flatten(1).amax(1).argmin()) for one in crops]
    assert rows == sorted(set(rows)) and torch.allclose(every[rows], crops, atol=1e-4)
    small = pl.quantize(folder / "pose", "repq-vit", calibration=folder / "test", samples=5)
    same = pl.quantize(
        folder / "pose",
        "repq-vit",
        calibration=[{"pixel_values": calibration_crops(model, folder / "test", 5, 0)}],
    )
    for a, b in zip(
        small.model.state_dict().values(), same.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
    with pytest.raises(DataError, match="has 9 pictures, and 12 are asked for"):
        pl.quantize(folder / "pose", "repq-vit", calibration=folder / "test", samples=12)
