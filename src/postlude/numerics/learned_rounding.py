"""Learned rounding: whether an entry goes down or up on its grid is trained against the loss of the model.

AdaRound (arXiv:2004.10568) keeps the scale ``s`` of a grid and gives every entry a variable ``V``::

    w_soft = s * clamp(floor(w / s) + h(V))          h(V) = clamp(1.2 sigmoid(V) - 0.1, 0, 1)
    loss   = loss(w_soft) + lam * sum (1 - |2 h - 1|^beta)             beta from 20 down to 2

It starts at the float weight, ``h = w / s - floor(w / s)``; the second term drives every ``h`` to 0 or 1, where
rounding it changes nothing any more. What the loss is, the caller says: the output of a layer, or the whole picture.

:class:`StraightThrough` trains the weight itself instead, so that an entry may move by more than one step; what it is
rounded to is what the loss sees, and gradients pass as if nothing was rounded.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.formats import Integer
from postlude.numerics.schemes import Encoded, ScaleAndZero, Scheme

__all__ = [
    "Rounding",
    "StraightThrough",
    "Trained",
    "annealed_power",
    "straight_through",
]

_LOW, _HIGH = -0.1, 1.1


class Trained(Protocol):
    """A weight whose codes are trained."""

    variables: Tensor

    def soft(self) -> Tensor:
        """The weight that the loss sees, differentiable in the variables."""

    def encode(self) -> Encoded:
        """The codes that are stored."""


class _PassThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """``rounded`` bit for bit, with the gradient of ``x``."""
    passed: Tensor = _PassThrough.apply(x, rounded.detach())
    return passed


class StraightThrough:
    """A weight that is trained while its grid stays.

    Args:
        weight: ``[out_features, in_features]``, where it starts.
        scheme: any grid.
        parameters: scale and zero point; from the range of the weight where there are none.

    Attributes:
        variables: the weight, to be trained.
    """

    def __init__(
        self, weight: Tensor, scheme: Scheme, parameters: ScaleAndZero | None = None
    ) -> None:
        self.scheme = scheme
        self._parameters = parameters or scheme.parameters(weight)
        self.variables = weight.detach().float().clone().requires_grad_()

    def soft(self) -> Tensor:
        """The rounded weight, fp32."""
        return straight_through(self.variables, self.encode().decode())

    def encode(self) -> Encoded:
        """Its codes."""
        return self.scheme.encode(self.variables.detach(), self._parameters)


class Rounding:
    """The choice between two neighbours on the grid for every entry of a weight.

    Args:
        weight: ``[out_features, in_features]``.
        scheme: an integer grid.
        parameters: scale and zero point; from the range of the weight where there are none.

    Attributes:
        variables: ``V``, in the shape of the weight's groups; to be trained.

    Raises:
        SettingsError: the grid is not one of integers: its neighbours are not one step apart.
    """

    def __init__(
        self, weight: Tensor, scheme: Scheme, parameters: ScaleAndZero | None = None
    ) -> None:
        if not isinstance(scheme.format, Integer):
            raise SettingsError(
                f"learned rounding needs an integer grid, got {scheme.format.kind}; round to nearest instead"
            )
        self.scheme, self._shape = scheme, weight.shape
        self._scale, self._zero_point = parameters or scheme.parameters(weight)
        steps = scheme.granularity.split(weight.detach().float()) / self._scale.unsqueeze(-1)
        # A range that was clipped leaves entries beyond the grid: they have no second neighbour.
        lowest, highest = self._limits(scheme.format)
        self._floor = steps.floor().clamp(lowest, highest)
        share = ((steps - self._floor).clamp(0, 1) - _LOW) / (_HIGH - _LOW)
        self.variables = torch.logit(share).requires_grad_()
        self._lowest, self._highest = lowest, highest

    def _limits(self, form: Integer) -> tuple[Tensor, Tensor]:
        """Least and largest step of every group."""
        if self._zero_point is None:
            lowest = -form.highest if form.narrow else -form.highest - 1
            one = torch.ones_like(self._scale).unsqueeze(-1)
            return lowest * one, form.highest * one
        zero = self._zero_point.unsqueeze(-1)
        return -zero, 2**form.bits - 1 - zero

    def up(self) -> Tensor:
        """``h(V)``: 0 rounds down, 1 up."""
        return (torch.sigmoid(self.variables) * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def soft(self) -> Tensor:
        """The weight between its neighbours, differentiable in the variables; fp32, shape of the weight."""
        return self._values(self.up())

    def penalty(self, power: float) -> Tensor:
        """``sum (1 - |2 h - 1|^power)``: 0 where every entry has decided."""
        return (1 - (2 * self.up() - 1).abs().pow(power)).sum()

    def encode(self) -> Encoded:
        """Codes of the decided weight."""
        values = self._values((self.up() >= 0.5).float()).detach()
        return self.scheme.encode(values, (self._scale, self._zero_point))

    def _values(self, up: Tensor) -> Tensor:
        steps = (self._floor + up).clamp(self._lowest, self._highest)
        grouped = steps * self._scale.unsqueeze(-1)
        return self.scheme.granularity.join(grouped, self._shape)


def annealed_power(share: float, start: float = 20.0, end: float = 2.0, warm: float = 0.2) -> float:
    """``beta`` when a share of the steps is done: ``start`` for the warm-up, then down a cosine to ``end``."""
    left = min(max((share - warm) / (1 - warm), 0.0), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * left)) / 2
