"""Packing is exact for every number of bits and any width."""

from __future__ import annotations

import pytest
import torch

from postlude.numerics.packing import pack, packed_width, unpack


def by_strings(row: list[int], bits: int) -> list[int]:
    """The same layout, bit by bit: little-endian codes, one after another."""
    stream = "".join(format(code, f"0{bits}b")[::-1] for code in row)
    stream += "0" * (-len(stream) % 8)
    return [int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8)]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("width", [1, 7, 8, 172])
def test_layout_and_inverse(bits: int, width: int) -> None:
    codes = torch.randint(0, 2**bits, (3, width), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, packed_width(width, bits))
    assert packed[0].tolist() == by_strings(codes[0].tolist(), bits)
    assert torch.equal(unpack(packed, bits, width), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(0, 1), (0, 172), (3, 0), (0,)])
def test_nothing_is_packed_as_nothing(bits: int, shape: tuple[int, ...]) -> None:
    codes = torch.zeros(shape, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (*shape[:-1], packed_width(shape[-1], bits))
    assert torch.equal(unpack(packed, bits, shape[-1]), codes)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 8 bits"):
        pack(torch.zeros(4, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match="take 2 bytes, got 3"):
        unpack(torch.zeros(3, dtype=torch.uint8), 4, 4)
