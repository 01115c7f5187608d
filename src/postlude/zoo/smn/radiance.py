"""A small radiance field: a scene of a few solids, known cameras, and how a network's field is seen along rays.

The scene is drawn exactly: three balls on a disc under one lamp, white behind (:func:`photograph`). A field is a
network from an encoded place and an encoded direction to density and colour (NeRF, arXiv:2003.08934), and a ray sees::

    alpha_i = 1 - exp(-softplus(density_i) delta_i)      w_i = alpha_i prod_{j<i} (1 - alpha_j)
    colour  = sum_i w_i sigmoid(rgb_i) + (1 - sum_i w_i) white

Both codes go into one network together, as in arXiv:2602.16337, whose encodings have 10 and 4 octaves; the scene here
is smaller and so are the defaults. Depths are drawn once a ray, one in each of equal bins: there is no finer pass. The
density has a softplus (arXiv:2103.13415) and not a ReLU, under which a field that starts empty stays so.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from postlude.zoo.smn.layers import PositionEncoding

__all__ = ["Camera", "Field", "cameras", "composite", "photograph", "rays", "see"]

# The scene lies within 1.1 of the point that cameras look at.
_NEAR, _FAR = 1.9, 4.1
_DISTANCE = 3.0
# Centre, radius, colour.
_BALLS = (
    ((-0.35, -0.25, 0.35), 0.35, (0.85, 0.2, 0.15)),
    ((0.45, -0.1, 0.25), 0.25, (0.15, 0.45, 0.85)),
    ((0.05, 0.5, 0.18), 0.18, (0.95, 0.75, 0.1)),
)
_DISC_RADIUS = 1.0
_LAMP = (0.4, -0.5, 0.77)
_AMBIENT = 0.35
# Squares of the disc: detail for the high octaves.
_SQUARES = 5.0


@dataclasses.dataclass(frozen=True)
class Camera:
    """A pinhole camera that looks at the scene's middle from a sphere around it.

    Attributes:
        azimuth, elevation: radians.
        size: pixels of a side.
        field_of_view: radians across.
    """

    azimuth: float
    elevation: float
    size: int = 32
    field_of_view: float = 0.75


def cameras(count: int, size: int, turn: float = 0.0) -> list[Camera]:
    """Cameras around the scene, alternating between three heights.

    Args:
        count: how many.
        size: pixels of a side.
        turn: added to every azimuth, in steps from one camera to the next; 0.5 looks in between.
    """
    heights = (0.35, 0.65, 0.95)
    return [
        Camera(2 * math.pi * (i + turn) / count, heights[i % len(heights)], size)
        for i in range(count)
    ]


def rays(camera: Camera) -> tuple[Tensor, Tensor]:
    """Origins and unit directions, both ``[size * size, 3]``, row by row from the top left."""
    cos, sin = math.cos(camera.elevation), math.sin(camera.elevation)
    back = torch.tensor([cos * math.cos(camera.azimuth), cos * math.sin(camera.azimuth), sin])
    right = torch.tensor([-math.sin(camera.azimuth), math.cos(camera.azimuth), 0.0])
    up = torch.linalg.cross(back, right)
    middle = torch.tensor([0.0, 0.0, 0.2])
    edge = math.tan(camera.field_of_view / 2)
    across = ((torch.arange(camera.size) + 0.5) / camera.size * 2 - 1) * edge
    down, over = torch.meshgrid(across, across, indexing="ij")
    directions = over[..., None] * right - down[..., None] * up - back
    directions = functional.normalize(directions, dim=-1).reshape(-1, 3)
    return (middle + _DISTANCE * back).expand_as(directions), directions


def photograph(camera: Camera) -> Tensor:
    """What the camera sees of the scene, ``[size * size, 3]`` in ``[0, 1]``; hard shadows, white behind."""
    origins, directions = rays(camera)
    depth, normal, colour = _hit(origins, directions)
    place = origins + depth.clamp(max=_FAR)[:, None] * directions
    lamp = torch.tensor(_LAMP) / torch.tensor(_LAMP).norm()
    shadow, _, _ = _hit(place + 1e-3 * normal, lamp.expand_as(place))
    light = (normal @ lamp).clamp(min=0) * torch.isinf(shadow)
    shaded = colour * (_AMBIENT + (1 - _AMBIENT) * light)[:, None]
    return torch.where(torch.isinf(depth)[:, None], torch.ones_like(shaded), shaded)


def _hit(origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Depth (infinite for a miss), normal and colour of what a ray meets first."""
    up = torch.tensor([0.0, 0.0, 1.0])
    depth = -origins[:, 2] / directions[:, 2]
    place = origins + depth[:, None] * directions
    on_disc = (depth > 1e-4) & (place[:, :2].norm(dim=-1) < _DISC_RADIUS)
    depth = torch.where(on_disc, depth, torch.inf)
    normal = up.expand_as(directions)
    dark = ((place[:, :2] * _SQUARES).floor().sum(-1) % 2)[:, None]
    colour = 0.85 - 0.45 * dark.nan_to_num().expand_as(directions)
    for centre, radius, paint in _BALLS:
        towards = origins - torch.tensor(centre)
        half = (towards * directions).sum(-1)
        root = half.square() - towards.square().sum(-1) + radius**2
        near = -half - root.clamp(min=0).sqrt()
        closer = (root > 0) & (near > 1e-4) & (near < depth)
        depth = torch.where(closer, near, depth)
        out = (towards + near[:, None] * directions) / radius
        normal = torch.where(closer[:, None], out, normal)
        colour = torch.where(closer[:, None], torch.tensor(paint), colour)
    return depth, normal, colour


