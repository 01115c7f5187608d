"""How numbers of an index are stored: ``fp32``; ``bf16``; ``int8``.

``int8`` is symmetric, with one bf16 scale for every vector (a column of ``U`` or ``V`` of one example and layer; for
dense gradients a row of ``G``). fp16 is refused: gradients leave its range.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.formats import Integer
from postlude.numerics.schemes import Granularity, Scheme

__all__ = ["FORMATS", "Read", "VectorFormat", "format_named"]

# All rows of the stored tensor of a name.
Read = Callable[[str], Tensor]


@dataclasses.dataclass(frozen=True)
class VectorFormat:
    """How vectors are stored: a name, its type, whether vectors carry a scale."""

    name: str
    dtype: torch.dtype
    scaled: bool = False

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """``[n, k, width]`` as stored tensors, by suffix."""
        if not self.scaled:
            return {"": x.to(self.dtype)}
        encoded = _INT8.encode(x)
        codes = (encoded.codes.to(torch.int16) - 128).to(torch.int8)
        return {"": codes, ".scale": encoded.scale.squeeze(-1)}

    def decode(self, read: Read, start: int, stop: int) -> Tensor:
        """fp32 ``[rows, k, width]``."""
        x, scale = self.read(read, start, stop)
        return x if scale is None else x * scale.unsqueeze(-1)

    def read(self, read: Read, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """fp32 ``[rows, k, width]``, still to be multiplied by ``[rows, k]`` where that is not None."""
        x = read("")[start:stop].float()
        return x, read(".scale")[start:stop].float() if self.scaled else None

    def bytes(self, vectors: int, width: int) -> int:
        """Bytes of so many vectors."""
        return vectors * (width * self.dtype.itemsize + (2 if self.scaled else 0))


# Scales in bf16: fp16 would lose the smallest gradients, and codes are made for the scale that is stored.
_INT8 = Scheme(Integer(8, narrow=True), Granularity("channel"), "bfloat16")

FORMATS = {
    one.name: one
    for one in (
        VectorFormat("fp32", torch.float32),
        VectorFormat("bf16", torch.bfloat16),
        VectorFormat("int8", torch.int8, scaled=True),
    )
}


def format_named(name: str) -> VectorFormat:
    """The format of that name.

    Raises:
        SettingsError: there is none.
    """
    if name in ("fp16", "float16"):
        raise SettingsError(
            "format is 'fp16', whose range gradients leave; expected bf16, int8 (smaller still) or fp32"
        )
    if name not in FORMATS:
        raise SettingsError(f"format is {name!r}; expected {', '.join(FORMATS)}")
    return FORMATS[name]
