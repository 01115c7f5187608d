"""Poses drawn on pictures: the body's axes and the outline of its key points, for the eye."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from postlude.zoo.fastpose_vit.camera import project
from postlude.zoo.fastpose_vit.data import PoseData

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["draw_axes"]

# x, y, z: of different brightness too, for eyes that do not tell colours apart.
_COLOURS = ((213, 94, 0), (240, 228, 66), (86, 180, 233))
_LENGTH = 0.5  # metres


def draw_axes(
    data: PoseData,
    rotations: Tensor,
    translations: Tensor,
    *,
    scale: int = 2,
    columns: int = 4,
) -> Image:
    """Pictures in a grid with the axes of the true pose (thin, white) and of the predicted one (x, y, z in colours).

    Args:
        data: the pictures with their true poses.
        rotations: predicted ``[n, 3, 3]``.
        translations: predicted ``[n, 3]``.
        scale: pixels for one of a picture.
        columns: pictures in a row.
    """
    from PIL import Image, ImageDraw

    size = data.images.shape[-1] * scale
    rows = -(-len(data) // columns)
    sheet = Image.new("RGB", (columns * size, rows * size))
    ends = torch.cat([torch.zeros(1, 3), torch.eye(3) * _LENGTH]).double()
    for i in range(len(data)):
        picture = Image.fromarray(data.images[i].numpy()).convert("RGB").resize((size, size))
        pen = ImageDraw.Draw(picture)
        low, high = data.windows[i, :2], data.windows[i, 2:]
        for rotation, translation, width in (
            (data.rotations[i], data.translations[i], 1),
            (rotations[i].double(), translations[i].double(), 3),
        ):
            pixels = project(ends, rotation, translation, data.camera)
            places = ((pixels - low) / (high - low) * size).tolist()
            for axis, colour in enumerate(_COLOURS):
                line = [tuple(places[0]), tuple(places[axis + 1])]
                pen.line(line, fill=colour if width > 1 else (255, 255, 255), width=width)
        sheet.paste(picture, (i % columns * size, i // columns * size))
    return sheet
