"""AWQ: the GEMM layout of AutoAWQ (``quant_method: awq``), 4 bits.

For a linear of ``out`` outputs and ``in`` inputs::

    qweight  int32 [in, out / 8]       eight outputs to a word, in the order 0 2 4 6 1 3 5 7, low bits first
    qzeros   int32 [groups, out / 8]   the same
    scales   [groups, out]

    w[o, i] = scales[g, o] * (q[i, o] - z[g, o]),   g = i // group size

Method: arXiv:2306.00978.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from postlude.errors import CheckpointError
from postlude.numerics.packing import pack
from postlude.runs.importing.foreign import Foreign, integer_layer, refuse, unpack_words

__all__ = ["read_awq"]

# Which of its eight outputs a word holds at each position.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def read_awq(quantization: dict[str, Any], foreign: Foreign) -> None:
    """Read every quantized layer of the checkpoint.

    Raises:
        CheckpointError: a variant that is not known, or tensors that do not fit together.
    """
    bits = quantization.get("bits", quantization.get("w_bit"))
    size = quantization.get("group_size", quantization.get("q_group_size", -1))
    layout = str(quantization.get("version", "gemm")).lower()
    if bits != 4:
        raise refuse("AWQ", f"has {bits}-bit codes (expected 4)")
    if layout != "gemm":
        raise refuse("AWQ", f"is in the layout {layout!r} (expected gemm)")
    paths = foreign.paths("qweight")
    if not paths:
        raise CheckpointError(
            "the configuration says AWQ, but no layer has a qweight; the checkpoint is not whole"
        )
    for path in paths:
        codes = _columns(foreign.take(path, "qweight"), path)
        width, out = codes.shape
        group = size if size > 0 else width
        groups = -(-width // group)
        scales = foreign.take(path, "scales", (groups, out))
        zeros = None
        if quantization.get("zero_point", True) or f"{path}.qzeros" in foreign.tensors:
            zeros = _columns(foreign.take(path, "qzeros", (groups, out // 8)), path).T
        integer_layer(
            foreign,
            path,
            pack(codes.T.contiguous(), 4),
            scales.T,
            zeros,
            bits=4,
            in_features=width,
            group=group,
        )


def _columns(words: Tensor, path: str) -> Tensor:
    """``int32 [rows, columns / 8]`` to ``uint8 [rows, columns]``, columns in their own order."""
    if words.dtype != torch.int32 or words.ndim != 2:
        raise refuse(
            "AWQ", f"has {path} as {words.dtype} of {words.ndim} axes (expected int32 of 2)"
        )
    held = unpack_words(words, 4, words.shape[1] * 8).unflatten(-1, (-1, 8))
    codes = torch.empty_like(held)
    codes[..., list(_ORDER)] = held
    return codes.flatten(-2)
