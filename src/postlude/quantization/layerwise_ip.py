"""Bits of every layer by an integer programme: the least total loss within a budget of bytes.

    min  sum_l loss(l, bits_l)      subject to      sum_l bits_l weights_l <= budget

Paper: "Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming"
(arXiv:2006.10518), of which the abstract was read. What differs: losses are changes of the network's output rather
than of its task loss, which needs labels; weights are corrected layer by layer by GPTQ (arXiv:2210.17323) where the
paper trains a continuous correction; its re-estimated batch-norm statistics have no counterpart in a vision
transformer. The linears that read one tensor have the same bits. Needs calibration images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from postlude.numerics.budget import Allocation, allocate
from postlude.quantization.budgeted import Budgeted
from postlude.registry import method

__all__ = ["LayerwiseIP"]


@method(
    "quantize",
    "layerwise-ip",
    family="budget: importance and cost",
    paper="arXiv:2006.10518",
    needs=("calibration",),
)
@dataclasses.dataclass(frozen=True)
class LayerwiseIP(Budgeted):
    """Bits of every site by an integer programme; weights corrected layer by layer."""

    rounding: Literal["nearest", "gptq"] = "gptq"

    def choose(
        self, losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int
    ) -> Allocation:
        return allocate(losses, costs, budget)
