"""MPTQ-ViT: inputs shifted and scaled until they are symmetric, and bits bought where a byte helps most.

SQ-b moves every channel behind a LayerNorm to the middle of its range ``c`` and narrows it by ``s``; norm and linears
take both in, as in :mod:`postlude.quantization.vision`::

    x <- (x - c) / s          s = k h^alpha, h: half of the channel's range

Greedy MP starts at the lowest bits and raises, again and again, the site with the steepest fall of loss per byte
(:func:`postlude.numerics.budget.allocate_greedy`).

OPT-m gives values above 0 behind GELU steps that are ``2^m`` times as wide as those below (``two-sided`` in
:mod:`postlude.numerics.activation_grids`), with the ``m`` that the data asks for.

Paper: "MPTQ-ViT: Mixed-Precision Post-Training Quantization for Vision Transformer" (arXiv:2401.14895), of which the
abstract was read; the formulas are ours. Needs calibration images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.activation_grids import ActivationGrid, LogSqrt2, TwoSided
from postlude.numerics.budget import Allocation, allocate_greedy
from postlude.quantization.budgeted import Budgeted
from postlude.registry import method

__all__ = ["MPTQGreedy", "shifted_range"]


def shifted_range(rows: Tensor, bits: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point for each column of ``[rows, columns]``, as SQ-b implies them, fp64 ``[columns]``.

    The middle of every column has the middle code, and scales go with the ``alpha``-th power of its range.
    """
    low, high = rows.double().amin(0), rows.double().amax(0)
    middle, half = (low + high) / 2, ((high - low) / 2).clamp(min=1e-12)
    scale = half**alpha * (half ** (1 - alpha)).max() * 2 / (2**bits - 1)
    return scale, (2**bits - 1) / 2 - middle / scale


@method(
    "quantize",
    "mptq-greedy",
    family="budget: importance and cost",
    paper="arXiv:2401.14895",
    needs=("calibration",),
)
@dataclasses.dataclass(frozen=True)
class MPTQGreedy(Budgeted):
    """Inputs made symmetric in the norm; bits of every site bought greedily.

    Attributes:
        alpha: power of the range of an input channel that its scale goes with, 0 to 1.
    """

    alpha: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise SettingsError(f"alpha is between 0 and 1, got {self.alpha}")

    def channel_range(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return shifted_range(rows, self.activations, self.alpha)

    def post_softmax(self) -> ActivationGrid:
        return LogSqrt2(self.activations)

    def post_gelu(self) -> ActivationGrid:
        return TwoSided(self.activations)

    def choose(
        self, losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int
    ) -> Allocation:
        return allocate_greedy(losses, costs, budget)
