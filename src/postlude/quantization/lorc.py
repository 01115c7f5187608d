"""LoRC: what rounding loses of a weight, given back by its best low-rank approximation.

    E = W - Q(W) = U S V^T        W ~ Q(W) + (U_r sqrt(S_r)) (sqrt(S_r) V_r^T)

Paper: "ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank Compensation"
(arXiv:2303.08302). Rank 8 and factors of 8 bits are enough there, beside weights in fine groups. It is also the QERA
family's setting with the identity as metric. Factors are split evenly here, scales are float16 per group of 32.

Needs no data. Cost: one SVD a layer; ``8.5 * 8 * (in + out)`` bits by default.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from postlude.numerics.low_rank import Corrected, Round, one_shot
from postlude.numerics.schemes import Scheme
from postlude.quantization.correction import Correction
from postlude.quantization.engine import FLOAT
from postlude.registry import method

__all__ = ["LoRC"]


@method("quantize", "lorc", family="low-rank correction", paper="arXiv:2303.08302")
@dataclasses.dataclass(frozen=True)
class LoRC(Correction):
    """Give back the rounding error by its SVD."""

    own_rank: ClassVar[int] = 8

    activations: int = FLOAT
    group: str | int = 128
    branch: str = "w8a16"

    def fit(
        self, weight: Tensor, rank: int, scheme: Scheme, rounding: Round, metric: Tensor | None
    ) -> Corrected:
        return one_shot(weight, rank, self.branch_format, rounding, of="error", metric=metric)
