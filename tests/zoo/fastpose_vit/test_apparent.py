"""Why the apparent rotation: from the points of a crop alone, the camera's rotation cannot be told."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from postlude.zoo.fastpose_vit.camera import SPEED, decode_translation, encode_translation, project
from postlude.zoo.fastpose_vit.losses import pose_loss
from postlude.zoo.fastpose_vit.making import random_poses
from postlude.zoo.fastpose_vit.metrics import pose_errors
from postlude.zoo.fastpose_vit.rotation import (
    apparent_rotation,
    first_columns,
    gram_schmidt,
    true_rotation,
)
from postlude.zoo.fastpose_vit.spacecraft import own_spacecraft


def errors(target: str, steps: int, width: int, seed: int = 0) -> tuple[float, float]:
    """Mean ``E_R`` in degrees and ``e_t`` of a network that reads 22 numbers: eleven points in units of their box."""
    body = own_spacecraft()
    points = torch.from_numpy(body.keypoints)

    def numbers(pose: tuple[torch.Tensor, ...]) -> torch.Tensor:
        rotation, translation, box = pose
        pixels = project(points, rotation, translation, SPEED)
        middle, extent = (box[:, :2] + box[:, 2:]) / 2, box[:, 2:] - box[:, :2]
        return ((pixels - middle[:, None]) / extent.amax(-1)[:, None, None]).flatten(1).float() * 3

    torch.manual_seed(seed)
    widths = (22, width, width, width)
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.GELU())]
    network = nn.Sequential(*layers, nn.Linear(width, 9))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3 if width < 256 else 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    train = random_poses(body, 128 * min(steps, 300), seed + 1)
    inputs = numbers(train)
    rotation = apparent_rotation(train[0], train[1]) if target == "apparent" else train[0]
    six, encoded = first_columns(rotation).float(), encode_translation(train[1], train[2]).float()
    for step in range(steps):
        part = torch.arange(step * 128, step * 128 + 128) % len(inputs)
        loss = sum(pose_loss(network(inputs[part]), encoded[part], six[part]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
        schedule.step()
    test = random_poses(body, 2000, seed + 2)
    with torch.no_grad():
        outputs = network(numbers(test)).double()
    translation = decode_translation(outputs[:, :3], test[2])
    found = gram_schmidt(outputs[:, 3:])
    if target == "apparent":
        found = true_rotation(found, translation)
    found_errors = pose_errors(translation, found, test[1], test[0])
    rotation_error = math.degrees(float(found_errors.rotation.mean()))
    return rotation_error, float(found_errors.relative_translation.mean())


@pytest.mark.parametrize(
    ("steps", "width"),
    [(450, 96), pytest.param(6000, 256, marks=pytest.mark.slow)],
    ids=["short", "whole"],
)
def test_points_of_a_crop_give_the_apparent_rotation_only(steps: int, width: int) -> None:
    found = {target: errors(target, steps, width) for target in ("apparent", "camera")}
    print(found)
    compensated, direct = found["apparent"][0], found["camera"][0]
    assert compensated < 2
    assert direct > 5
    assert direct / compensated > 4