class Field(nn.Module):
    """A network as a radiance field.

    Args:
        network: ``[n, in_features]`` to ``[n, 5]``: colour, density, and one output that nothing reads, as in
            arXiv:2602.16337.
        octaves: of places and of directions; see :meth:`in_features`.
    """

    def __init__(self, network: nn.Module, octaves: tuple[int, int] = (6, 2)) -> None:
        super().__init__()
        self.network = network
        self.place, self.direction = (PositionEncoding(3, count) for count in octaves)

    @staticmethod
    def in_features(octaves: tuple[int, int] = (6, 2)) -> int:
        """Entries of an encoded place and direction together; 90 for ``(10, 4)``."""
        return sum(3 * (1 + 2 * count) for count in octaves)

    def forward(self, places: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Density ``[...]`` and colour ``[..., 3]`` at ``[..., 3]`` places seen along unit directions."""
        codes = torch.cat([self.place(places), self.direction(directions)], dim=-1)
        out = self.network(codes)
        return functional.softplus(out[..., 3]), torch.sigmoid(out[..., :3])


def composite(densities: Tensor, colours: Tensor, depths: Tensor) -> Tensor:
    """The colour that a ray sees, ``[rays, 3]``, on white.

    Args:
        densities: ``[rays, samples]``.
        colours: ``[rays, samples, 3]``.
        depths: ``[rays, samples]``, rising; the last sample reaches to the far end.
    """
    ends = torch.full_like(depths[:, :1], _FAR)
    lengths = torch.diff(depths, dim=1, append=ends)
    passed = torch.exp(-densities * lengths)
    before = torch.cumprod(
        torch.cat([torch.ones_like(passed[:, :1]), passed[:, :-1]], dim=1), dim=1
    )
    weights = before * (1 - passed)
    return (weights[..., None] * colours).sum(1) + (1 - weights.sum(1))[:, None]


def see(
    field: Field,
    origins: Tensor,
    directions: Tensor,
    samples: int,
    draw: torch.Generator | None = None,
) -> Tensor:
    """What a field looks like along rays, ``[rays, 3]``.

    Args:
        field: density and colour.
        origins, directions: ``[rays, 3]``.
        samples: depths of a ray.
        draw: where in its bin a depth lies; in the middle without.
    """
    shape = len(origins), samples
    inside = torch.full(shape, 0.5) if draw is None else torch.rand(shape, generator=draw)
    depths = _NEAR + (_FAR - _NEAR) * (torch.arange(samples) + inside) / samples
    depths = depths.to(origins.device)
    places = origins[:, None] + depths[..., None] * directions[:, None]
    densities, colours = field(places, directions[:, None].expand_as(places))
    return composite(densities, colours, depths)
