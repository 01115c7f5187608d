from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from postlude.errors import DataError, OutputExistsError, SettingsError
from postlude.zoo.fastpose_vit import data as sets
from postlude.zoo.fastpose_vit.augmentation import Augmentation, crop, shaken, turned_crops
from postlude.zoo.fastpose_vit.camera import SPEED, Camera, box_of, project
from postlude.zoo.fastpose_vit.making import NOMINAL, make, random_poses
from postlude.zoo.fastpose_vit.renderer import Scene, render
from postlude.zoo.fastpose_vit.rotation import apparent_rotation, in_plane, quaternion_of_matrix
from postlude.zoo.fastpose_vit.spacecraft import Spacecraft, own_spacecraft, read_keypoints

SMALL = Camera(fx=150.0, fy=150.0, cx=48.0, cy=30.0, width=96, height=60)
# Light from behind the camera, no stars, no noise.
SUN = Scene(sun=(0.0, 0.0, -1.0), noise=0.0, planet=1e-9)


@pytest.fixture(scope="module")
def made() -> sets.PoseData:
    return make(own_spacecraft(), 8, seed=0, size=32)


@pytest.fixture
def speed(tmp_path: Path) -> Path:
    """A folder as SPEED+ writes it, with whole images of a small camera and no boxes."""
    body = own_spacecraft()
    rotations, translations, _ = random_poses(body, 3, 1, SMALL_WIDE, distances=(4, 8))
    folder = tmp_path / "synthetic"
    (folder / "images").mkdir(parents=True)
    labels = []
    for i in range(3):
        window = np.array([0.0, 0.0, 400.0, 400.0])
        picture = render(
            body, rotations[i].numpy(), translations[i].numpy(), SMALL_WIDE, window, 400, SUN
        )
        name = f"img{i:06d}.jpg"
        Image.fromarray(picture).save(folder / "images" / name)
        labels.append(
            {
                "filename": name,
                "q_vbs2tango_true": quaternion_of_matrix(rotations[i]).tolist(),
                "r_Vo2To_vbs_true": translations[i].tolist(),
            }
        )
    (folder / "train.json").write_text(json.dumps(labels))
    camera = {"Nu": 400, "Nv": 400, "cameraMatrix": SMALL_WIDE.matrix().tolist()}
    (tmp_path / "camera.json").write_text(json.dumps(camera))
    (folder / "keypoints.json").write_text(json.dumps({"keypoints": body.keypoints.tolist()}))
    return folder


SMALL_WIDE = Camera(fx=700.0, fy=700.0, cx=200.0, cy=200.0, width=400, height=400)


def test_the_same_seed_gives_the_same_pictures(made: sets.PoseData) -> None:
    again = make(own_spacecraft(), 8, seed=0, size=32)
    other = make(own_spacecraft(), 8, seed=1, size=32)
    assert torch.equal(made.images, again.images) and torch.equal(made.rotations, again.rotations)
    assert not torch.equal(made.images, other.images)


def test_the_body_is_drawn_where_its_points_are(made: sets.PoseData) -> None:
    body = own_spacecraft()
    for i in range(len(made)):
        pose = (made.rotations[i].numpy(), made.translations[i].numpy())
        picture = render(body, *pose, SPEED, made.windows[i].numpy(), 64, SUN)
        # Rods and edges may be covered in part; the lit body fills the box to a pixel or two.
        rows, columns = np.nonzero(picture > 8)
        low, high = made.windows[i][:2], made.windows[i][2:]
        box = (made.boxes[i].view(2, 2) - low) / (high - low) * 64
        drawn = torch.tensor([[columns.min(), rows.min()], [columns.max() + 1, rows.max() + 1]])
        assert (drawn - box).abs().max() < 2.5


def test_attitudes_stay_near_the_nominal_one() -> None:
    near, _, _ = random_poses(own_spacecraft(), 200, 0, attitudes=30.0)
    angles = torch.rad2deg(
        torch.acos(((near @ NOMINAL.mT).diagonal(dim1=1, dim2=2).sum(-1) - 1) / 2)
    )
    assert angles.max() <= 30.0 + 1e-6 and angles.mean() > 18
    with pytest.raises(SettingsError, match="above 0 and at most 180"):
        random_poses(own_spacecraft(), 2, 0, attitudes=0.0)
    with pytest.raises(SettingsError, match="greater distance"):
        random_poses(own_spacecraft(), 2, 0, distances=(0.2, 0.3))


def test_a_set_is_read_as_it_was_written(made: sets.PoseData, tmp_path: Path) -> None:
    sets.write(made, tmp_path / "set", "own")
    read = sets.load(tmp_path / "set", size=32)
    assert torch.equal(read.images, made.images)
    assert torch.equal(read.boxes, made.boxes) and torch.equal(read.windows, made.windows)
    assert (read.rotations - made.rotations).abs().max() < 1e-12
    assert torch.equal(read.translations, made.translations)
    assert read.camera == made.camera and read.names == made.names
    assert read.keypoints is not None
    with pytest.raises(OutputExistsError):
        sets.write(made, tmp_path / "set")
    with pytest.raises(DataError, match=r"it has data sets below it: set"):
        sets.load(tmp_path)
    assert len(sets.load(tmp_path / "set", limit=2)) == 2


