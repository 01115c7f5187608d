"""RTN: round to nearest, nothing else.

Every weight goes to the nearest value of its grid, every activation likewise at run time. The baseline that a
method must beat, and the fastest to make. Needs no data; costs one pass over the weights.
"""

from __future__ import annotations

import dataclasses

from postlude.quantization.engine import Quantizer
from postlude.registry import method

__all__ = ["RTN"]


@method("quantize", "rtn", family="nearest rounding")
@dataclasses.dataclass(frozen=True)
class RTN(Quantizer):
    """Round to nearest, no compensation and no rewrite."""
