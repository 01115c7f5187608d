"""Pixels as points: the coordinates of a picture of any size, and how far two pictures are apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["points", "psnr"]


def points(indices: Tensor, width: int, height: int) -> Tensor:
    """Coordinates of pixels: the centres of the outermost ones are at -1 and 1, an axis of one pixel is at 0.

    Args:
        indices: ``row * width + column``, any shape; an integer type.
        width, height: of the picture, in pixels.

    Returns:
        ``[..., 2]`` in fp32: across, then down.
    """
    columns, rows = indices % width, torch.div(indices, width, rounding_mode="floor")
    return torch.stack([_axis(columns, width), _axis(rows, height)], dim=-1)


def _axis(index: Tensor, size: int) -> Tensor:
    # In fp64 first, so that the middle of a large picture is where the middle of a small one is.
    return (index.double() * (2 / (size - 1)) - 1).float() if size > 1 else index.float() * 0


def psnr(found: Tensor, expected: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of values in ``[0, 1]``; infinite where they are equal.

    Args:
        found, expected: the same shape; what is found is clamped to ``[0, 1]`` first.
    """
    error = float((found.double().clamp(0, 1) - expected.double()).square().mean())
    return -10 * math.log10(error) if error else math.inf
