"""What is inside a model: one file per method; what they hand back is in ``report``.

``outliers`` measures the tensors that a quantizer has to round, ``singular_defects`` finds where massive activations
are made and unmade (``empirical`` is their direction, ``explosion`` how tokens come by them), and ``signature``
compares models by that direction.
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
