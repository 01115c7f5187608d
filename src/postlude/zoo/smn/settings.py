"""What the settings of every network of coordinates have in common: sizes, counts, operations."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import nn

from postlude.errors import SettingsError

__all__ = ["NetworkSettings"]


@dataclasses.dataclass(frozen=True)
class NetworkSettings:
    """What every network of coordinates has.

    Attributes:
        width: of the hidden layers.
        in_features: coordinates of a point.
        out_features: values at a point.
    """

    width: int = 256
    in_features: int = 2
    out_features: int = 3

    name: ClassVar[str]
    learning_rate: ClassVar[float]

    def __post_init__(self) -> None:
        for field in ("width", "in_features", "out_features"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SettingsError(
                    f"{self.name}: {field} is {value!r}; expected a whole number from 1"
                )

    @property
    def parameters(self) -> int:
        """Numbers that are trained; a complex one counts once, as the papers do."""
        raise NotImplementedError

    @property
    def numbers(self) -> int:
        """Real numbers that are trained and stored; a complex one counts twice."""
        return self.parameters

    @property
    def published_parameters(self) -> int:
        """What arXiv:2602.16337 counts: also scalars that do not act."""
        return self.parameters

    def flops(self, points: int) -> int:
        """Floating-point operations of ``points`` values as arXiv:2602.16337 counts: two a weight."""
        return 2 * self.published_parameters * points

    def build(self, generator: torch.Generator) -> nn.Module:
        """A network with fresh weights."""
        raise NotImplementedError
