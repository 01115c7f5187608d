"""What kernels that multiply codes share.

With codes ``u`` of the input (scale ``a``, zero point ``z``) and ``v`` of the weight (scale ``s``, zero point
``w``), both constant over a run of inputs, one run contributes::

    a s sum (u - z)(v - w)  =  a s [ sum u v - w sum u ]  -  (a z) [ s sum (v - w) ]

The first bracket is an integer product; the second depends on the weight alone and is kept. A zero point of the
input may lie as far outside the codes as it likes: it never enters the integers. Runs are cut where a group of
the input or of the weight ends; one run where neither has groups.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from postlude.numerics.formats import Integer
from postlude.surgery.kernels.kernel import integer_format, pieces
from postlude.surgery.kernels.layouts import Layout
from postlude.surgery.layers import QuantizedLinear
from postlude.surgery.static_quantizers import StaticQuantizer

__all__ = [
    "LARGEST_WIDTH",
    "add_input_zero",
    "input_codes",
    "refuse",
    "runs",
    "weight_parameters",
    "weight_sums",
]

# |code| <= 128 twice, summed over this many inputs, stays inside int32 with room for the zero points.
LARGEST_WIDTH = 60_000
# Output channels whose codes are unpacked at once.
_TILE = 512


def runs(layer: QuantizedLinear) -> list[tuple[int, int, int, int]]:
    """``(first, last, input group, weight group)``: inputs over which all scales are constant."""
    width = layer.in_features
    sizes = [
        scheme.granularity.size or width
        for scheme in (layer.input_scheme, layer.weight_scheme)
        if scheme is not None
    ]
    edges = sorted({edge for size in sizes for edge in range(0, width, size)} | {width})
    return [
        (first, last, first // sizes[0], first // sizes[1])
        for first, last in itertools.pairwise(edges)
    ]


def weight_parameters(layer: QuantizedLinear) -> tuple[Tensor, Tensor]:
    """Scale and zero point as fp32 ``[out_features, groups]``; the zero point of unsigned codes."""
    format_ = integer_format(layer)
    if format_ is None:
        raise ValueError("the weight is not an integer")
    scale = layer.scale.float()
    offset = layer.zero_point
    zero = torch.full_like(scale, format_.highest + 1) if offset is None else offset.float()
    if scale.ndim == 1:
        shape = (layer.out_features, 1)
        return scale.expand(shape), zero.expand(shape)
    return scale, zero


def input_codes(layer: QuantizedLinear, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """``int8`` codes, and fp32 scale and zero point ``[rows, groups]``; no zero point where it is 0."""
    scheme = layer.input_scheme
    if scheme is None or not isinstance(scheme.format, Integer):
        raise ValueError("the input is not quantized to integers")
    bits, parts, found = scheme.format.bits, pieces(layer, x), []
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    for part in parts:
        found.append(scheme.parameters(x[part]))
        codes[part] = scheme.encode(x[part], found[-1]).codes
    scale = torch.cat([one for one, _ in found]) if len(parts) > 1 else found[0][0]
    zeros = [one for _, one in found if one is not None]
    zero = None if not zeros else torch.cat(zeros) if len(parts) > 1 else zeros[0]
    if scale.ndim == 1:
        scale = scale.expand(len(x), 1)
        zero = None if zero is None else zero.expand(len(x), 1)
    if bits == 8:
        # Codes above 127 wrap around to negative numbers, and the subtraction wraps them back.
        return codes.view(torch.int8).add_(-128), scale, None if zero is None else zero - 128
    signed = codes.view(torch.int8)
    return (signed.add_(-(2 ** (bits - 1))) if zero is None else signed), scale, zero


def weight_sums(layer: QuantizedLinear, weight: Layout) -> dict[str, Tensor]:
    """``s sum (v - w)`` of every channel and run, fp32 ``[out_features, runs]``; empty where inputs have no zero."""
    scheme = layer.input_scheme
    if scheme is None or not scheme.format.zero_point_bits:
        return {}
    every = runs(layer)
    scale, zero = weight_parameters(layer)
    sums = scale.new_empty(layer.out_features, len(every))
    for start in range(0, layer.out_features, _TILE):
        stop = min(start + _TILE, layer.out_features)
        codes = weight.unsigned(layer, start, stop)
        for index, (first, last, _, group) in enumerate(every):
            total = codes[:, first:last].sum(-1, dtype=torch.int32).float()
            total -= (last - first) * zero[start:stop, group]
            sums[start:stop, index] = total * scale[start:stop, group]
    return {"weight_sums": sums}


def add_input_zero(
    out: Tensor,
    layer: QuantizedLinear,
    input_scale: Tensor,
    input_zero: Tensor | None,
    sums: Tensor | None,
) -> None:
    """Subtract ``(a z) [s sum (v - w)]`` of every run from ``out [rows, channels]``, in place.

    Args:
        out: of some channels or all.
        layer: its runs.
        input_scale, input_zero: from :func:`input_codes`.
        sums: :func:`weight_sums` of those channels.
    """
    if input_zero is None or sums is None:
        return
    index = torch.tensor([piece[2] for piece in runs(layer)], device=out.device)
    out.addmm_((input_scale * input_zero)[:, index], sums.T, alpha=-1)


def refuse(layer: QuantizedLinear, dtype: torch.dtype) -> str | None:
    """Why codes of this layer cannot be multiplied; None where they can."""
    if integer_format(layer) is None:
        return "takes integer weights"
    if isinstance(layer.transform, StaticQuantizer):
        return "takes inputs that are scaled at run time, a static grid rounds these"
    if layer.input_scheme is None:
        return "takes quantized inputs, these stay in floating point"
    if not isinstance(layer.input_scheme.format, Integer):
        return "takes integer inputs"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes in float32, the activations are {str(dtype).removeprefix('torch.')}"
    if layer.in_features > LARGEST_WIDTH:
        return f"sums at most {LARGEST_WIDTH} products exactly, got {layer.in_features}"
    return None
