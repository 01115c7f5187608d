"""The Triton programs of :mod:`~postlude.surgery.kernels.triton_packed` and ``triton_integer``.

Imports triton, so it is imported only where one of them runs. Codes lie as in the checkpoint: ``PER = 8 // BITS``
of them to a byte, the first in the lowest bits. They are never put in order: the inputs whose codes are the lowest
of their bytes meet those, the next ones the next, as ``PER`` products over one load of bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["integer_rows", "packed_rows"]


@triton.jit
def _weight_tile(
    bytes_,
    n,
    k,
    first_k,
    part: tl.constexpr,
    scale_ptr,
    zero_ptr,
    scale_n,
    scale_g,
    width,
    channels,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    ONE_GROUP: tl.constexpr,
):
    """``(code - zero) * scale`` in fp32 ``[N, J]``, the operations of ``Scheme.decode``."""
    code = ((bytes_ >> (BITS * part)) & (2**BITS - 1)).to(tl.float32)
    if ONE_GROUP:
        # The whole tile lies in one group: a scale a channel, and no lookup an input.
        at = n * scale_n + (first_k // GROUP) * scale_g
        scale = tl.load(scale_ptr + at, mask=n < channels, other=0.0).to(tl.float32)[:, None]
        if HAS_ZERO:
            zero = tl.load(zero_ptr + at, mask=n < channels, other=0).to(tl.float32)[:, None]
            code = code - zero
        else:
            code = code - ZERO
    else:
        at = n[:, None] * scale_n + (k // GROUP)[None, :] * scale_g
        inside = (n < channels)[:, None] & (k < width)[None, :]
        scale = tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_ZERO:  # noqa: SIM108 - decided when the program is compiled
            code = code - tl.load(zero_ptr + at, mask=inside, other=0).to(tl.float32)
        else:
            code = code - ZERO
    return code * scale


@triton.jit
def packed_rows(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    out_ptr,
    rows,
    width,
    channels,
    row_bytes,
    scale_n,
    scale_g,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    ONE_ROW: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """``x [rows, width]`` times packed weights, sums in fp32.

    Tiles are multiplied on matrix units. ``ONE_ROW``, with a ``BLOCK_M`` of 1, leaves those out: they would be idle at
    15 sixteenths, and its time is that of reading the codes. ``WIDE`` is for the interpreter, which multiplies the bits
    of bf16 numbers as if they were integers: their products are the same in fp32.
    """
    PER: tl.constexpr = 8 // BITS
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_J)
    if ONE_ROW:  # noqa: SIM108 - decided when the program is compiled
        total = tl.full((BLOCK_N, BLOCK_J), 0.0, tl.float32)
    else:
        total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for first in range(0, row_bytes, BLOCK_J):
        at = first + j
        inside = (n < channels)[:, None] & (at < row_bytes)[None, :]
        bytes_ = tl.load(codes_ptr + n[:, None] * row_bytes + at[None, :], mask=inside, other=0)
        for part in tl.static_range(PER):
            k = at * PER + part
            w = _weight_tile(
                bytes_,
                n,
                k,
                first * PER,
                part,
                scale_ptr,
                zero_ptr,
                scale_n,
                scale_g,
                width,
                channels,
                BITS,
                GROUP,
                ZERO,
                HAS_ZERO,
                ONE_GROUP,
            )
            # Weights are rounded to the type of the activations, as the simulation does.
            if ONE_ROW:
                x = tl.load(x_ptr + k, mask=k < width, other=0.0)
                total += w.to(x.dtype).to(tl.float32) * x.to(tl.float32)[None, :]
            else:
                there = (m < rows)[:, None] & (k < width)[None, :]
                x = tl.load(x_ptr + m[:, None] * width + k[None, :], mask=there, other=0.0)
                w = w.to(x.dtype)
                if WIDE:
                    x, w = x.to(tl.float32), w.to(tl.float32)
                total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    out = tl.reduce(total, 1, tl.standard._sum_combine)[None, :] if ONE_ROW else total
    if HAS_BIAS:
        out += tl.load(bias_ptr + n, mask=n < channels, other=0.0).to(tl.float32)[None, :]
    at = m[:, None] * channels + n[None, :]
    inside = (m < rows)[:, None] & (n < channels)[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def integer_rows(
    x_ptr,
    input_scale_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    runs_ptr,
    out_ptr,
    rows,
    channels,
    row_bytes,
    run_count,
    input_m,
    input_g,
    scale_n,
    scale_g,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """``sum over runs of a s [sum u v - w sum u]``, see :mod:`postlude.surgery.kernels.integers`.

    ``x_ptr`` is ``int8 [PER, rows, row_bytes]``: the codes of inputs that meet the same bits of a byte. Products
    and sums of a run are int32. ``out_ptr`` is fp32.
    """
    PER: tl.constexpr = 8 // BITS
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_J)
    out = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for run in range(0, run_count):
        first = tl.load(runs_ptr + 4 * run)
        last = tl.load(runs_ptr + 4 * run + 1)
        input_group = tl.load(runs_ptr + 4 * run + 2)
        group = tl.load(runs_ptr + 4 * run + 3)
        product = tl.full((BLOCK_M, BLOCK_N), 0, tl.int32)
        sums = tl.full((BLOCK_M,), 0, tl.int32)
        for start in range(first // PER, (last + PER - 1) // PER, BLOCK_J):
            at = start + j
            inside = (n < channels)[:, None] & (at < row_bytes)[None, :]
            bytes_ = tl.load(codes_ptr + n[:, None] * row_bytes + at[None, :], mask=inside, other=0)
            for part in tl.static_range(PER):
                k = at * PER + part
                there = (m < rows)[:, None] & ((k >= first) & (k < last))[None, :]
                place = (part * rows + m[:, None]) * row_bytes + at[None, :]
                u = tl.load(x_ptr + place, mask=there, other=0)
                if BITS == 8:
                    v = (bytes_ ^ 128).to(tl.int8, bitcast=True)
                else:
                    v = ((bytes_ >> (BITS * part)) & (2**BITS - 1)).to(tl.int8)
                product = tl.dot(u, tl.trans(v), product, out_dtype=tl.int32)
                sums += tl.reduce(u.to(tl.int32), 1, tl.standard._sum_combine)
        weight_at = n * scale_n + group * scale_g
        scale = tl.load(scale_ptr + weight_at, mask=n < channels, other=0.0).to(tl.float32)
        # ZERO is where the codes of the tile have their zero; of 8 bits, they were moved by 128.
        zero = tl.full((BLOCK_N,), ZERO, tl.float32)
        if HAS_ZERO:
            zero += tl.load(zero_ptr + weight_at, mask=n < channels, other=0).to(tl.float32)
        input_at = m * input_m + input_group * input_g
        input_scale = tl.load(input_scale_ptr + input_at, mask=m < rows, other=0.0)
        value = product.to(tl.float32) - sums.to(tl.float32)[:, None] * zero[None, :]
        out += value * input_scale[:, None] * scale[None, :]
    at = m[:, None] * channels + n[None, :]
    inside = (m < rows)[:, None] & (n < channels)[None, :]
    tl.store(out_ptr + at, out, mask=inside)
