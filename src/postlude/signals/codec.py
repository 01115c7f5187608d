"""A fitted network in few bits: which matrix gets how many, and how its weights are rounded.

``bits`` chooses: a whole number gives every matrix that many and leaves the first in fp32, whose entries are
frequencies that a coarse grid would detune; a fraction, or ``mixed``, is a budget of bits a weight, scales included,
that an exact integer programme spends where it hurts the picture least (:mod:`postlude.numerics.budget`). ``rounding``
is ``nearest`` or ``learned`` (AdaRound on the loss of the picture, :mod:`postlude.numerics.learned_rounding`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from postlude.errors import SettingsError, UnknownNameError
from postlude.numerics.budget import allocate
from postlude.numerics.learned_rounding import Rounding, annealed_power
from postlude.numerics.rounding import nearest
from postlude.runs.progress import Progress
from postlude.signals.inr import FLOATS, WIDTHS, Codes, Stored, matrices, rows_of, scheme_of, store
from postlude.signals.picture import Picture
from postlude.signals.training import Training, Unit, optimise
from postlude.zoo.smn.grid import points

__all__ = ["Coding", "encode"]

# Pixels that sensitivities are measured on; more do not change which matrix is the more important one.
_PIXELS = 16_384
# Pixels of a step of learned rounding.
_BATCH = 4096


@dataclasses.dataclass(frozen=True)
class Coding:
    """How the weights of a fitted network are stored.

    Attributes:
        bits: of a weight: a whole number for every matrix but the first, or a mean to be spent.
        mixed: spend also a whole number as a mean.
        rounding: ``nearest`` or ``learned``.
        steps: of learned rounding.
    """

    bits: float = 8
    mixed: bool = False
    rounding: Literal["nearest", "learned"] = "nearest"
    steps: int = 500

    def __post_init__(self) -> None:
        if self.rounding not in _ROUNDINGS:
            raise UnknownNameError("rounding of a network", self.rounding, _ROUNDINGS)
        if self.steps < 1:
            raise SettingsError(f"learned rounding takes 1 step or more, got {self.steps}")
        if self.is_mixed:
            if not 2 <= self.bits <= 32:
                raise SettingsError(f"bits are 2 to 32 on average, got {self.bits:g}")
        elif self.bits not in WIDTHS:
            raise SettingsError(
                f"bits are {', '.join(map(str, WIDTHS))}, or a mean such as 5.5 or with mixed, got {self.bits:g}"
            )

    @property
    def is_mixed(self) -> bool:
        """Whether matrices get different numbers of bits."""
        return self.mixed or self.bits != int(self.bits)


def encode(
    network: nn.Module,
    picture: Picture,
    coding: Coding,
    *,
    made_by: Mapping[str, Any] | None = None,
    seed: int = 0,
    unit: Unit | None = None,
    progress: Progress | None = None,
) -> Stored:
    """A fitted network in as many bits as asked for.

    Args:
        network: one of ``NETWORKS``, fitted to the picture; left as it is.
        picture: what losses are measured on.
        coding: bits and rounding.
        made_by: kept in ``config.json``.
        seed: of the pixels drawn.
        unit, progress: see :func:`postlude.signals.training.optimise`; for learned rounding.

    Raises:
        SettingsError: fewer bits than the coarsest choice takes.
    """
    names = matrices(network)
    bits = (
        _allocated(network, picture, coding.bits, seed)
        if coding.is_mixed
        else {name: 32 if place == 0 else int(coding.bits) for place, name in enumerate(names)}
    )
    codes = _ROUNDINGS[coding.rounding](network, picture, coding, bits, seed, unit, progress)
    return store(network, picture.size, bits, codes, made_by)


def _cost(weight: Tensor, bits: int) -> int:
    """Bits on the disk, scales included."""
    rows = rows_of(weight)
    return bits * rows.numel() if bits in FLOATS else scheme_of(bits).stored_bits(*rows.shape)


def _coarse(weight: Tensor, bits: int) -> Tensor:
    """A weight as it comes back from so many bits, rounded to nearest."""
    if bits in FLOATS:
        return weight.to(FLOATS[bits]).float()
    return nearest(rows_of(weight), scheme_of(bits)).decode().reshape(weight.shape)


@torch.no_grad()
def _allocated(network: nn.Module, picture: Picture, mean: float, seed: int) -> dict[str, int]:
    """Bits of every matrix: least sum of the errors that each of them alone brings into the picture."""
    names = matrices(network)
    state = {name: value.detach() for name, value in network.state_dict().items()}
    x, target = _sample(picture, seed, next(network.parameters()).device)
    base = float(functional.mse_loss(network(x), target))
    losses = [
        [
            float(
                functional.mse_loss(
                    functional_call(network, {name: _coarse(state[name], bits)}, (x,)), target
                )
            )
            - base
            for bits in WIDTHS
        ]
        for name in names
    ]
    costs = [[_cost(state[name], bits) for bits in WIDTHS] for name in names]
    entries = sum(state[name].numel() for name in names)
    found = allocate(losses, costs, math.floor(mean * entries))
    return {name: WIDTHS[option] for name, option in zip(names, found.options, strict=True)}


def _sample(picture: Picture, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Some pixels, or all: points and values."""
    flat = picture.pixels.reshape(-1, picture.channels)
    chosen = torch.arange(len(flat))
    if len(flat) > _PIXELS:
        chosen = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))[:_PIXELS]
    return points(chosen, *picture.size).to(device), (flat[chosen] / 255).to(device)


