"""The 8-bit float of accelerators, ``float8_e4m3fn``: no infinities, two NaN, values up to 448 (arXiv:2209.05433)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from postlude.numerics.formats import Codebook

__all__ = ["float8_codes", "float8_e4m3fn"]


@functools.cache
def float8_e4m3fn() -> Codebook:
    """The values of the type, as a number format; minus zero is zero."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return Codebook(tuple(sorted({value + 0.0 for value in values[values.isfinite()].tolist()})))


def float8_codes(values: Tensor) -> Tensor:
    """Codes of :func:`float8_e4m3fn` for a tensor of that type, ``uint8``, same shape; NaN is not looked for."""
    levels = torch.tensor(float8_e4m3fn().levels(), device=values.device)
    return torch.searchsorted(levels, values.float()).to(torch.uint8)
