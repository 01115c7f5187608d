"""Checkpoints that other libraries quantized, as if Postlude had: one file per layout.

A reader turns the tensors of its layout into codes, scales and zero points of the same meaning, bit for bit; what it
does not know it refuses. ``READERS`` maps the ``quant_method`` of ``config.json`` to its reader.
"""

from __future__ import annotations

from postlude.runs.importing.awq import read_awq
from postlude.runs.importing.compressed_tensors import read_compressed_tensors
from postlude.runs.importing.foreign import Foreign, Reader
from postlude.runs.importing.gptq import read_gptq

__all__ = ["READERS", "Foreign", "Reader"]

READERS: dict[str, Reader] = {
    "awq": read_awq,
    "compressed-tensors": read_compressed_tensors,
    "gptq": read_gptq,
}