@pytest.mark.parametrize("split", [False, True])
def test_the_layout_of_speed_is_read(speed: Path, split: bool) -> None:
    if (
        split
    ):  # as the first SPEED: other names of the fields, images in a folder of the list's name
        (speed / "images").rename(speed / "train")
        (speed / "images").mkdir()
        (speed / "train").rename(speed / "images" / "train")
        text = (speed / "train.json").read_text()
        (speed / "train.json").write_text(text.replace("_true", ""))
    read = sets.load(speed, size=48)
    assert read.camera == SMALL_WIDE and len(read) == 3
    around = box_of(project(read.keypoints, read.rotations, read.translations, read.camera))
    assert (read.boxes - around).abs().max() < 1
    # The same crop as of pictures made as windows, up to the JPEG and the resampling.
    body = own_spacecraft()
    for i in range(3):
        pose = (read.rotations[i].numpy(), read.translations[i].numpy())
        window = render(body, *pose, SMALL_WIDE, read.windows[i].numpy(), 48, SUN)
        assert np.abs(window.astype(float) - read.images[i].numpy()).mean() < 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_vbs2tango_true": None}, "q_vbs2tango_true is None; expected 4 finite numbers"),
        ({"q_vbs2tango_true": [1.0, 1.0, 0.0, 0.0]}, "has length 1.41421; expected 1"),
        ({"r_Vo2To_vbs_true": [0.0, 0.0]}, r"r_Vo2To_vbs_true is \[0.0, 0.0\]; expected 3"),
        ({"r_Vo2To_vbs_true": [0.0, 0.0, -5.0]}, "-5 m before the camera"),
        ({"filename": 3}, "no filename"),
        ({"filename": "absent.png"}, "there is no image absent.png"),
    ],
)
def test_a_bad_label_is_named_by_its_index(
    speed: Path, change: dict[str, Any], message: str
) -> None:
    labels = json.loads((speed / "train.json").read_text())
    labels[1] |= change
    (speed / "train.json").write_text(json.dumps(labels))
    with pytest.raises(DataError, match=f"label 1 of .*{message}"):
        sets.load(speed)


def test_labels_without_a_field_or_a_box_inside_are_refused(speed: Path) -> None:
    labels = json.loads((speed / "train.json").read_text())
    del labels[2]["q_vbs2tango_true"]
    (speed / "train.json").write_text(json.dumps(labels))
    with pytest.raises(
        DataError, match=r"label 2 of .* has no q_vbs2tango_true; it has 'filename'"
    ):
        sets.load(speed)
    labels = [{**label, "q_vbs2tango": [1, 0, 0, 0], "box": [-90, 5, -20, 60]} for label in labels]
    (speed / "train.json").write_text(json.dumps(labels))
    with pytest.raises(
        DataError, match=r"box of example 0 \(img000000.jpg\) is \(-90, 5, -20, 60\)"
    ):
        sets.load(speed)
    (speed / "train.json").write_text("{}")
    with pytest.raises(DataError, match="holds no list of labels"):
        sets.load(speed)
    (speed / "train.json").write_text("[")
    with pytest.raises(DataError, match="is not JSON"):
        sets.load(speed)
    with pytest.raises(DataError, match="there is no folder or file"):
        sets.load(speed / "nothing")


def test_a_box_beside_the_body_is_refused(made: sets.PoseData, tmp_path: Path) -> None:
    sets.write(made, tmp_path)
    file = tmp_path / "labels.json"
    labels = json.loads(file.read_text())
    x1, y1, x2, y2 = labels[3]["box"]
    away = x2 if x2 < SPEED.width - 20 else x1 - 20
    labels[3]["box"] = [away + 5, y1, away + 15, y2]
    file.write_text(json.dumps(labels))
    with pytest.raises(DataError, match=r"label 3 of .*misses the body"):
        sets.load(tmp_path)


