"""``W = Q + A B``: what every method with a low-rank branch shares.

A layer computes ``Q x_q + A (B x)``: low-bit codes, and beside them two thin factors that read the input before it
is rounded. Methods differ in the metric of the error and in how they fit (:mod:`postlude.numerics.low_rank`).

A branch costs ``rank * (in + out)`` entries of its format and their scales. With ``bytes_as="svdquant:32"`` the rank of
every layer is the largest whose factors, as stored, take no more bytes than those of that method at that rank. A rank
above the smaller side of a layer would add nothing, and is cut to it; ``accounts`` reports all ranks.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from postlude import registry
from postlude.errors import SettingsError
from postlude.numerics.low_rank import BranchFormat, Corrected, Round
from postlude.numerics.moments import MeanVariance, SecondMoment
from postlude.numerics.schemes import Scheme
from postlude.quantization.engine import FLOAT, Quantizer, Rounded, Seen
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import LinearRef, Site
from postlude.surgery.layers import quantized_linears

__all__ = ["Correction", "Metric", "rounded"]

Metric = Literal["identity", "diagonal", "full"]


@dataclasses.dataclass(frozen=True)
class Correction(Quantizer):
    """Base of the settings of every method with a low-rank branch.

    Attributes:
        rank: of the branch of every layer; by default the method's own, or the one that ``bytes_as`` leaves room for.
        branch: its format: bits of the factors and of what they multiply as in ``w8a8`` (in groups of 32 along each
            factor's contraction axis; ``w8a8g64`` for others), or 16.
        bytes_as: ``METHOD:RANK``: a branch may take as many bytes as that method's at that rank, and no more.
    """

    own_rank: ClassVar[int] = 32

    kv: int = FLOAT
    rank: int | None = None
    branch: str = "16"
    bytes_as: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights == FLOAT:
            raise SettingsError(
                f"{self._name} corrects the rounding of weights, but weights stay at 16 bits; give weight bits (w4)"
            )
        rank = self.rank
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
            raise SettingsError(f"{self._name}: rank is {rank!r}; expected 1 or more")
        if not isinstance(self.branch, str):
            raise SettingsError(f"branch is {self.branch!r}; expected a word such as w8a8 or 16")
        BranchFormat.parse(self.branch)
        if self.bytes_as is not None:
            _budget(self.bytes_as)

    @property
    def metric(self) -> Metric:
        """Under which the error of a weight is measured: alone, or with the inputs it meets."""
        return "identity"

    @property
    def reads_inputs(self) -> bool:
        return super().reads_inputs or self.metric != "identity"

    @property
    def rounds_apart(self) -> bool:
        return type(self).round_site is Correction.round_site

    @property
    def branch_format(self) -> BranchFormat:
        return BranchFormat.parse(self.branch)

    def observes(self, site: Site) -> Seen:
        diagonal = self.metric == "diagonal" and self.rounding != "gptq"
        return MeanVariance(site.width) if diagonal else SecondMoment(site.width)

    def rank_of(self, out_features: int, in_features: int) -> int:
        """The rank of the branch of a layer of this shape.

        Raises:
            SettingsError: the branch does not fit in the bytes it was given.
        """
        most, format = min(out_features, in_features), self.branch_format
        rank = min(self.rank or self.own_rank, most)
        if self.bytes_as is None:
            return rank
        budget = _budget_bits(self.bytes_as, out_features, in_features)
        fitting = format.rank_within(budget, out_features, in_features)
        shape, room = f"{out_features} x {in_features}", f"{budget // 8:,} bytes"
        if not fitting:
            raise SettingsError(
                f"no branch in {format} fits on a layer of {shape}: {self.bytes_as} leaves {room}, and rank 1 takes "
                f"{format.stored_bits(out_features, in_features, 1) // 8:,}. Give a larger rank to count as, or "
                "fewer bits"
            )
        if self.rank is not None and rank > fitting:
            raise SettingsError(
                f"a branch of rank {rank} in {format} takes "
                f"{format.stored_bits(out_features, in_features, rank) // 8:,} bytes on a layer of {shape}, and "
                f"{self.bytes_as} leaves {room}: give rank {fitting} or less, or leave the rank out to have it chosen"
            )
        return rank if self.rank is not None else fitting

    def fold(self, checkpoint: Checkpoint) -> None:
        """Nothing is rewritten; a branch that does not fit is refused before anything is computed."""
        for _, site in checkpoint.anatomy.sites():
            for path in site.modules:
                weight = LinearRef(path, site.readers[0].role).weight(checkpoint.model)
                self.rank_of(*weight.shape)

    def round_site(
        self, site: Site, weights: Sequence[Tensor], seen: Seen | None, scheme: Scheme
    ) -> list[Rounded]:
        moment = seen.value() if isinstance(seen, SecondMoment) else None
        rounding = self.rounder(scheme, moment)
        metric = moment
        if self.metric == "diagonal":
            metric = seen.mean_square() if isinstance(seen, MeanVariance) else _diagonal(moment)
        elif self.metric == "identity":
            metric = None
        return [
            rounded(self.fit(weight, self.rank_of(*weight.shape), scheme, rounding, metric))
            for weight in weights
        ]

    @abstractmethod
    def fit(
        self, weight: Tensor, rank: int, scheme: Scheme, rounding: Round, metric: Tensor | None
    ) -> Corrected:
        """Codes and factors for one weight ``[out_features, in_features]``."""

    def accounts(self, checkpoint: Checkpoint) -> Mapping[str, Any]:
        """Ranks and bytes of all branches, and the bytes they were allowed."""
        ranks: dict[int, int] = {}
        bits = budget = 0
        for _, layer in quantized_linears(checkpoint.model):
            if layer.branch is None:
                continue
            ranks[layer.branch.rank] = ranks.get(layer.branch.rank, 0) + 1
            bits += layer.branch.stored_bits()
            if self.bytes_as is not None:
                budget += _budget_bits(self.bytes_as, layer.out_features, layer.in_features)
        report: dict[str, Any] = {
            "format": self.branch,
            "bytes": bits // 8,
            "layers_of_rank": {str(rank): ranks[rank] for rank in sorted(ranks)},
        }
        if self.bytes_as is not None:
            report |= {"bytes_as": self.bytes_as, "bytes_allowed": budget // 8}
        return {"branch": report}


def rounded(fit: Corrected, smoothing: Tensor | None = None) -> Rounded:
    """A fitted weight as the engine takes it."""
    return Rounded(fit.main, fit.up, fit.down, smoothing)


def _diagonal(moment: Tensor | None) -> Tensor | None:
    return None if moment is None else moment.diagonal()


def _budget(text: str) -> tuple[type[Correction], int]:
    """The method and the rank of ``"svdquant:32"``.

    Raises:
        SettingsError: it is not understood, or the method has no branch.
        UnknownNameError: no such method.
    """
    name, colon, number = str(text).partition(":")
    if not colon or not name or not number.isascii() or not number.isdigit() or not int(number):
        raise SettingsError(
            f"bytes_as is {text!r}; expected a method and a rank as in svdquant:32, whose branch decides how many "
            "bytes this one may take"
        )
    settings = registry.find("quantize", name).settings
    if not issubclass(settings, Correction):
        able = [
            info.name
            for info in registry.available("quantize")
            if issubclass(info.settings, Correction)
        ]
        raise SettingsError(
            f"bytes_as is {text!r}, and {name} has no low-rank branch: count as one of {', '.join(able)}"
        )
    return settings, int(number)


def _budget_bits(text: str, out_features: int, in_features: int) -> int:
    settings, rank = _budget(text)
    format = BranchFormat.parse(settings.branch)
    return format.stored_bits(out_features, in_features, min(rank, out_features, in_features))
