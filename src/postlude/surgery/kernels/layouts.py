"""Orders in which the codes of a weight lie in memory.

A layer keeps its weight in exactly one of them. Where that is not the order of the checkpoint, the buffer
``codes`` is given up, and :meth:`Layout.codes` makes it anew, bit for bit, when somebody asks.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from postlude.numerics.packing import pack, unpack
from postlude.surgery.layers import QuantizedLinear

__all__ = ["LAYOUTS", "Int4Pack", "Int8", "Layout", "Stored", "int4pack_block"]

# Output channels that are repacked at once: bounds the int32 copy that PyTorch's packing reads.
_CHUNK = 1024


class Layout(ABC):
    """The weight of one layer.

    Args:
        layer: its codes are read here and nowhere else.

    Attributes:
        name: what kernels refer to it by.
        keeps_codes: whether the layer's own buffer is the storage.
        step: :meth:`unsigned` starts at multiples of this.
    """

    name: ClassVar[str]
    keeps_codes: ClassVar[bool] = False
    step: ClassVar[int] = 1

    @abstractmethod
    def __init__(self, layer: QuantizedLinear) -> None: ...

    @staticmethod
    @abstractmethod
    def takes(layer: QuantizedLinear) -> bool:
        """Whether this layer's codes can be kept in this order."""

    @abstractmethod
    def codes(self, layer: QuantizedLinear) -> Tensor:
        """``uint8 [out_features, packed bytes]``, as in the checkpoint."""

    @abstractmethod
    def unsigned(self, layer: QuantizedLinear, start: int, stop: int) -> Tensor:
        """Codes of some output channels: ``uint8 [stop - start, in_features]``."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes beyond those of the layer's own buffers."""


class Stored(Layout):
    """As in the checkpoint."""

    name = "stored"
    keeps_codes = True

    def __init__(self, layer: QuantizedLinear) -> None:
        pass

    @staticmethod
    def takes(layer: QuantizedLinear) -> bool:
        return True

    def codes(self, layer: QuantizedLinear) -> Tensor:
        return layer.codes

    def unsigned(self, layer: QuantizedLinear, start: int, stop: int) -> Tensor:
        scheme = layer.weight_scheme
        if scheme is None:
            raise ValueError("an unquantized weight has no codes")
        return unpack(layer.codes[start:stop], scheme.format.code_bits, layer.in_features)

    @property
    def nbytes(self) -> int:
        return 0


class Int8(Layout):
    """Codes of 8 bits, minus 128, as ``int8 [out_features, in_features]``: as many bytes as in the checkpoint."""

    name = "int8"

    def __init__(self, layer: QuantizedLinear) -> None:
        self.weight = (layer.codes ^ 128).view(torch.int8)

    @staticmethod
    def takes(layer: QuantizedLinear) -> bool:
        return layer.weight_scheme is not None and layer.weight_scheme.format.code_bits == 8

    def codes(self, layer: QuantizedLinear) -> Tensor:
        return self.weight.view(torch.uint8) ^ 128

    def unsigned(self, layer: QuantizedLinear, start: int, stop: int) -> Tensor:
        return self.weight[start:stop].view(torch.uint8) ^ 128

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


