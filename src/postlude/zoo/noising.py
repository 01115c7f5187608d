"""How an image is noised, and what a denoiser is asked to predict.

    epsilon   x = x0 + sigma*eps, sigma in [0.03, 30.4]; the network sees x / sqrt(1 + sigma^2) and predicts eps
    flow      x = (1 - sigma)*x0 + sigma*eps, sigma in [0, 1]; the network sees x and predicts eps - x0

The first is the variance-exploding process of arXiv:2206.00364; divided by sqrt(1 + sigma^2) it is the
variance-preserving one of DDPM (arXiv:2006.11239), and ``BETAS`` are chosen such that the thousand timesteps of
diffusers' schedulers span the same range of sigma. So one network serves both. The second is the rectified flow of
arXiv:2209.03003, noise at 1 and data at 0, timestep 1000*sigma as in diffusers.

Training levels: log(sigma) ~ N(-0.4, 1.2^2) (epsilon), logit(sigma) ~ N(0, 1) (flow, arXiv:2403.03206).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from postlude.errors import UnknownNameError

__all__ = [
    "BETAS",
    "NOISINGS",
    "TIMESTEPS",
    "Epsilon",
    "Flow",
    "Noising",
    "denoising_loss",
    "noising_of",
]

TIMESTEPS = 1000
BETAS = (0.0009, 0.0127)
"""First and last of the thousand linear betas: sigma = 0.0300 at timestep 0 and 30.39 at 999."""


class Noising(ABC):
    """One way to noise an image; stateless."""

    name: ClassVar[str]

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Noise levels ``[count]`` as in training."""

    @abstractmethod
    def timesteps(self, sigma: Tensor) -> Tensor:
        """What the network is told for the noise levels ``sigma``: continuous timesteps of diffusers."""

    @abstractmethod
    def noised(self, images: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The network's input and its target, both of the images' shape ``[n, ...]``; ``sigma`` is ``[n]``."""

    @abstractmethod
    def scheduler(self) -> Any:
        """The diffusers scheduler that samples from such a network."""


class Epsilon(Noising):
    """The network predicts the noise."""

    name = "epsilon"

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """log(sigma) ~ N(-0.4, 1.2^2), clamped to [0.03, 30]."""
        drawn = torch.randn(count, generator=generator) * 1.2 - 0.4
        return drawn.exp().clamp(0.03, 30.0)

    def timesteps(self, sigma: Tensor) -> Tensor:
        """Linear in log(sigma) between the thousand timesteps, as diffusers' Euler scheduler interpolates."""
        beta = torch.linspace(*BETAS, TIMESTEPS, dtype=torch.float64)
        kept = torch.cumprod(1.0 - beta, 0)
        table = ((1.0 - kept) / kept).sqrt().log().to(sigma.device)
        level = sigma.double().log().clamp(table[0], table[-1])
        above = torch.searchsorted(table, level).clamp(1, TIMESTEPS - 1)
        low, high = table[above - 1], table[above]
        return (above - 1 + (level - low) / (high - low)).to(sigma.dtype)

    def noised(self, images: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The scaled noisy image, and the noise."""
        level = _as(sigma, images)
        return (images + level * noise) / (1.0 + level * level).sqrt(), noise

    def scheduler(self) -> Any:
        """Euler on the grid of arXiv:2206.00364 (rho = 7)."""
        from diffusers import EulerDiscreteScheduler

        return EulerDiscreteScheduler(
            num_train_timesteps=TIMESTEPS,
            beta_start=BETAS[0],
            beta_end=BETAS[1],
            beta_schedule="linear",
            prediction_type="epsilon",
            use_karras_sigmas=True,
        )


class Flow(Noising):
    """The network predicts the velocity from data to noise."""

    name = "flow"

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """logit(sigma) ~ N(0, 1)."""
        return torch.randn(count, generator=generator).sigmoid()

    def timesteps(self, sigma: Tensor) -> Tensor:
        """1000*sigma."""
        return sigma * TIMESTEPS

    def noised(self, images: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The point on the straight line from image to noise, and the line's direction."""
        level = _as(sigma, images)
        return (1.0 - level) * images + level * noise, noise - images

    def scheduler(self) -> Any:
        """Euler on the straight path."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS, shift=1.0)


NOISINGS: dict[str, Noising] = {each.name: each for each in (Epsilon(), Flow())}


def noising_of(name: str) -> Noising:
    """The process of that name.

    Raises:
        UnknownNameError: there is none; the message lists those there are.
    """
    if name not in NOISINGS:
        raise UnknownNameError("prediction", name, NOISINGS)
    return NOISINGS[name]


def denoising_loss(
    model: Any,
    images: Tensor,
    labels: Tensor,
    noise: Tensor,
    sigma: Tensor,
    *,
    prediction: str = "epsilon",
) -> Tensor:
    """The mean squared error of the prediction, one number per example ``[n]``.

    Args:
        model: a class-conditional diffusers transformer (``hidden_states, timestep, class_labels``).
        images: clean images ``[n, channels, height, width]`` in [-1, 1].
        labels: classes ``[n]``.
        noise: standard normal, of the images' shape.
        sigma: noise levels ``[n]``; ``noising_of(prediction).draw(n, generator)`` draws them as in training.
        prediction: ``epsilon`` or ``flow``.
    """
    process = noising_of(prediction)
    inputs, target = process.noised(images, noise, sigma)
    output = model(inputs, timestep=process.timesteps(sigma), class_labels=labels).sample
    return (output - target).square().flatten(1).mean(1)


def _as(sigma: Tensor, images: Tensor) -> Tensor:
    return sigma.to(images).view(-1, *[1] * (images.ndim - 1))