def _round_to_nearest(
    network: nn.Module,
    picture: Picture,
    coding: Coding,
    bits: Mapping[str, int],
    seed: int,
    unit: Unit | None,
    progress: Progress | None,
) -> Codes:
    state = network.state_dict()
    return {
        name: nearest(rows_of(state[name]), scheme_of(count))
        for name, count in bits.items()
        if count not in FLOATS
    }


class _Learning(nn.Module):
    """The variables of all matrices, as parameters."""

    def __init__(self, roundings: Mapping[str, Rounding]) -> None:
        super().__init__()
        self.variables = nn.ParameterList()
        for rounding in roundings.values():
            rounding.variables = nn.Parameter(rounding.variables.detach())
            self.variables.append(rounding.variables)


def _learn_rounding(
    network: nn.Module,
    picture: Picture,
    coding: Coding,
    bits: Mapping[str, int],
    seed: int,
    unit: Unit | None,
    progress: Progress | None,
) -> Codes:
    state = network.state_dict()
    roundings = {
        name: Rounding(rows_of(state[name]), scheme_of(count))
        for name, count in bits.items()
        if count not in FLOATS
    }
    if not roundings:
        return {}
    flat = picture.pixels.reshape(-1, picture.channels)
    device = next(network.parameters()).device
    kept = {name: value.detach() for name, value in state.items()}
    entries = sum(rounding.variables.numel() for rounding in roundings.values())

    def loss(step: int, draw: torch.Generator) -> Tensor:
        chosen = torch.randint(len(flat), (min(len(flat), _BATCH),), generator=draw)
        soft = {name: r.soft().reshape(state[name].shape) for name, r in roundings.items()}
        found = functional_call(
            network, {**kept, **soft}, (points(chosen, *picture.size).to(device),)
        )
        error = functional.mse_loss(found, (flat[chosen] / 255).to(device))
        power = annealed_power(step / coding.steps)
        penalty = sum((r.penalty(power) for r in roundings.values()), torch.zeros(()))
        # Adam sees ratios only: with this weight entries decide in the second half of the steps. Our choice.
        return error + penalty / entries

    training = Training(steps=coding.steps, learning_rate=0.1, batch=_BATCH)
    optimise(
        _Learning(roundings),
        loss,
        training,
        seed=seed,
        unit=unit,
        progress=progress,
        name="rounding",
    )
    return {name: rounding.encode() for name, rounding in roundings.items()}


_ROUNDINGS: dict[str, Callable[..., Codes]] = {
    "nearest": _round_to_nearest,
    "learned": _learn_rounding,
}
