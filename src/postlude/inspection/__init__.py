"""What is inside a model: one file per method; what they hand back is in ``report``.

``outliers`` measures the tensors that a quantizer has to round. ``singular_defects`` finds where massive activations
are made and unmade; ``empirical`` is their direction, ``explosion`` and ``explosion_path`` are how tokens come by them.
``signature`` compares models by that direction, ``update`` tells what tuning changed, and ``comparison`` is both.
"""

from __future__ import annotations

from postlude.inspection.outliers import Outliers, OutliersReport
from postlude.inspection.signature import Signature, SignatureComparison, SignatureReport
from postlude.inspection.singular_defects import SingularDefects, SingularDefectsReport

__all__ = [
    "Outliers",
    "OutliersReport",
    "Signature",
    "SignatureComparison",
    "SignatureReport",
    "SingularDefects",
    "SingularDefectsReport",
]
