"""Fit a radiance field to photographs with known cameras, and judge it by views it has not seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from postlude.runs.progress import Progress
from postlude.signals.training import Training, Unit, optimise
from postlude.zoo.smn.grid import psnr
from postlude.zoo.smn.radiance import Camera, Field, photograph, rays, see

__all__ = ["evaluate_field", "fit_field", "view"]

_RAYS = 1024


def fit_field(
    field: Field,
    views: Sequence[Camera],
    training: Training,
    *,
    samples: int = 32,
    seed: int = 0,
    unit: Unit | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Train a field on what cameras see of the scene, in place.

    Args:
        field: to be trained.
        views: cameras whose photographs are learned from.
        training: steps and rate; ``batch`` counts points, so a step takes ``batch // samples`` rays.
        samples: depths of a ray.
        seed: of the rays and depths drawn.
        unit, progress: see :func:`postlude.signals.training.optimise`.

    Returns:
        The loss of every step.
    """
    device = next(field.parameters()).device
    pairs = [rays(camera) for camera in views]
    origins, directions = (torch.cat(part).to(device) for part in zip(*pairs, strict=True))
    colours = torch.cat([photograph(camera) for camera in views]).to(device)
    count = max(1, training.batch // samples)

    def loss(step: int, draw: torch.Generator) -> Tensor:
        chosen = torch.randint(len(origins), (count,), generator=draw).to(device)
        seen = see(field, origins[chosen], directions[chosen], samples, draw)
        return functional.mse_loss(seen, colours[chosen])

    return optimise(field, loss, training, seed=seed, unit=unit, progress=progress, name="field")


@torch.no_grad()
def view(field: Field, camera: Camera, samples: int = 64) -> Tensor:
    """What a camera sees of a field, ``[size, size, 3]`` on the CPU."""
    device = next(field.parameters()).device
    origins, directions = rays(camera)
    parts = [
        see(field, some.to(device), ways.to(device), samples).cpu()
        for some, ways in zip(origins.split(_RAYS), directions.split(_RAYS), strict=True)
    ]
    return torch.cat(parts).reshape(camera.size, camera.size, 3)


def evaluate_field(field: Field, views: Sequence[Camera], samples: int = 64) -> float:
    """PSNR in dB over all pixels of the cameras' views."""
    found = torch.stack([view(field, camera, samples) for camera in views])
    expected = torch.stack([photograph(camera) for camera in views]).reshape(found.shape)
    return psnr(found, expected)