def test_images_that_cannot_be_used_are_refused(speed: Path, monkeypatch: Any) -> None:
    Image.new("L", (10, 10)).save(speed / "images" / "img000000.jpg")
    with pytest.raises(DataError, match=r"has 10 x 10 pixels, and the camera 400 x 400"):
        sets.load(speed)
    (speed / "images" / "img000000.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"label 0 of .*cannot be read as an image"):
        sets.load(speed)
    (speed / "keypoints.json").unlink()
    monkeypatch.setenv("POSTLUDE_DATA", str(speed))
    with pytest.raises(DataError, match="without a box, and the key points"):
        sets.load(speed)


def test_key_points_are_read_or_refused(data_dir: Path, tmp_path: Path) -> None:
    tango = read_keypoints(data_dir / "space" / "tangoPoints.mat")
    assert tango.keypoints[8].tolist() == pytest.approx([-0.5427, 0.4877, 0.2535])
    with pytest.raises(DataError, match="there is no file"):
        read_keypoints(tmp_path / "none.mat")
    (tmp_path / "bad.mat").write_text("x" * 200)
    with pytest.raises(DataError, match=r"cannot be read as a \.mat file"):
        read_keypoints(tmp_path / "bad.mat")
    with pytest.raises(DataError, match=re.escape("shape [3, 3]")):
        Spacecraft(np.eye(3), "nothing")


def test_crops_are_the_boxes_padded_with_black() -> None:
    images = torch.arange(64 * 64).view(1, 64, 64).remainder(251).to(torch.uint8)
    windows = torch.tensor([[100.0, 200.0, 164.0, 264.0]], dtype=torch.float64)
    boxes = torch.tensor([[110.0, 210.0, 142.0, 226.0]], dtype=torch.float64)
    pixels = crop(images, windows, boxes, 32, SPEED)[0]
    grey = pixels * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    grey = (grey + torch.tensor([0.485, 0.456, 0.406])[:, None, None]) * 255
    assert torch.allclose(grey[0], grey[2], atol=1e-3)
    assert torch.allclose(grey[0, 8:24], images[0, 10:26, 10:42].float(), atol=1e-2)
    assert grey[0, :8].abs().max() < 1e-3 and grey[0, 24:].abs().max() < 1e-3


def test_a_turned_crop_is_the_crop_of_the_turned_pose() -> None:
    """What the pixels show after a turn is what is rendered at the turned pose."""
    body = own_spacecraft()
    rotations, translations, boxes = random_poses(body, 3, 5, distances=(8, 12))
    turns = torch.tensor([0.3, -0.25, 2.9], dtype=torch.float64)
    middle, half = (
        (boxes[:, :2] + boxes[:, 2:]) / 2,
        (boxes[:, 2:] - boxes[:, :2]).amax(-1, keepdim=True),
    )
    windows = torch.cat([middle - half, middle + half], dim=-1)

    def picture(
        i: int, rotation: torch.Tensor, translation: torch.Tensor, window: torch.Tensor
    ) -> Any:
        drawn = render(body, rotation.numpy(), translation.numpy(), SPEED, window.numpy(), 192, SUN)
        return torch.from_numpy(drawn)

    images = torch.stack([picture(i, rotations[i], translations[i], windows[i]) for i in range(3)])
    points = torch.from_numpy(body.keypoints)
    data = sets.PoseData(images, windows, boxes, rotations, translations, points, SPEED, ("",) * 3)
    matrices = in_plane(turns)
    turned, moved = matrices @ rotations, (matrices @ translations[..., None])[..., 0]
    around = box_of(project(points, turned, moved, SPEED))
    found = crop(data.images, data.windows, around, 48, SPEED, turns)
    for i in range(3):
        centre, reach = (around[i, :2] + around[i, 2:]) / 2, (around[i, 2:] - around[i, :2]).max()
        window = torch.cat([centre - reach, centre + reach])
        direct = picture(i, turned[i], moved[i], window)[None]
        expected = crop(direct, window[None], around[i][None], 48, SPEED)[0]
        assert (found[i] - expected).abs().mean() < 0.06 * expected.std() + 0.02


def test_augmentation_changes_half_and_keeps_labels_true(made: sets.PoseData) -> None:
    settings = Augmentation()
    many = made.take([0, 1, 2, 3] * 50)
    generator = torch.Generator().manual_seed(0)
    crops = turned_crops(many, 16, settings, generator)
    apparent = apparent_rotation(crops.rotations, crops.translations)
    before = apparent_rotation(many.rotations, many.translations)
    turned = (apparent - before).abs().amax((1, 2)) > 1e-9
    assert 0.35 < turned.float().mean() < 0.65
    assert (crops.translations[:, 2] - many.translations[:, 2]).abs().max() < 1e-9
    again = turned_crops(many, 16, settings, torch.Generator().manual_seed(0))
    assert torch.equal(again.pixels, crops.pixels)
    plain = turned_crops(many, 16)
    assert torch.equal(plain.boxes, many.boxes) and plain.pixels.shape == (200, 3, 16, 16)
    with pytest.raises(SettingsError, match="needs the body's key points"):
        turned_crops(sets.dataclasses.replace(made, keypoints=None), 16, settings, generator)


def test_shaken_boxes_stay_in_the_image() -> None:
    boxes = torch.tensor([[2.0, 3.0, 60.0, 58.0]], dtype=torch.float64).repeat(400, 1)
    moved = shaken(boxes, Augmentation(jitter=0.4), SMALL, torch.Generator().manual_seed(0))
    assert (moved[:, 0] >= 0).all() and (moved[:, 1] >= 0).all()
    assert (moved[:, 3] <= 60).all() and (
        moved[:, 2:] - moved[:, :2] > torch.tensor([29, 27.5])
    ).all()
    assert 0.3 < (moved != boxes).any(-1).float().mean() < 0.6
    with pytest.raises(SettingsError, match="jitter"):
        Augmentation(jitter=0.5)
