"""What a kernel declares, and how it computes."""

from __future__ import annotations

import importlib.util
import os
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from postlude.numerics.formats import Integer
from postlude.surgery.kernels.layouts import Layout
from postlude.surgery.layers import QuantizedLinear

__all__ = [
    "Kernel",
    "integer_format",
    "no_cpu_op",
    "no_triton",
    "pieces",
    "rounded_input",
    "rounding_cost",
]

# Entries of an input that are rounded at once on a CPU: fp32 copies of them stay in the cache.
_CACHED = 1 << 17


class Kernel(ABC):
    """One way to compute ``Q_in(x) W_q^T + bias``. Stateless: what it keeps for a layer is in ``extras``.

    Online transforms are applied before, by the layer, so every kernel takes layers with any of them.

    Attributes:
        name: what it is asked for by.
        layouts: names of the layouts whose weight it can read.
    """

    name: ClassVar[str]
    layouts: ClassVar[tuple[str, ...]]

    @abstractmethod
    def takes(self, layer: QuantizedLinear, dtype: torch.dtype, device: torch.device) -> str | None:
        """None where it computes this layer on inputs of that type and place; else the reason it does not."""

    @abstractmethod
    def cost(self, layer: QuantizedLinear, rows: int, layout: str) -> float:
        """Estimated nanoseconds for ``rows`` tokens on one core; for choosing between kernels only."""

    def prepare(self, layer: QuantizedLinear, weight: Layout) -> dict[str, Tensor]:
        """What it keeps beside the weight (scales in its own form); made at its first use of a layer."""
        return {}

    @abstractmethod
    def run(
        self, layer: QuantizedLinear, x: Tensor, weight: Layout, extras: dict[str, Tensor]
    ) -> Tensor:
        """``x [rows, in_features]``, transformed and not yet quantized, to ``[rows, out_features]``."""


def integer_format(layer: QuantizedLinear) -> Integer | None:
    """The format of the weight where it is a uniform integer grid."""
    scheme = layer.weight_scheme
    return scheme.format if scheme is not None and isinstance(scheme.format, Integer) else None


def rounding_cost(layer: QuantizedLinear, rows: int) -> float:
    """Estimated nanoseconds for quantizing the input."""
    return 50_000 + 4 * rows * layer.in_features if layer.input_scheme is not None else 0


def pieces(layer: QuantizedLinear, x: Tensor) -> list[slice]:
    """Rows of ``x [rows, in_features]`` to round at a time; more than one piece only where rows do not share a scale.

    Rounding makes half a dozen fp32 copies. Of a whole prompt, fetching memory for them takes longer than the
    arithmetic, and longer than the product that follows.
    """
    scheme, step = layer.input_scheme, max(_CACHED // max(x.shape[1], 1), 1)
    shared = scheme is None or scheme.granularity.kind == "tensor" or x.device.type != "cpu"
    if shared or step >= len(x):
        return [slice(0, len(x))]
    return [slice(start, start + step) for start in range(0, len(x), step)]


def rounded_input(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """``layer.quantized_input(x)`` of ``x [rows, in_features]``, a piece at a time."""
    parts = pieces(layer, x)
    if len(parts) == 1:
        return layer.quantized_input(x)
    out = torch.empty_like(x)
    for part in parts:
        out[part] = layer.quantized_input(x[part])
    return out


def no_cpu_op(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why PyTorch's CPU operators on packed weights cannot run on such inputs; None where they can."""
    if device.type != "cpu":
        return f"runs on the CPU, the layer is on {device.type}"
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        return f"takes bfloat16 activations; with {name} the op falls to a slow path"
    return None


def no_triton(device: torch.device) -> str | None:
    """Why a Triton program cannot run on that device; None where it can.

    With ``TRITON_INTERPRET=1`` it runs on the CPU as well, in Triton's interpreter, slowly: that is for tests.
    """
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"runs on a GPU, the layer is on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "needs the triton package, which is not installed (pip install triton)"
    return None
