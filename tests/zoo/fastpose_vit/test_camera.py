from __future__ import annotations

import pytest
import torch

from postlude.errors import DataError, SettingsError
from postlude.zoo.fastpose_vit.camera import (
    SPEED,
    Camera,
    box_of,
    check_boxes,
    decode_translation,
    encode_translation,
    project,
    viewing_direction,
)
from postlude.zoo.fastpose_vit.making import random_poses
from postlude.zoo.fastpose_vit.rotation import minimal_rotation
from postlude.zoo.fastpose_vit.spacecraft import own_spacecraft


@pytest.fixture(scope="module")
def poses() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return random_poses(own_spacecraft(), 500, seed=0)


def test_focal_length_is_that_of_the_lens_and_its_pixels() -> None:
    assert pytest.approx(17.6e-3 / 5.86e-6, abs=1e-9) == SPEED.fx == SPEED.fy


def test_translation_comes_back_from_its_encoding(
    poses: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    _, translation, box = poses
    jitter = torch.rand(box.shape, generator=torch.Generator().manual_seed(0)).double() * 20
    for seen in (box, box + jitter):
        back = decode_translation(encode_translation(translation, seen), seen)
        assert (back - translation).abs().max() < 1e-9


def test_encoding_is_the_formula_of_the_paper(
    poses: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    _, translation, box = poses
    (x, y, z), (x1, y1, x2, y2) = translation[3].tolist(), box[3].tolist()
    w, h, f = x2 - x1, y2 - y1, SPEED.fx
    rho = 0.5 * (w * (1920 / 1200) / 1920 + h / 1200)
    expected = [
        (f * x / z + 960 - (x1 + x2) / 2) / w,
        (f * y / z + 600 - (y1 + y2) / 2) / h,
        rho * z,
    ]
    assert encode_translation(translation[3], box[3]).tolist() == pytest.approx(expected, abs=1e-12)


def test_targets_are_of_order_one(poses: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    encoded = encode_translation(poses[1], poses[2])
    assert encoded[:, :2].abs().max() < 0.6
    assert encoded[:, 2].min() > 1.5 and encoded[:, 2].max() < 4


def test_direction_is_that_of_the_translation_whatever_the_depth(
    poses: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    _, translation, box = poses
    encoded = encode_translation(translation, box)
    expected = translation / translation.norm(dim=-1, keepdim=True)
    assert (viewing_direction(encoded, box) - expected).abs().max() < 1e-12
    wrong = encoded * torch.tensor([1.0, 1.0, 1.1])
    assert (viewing_direction(wrong, box) - expected).abs().max() < 1e-12


def test_homography_gives_the_picture_of_the_turned_camera(
    poses: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    rotation, translation, _ = poses
    points = torch.from_numpy(own_spacecraft().keypoints)
    pixels = project(points, rotation, translation, SPEED)
    distance = translation.norm(dim=-1, keepdim=True)
    turn = minimal_rotation(translation / distance)
    ahead = torch.cat([torch.zeros(len(distance), 2, dtype=torch.float64), distance], dim=-1)
    expected = project(points, turn.mT @ rotation, ahead, SPEED)
    rays = torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1)
    moved = rays @ SPEED.homography(turn.mT).mT
    assert (moved[..., :2] / moved[..., 2:] - expected).abs().max() < 1e-9


def test_boxes_hold_the_projected_points(
    poses: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    rotation, translation, box = poses
    points = torch.from_numpy(own_spacecraft().keypoints)
    tight = box_of(project(points, rotation, translation, SPEED))
    assert (box[:, :2] <= tight[:, :2]).all() and (box[:, 2:] >= tight[:, 2:]).all()
    assert (box[:, :2] >= 0).all() and (box[:, 2] <= 1920).all() and (box[:, 3] <= 1200).all()
    check_boxes(box, SPEED)


@pytest.mark.parametrize(
    "box",
    [(2000, 10, 2100, 50), (-50, 10, -1, 50), (10, 10, 10, 50), (10, float("nan"), 20, 50)],
)
def test_a_box_outside_the_image_is_refused_by_its_index(box: tuple[float, ...]) -> None:
    boxes = torch.tensor([(1.0, 2.0, 30.0, 40.0), box])
    with pytest.raises(DataError, match=r"box of example 1 \(b.png\).*inside the image of 1920"):
        check_boxes(boxes, SPEED, ["a.png", "b.png"])


def test_a_camera_without_a_focal_length_is_refused() -> None:
    with pytest.raises(SettingsError, match="focal lengths above 0"):
        Camera(0.0, 1.0, 5.0, 5.0, 10, 10)
    with pytest.raises(SettingsError, match="expected pixels"):
        Camera(1.0, 1.0, 5.0, 5.0, 0, 10)
