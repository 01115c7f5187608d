"""GPTQ: the layout of AutoGPTQ, GPTQModel and auto-round (``quant_method: gptq``).

For a linear of ``out`` outputs and ``in`` inputs::

    qweight  int32 [in bits / 32, out]       codes packed down the column, low bits first
    qzeros   int32 [groups, out bits / 32]   zero points packed along the row
    scales   [groups, out]
    g_idx    int32 [in]                      the group of every input

    w[o, i] = scales[g_idx[i], o] * (q[i, o] - z[g_idx[i], o])

Layout ``gptq`` (version 1) stores ``z - 1``, layout ``gptq_v2`` stores ``z``. The 1 is subtracted from whole words,
so a ``z`` of 0 borrows from its neighbour, and it is given back in the same way. With ``desc_act`` the groups of
``g_idx`` are not neighbours: inputs are put in the order of their groups at run time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from postlude.errors import CheckpointError
from postlude.runs.importing.foreign import (
    Foreign,
    integer_layer,
    packed_along_rows,
    refuse,
    unpack_words,
)

__all__ = ["read_gptq"]

_BITS = (2, 4, 8)


def read_gptq(quantization: dict[str, Any], foreign: Foreign) -> None:
    """Read every quantized layer of the checkpoint.

    Raises:
        CheckpointError: a variant that is not known, or tensors that do not fit together.
    """
    bits, size = quantization.get("bits"), quantization.get("group_size", -1)
    layout = quantization.get("checkpoint_format") or "gptq"
    if bits not in _BITS:
        raise refuse("GPTQ", f"has {bits}-bit codes (expected {', '.join(map(str, _BITS))})")
    if layout not in ("gptq", "gptq_v2"):
        raise refuse("GPTQ", f"is in the layout {layout!r} (expected gptq or gptq_v2)")
    if quantization.get("dynamic") or quantization.get("modules_in_block_to_quantize_bits"):
        raise refuse("GPTQ", "has settings of its own for some layers (dynamic)")
    paths = foreign.paths("qweight")
    if not paths:
        raise CheckpointError(
            "the configuration says GPTQ, but no layer has a qweight; the checkpoint is not whole"
        )
    for path in paths:
        _layer(foreign, path, bits, size, layout == "gptq")


def _layer(foreign: Foreign, path: str, bits: int, size: int, minus_one: bool) -> None:
    words = _words(foreign, path, "qweight")
    out, width = words.shape[1], words.shape[0] * 32 // bits
    group = size if size > 0 else width
    groups = -(-width // group)
    scales = foreign.take(path, "scales", (groups, out))
    stored = _words(foreign, path, "qzeros")
    if minus_one:
        # In 64 bits, since the sum of a whole word may not fit 32; what leaves the word is gone either way.
        ones = sum(1 << shift for shift in range(0, 32, bits))
        stored = (stored.long() + ones).to(torch.int32)
    zeros = unpack_words(stored, bits, out)
    g_idx = foreign.take(path, "g_idx", (width,)) if f"{path}.g_idx" in foreign.tensors else None
    integer_layer(
        foreign,
        path,
        packed_along_rows(words.T, bits, width),
        scales.T,
        zeros.T,
        bits=bits,
        in_features=width,
        group=group,
        groups_of=g_idx,
    )


def _words(foreign: Foreign, path: str, name: str) -> Tensor:
    words = foreign.take(path, name)
    if words.dtype != torch.int32 or words.ndim != 2:
        raise refuse(
            "GPTQ", f"has {path}.{name} as {words.dtype} of {words.ndim} axes (expected int32 of 2)"
        )
    return words
