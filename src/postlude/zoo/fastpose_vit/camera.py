"""The camera, and the translation of a spacecraft in units of its box (FastPose-ViT, arXiv:2512.09792).

A point ``X`` of the body lies at ``R X + t`` before the camera and at ``(u, v, 1) ~ K (R X + t)`` in the image,
``K = [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]``. With a box ``(x1, y1, x2, y2)`` of width ``w``, height ``h`` and
centre ``(bx, by)``, and ``rho = (w + h) / (2 H)`` for an image of height ``H``, the network learns::

    Ux = (fx tx / tz + cx - bx) / w      Uy = (fy ty / tz + cy - by) / h      Uz = rho tz

``Ux`` and ``Uy`` are the offset of the body's origin from the centre of the box, ``Uz`` is depth divided by the zoom
of the crop: all about 1, whatever the distance. Any box will do (true, shaken, detected), as long as the same one
encodes and decodes; the padding of a crop to a square is in no formula.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from postlude.errors import DataError, SettingsError

__all__ = [
    "SPEED",
    "Camera",
    "box_of",
    "check_boxes",
    "decode_translation",
    "encode_translation",
    "project",
    "viewing_direction",
]


@dataclasses.dataclass(frozen=True)
class Camera:
    """A pinhole camera without distortion; lengths in pixels.

    Attributes:
        fx, fy: focal lengths.
        cx, cy: principal point.
        width, height: of the image.
    """

    fx: float
    fy: float
    cx: float
    cy: float
    width: int
    height: int

    def __post_init__(self) -> None:
        numbers = (self.fx, self.fy, self.cx, self.cy)
        if not all(map(math.isfinite, numbers)) or min(self.fx, self.fy) <= 0:
            raise SettingsError(
                f"the focal lengths of a camera are {self.fx} and {self.fy}, its principal point "
                f"({self.cx}, {self.cy}); expected finite numbers and focal lengths above 0, in pixels"
            )
        if min(self.width, self.height) < 1:
            raise SettingsError(
                f"a camera's image is {self.width} x {self.height}; expected pixels"
            )

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """``K``, ``[3, 3]``."""
        return torch.tensor(
            [[self.fx, 0.0, self.cx], [0.0, self.fy, self.cy], [0.0, 0.0, 1.0]], dtype=dtype
        )

    def homography(self, rotation: Tensor) -> Tensor:
        """Where the pixels of this camera go when it is turned about its centre.

        Args:
            rotation: ``[..., 3, 3]``; a point at ``X`` before this camera is at ``rotation X`` before the turned one.

        Returns:
            ``K rotation inv(K)``, ``[..., 3, 3]``, for pixels ``(u, v, 1)``.
        """
        matrix = self.matrix(rotation.dtype).to(rotation.device)
        product: Tensor = matrix @ rotation @ torch.linalg.inv(matrix)
        return product


SPEED = Camera(fx=3003.4129692832764, fy=3003.4129692832764, cx=960.0, cy=600.0, width=1920, height=1200)  # fmt: skip
"""SPEED's camera: 17.6 mm of focal length over pixels of 5.86 um."""


def project(points: Tensor, rotation: Tensor, translation: Tensor, camera: Camera) -> Tensor:
    """Pixels ``[..., points, 2]`` of body points ``[points, 3]`` under poses ``[..., 3, 3]`` and ``[..., 3]``."""
    before = points @ rotation.mT + translation.unsqueeze(-2)
    x, y, z = before.unbind(-1)
    return torch.stack([camera.fx * x / z + camera.cx, camera.fy * y / z + camera.cy], dim=-1)


def box_of(pixels: Tensor) -> Tensor:
    """The smallest boxes ``[..., 4]`` (x1, y1, x2, y2) around pixels ``[..., points, 2]``."""
    return torch.cat([pixels.amin(-2), pixels.amax(-2)], dim=-1)


def check_boxes(boxes: Tensor, camera: Camera, names: list[str] | None = None) -> None:
    """Refuse boxes ``[n, 4]`` that are empty or show nothing of the image.

    Raises:
        DataError: names the first such box, by its index or by ``names``.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    good = torch.isfinite(boxes).all(-1) & (x2 > x1) & (y2 > y1)
    good &= (x2 > 0) & (y2 > 0) & (x1 < camera.width) & (y1 < camera.height)
    if bool(good.all()):
        return
    index = int((~good).nonzero()[0])
    name = f" ({names[index]})" if names else ""
    found = ", ".join(f"{value:.6g}" for value in boxes[index].tolist())
    raise DataError(
        f"the box of example {index}{name} is ({found}); expected x1 < x2 and y1 < y2 in pixels, with a part of it "
        f"inside the image of {camera.width} x {camera.height}. Correct the label or leave the example out."
    )


def _parts(box: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = box.unbind(-1)
    return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1


def encode_translation(translation: Tensor, box: Tensor, camera: Camera = SPEED) -> Tensor:
    """``U [..., 3]`` of translations ``[..., 3]`` in metres, seen in boxes ``[..., 4]`` in pixels."""
    bx, by, w, h = _parts(box)
    x, y, z = translation.unbind(-1)
    rho = (w + h) / (2 * camera.height)
    u = (camera.fx * x / z + camera.cx - bx) / w
    v = (camera.fy * y / z + camera.cy - by) / h
    return torch.stack([u, v, rho * z], dim=-1)


def decode_translation(encoded: Tensor, box: Tensor, camera: Camera = SPEED) -> Tensor:
    """The translation ``[..., 3]`` in metres that :func:`encode_translation` encodes; its exact inverse."""
    bx, by, w, h = _parts(box)
    u, v, depth = encoded.unbind(-1)
    z = depth * (2 * camera.height) / (w + h)
    x = (u * w + bx - camera.cx) / camera.fx * z
    y = (v * h + by - camera.cy) / camera.fy * z
    return torch.stack([x, y, z], dim=-1)


def viewing_direction(encoded: Tensor, box: Tensor, camera: Camera = SPEED) -> Tensor:
    """Unit vector ``[..., 3]`` towards the body's origin; the encoded depth has no part in it."""
    bx, by, w, h = _parts(box)
    u, v, _ = encoded.unbind(-1)
    x = (u * w + bx - camera.cx) / camera.fx
    y = (v * h + by - camera.cy) / camera.fy
    ray = torch.stack([x, y, torch.ones_like(x)], dim=-1)
    return ray / (x * x + y * y + 1).sqrt().unsqueeze(-1)
