"""Samples as one picture: a row per class, panels side by side for models on the same noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postlude.errors import DataError

__all__ = ["Panel", "check_colours", "draw_grid", "write_grid"]

_CELL = 48  # pixels that an image is enlarged to, if it is smaller
_GAP, _TEXT, _PAPER, _INK = 4, 14, 255, 30


@dataclass(frozen=True)
class Panel:
    """One block of images under a title.

    Attributes:
        title: one line.
        images: ``[n, 1 or 3, height, width]`` in [-1, 1]; what lies outside is clamped.
    """

    title: str
    images: Tensor


def draw_grid(panels: Sequence[Panel], labels: Tensor | None = None, caption: str = "") -> Any:
    """A Pillow image of the panels, side by side, cell by cell in the same order.

    Args:
        panels: with equally many images of one shape.
        labels: classes ``[n]``: every row holds one class, named at its left; None fills rows one after another.
        caption: a line below.

    Raises:
        DataError: images that have no colours, or panels that do not match.
    """
    from PIL import Image, ImageDraw, ImageFont

    shapes = {tuple(panel.images.shape) for panel in panels}
    count, channels, height, width = next(iter(shapes))
    if len(shapes) > 1:
        raise DataError(f"images of different shapes cannot stand side by side: {sorted(shapes)}")
    check_colours(channels)
    rows = _rows(labels, count)
    factor = max(1, _CELL // max(height, width))
    cell_y, cell_x = height * factor + _GAP, width * factor + _GAP
    names = [] if labels is None else [str(int(labels[row[0]])) for row in rows]
    font = ImageFont.load_default(size=_TEXT)
    left = max((int(font.getlength(name)) for name in names), default=0) + 2 * _GAP
    top = _TEXT + 2 * _GAP
    columns = max(len(row) for row in rows)
    panel_x = left + columns * cell_x + _GAP
    # A narrow picture is widened to what is written on it.
    wide = max((font.getlength(panel.title) for panel in panels), default=0.0)
    # The words start where the images do.
    margin = left + 2 * _GAP
    panel_x = max(
        panel_x, int(wide) + margin, -(-(int(font.getlength(caption)) + margin) // len(panels))
    )
    size = (panel_x * len(panels), top + len(rows) * cell_y + _GAP + (top if caption else 0))
    picture = Image.new("RGB", size, (_PAPER,) * 3)
    pen = ImageDraw.Draw(picture)
    for number, panel in enumerate(panels):
        x0 = number * panel_x
        pen.text((x0 + left, _GAP), panel.title, fill=(_INK,) * 3, font=font)
        cells = _enlarged(panel.images, factor)
        for y, row in enumerate(rows):
            if names:
                middle = top + y * cell_y + (cell_y - _GAP - _TEXT) // 2
                pen.text((x0 + _GAP, middle), names[y], fill=(_INK,) * 3, font=font)
            for x, index in enumerate(row):
                tile = Image.fromarray(cells[index].numpy())
                picture.paste(tile, (x0 + left + x * cell_x, top + y * cell_y))
    if caption:
        pen.text((left, size[1] - _TEXT - 2 * _GAP), caption, fill=(_INK,) * 3, font=font)
    return picture


def check_colours(channels: int) -> None:
    """Refuse images that no picture can show.

    Raises:
        DataError: neither grey nor red, green and blue.
    """
    if channels not in (1, 3):
        raise DataError(
            f"images have {channels} channels; expected 1 (grey) or 3 (red, green, blue). These are latents of an "
            "autoencoder: write the tensors alone (a .safetensors output) and decode them with it."
        )


def write_grid(
    path: Path, panels: Sequence[Panel], labels: Tensor | None = None, caption: str = ""
) -> None:
    """Write :func:`draw_grid` as a PNG file."""
    draw_grid(panels, labels, caption).save(path, format="PNG")


def _rows(labels: Tensor | None, count: int) -> list[list[int]]:
    if labels is None:
        columns = math.ceil(math.sqrt(count))
        return [
            list(range(first, min(first + columns, count))) for first in range(0, count, columns)
        ]
    found = [int(label) for label in labels]
    return [[i for i, label in enumerate(found) if label == each] for each in sorted(set(found))]


def _enlarged(images: Tensor, factor: int) -> Tensor:
    """``[n, height, width, 3]`` in bytes."""
    bright = ((images.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    bright = bright.expand(-1, 3, -1, -1) if bright.shape[1] == 1 else bright
    large = bright.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return large.permute(0, 2, 3, 1).contiguous()