class Int4Pack(Layout):
    """Codes of 4 bits in the order of ``aten::_weight_int4pack_mm_for_cpu``.

    Blocks of 64 output channels (32 without AVX-512), each ``[in_features, half a block]``: the low half of a
    byte is channel ``i`` of the block, the high half channel ``i + half``. Padded with the code 8 to whole
    blocks and to a multiple of 256 inputs at most, which :func:`group_of` decides.
    """

    name = "int4pack"
    step = 64

    def __init__(self, layer: QuantizedLinear) -> None:
        block, (_, width) = int4pack_block(), group_of(layer)
        if block is None:
            raise ValueError("PyTorch packs 4-bit weights in an unknown order here")
        self.block = block
        parts = []
        for start in range(0, layer.out_features, _CHUNK):
            codes = layer.codes[start : start + _CHUNK]
            padding = (0, width // 2 - codes.shape[1], 0, -len(codes) % self.step)
            # Two codes of 8, where a width or a number of channels is not whole.
            parts.append(_interleave(torch.nn.functional.pad(codes, padding, value=0x88), block))
        self.weight = torch.cat(parts)

    @staticmethod
    def takes(layer: QuantizedLinear) -> bool:
        scheme = layer.weight_scheme
        return (
            scheme is not None
            and scheme.format.code_bits == 4
            and layer.codes.device.type == "cpu"
            and group_of(layer)[0] > 0
            and int4pack_block() is not None
        )

    def codes(self, layer: QuantizedLinear) -> Tensor:
        parts = [
            pack(self.unsigned(layer, start, min(start + _CHUNK, layer.out_features)), 4)
            for start in range(0, layer.out_features, _CHUNK)
        ]
        return torch.cat(parts)

    def unsigned(self, layer: QuantizedLinear, start: int, stop: int) -> Tensor:
        rows = stop + -stop % self.step
        blocks = self.weight[start:rows].view(-1, self.weight.shape[1] * 2, self.block // 2)
        codes = torch.cat([blocks & 15, blocks >> 4], dim=-1).transpose(1, 2).flatten(0, 1)
        return codes[: stop - start, : layer.in_features]

    def transposed(self, start: int, stop: int) -> Tensor:
        """Codes of whole blocks of channels, ``uint8 [padded inputs, stop - start]``.

        A third of the time of :meth:`unsigned`: the channels of a block are neighbours already, so it is runs of
        bytes that change places, moved as words.
        """
        blocks = self.weight[start:stop].view(-1, self.weight.shape[1] * 2, self.block // 2)
        codes = torch.stack([blocks & 15, blocks >> 4], dim=2)
        words = codes.view(torch.int64).flatten(2).transpose(0, 1)
        return words.reshape(blocks.shape[1], -1).view(torch.uint8)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


def _interleave(codes: Tensor, block: int) -> Tensor:
    """From the order of a checkpoint to that of the op: ``uint8 [channels, bytes]``, whole blocks of channels.

    A byte of a checkpoint holds two inputs of a channel, one of the op two channels of an input, so halves of
    bytes change places before bytes do.
    """
    low, high = codes.view(-1, 2, block // 2, codes.shape[1]).unbind(1)
    even = (low & 15) | (high << 4)
    odd = (low >> 4) | (high & 0xF0)
    return torch.stack([even, odd]).permute(1, 3, 0, 2).reshape(codes.shape)


def group_of(layer: QuantizedLinear) -> tuple[int, int]:
    """Group size for the op and padded ``in_features``; 0 where no valid size divides the layer's groups.

    A weight whose scales cover more inputs (a channel, a group of 512) gets the largest valid size that divides
    them, and repeats its scales.
    """
    granularity = layer.weight_scheme.granularity if layer.weight_scheme else None
    if granularity is not None and granularity.kind == "group":
        size = next((size for size in (256, 128, 64, 32) if granularity.size % size == 0), 0)
        return size, layer.in_features + -layer.in_features % size if size else 0
    width = layer.in_features + -layer.in_features % 32
    return next(size for size in (256, 128, 64, 32) if width % size == 0), width


@functools.cache
def int4pack_block() -> int | None:
    """Output channels of a block, found by packing a known matrix; None where the order is another one."""
    known = torch.arange(128 * 64, dtype=torch.int32).reshape(128, 64)
    known = (known * 7 + known // 16) % 16
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(known, 2)
    except (RuntimeError, NotImplementedError):
        return None
    for block in (64, 32, 16):
        halves = packed.reshape(-1, 64, block // 2)
        codes = torch.cat([halves & 15, halves >> 4], dim=-1).transpose(1, 2).flatten(0, 1)
        if torch.equal(codes.int(), known):
            return block
    return None


LAYOUTS: dict[str, type[Layout]] = {one.name: one for one in (Stored, Int4Pack, Int8)}
