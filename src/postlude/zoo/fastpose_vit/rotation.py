"""Rotations as a crop shows them (FastPose-ViT, arXiv:2512.09792, equations 8 and 10).

A camera turned by ``Q`` about its centre, so that it looks at the body, sees the body at ``R_app``::

    R X + t = Q (R_app X + |t| e_z)        Q e_z = dir = t / |t|        R_app = Q^T R

and a square crop of the first image is, up to a homography, the picture of the second. So what the pixels of a crop
determine is the apparent rotation ``R_app``; the network learns it, and ``R = Q(dir) R_app`` with the direction of
the predicted translation.

``Q`` is the smallest such rotation. In closed form, without an arc cosine or a branch, so that it exports::

    Q = [ 1 - dx dx / (1 + dz)      - dx dy / (1 + dz)     dx ]
        [   - dx dy / (1 + dz)    1 - dy dy / (1 + dz)     dy ]          dz > -1
        [   - dx                      - dy                 dz ]

(the closed form is our derivation; the authors' code uses Rodrigues' formula and special cases).

Rotations are learned as their first two columns (6 numbers) and made orthogonal by Gram-Schmidt. Quaternions of labels
have their scalar first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "angle_between",
    "apparent_rotation",
    "first_columns",
    "gram_schmidt",
    "in_plane",
    "matrix_of_quaternion",
    "minimal_rotation",
    "quaternion_of_matrix",
    "random_rotations",
    "true_rotation",
]


def minimal_rotation(direction: Tensor) -> Tensor:
    """``Q [..., 3, 3]`` that turns the optical axis into unit directions ``[..., 3]`` before the camera."""
    x, y, z = direction.unbind(-1)
    scale = 1 / (1 + z)
    first = torch.stack([1 - x * x * scale, -x * y * scale, x], dim=-1)
    second = torch.stack([-x * y * scale, 1 - y * y * scale, y], dim=-1)
    third = torch.stack([-x, -y, z], dim=-1)
    return torch.stack([first, second, third], dim=-2)


def apparent_rotation(rotation: Tensor, direction: Tensor) -> Tensor:
    """``R_app = Q(direction)^T R``; the direction need not have length 1, a translation will do."""
    return minimal_rotation(functional.normalize(direction, dim=-1)).mT @ rotation


def true_rotation(apparent: Tensor, direction: Tensor) -> Tensor:
    """``R = Q(direction) R_app``, the inverse of :func:`apparent_rotation`."""
    return minimal_rotation(functional.normalize(direction, dim=-1)) @ apparent


def first_columns(rotation: Tensor) -> Tensor:
    """``[..., 6]``: the first column, then the second."""
    return rotation[..., :2].mT.flatten(-2)


def gram_schmidt(six: Tensor) -> Tensor:
    """The rotation ``[..., 3, 3]`` whose first two columns come from ``[..., 6]``; exports without a branch."""
    a, b = six[..., :3], six[..., 3:]
    first = a / a.square().sum(-1, keepdim=True).sqrt()
    b = b - (b * first).sum(-1, keepdim=True) * first
    second = b / b.square().sum(-1, keepdim=True).sqrt()
    # Written out: the ONNX exporter has no cross product.
    x1, y1, z1 = first.unbind(-1)
    x2, y2, z2 = second.unbind(-1)
    third = torch.stack([y1 * z2 - z1 * y2, z1 * x2 - x1 * z2, x1 * y2 - y1 * x2], dim=-1)
    return torch.stack([first, second, third], dim=-1)


def in_plane(angle: Tensor) -> Tensor:
    """Rotations ``[..., 3, 3]`` about the optical axis by angles ``[...]`` in radians."""
    cosine, sine = angle.cos(), angle.sin()
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    rows = ([cosine, -sine, zero], [sine, cosine, zero], [zero, zero, one])
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def matrix_of_quaternion(quaternion: Tensor) -> Tensor:
    """Rotations ``[..., 3, 3]`` (body to camera) of unit quaternions ``[..., 4]``, scalar first."""
    w, x, y, z = quaternion.unbind(-1)
    rows = (
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def quaternion_of_matrix(rotation: Tensor) -> Tensor:
    """Unit quaternions ``[..., 4]``, scalar first and not negative, of rotations ``[..., 3, 3]``.

    Of the four ways to write it, the one that divides by the largest number.
    """
    r = rotation
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    trace = diagonal.sum(-1, keepdim=True)
    # Four times the square of w, x, y and z.
    squares = torch.cat([1 + trace, 1 + 2 * diagonal - trace], dim=-1)
    wx, wy, wz = (
        r[..., 2, 1] - r[..., 1, 2],
        r[..., 0, 2] - r[..., 2, 0],
        r[..., 1, 0] - r[..., 0, 1],
    )
    xy, xz, yz = (
        r[..., 1, 0] + r[..., 0, 1],
        r[..., 0, 2] + r[..., 2, 0],
        r[..., 2, 1] + r[..., 1, 2],
    )
    ways = torch.stack(
        [
            torch.stack([squares[..., 0], wx, wy, wz], dim=-1),
            torch.stack([wx, squares[..., 1], xy, xz], dim=-1),
            torch.stack([wy, xy, squares[..., 2], yz], dim=-1),
            torch.stack([wz, xz, yz, squares[..., 3]], dim=-1),
        ],
        dim=-2,
    )
    best = squares.argmax(-1)[..., None, None].expand(*squares.shape[:-1], 1, 4)
    quaternion = functional.normalize(ways.gather(-2, best).squeeze(-2), dim=-1)
    return torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)


def angle_between(first: Tensor, second: Tensor) -> Tensor:
    """Angles ``[...]`` in radians between rotations ``[..., 3, 3]``: ``2 arccos |q1 . q2|``.

    Computed as ``2 arcsin(|R1 - R2|_F / sqrt 8)``, the same angle, which stays exact where the cosine is 1.
    """
    distance = (first - second).square().sum((-2, -1)).sqrt() / 8**0.5
    return 2 * torch.arcsin(distance.clamp(max=1.0))


def random_rotations(count: int, generator: torch.Generator) -> Tensor:
    """``count`` rotations ``float64 [count, 3, 3]``, uniform."""
    quaternions = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return matrix_of_quaternion(functional.normalize(quaternions, dim=-1))
