from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from postlude.zoo.smn.networks import build, settings_for
from postlude.zoo.smn.radiance import Camera, Field, cameras, composite, photograph, rays, see


def test_rays_of_a_camera() -> None:
    camera = Camera(azimuth=0.7, elevation=0.5, size=9)
    origins, directions = rays(camera)
    assert origins.shape == directions.shape == (81, 3)
    assert torch.allclose(directions.norm(dim=-1), torch.ones(81))
    # The middle pixel looks at the middle of the scene, from three away.
    middle = origins[40] + 3 * directions[40]
    torch.testing.assert_close(middle, torch.tensor([0.0, 0.0, 0.2]), atol=1e-5, rtol=0)
    # The top row looks higher than the bottom row, the right end of a row is to the right.
    assert directions[4, 2] > directions[-5, 2]
    right = torch.linalg.cross(directions[40], torch.tensor([0.0, 0.0, 1.0]))
    assert (directions[44] - directions[36]) @ right > 0


def test_the_photograph_has_what_the_scene_has() -> None:
    for camera in cameras(4, 24):
        seen = photograph(camera)
        assert seen.shape == (24 * 24, 3)
        assert seen.min() >= 0
        assert seen.max() <= 1
        white = (seen == 1).all(-1)
        assert 0.3 < white.float().mean() < 0.9
        assert white[0]
        assert white[-1]
        red, _, blue = seen[~white].T
        assert (red > blue + 0.2).any()
        assert (blue > red + 0.2).any()
    turned = cameras(4, 24, turn=0.5)
    assert turned[0].azimuth == pytest.approx(math.pi / 4)


def slow_composite(
    densities: list[float], colours: list[list[float]], depths: list[float]
) -> list[float]:
    """One sample after another."""
    through, colour = 1.0, [0.0, 0.0, 0.0]
    for i, density in enumerate(densities):
        end = depths[i + 1] if i + 1 < len(depths) else 4.1
        alpha = 1 - math.exp(-density * (end - depths[i]))
        colour = [c + through * alpha * one for c, one in zip(colour, colours[i], strict=True)]
        through *= 1 - alpha
    return [c + through for c in colour]


def test_composite_against_a_loop() -> None:
    draw = torch.Generator().manual_seed(0)
    densities = 5 * torch.rand(4, 6, generator=draw)
    densities[0] = 0
    densities[1, 2] = 1e6
    colours = torch.rand(4, 6, 3, generator=draw)
    depths = 1.9 + 2.2 * torch.rand(4, 6, generator=draw).sort(dim=1).values
    found = composite(densities, colours, depths)
    expected = [
        slow_composite(d, c, t)
        for d, c, t in zip(densities.tolist(), colours.tolist(), depths.tolist(), strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert torch.equal(found[0], torch.ones(3))


class Ball(nn.Module):
    """Solid green within half of the scene's middle, as the network of a field."""

    def forward(self, codes: Tensor) -> Tensor:
        places = codes[..., :3]
        inside = (places - torch.tensor([0.0, 0.0, 0.2])).norm(dim=-1) < 0.5
        density = torch.where(inside, 1e4, -50.0)
        out = torch.full((*places.shape[:-1], 5), -20.0)
        out[..., 1] = 20
        out[..., 3] = density
        return out


def test_what_is_solid_is_seen() -> None:
    camera = Camera(1.0, 0.6, size=15)
    origins, directions = rays(camera)
    seen = see(Field(Ball()), origins, directions, 64).reshape(15, 15, 3)
    torch.testing.assert_close(seen[7, 7], torch.tensor([0.0, 1.0, 0.0]), atol=1e-4, rtol=0)
    assert torch.equal(seen[0, 0], torch.ones(3))
    # The rays that pass within half of the middle, up to one sample's length.
    towards = torch.tensor([0.0, 0.0, 0.2]) - origins
    miss = torch.linalg.cross(towards, directions).norm(dim=-1).reshape(15, 15)
    assert (seen[miss < 0.45][:, 0] < 0.01).all()
    assert (seen[miss > 0.5] == 1).all()


def test_encodings_of_the_paper() -> None:
    assert Field.in_features((10, 4)) == 90
    settings = settings_for(
        "smn", {"width": 8, "in_features": 90, "out_features": 5, "variant": "field"}
    )
    field = Field(build(settings, 0), (10, 4))
    density, colour = field(torch.rand(2, 7, 3), torch.rand(2, 7, 3))
    assert density.shape == (2, 7)
    assert colour.shape == (2, 7, 3)
    assert (density >= 0).all()


def test_depths_are_drawn_in_their_bins() -> None:
    seen: list[Tensor] = []

    class Watching(Ball):
        def forward(self, codes: Tensor) -> Tensor:
            seen.append(codes[..., :3])
            return super().forward(codes)

    origins, directions = rays(Camera(0.2, 0.5, size=3))
    see(Field(Watching()), origins, directions, 8, torch.Generator().manual_seed(0))
    depths = (seen[0] - origins[:, None]).norm(dim=-1)
    bins = (depths - 1.9) / 2.2 * 8
    assert torch.equal(bins.floor(), torch.arange(8.0).expand(9, 8))
