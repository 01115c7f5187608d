from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from postlude.errors import ArchitectureError, CheckpointError, OutputExistsError, SettingsError
from postlude.zoo.fastpose_vit import data as sets
from postlude.zoo.fastpose_vit.__main__ import main
from postlude.zoo.fastpose_vit.augmentation import Augmentation, turned_crops
from postlude.zoo.fastpose_vit.camera import SPEED
from postlude.zoo.fastpose_vit.losses import pose_loss
from postlude.zoo.fastpose_vit.making import make
from postlude.zoo.fastpose_vit.network import Backbone, PoseModel, build, pose_of
from postlude.zoo.fastpose_vit.rotation import first_columns
from postlude.zoo.fastpose_vit.spacecraft import own_spacecraft
from postlude.zoo.fastpose_vit.training import Training, fit, measure, predict, save, targets

SHAPE = Backbone(image_size=16, patch=8, width=16, depth=1, heads=2)
PLAIN = Training(epochs=1, batch=4, augmentation=Augmentation(jitter_share=0.0, turn_share=0.0))


@pytest.fixture(scope="module")
def made() -> sets.PoseData:
    return make(own_spacecraft(), 12, seed=0, size=32)


def test_loss_is_the_mean_relative_distance() -> None:
    encoded = torch.tensor([[3.0, 0.0, 4.0], [0.0, 0.0, 2.0]])
    six = torch.tensor([[1.0, 0, 0, 0, 1, 0], [0, 1.0, 0, 1, 0, 0]])
    predicted = torch.cat([encoded + torch.tensor([0.0, 1.0, 0.0]), six * 1.5], dim=-1)
    rotation, translation = pose_loss(predicted, encoded, six)
    assert float(rotation) == pytest.approx(0.5)
    assert float(translation) == pytest.approx((1 / 5 + 1 / 2) / 2)


@pytest.mark.parametrize("target", ["apparent", "camera"])
def test_perfect_outputs_give_the_true_pose(made: sets.PoseData, target: Any) -> None:
    model = build(SHAPE, target=target)
    encoded, six = targets(model, turned_crops(made, 16))
    translation, rotation = PoseModel(model).decode(
        torch.cat([encoded, six], dim=-1).double(), made.boxes
    )
    assert (translation - made.translations).abs().max() < 1e-4
    assert (rotation - made.rotations).abs().max() < 1e-5
    if target == "camera":
        assert torch.allclose(six, first_columns(made.rotations).float())


def test_pose_model_is_the_network_with_the_formulas(made: sets.PoseData) -> None:
    model = build(SHAPE).eval()
    with torch.no_grad():
        pair = PoseModel(model)(turned_crops(made, 16).pixels, made.boxes)
    for found, expected in zip(pair, predict(model, made, batch=5), strict=True):
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_training_repeats_bit_by_bit_and_learns(made: sets.PoseData) -> None:
    first, second = (fit(build(SHAPE, 3), made, PLAIN, 1) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    lines: list[str] = []
    fit(build(SHAPE, 3), made, dataclasses.replace(PLAIN, epochs=40), 1, log=lines.append)
    early, late = (
        float(line.split("rotation ")[1].split(",")[0]) for line in (lines[0], lines[-1])
    )
    assert late < 0.9 * early


def test_a_network_is_saved_for_transformers(made: sets.PoseData, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = build(SHAPE, target="camera")
    save(model, tmp_path / "pose", {"seed": 0})
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "pose").eval()
    assert pose_of(again) == ("camera", SPEED)
    assert torch.equal(predict(again, made)[0], predict(model.eval(), made)[0])
    processor = AutoImageProcessor.from_pretrained(tmp_path / "pose", backend="pil")
    assert processor.size == {"height": 16, "width": 16}
    with pytest.raises(OutputExistsError):
        save(model, tmp_path / "pose", {})
    # Its weights start another one, with a head of its own.
    assert torch.equal(
        build(tmp_path / "pose").vit.embeddings.cls_token, again.vit.embeddings.cls_token
    )


@pytest.mark.parametrize("model_type", ["deit", "dinov2"])
def test_other_backbones_predict_poses_too(made: sets.PoseData, model_type: str) -> None:
    model = build(dataclasses.replace(SHAPE, model_type=model_type)).eval()
    errors = measure(model, made.take(slice(0, 3)))
    assert errors.rotation.isfinite().all() and len(errors.rotation) == 3


def test_what_cannot_be_built_is_refused(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    with pytest.raises(SettingsError, match="whole patches"):
        Backbone(image_size=20)
    for model_type in ("llama", "resnet"):
        with pytest.raises(SettingsError, match="expected deit, dinov2, vit"):
            dataclasses.replace(SHAPE, model_type=model_type)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        build(tmp_path)
    with pytest.raises(SettingsError, match="0 epochs"):
        Training(epochs=0)
    other = ViTForImageClassification(
        ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, num_labels=4
        )
    )
    with pytest.raises(ArchitectureError, match=r"predicts no poses: .* 4 outputs"):
        pose_of(other)


def test_the_command_makes_trains_and_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = str(tmp_path / "mini"), str(tmp_path / "pose")
    arguments = ["data", "--n", "20", "--size", "32", "--keypoints", "own", "-o", folder, "--json"]
    assert main(arguments) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["train"], made["validation"], made["test"]) == (16, 2, 2)
    shape = ["--image-size", "16", "--width", "16", "--depth", "1", "--heads", "2", "--epochs", "1"]
    assert main(["train", folder, "-o", out, "--json", *shape]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert {"e_t", "e_r_degrees", "score"} <= set(trained)
    assert json.loads((tmp_path / "pose" / "training.json").read_text())["pictures"] == 16
    assert main(["train", folder, "-o", out, *shape]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["data", "--n", "5", "-o", folder]) == 2
    assert main(arguments) == 2
    assert "holds a data set" in capsys.readouterr().err
