from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn import functional

from postlude.zoo.fastpose_vit.metrics import SPEED_PLUS, pose_errors
from postlude.zoo.fastpose_vit.rotation import (
    angle_between,
    apparent_rotation,
    first_columns,
    gram_schmidt,
    in_plane,
    matrix_of_quaternion,
    minimal_rotation,
    quaternion_of_matrix,
    random_rotations,
    true_rotation,
)


@pytest.fixture(scope="module")
def directions() -> Tensor:
    drawn = torch.randn(300, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn[:, 2] = drawn[:, 2].abs()
    return functional.normalize(drawn, dim=-1)


@pytest.fixture(scope="module")
def rotations() -> Tensor:
    return random_rotations(300, torch.Generator().manual_seed(1))


def test_minimal_rotation_is_rodrigues_formula(directions: Tensor) -> None:
    for direction, found in zip(directions.numpy(), minimal_rotation(directions), strict=True):
        axis = np.cross([0, 0, 1], direction)
        angle = math.atan2(np.linalg.norm(axis), direction[2])
        expected = Rotation.from_rotvec(axis / np.linalg.norm(axis) * angle).as_matrix()
        assert np.abs(found.numpy() - expected).max() < 1e-9


def test_minimal_rotation_turns_the_axis_into_the_direction(directions: Tensor) -> None:
    found = minimal_rotation(directions)
    assert (found @ found.mT - torch.eye(3)).abs().max() < 1e-9
    assert (torch.linalg.det(found) - 1).abs().max() < 1e-9
    assert (found[..., 2] - directions).abs().max() < 1e-9
    ahead = minimal_rotation(torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    assert torch.equal(ahead, torch.eye(3, dtype=torch.float64))


def test_apparent_rotation_and_back(directions: Tensor, rotations: Tensor) -> None:
    back = true_rotation(apparent_rotation(rotations, 7 * directions), directions)
    assert (back - rotations).abs().max() < 1e-9


def test_turning_the_image_turns_the_apparent_rotation(
    directions: Tensor, rotations: Tensor
) -> None:
    turn = in_plane(torch.linspace(-3, 3, 300, dtype=torch.float64))
    turned = apparent_rotation(turn @ rotations, (turn @ directions[..., None])[..., 0])
    assert (turned - turn @ apparent_rotation(rotations, directions)).abs().max() < 1e-9


def test_gram_schmidt_gives_back_a_rotation(rotations: Tensor) -> None:
    assert (gram_schmidt(first_columns(rotations)) - rotations).abs().max() < 1e-12
    noisy = gram_schmidt(first_columns(rotations) * 3 + 0.2)
    assert (noisy @ noisy.mT - torch.eye(3)).abs().max() < 1e-12
    assert (torch.linalg.det(noisy) - 1).abs().max() < 1e-12
    assert first_columns(rotations)[5].tolist() == [*rotations[5, :, 0], *rotations[5, :, 1]]


def test_quaternions_are_those_of_scipy(rotations: Tensor) -> None:
    half_turns = torch.stack(
        [torch.diag(torch.tensor(d).double()) for d in ([1, -1, -1], [-1, 1, -1])]
    )
    for given in (rotations, half_turns):
        quaternions = quaternion_of_matrix(given)
        theirs = Rotation.from_quat(quaternions.numpy()[:, [1, 2, 3, 0]]).as_matrix()
        assert np.abs(theirs - given.numpy()).max() < 1e-9
        assert (matrix_of_quaternion(quaternions) - given).abs().max() < 1e-9


def test_angle_between_is_the_one_of_the_quaternions(rotations: Tensor) -> None:
    first, second = rotations[:150], rotations[150:]
    cosine = (quaternion_of_matrix(first) * quaternion_of_matrix(second)).sum(-1).abs()
    assert (angle_between(first, second) - 2 * cosine.clamp(max=1).arccos()).abs().max() < 1e-9
    tiny = in_plane(torch.tensor(1e-7, dtype=torch.float64))
    assert float(angle_between(tiny @ first[0], first[0])) == pytest.approx(1e-7, rel=1e-6)


def test_score_adds_relative_translation_and_radians(rotations: Tensor) -> None:
    translation = torch.tensor([[0.0, 0.0, 10.0], [0.0, 3.0, 4.0]], dtype=torch.float64)
    off = translation + torch.tensor([[0.0, 0.0, 1.0], [0.005, 0.0, 0.0]], dtype=torch.float64)
    turn = in_plane(torch.tensor([0.2, 0.001], dtype=torch.float64)) @ rotations[:2]
    errors = pose_errors(off, turn, translation, rotations[:2])
    assert errors.relative_translation.tolist() == pytest.approx([0.1, 0.001])
    assert errors.translation.tolist() == pytest.approx([1.0, 0.005])
    assert errors.distance.tolist() == [10.0, 5.0]
    assert errors.score() == pytest.approx((0.3 + 0.002) / 2)
    assert errors.score(SPEED_PLUS) == pytest.approx(0.3 / 2)
