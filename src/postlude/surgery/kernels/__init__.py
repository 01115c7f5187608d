"""Kernels: ways to compute a :class:`~postlude.surgery.layers.QuantizedLinear` from its packed weight.

    from postlude.surgery import kernels

    for one in kernels.use(model, "auto"):          # or the name of a kernel, or "simulate"
        print(one.layer, one.decode, one.prefill, one.refused)

Without this a model simulates: it decodes its weights and multiplies in floating point, which is what
quantization and evaluation mean by a quantized model. A kernel is one file with one class; ``KERNELS`` is the
table.
"""

from postlude.surgery.kernels.choice import (
    AUTO,
    DECODE,
    KERNELS,
    PREFILL,
    Assignment,
    assign,
    assignments,
    extra_bytes,
    use,
)
from postlude.surgery.kernels.kernel import Kernel
from postlude.surgery.kernels.layouts import LAYOUTS, Layout

__all__ = [
    "AUTO",
    "DECODE",
    "KERNELS",
    "LAYOUTS",
    "PREFILL",
    "Assignment",
    "Kernel",
    "Layout",
    "assign",
    "assignments",
    "extra_bytes",
    "use",
]
