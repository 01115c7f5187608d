"""What SMN is compared with, laid out as the parameter counts of arXiv:2602.16337 say.

SIREN (arXiv:2006.09661), Gauss (arXiv:2111.15135), WIRE (arXiv:2301.05187), and ReLU with a positional encoding
(arXiv:2003.08934): four hidden layers and an output, all with biases.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
from torch import Tensor, nn

from postlude.registry import method
from postlude.zoo.smn.layers import ComplexDense, Dense, PositionEncoding, siren_layer
from postlude.zoo.smn.settings import NetworkSettings

__all__ = [
    "Gauss",
    "GaussSettings",
    "ReLU",
    "ReLUSettings",
    "Siren",
    "SirenSettings",
    "Wire",
    "WireSettings",
]


@dataclasses.dataclass(frozen=True)
class _Plain(NetworkSettings):
    """Four hidden layers and an output, with biases."""

    @property
    def parameters(self) -> int:
        inputs, width = self._inputs, self.width
        return inputs * width + width + 3 * (width**2 + width) + (width + 1) * self.out_features

    @property
    def _inputs(self) -> int:
        return self.in_features


@method("fit", "siren", family="network of coordinates", paper="arXiv:2006.09661")
@dataclasses.dataclass(frozen=True)
class SirenSettings(_Plain):
    """SIREN: sines all the way (arXiv:2006.09661).

    Attributes:
        omega: of every layer.
    """

    omega: float = 40.0

    name = "siren"
    learning_rate = 1e-3

    def build(self, generator: torch.Generator) -> nn.Module:
        return Siren(self, generator)


class Siren(nn.Module):
    """``h <- sin(omega (W h + b))``; the output is linear."""

    def __init__(self, settings: SirenSettings, generator: torch.Generator) -> None:
        super().__init__()
        self.settings = settings
        width, omega = settings.width, settings.omega
        usual = 1 / math.sqrt(settings.in_features)
        first = Dense(
            settings.in_features,
            width,
            generator,
            gain=omega,
            bound=1 / settings.in_features,
            bias=usual,
        )
        hidden = [siren_layer(width, width, omega, generator) for _ in range(3)]
        self.layers = nn.ModuleList([first, *hidden])
        self.readout = Dense(
            width,
            settings.out_features,
            generator,
            bound=math.sqrt(6 / width) / omega,
            bias=1 / math.sqrt(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        for layer in self.layers:
            x = torch.sin(layer(x))
        return self.readout(x)


@method("fit", "gauss", family="network of coordinates", paper="arXiv:2111.15135")
@dataclasses.dataclass(frozen=True)
class GaussSettings(_Plain):
    """Gauss: bumps of a linear layer (arXiv:2111.15135).

    Attributes:
        scale: ``s0`` in ``exp(-(s0 (W x + b))^2)``.
    """

    scale: float = 30.0

    name = "gauss"
    learning_rate = 1e-3

    def build(self, generator: torch.Generator) -> nn.Module:
        return Gauss(self, generator)


class Gauss(nn.Module):
    """``h <- exp(-(s0 (W h + b))^2)``; the output is linear."""

    def __init__(self, settings: GaussSettings, generator: torch.Generator) -> None:
        super().__init__()
        self.settings = settings
        sizes = [settings.in_features, *[settings.width] * 4]
        self.layers = nn.ModuleList(
            Dense(a, b, generator, gain=settings.scale, bias=1 / math.sqrt(a))
            for a, b in itertools.pairwise(sizes)
        )
        self.readout = Dense(
            settings.width, settings.out_features, generator, bias=1 / math.sqrt(settings.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        for layer in self.layers:
            x = torch.exp(-(layer(x) ** 2))
        return self.readout(x)


@method("fit", "relu-pe", family="network of coordinates", paper="arXiv:2003.08934")
@dataclasses.dataclass(frozen=True)
class ReLUSettings(_Plain):
    """A perceptron on a positional encoding (arXiv:2003.08934).

    Attributes:
        frequencies: octaves of the encoding.
    """

    frequencies: int = 10

    name = "relu-pe"
    learning_rate = 1e-2

    @property
    def _inputs(self) -> int:
        return self.in_features * (1 + 2 * self.frequencies)

    def build(self, generator: torch.Generator) -> nn.Module:
        return ReLU(self, generator)


class ReLU(nn.Module):
    """Encoded positions, four layers of ReLU, a linear output."""

    def __init__(self, settings: ReLUSettings, generator: torch.Generator) -> None:
        super().__init__()
        self.settings = settings
        self.encoding = PositionEncoding(settings.in_features, settings.frequencies)
        sizes = [self.encoding.out_features, *[settings.width] * 4]
        # Kaiming's bound keeps the variance through ReLUs; PyTorch's default loses a factor 6 a layer.
        self.layers = nn.ModuleList(
            Dense(a, b, generator, bound=math.sqrt(6 / a), bias=0.0)
            for a, b in itertools.pairwise(sizes)
        )
        self.readout = Dense(settings.width, settings.out_features, generator, bias=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        x = self.encoding(x)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.readout(x)


@method("fit", "wire", family="network of coordinates", paper="arXiv:2301.05187")
@dataclasses.dataclass(frozen=True)
class WireSettings(_Plain):
    """WIRE: complex Gabor wavelets (arXiv:2301.05187); every weight after the first layer is two real numbers.

    Attributes:
        omega: frequency of the wavelets.
        scale: inverse width of their envelope.
    """

    omega: float = 20.0
    scale: float = 10.0

    name = "wire"
    learning_rate = 3e-3

    @property
    def numbers(self) -> int:
        return 2 * self.parameters - (self.in_features + 1) * self.width

    @property
    def published_parameters(self) -> int:
        """Two fixed scalars in each of four layers are counted too."""
        return self.parameters + 2 * 4

    def flops(self, points: int) -> int:
        """A complex product is four real ones."""
        return 4 * super().flops(points)

    def build(self, generator: torch.Generator) -> nn.Module:
        return Wire(self, generator)


class Wire(nn.Module):
    """``h <- exp(i omega (W h + b) - |s (W h + b)|^2)``; the output is the real part of a linear layer."""

    def __init__(self, settings: WireSettings, generator: torch.Generator) -> None:
        super().__init__()
        self.settings = settings
        width = settings.width
        usual = 1 / math.sqrt(settings.in_features)
        self.first = Dense(settings.in_features, width, generator, bias=usual)
        self.layers = nn.ModuleList(ComplexDense(width, width, generator) for _ in range(3))
        self.readout = ComplexDense(width, settings.out_features, generator)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        h = self._wavelet(self.first(x))
        for layer in self.layers:
            h = self._wavelet(layer(h))
        return self.readout(h).real

    def _wavelet(self, y: Tensor) -> Tensor:
        square = y.real.square() + y.imag.square() if y.is_complex() else y.square()
        return torch.exp(1j * self.settings.omega * y - self.settings.scale**2 * square)
