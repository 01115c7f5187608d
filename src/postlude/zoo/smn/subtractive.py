"""SMN, the Subtractive Modulative Network (arXiv:2602.16337).

A chain of synthesiser parts: an oscillator of few fixed frequencies with learnable amplitudes, a filter of two
multiplicative masks, a squaring amplifier::

    v   = g0 W0 x                          z  = sum_i amp_i sin(omega_i v)        omega = 8, 40, 120
    m1  = sin(s Wm1 z)                     m2 = mask(s Wm2 m1)                    s = sqrt(6 / width)
    z1  = sin(s W1 (z + m1)) * m2          z2 = sin(s W2 z1)^2                    y = readout

The paper's text and its released code are different networks; each difference is a field of :class:`Variant`, and
``VARIANTS`` has three rows: ``code`` (pictures), ``paper`` (the text) and ``field`` (the released class for radiance
fields). What the text leaves open is our choice and said there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from postlude.errors import SettingsError, UnknownNameError
from postlude.registry import method
from postlude.zoo.smn.layers import Dense, siren_layer
from postlude.zoo.smn.settings import NetworkSettings

__all__ = ["SMN", "VARIANTS", "SMNSettings", "Variant"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"sin": torch.sin, "relu": torch.relu}
_COMBINATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": torch.mul,
    "sum": torch.add,
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """Where the text and the two released classes of SMN differ.

    Attributes:
        mask: activation of the second mask.
        added: which mask is added to the oscillator's output.
        bias: whether layers have (trained) biases.
        concatenate: whether the output reads the first main layer too.
        sigmoid: whether the output is squashed.
        amplitudes: where they start.
        layers: ``unit`` stores weights of ``U(-1, 1)`` under a gain ``sqrt(6 / width)``; ``siren`` has gain 30 and
            SIREN's start.
    """

    mask: Literal["relu", "sin"]
    added: Literal["first", "second"]
    bias: bool
    concatenate: bool
    sigmoid: bool
    amplitudes: tuple[float, float, float]
    layers: Literal["unit", "siren"]


VARIANTS = {
    "code": Variant("relu", "first", False, True, True, (1.3, 0.3, 1.3), "unit"),
    # The text gives neither a start of weights and amplitudes nor their scale: those of the code are our choice, as
    # is the second main layer of the code as its "last hidden feature". Biases start at zero.
    "paper": Variant("sin", "first", True, False, False, (1.3, 0.3, 1.3), "unit"),
    "field": Variant("relu", "second", True, False, False, (1.0, 0.3, 1.0), "siren"),
}


@method("fit", "smn", family="network of coordinates", paper="arXiv:2602.16337")
@dataclasses.dataclass(frozen=True)
class SMNSettings(NetworkSettings):
    """The Subtractive Modulative Network (arXiv:2602.16337).

    Attributes:
        variant: a row of ``VARIANTS``.
        frequencies: of the oscillators.
        learnable: whether amplitudes are trained.
        combine: how the second mask acts on the first main layer.
        square: whether the last feature masks itself.
    """

    variant: str = "code"
    frequencies: tuple[float, ...] = (8.0, 40.0, 120.0)
    learnable: bool = True
    combine: Literal["product", "sum"] = "product"
    square: bool = True

    name = "smn"
    learning_rate = 2e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "frequencies", tuple(float(omega) for omega in self.frequencies))
        if self.variant not in VARIANTS:
            raise UnknownNameError("variant of smn", self.variant, VARIANTS)
        if self.combine not in _COMBINATIONS:
            raise UnknownNameError("combination of smn", self.combine, _COMBINATIONS)
        if not 1 <= len(self.frequencies) <= 3 or min(self.frequencies) <= 0:
            raise SettingsError(
                f"smn has one to three positive oscillator frequencies, got {self.frequencies}"
            )

    @property
    def weights(self) -> int:
        """Entries of matrices."""
        readout = 2 if VARIANTS[self.variant].concatenate else 1
        return self.width * (self.in_features + 4 * self.width + readout * self.out_features)

    @property
    def parameters(self) -> int:
        biases = 5 * self.width + self.out_features if VARIANTS[self.variant].bias else 0
        return self.weights + biases + (len(self.frequencies) if self.learnable else 0)

    @property
    def released_parameters(self) -> int:
        """What the released class registers: three scalars in each of its six layers, of which three act."""
        return self.weights + 3 * 6

    @property
    def published_parameters(self) -> int:
        """Four scalars in each of six layers would explain the published 264,216; the weights are certain."""
        return self.weights + 4 * 6

    def flops(self, points: int) -> int:
        return 2 * self.weights * points

    def build(self, generator: torch.Generator) -> nn.Module:
        return SMN(self, generator)


class SMN(nn.Module):
    """See :class:`SMNSettings` and the formula of this file."""

    def __init__(self, settings: SMNSettings, generator: torch.Generator) -> None:
        super().__init__()
        self.settings = settings
        variant = self._variant = VARIANTS[settings.variant]
        width, count = settings.width, len(settings.frequencies)

        def layer(inputs: int, outputs: int, scale: int) -> Dense:
            gain = math.sqrt(6 / scale)
            bias = 0.0 if variant.bias else None
            return Dense(inputs, outputs, generator, gain=gain, bound=1.0, bias=bias)

        def siren(inputs: int, outputs: int) -> Dense:
            return siren_layer(inputs, outputs, 30.0, generator)

        def plain(inputs: int, outputs: int) -> Dense:
            return Dense(inputs, outputs, generator, bias=1 / math.sqrt(inputs))

        ends = 2 * width if variant.concatenate else width
        if variant.layers == "unit":
            self.first = Dense(
                settings.in_features,
                width,
                generator,
                gain=4.0,
                bound=math.sqrt(9 / 2),
                bias=0.0 if variant.bias else None,
            )
            self.mask1, self.mask2, self.main1, self.main2 = (
                layer(width, width, width) for _ in range(4)
            )
            self.readout = layer(ends, settings.out_features, ends)
        else:
            bound = 1 / settings.in_features
            self.first = Dense(settings.in_features, width, generator, bound=bound, bias=bound)
            self.mask1, self.main1, self.main2 = (siren(width, width) for _ in range(3))
            self.mask2 = plain(width, width)
            self.readout = plain(ends, settings.out_features)
        amplitudes = torch.tensor(variant.amplitudes[:count])
        if settings.learnable:
            self.amplitudes = nn.Parameter(amplitudes)
        else:
            self.register_buffer("amplitudes", amplitudes)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        variant = self._variant
        v = self.first(x)
        z = sum(
            amplitude * torch.sin(omega * v)
            for amplitude, omega in zip(self.amplitudes, self.settings.frequencies, strict=True)
        )
        m1 = torch.sin(self.mask1(z))
        m2 = _ACTIVATIONS[variant.mask](self.mask2(m1))
        added = m1 if variant.added == "first" else m2
        z1 = _COMBINATIONS[self.settings.combine](torch.sin(self.main1(z + added)), m2)
        z2 = torch.sin(self.main2(z1))
        if self.settings.square:
            z2 = z2 * z2
        y = self.readout(torch.cat([z1, z2], dim=-1) if variant.concatenate else z2)
        return torch.sigmoid(y) if variant.sigmoid else y
