"""Crops of pictures, as the network sees them, with and without the two augmentations of training.

A crop is the box of the body, padded with black to a square and resized (FastPose-ViT, arXiv:2512.09792). In
training half of the boxes are shaken, every side by up to 10 % of its length (not where a side would halve), and half
of the images are turned about the principal point, which changes a pose to ``t' = Rz t`` and ``R' = Rz R`` and turns
the apparent rotation by the same ``Rz``. The box of a turned image is the one around its turned key points; how the
authors rebuild it is not known. They turn by -20 to 20 and 160 to 200 degrees, and so does the default here.

Everything is one resampling of the stored window, for all crops of a batch at once.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional

from postlude.errors import SettingsError
from postlude.zoo.fastpose_vit.camera import Camera, box_of, project
from postlude.zoo.fastpose_vit.data import PoseData
from postlude.zoo.fastpose_vit.rotation import in_plane

__all__ = ["MEAN", "STD", "Augmentation", "Crops", "crop", "shaken", "turned_crops"]

# ImageNet's, as pretrained backbones expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What training does to pictures.

    Attributes:
        jitter: the most that a side of the box moves, of its length.
        jitter_share: share of boxes that are shaken.
        turn_share: share of pictures that are turned.
        turn: the largest angle, in degrees.
        upside_down: turn half of them by 180 degrees more.
    """

    jitter: float = 0.1
    jitter_share: float = 0.5
    turn_share: float = 0.5
    turn: float = 20.0
    upside_down: bool = True

    def __post_init__(self) -> None:
        shares = (self.jitter_share, self.turn_share)
        if not 0 <= self.jitter < 0.5 or not all(0 <= share <= 1 for share in shares):
            raise SettingsError(
                f"jitter is {self.jitter}, the shares are {shares}; expected at least 0 and less than 0.5, and "
                "shares from 0 to 1"
            )


@dataclasses.dataclass(frozen=True)
class Crops:
    """What the network learns from: pixels ``[n, 3, size, size]``, normalised, with boxes and poses."""

    pixels: Tensor
    boxes: Tensor
    rotations: Tensor
    translations: Tensor


def crop(
    images: Tensor,
    windows: Tensor,
    boxes: Tensor,
    size: int,
    camera: Camera,
    turns: Tensor | None = None,
) -> Tensor:
    """Square crops of boxes, ``float32 [n, 3, size, size]`` with ImageNet's mean and deviation taken out.

    Args:
        images: ``uint8 [n, s, s]``.
        windows: ``[n, 4]``, what they show.
        boxes: ``[n, 4]``, in the turned image where there is one.
        size: pixels of a side.
        camera: whose image was turned, and about whose principal point.
        turns: angles ``[n]`` by which each was turned, in radians.
    """
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    extent = boxes[:, 2:] - boxes[:, :2]
    side = extent.amax(-1)
    steps = (torch.arange(size, dtype=boxes.dtype) + 0.5) / size - 0.5
    offset = (
        torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1) * side[:, None, None, None]
    )
    places = offset + middle[:, None, None]
    if turns is not None:
        centre = torch.tensor([camera.cx, camera.cy], dtype=boxes.dtype)
        cosine, sine = turns.cos()[:, None, None], turns.sin()[:, None, None]
        x, y = (places - centre).unbind(-1)
        places = torch.stack([cosine * x + sine * y, cosine * y - sine * x], dim=-1) + centre
    low, high = windows[:, None, None, :2], windows[:, None, None, 2:]
    grid = ((places - low) / (high - low) * 2 - 1).float()
    source = images[:, None].float() / 255
    # Where the crop is coarser than the picture, neighbours are averaged first.
    ratio = float((side / (windows[:, 2] - windows[:, 0])).median()) * images.shape[-1] / size
    if ratio >= 1.75:
        source = functional.interpolate(source, size=round(images.shape[-1] / ratio), mode="area")
    pixels = functional.grid_sample(source, grid, align_corners=False, padding_mode="zeros")
    padding = (offset.abs() > extent[:, None, None] / 2 + 1e-9).any(-1)
    pixels = pixels.masked_fill(padding[:, None], 0.0)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std


def shaken(
    boxes: Tensor, settings: Augmentation, camera: Camera, generator: torch.Generator
) -> Tensor:
    """Boxes ``[n, 4]`` of which some have moved sides, inside the image; one that halves a side stays as it was."""
    n = len(boxes)
    extent = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    draw = torch.rand(n, 4, generator=generator, dtype=boxes.dtype) * 2 - 1
    moved = boxes + settings.jitter * draw * extent
    # A turned box may reach out of the image already; it is not cut.
    shown = torch.tensor([0.0, 0.0, camera.width, camera.height], dtype=boxes.dtype)
    moved = torch.cat(
        [
            torch.maximum(moved[:, :2], torch.minimum(shown[:2], boxes[:, :2])),
            torch.minimum(moved[:, 2:], torch.maximum(shown[2:], boxes[:, 2:])),
        ],
        dim=-1,
    )
    good = (moved[:, 2:] - moved[:, :2] > extent[:, :2] / 2).all(-1)
    good &= torch.rand(n, generator=generator) < settings.jitter_share
    return torch.where(good[:, None], moved, boxes)


def _turns(count: int, settings: Augmentation, generator: torch.Generator) -> Tensor:
    draw = torch.rand(3, count, generator=generator, dtype=torch.float64)
    angles = math.radians(settings.turn) * (2 * draw[0] - 1)
    if settings.upside_down:
        angles = angles + math.pi * (draw[1] < 0.5)
    return torch.where(draw[2] < settings.turn_share, angles, 0.0)


def turned_crops(
    data: PoseData,
    size: int,
    settings: Augmentation | None = None,
    generator: torch.Generator | None = None,
) -> Crops:
    """Crops of all pictures of ``data``; augmented if settings and a generator are given.

    Raises:
        SettingsError: pictures are to be turned, and the set has no key points to make the new boxes of.
    """
    if settings is None or generator is None:
        pixels = crop(data.images, data.windows, data.boxes, size, data.camera)
        return Crops(pixels, data.boxes, data.rotations, data.translations)
    boxes, rotations, translations, turns = data.boxes, data.rotations, data.translations, None
    if settings.turn_share > 0:
        if data.keypoints is None:
            raise SettingsError(
                "turning pictures needs the body's key points, and this set has none: put keypoints.json beside the "
                "labels, or set turn_share to 0"
            )
        turns = _turns(len(data), settings, generator)
        matrices = in_plane(turns)
        rotations, translations = matrices @ rotations, (matrices @ translations[..., None])[..., 0]
        around = box_of(project(data.keypoints, rotations, translations, data.camera))
        boxes = torch.where((turns != 0)[:, None], around, boxes)
    boxes = shaken(boxes, settings, data.camera, generator)
    pixels = crop(data.images, data.windows, boxes, size, data.camera, turns)
    return Crops(pixels, boxes, rotations, translations)
