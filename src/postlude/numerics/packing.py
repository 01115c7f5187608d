"""Bit-packing of codes: the bytes that are stored are the bits that are reported.

A row of ``width`` codes of ``bits`` bits becomes ``ceil(width * bits / 8)`` bytes, little-endian within the
row; rows start on a byte. Every width from 1 to 8 bits goes through the same rule: ``per`` codes fill a whole
number of bytes, ``per = 8 / gcd(8, bits)``.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

__all__ = ["pack", "packed_width", "unpack"]


def packed_width(width: int, bits: int) -> int:
    """Bytes of one packed row."""
    return -(-width * bits // 8)


def _layout(bits: int) -> tuple[int, int, torch.dtype]:
    """Codes and bytes of one whole chunk, and an integer type that holds it."""
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, got {bits}")
    per = 8 // math.gcd(8, bits)
    return per, per * bits // 8, torch.int32 if per * bits <= 24 else torch.int64


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes along the last axis.

    Args:
        codes: integers in ``[0, 2**bits)``, shape ``[..., width]``.
        bits: 1 to 8.

    Returns:
        ``uint8`` of shape ``[..., packed_width(width, bits)]``.
    """
    per, chunk_bytes, word = _layout(bits)
    width = codes.shape[-1]
    if bits == 8:
        return codes.to(torch.uint8)
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -width % per))
    chunks = padded.unflatten(-1, (-1, per))
    words = torch.zeros(chunks.shape[:-1], dtype=word, device=codes.device)
    for position in range(per):
        words |= chunks[..., position].to(word) << (bits * position)
    out = [((words >> (8 * byte)) & 255).to(torch.uint8) for byte in range(chunk_bytes)]
    return torch.stack(out, dim=-1).flatten(-2)[..., : packed_width(width, bits)].contiguous()


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """Exact inverse of :func:`pack`: ``uint8`` codes of shape ``[..., width]``."""
    per, chunk_bytes, word = _layout(bits)
    if packed.shape[-1] != packed_width(width, bits):
        raise ValueError(
            f"{width} codes of {bits} bits take {packed_width(width, bits)} bytes, got {packed.shape[-1]}"
        )
    if bits == 8:
        return packed
    if not packed.numel():  # PyTorch reads no bytes of nothing
        return packed.new_empty(*packed.shape[:-1], width)
    if bits == 4 and sys.byteorder == "little":
        return _nibbles(packed)[..., :width].contiguous()
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % chunk_bytes))
    chunks = padded.unflatten(-1, (-1, chunk_bytes))
    words = torch.zeros(chunks.shape[:-1], dtype=word, device=packed.device)
    for byte in range(chunk_bytes):
        words |= chunks[..., byte].to(word) << (8 * byte)
    mask = 2**bits - 1
    out = [((words >> (bits * position)) & mask).to(torch.uint8) for position in range(per)]
    return torch.stack(out, dim=-1).flatten(-2)[..., :width].contiguous()


def _nibbles(packed: Tensor) -> Tensor:
    """Low and high half of every byte side by side: a byte spread over 16 bits, read as two bytes."""
    word = packed.to(torch.int16)
    spread = word << 4
    spread |= word
    spread &= 0x0F0F
    return spread.view(torch.uint8)
