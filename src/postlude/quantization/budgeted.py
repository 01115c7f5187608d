"""Bits of every site of a vision transformer under one budget of weight bytes.

The ``weights`` of these methods is an average: a budget of so many bits a weight, spent where it helps. What a site
loses at a number of bits is measured, not modelled: the mean squared change of the network's output on the
calibration pictures while the weights of that site alone are rounded. What to buy is then chosen by
:mod:`postlude.numerics.budget`, which takes losses to add up over sites.

Everything else is that of :class:`~postlude.quantization.vision.VisionQuantizer`. Cost: a pass over the calibration
pictures for every site and every option.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.budget import Allocation
from postlude.numerics.formats import Integer
from postlude.numerics.rounding import nearest
from postlude.numerics.schemes import Granularity, Scheme
from postlude.quantization.engine import FLOAT
from postlude.quantization.vision import VisionQuantizer
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import Site
from postlude.surgery.batches import Calibration, forward_batches, placed_on

__all__ = ["Budgeted", "site_losses"]

_BITS = "bits_of_sites"


@dataclasses.dataclass(frozen=True)
class Budgeted(VisionQuantizer):
    """Base of the methods that give sites different bits.

    Attributes:
        lowest, highest: bits that a site may have; all between are options.
    """

    lowest: int = 2
    highest: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.lowest <= self.highest <= 8:
            raise SettingsError(
                f"{self._name}: sites may have {self.lowest} to {self.highest} bits; expected 2 to 8, in this order"
            )
        if self.weights != FLOAT and self.weights < self.lowest:
            raise SettingsError(
                f"{self._name}: an average of {self.weights} bits cannot be had of options from {self.lowest} bits up; "
                "lower lowest or give more bits"
            )

    @abstractmethod
    def choose(
        self, losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int
    ) -> Allocation:
        """Options for all sites within the budget."""

    @property
    def options(self) -> tuple[int, ...]:
        """Numbers of bits."""
        return tuple(range(self.lowest, self.highest + 1))

    def statistics(
        self, checkpoint: Checkpoint, calibration: Calibration | None, seed: int
    ) -> Mapping[str, Tensor]:
        found = dict(super().statistics(checkpoint, calibration, seed))
        if self.weights == FLOAT or calibration is None:
            return found
        model = checkpoint.model
        sites = [site for _, site in checkpoint.anatomy.sites()]
        schemes = [self._scheme(bits) for bits in self.options]
        losses = site_losses(checkpoint, calibration, sites, schemes, clip=self.clip)
        sizes = [sum(reader.weight(model).numel() for reader in site.readers) for site in sites]
        unit = math.gcd(*sizes)
        costs = [[bits * (size // unit) for bits in self.options] for size in sizes]
        chosen = self.choose(losses, costs, self.weights * sum(sizes) // unit)
        found[_BITS] = torch.tensor([self.options[option] for option in chosen.options])
        return found

    def rewrite(self, checkpoint: Checkpoint, statistics: Mapping[str, Tensor], seed: int) -> None:
        super().rewrite(checkpoint, statistics, seed)
        if _BITS in statistics:
            paths = [site.modules[0] for _, site in checkpoint.anatomy.sites()]
            # Found for this model and no setting, so no field either.
            bits = dict(zip(paths, statistics[_BITS].tolist(), strict=True))
            object.__setattr__(self, "_allocated", bits)

    def weight_scheme(self, site: Site) -> Scheme | None:
        if self.weights == FLOAT:
            return None
        allocated: Mapping[str, int] = getattr(self, "_allocated", {})
        return self._scheme(allocated.get(site.modules[0], self.weights))

    def _scheme(self, bits: int) -> Scheme:
        return Scheme(Integer(bits, symmetric=False), Granularity.parse(self.group))

    def accounts(self, checkpoint: Checkpoint) -> Mapping[str, Any]:
        """``bits``: of the weights of every site, by the path of its first linear."""
        return {"bits": dict(getattr(self, "_allocated", {}))}


@torch.no_grad()
def site_losses(
    checkpoint: Checkpoint,
    calibration: Calibration,
    sites: Sequence[Site],
    schemes: Sequence[Scheme],
    *,
    clip: bool,
) -> list[list[float]]:
    """Mean squared change of the output by rounding each site alone, for each scheme ``[sites][schemes]``."""
    model: Any = checkpoint.model
    batches = [placed_on(batch, model) for batch in forward_batches(calibration)]

    def outputs() -> Tensor:
        return torch.cat([model(**batch)[0].double() for batch in batches])

    exact = outputs()
    losses: list[list[float]] = []
    for site in sites:
        row = []
        for scheme in schemes:
            kept = [copy.deepcopy(reader.weight(model)) for reader in site.readers]
            for reader, weight in zip(site.readers, kept, strict=True):
                rounded = nearest(weight, scheme, clip=clip).decode()
                reader.weight(model).copy_(rounded)
            row.append(float((outputs() - exact).square().mean()))
            for reader, weight in zip(site.readers, kept, strict=True):
                reader.weight(model).copy_(weight)
        losses.append(row)
    return losses
