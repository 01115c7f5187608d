"""Pictures with poses from a seed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from postlude.errors import SettingsError
from postlude.zoo.fastpose_vit.camera import SPEED, Camera, box_of, project
from postlude.zoo.fastpose_vit.data import PoseData, whole_pixels, window_of
from postlude.zoo.fastpose_vit.renderer import random_scene, render
from postlude.zoo.fastpose_vit.rotation import matrix_of_quaternion
from postlude.zoo.fastpose_vit.spacecraft import Spacecraft

__all__ = ["DISTANCES", "NOMINAL", "make", "random_poses"]

DISTANCES = (3.0, 40.0)
"""Nearest and farthest body in metres, as in SPEED."""

NOMINAL = matrix_of_quaternion(torch.tensor([0.5, 0.7, -0.4, 0.3], dtype=torch.float64) / 0.99**0.5)
"""An attitude that shows the solar cells and two sides at a slant."""

_EDGE = 150  # pixels from the origin of the body to the edge of the image, at least


def random_poses(
    spacecraft: Spacecraft,
    count: int,
    seed: int,
    camera: Camera = SPEED,
    distances: tuple[float, float] = DISTANCES,
    attitudes: float = 180.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Poses whose box lies inside the image: rotations ``[n, 3, 3]``, translations ``[n, 3]``, boxes ``[n, 4]``.

    Rotations and depths are uniform, the body's origin is uniform over the image without its edge; where the box would
    leave the image, the whole pose is drawn again. Boxes end at whole pixels. Rotations that differ from `NOMINAL` by
    more than ``attitudes`` degrees are left out; 180 keeps all.
    """
    if not 0 < attitudes <= 180:
        raise SettingsError(f"attitudes is {attitudes}; expected degrees above 0 and at most 180")
    generator = torch.Generator().manual_seed(seed)
    points = torch.from_numpy(spacecraft.keypoints)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    while sum(len(part[0]) for part in kept) < count:
        rotation = _attitudes(2 * count, attitudes, generator)
        draw = torch.rand(2 * count, 3, generator=generator, dtype=torch.float64)
        depth = distances[0] + draw[:, 2] * (distances[1] - distances[0])
        u = _EDGE + draw[:, 0] * (camera.width - 2 * _EDGE)
        v = _EDGE + draw[:, 1] * (camera.height - 2 * _EDGE)
        x, y = (u - camera.cx) / camera.fx * depth, (v - camera.cy) / camera.fy * depth
        translation = torch.stack([x, y, depth], dim=-1)
        box = whole_pixels(box_of(project(points, rotation, translation, camera)))
        inside = (
            (box[:, :2] >= 0).all(-1) & (box[:, 2] <= camera.width) & (box[:, 3] <= camera.height)
        )
        if not bool(inside.any()):
            raise SettingsError(
                f"no pose between {distances[0]} and {distances[1]} m shows the whole body; choose a greater distance"
            )
        kept.append((rotation[inside], translation[inside], box[inside]))
    joined = [torch.cat(parts)[:count] for parts in zip(*kept, strict=True)]
    return joined[0], joined[1], joined[2]


def _attitudes(count: int, limit: float, generator: torch.Generator) -> Tensor:
    """Rotations ``[count, 3, 3]``, uniform among those within ``limit`` degrees of `NOMINAL`."""
    # Angles of uniform rotations have the density 1 - cos(angle).
    angles = torch.linspace(0, math.radians(limit), 4097, dtype=torch.float64)
    shares = angles - angles.sin()
    draw = torch.rand(count, generator=generator, dtype=torch.float64) * shares[-1]
    half = torch.from_numpy(np.interp(draw, shares, angles))[:, None] / 2
    axes = functional.normalize(
        torch.randn(count, 3, generator=generator, dtype=torch.float64), dim=-1
    )
    return matrix_of_quaternion(torch.cat([half.cos(), half.sin() * axes], dim=-1)) @ NOMINAL


def make(
    spacecraft: Spacecraft,
    count: int,
    seed: int,
    *,
    size: int = 96,
    camera: Camera = SPEED,
    distances: tuple[float, float] = DISTANCES,
    attitudes: float = 180.0,
    progress: Any = None,
) -> PoseData:
    """Render ``count`` pictures, about 4 ms each; the same seed gives the same ones.

    Args:
        spacecraft: the body.
        count: pictures.
        seed: of poses, light, backgrounds and noise.
        size: pixels of a side of the stored windows.
        camera: whose images they are cut from.
        distances: nearest and farthest, in metres.
        attitudes: largest angle to `NOMINAL`, in degrees.
        progress: called with the number of finished pictures.
    """
    rotations, translations, boxes = random_poses(
        spacecraft, count, seed, camera, distances, attitudes
    )
    windows = window_of(boxes)
    random = np.random.default_rng([seed, 1])
    images = np.empty((count, size, size), np.uint8)
    for i in range(count):
        images[i] = render(
            spacecraft,
            rotations[i].numpy(),
            translations[i].numpy(),
            camera,
            windows[i].numpy(),
            size,
            random_scene(random),
        )
        if progress is not None:
            progress(i + 1)
    return PoseData(
        torch.from_numpy(images),
        windows,
        boxes,
        rotations,
        translations,
        torch.from_numpy(spacecraft.keypoints),
        camera,
        tuple(f"img{i + 1:06d}.png" for i in range(count)),
    )
