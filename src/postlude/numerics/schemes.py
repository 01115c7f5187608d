"""Schemes: how one tensor is quantized, encoded and decoded.

A :class:`~postlude.numerics.formats.Format` says what one code means; a :class:`Granularity` says which entries share
one scale; a :class:`Scheme` is both. Axes: a tensor is ``[..., width]``, its last axis is the one that a matrix product
sums over, and groups are runs of consecutive entries of that axis (the last group may be shorter).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.formats import Format, Integer
from postlude.numerics.packing import packed_width

__all__ = ["Encoded", "Granularity", "ScaleAndZero", "Scheme", "working"]

ScaleAndZero = tuple[Tensor, Tensor | None]
"""The parameters of a grid: scale, and zero point where there is one."""


@dataclasses.dataclass(frozen=True)
class Granularity:
    """Which entries share one scale.

    ``tensor``: all; ``channel`` (weights) and ``token`` (activations): one row of the last axis; ``group``:
    ``size`` consecutive entries of a row, the last group possibly shorter.
    """

    kind: Literal["tensor", "channel", "token", "group"] = "channel"
    size: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("tensor", "channel", "token", "group"):
            raise SettingsError(
                f"granularity is tensor, channel, token or a group size, got {self.kind!r}"
            )
        if (self.kind == "group") != (self.size > 0):
            raise SettingsError(f"a group needs a positive size, got {self.kind} with {self.size}")

    @classmethod
    def parse(cls, text: str | int | Granularity) -> Granularity:
        """``"channel"``, ``"token"``, ``"tensor"`` or a group size as a number.

        Raises:
            SettingsError: anything else.
        """
        if isinstance(text, Granularity):
            return text
        if str(text).isdigit():
            return cls("group", int(text))
        return cls(str(text))  # type: ignore[arg-type]

    def __str__(self) -> str:
        return str(self.size) if self.kind == "group" else self.kind

    def groups(self, width: int) -> int:
        """Scales of one row of ``width`` entries."""
        return -(-width // self.size) if self.kind == "group" else 1

    def split(self, x: Tensor) -> Tensor:
        """View ``[..., width]`` as ``[..., groups, entries]``.

        A short last group is filled with its own last entry, which changes no minimum or maximum.
        """
        if self.kind == "tensor":
            return x.reshape(1, -1)
        if self.kind != "group":
            return x.unsqueeze(-2)
        missing = -x.shape[-1] % self.size
        if missing:
            x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], dim=-1)
        grouped: Tensor = x.unflatten(-1, (-1, self.size))
        return grouped

    def join(self, grouped: Tensor, shape: torch.Size) -> Tensor:
        """Inverse of :meth:`split`."""
        if self.kind == "tensor":
            return grouped.reshape(shape)
        return grouped.flatten(-2)[..., : shape[-1]]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A quantized tensor, unpacked.

    Attributes:
        codes: ``uint8``, shape ``[..., width]``.
        scale: stored type, shape ``[..., groups]`` (``[1]`` per tensor).
        zero_point: ``int16`` or ``uint8``, shape of ``scale``; None for symmetric formats.
        scheme: how to read them.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: Scheme

    def decode(self) -> Tensor:
        """Values in fp32, shape of ``codes``."""
        return self.scheme.decode(self.codes, self.scale, self.zero_point)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How one tensor is quantized.

    Attributes:
        format: what a code means.
        granularity: which entries share a scale.
        scale_dtype: type that scales are stored in.
        clip: factor on every range; below 1, the largest entries saturate and the rest is finer.
    """

    format: Format = dataclasses.field(default=Integer())
    granularity: Granularity = Granularity()
    scale_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    clip: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": self.format.to_dict(),
            "granularity": str(self.granularity),
            "scale_dtype": self.scale_dtype,
            "clip": self.clip,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scheme:
        return cls(
            Format.from_dict(data["format"]),
            Granularity.parse(data["granularity"]),
            data["scale_dtype"],
            data["clip"],
        )

    def parameters(self, x: Tensor, shrink: Tensor | float = 1.0) -> ScaleAndZero:
        """Scale and zero point from the range of ``x``.

        Args:
            x: ``[..., width]``.
            shrink: factor on the range, broadcast over ``[..., groups]``.

        Returns:
            ``(scale, zero_point)``, both ``[..., groups]``, as floats that hold exactly what is stored.
        """
        grouped = self.granularity.split(working(x))
        return self.parameters_of(grouped.amin(-1) * shrink, grouped.amax(-1) * shrink)

    def parameters_of(self, low: Tensor, high: Tensor) -> ScaleAndZero:
        """Scale and zero point for groups between ``low`` and ``high``, both ``[..., groups]``; see above."""
        if self.clip != 1:
            low, high = low * self.clip, high * self.clip
        kept = getattr(torch, self.scale_dtype)
        scale = self.format.scale(low, high)
        # A group of zeros has no range; any positive scale encodes it exactly.
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        # What the stored type cannot hold would decode to infinity or NaN; the largest entries saturate instead.
        kinds = torch.finfo(kept)
        scale = scale.clamp(min=kinds.smallest_normal * kinds.eps * 2, max=kinds.max)
        scale = scale.to(kept).to(low.dtype)
        return scale, self.format.zero_point(low, high, scale)

    def encode(
        self,
        x: Tensor,
        parameters: ScaleAndZero | None = None,
    ) -> Encoded:
        """Quantize ``[..., width]`` to the nearest values.

        Args:
            x: floating-point tensor.
            parameters: scale and zero point to use; from the range of ``x`` when absent.
        """
        scale, zero_point = parameters or self.parameters(x)
        grouped = self.granularity.split(working(x))
        codes = self.format.encode(grouped, scale.unsqueeze(-1), _unsqueeze(zero_point))
        stored = None if zero_point is None else zero_point.to(self.zero_point_dtype)
        return Encoded(
            self.granularity.join(codes, x.shape).contiguous(),
            scale.to(getattr(torch, self.scale_dtype)),
            stored,
            self,
        )

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Values in fp32, shape of ``codes``."""
        scale = scale.float().unsqueeze(-1)
        zero = _unsqueeze(None if zero_point is None else zero_point.float())
        grouped = self.granularity.split(codes)
        return self.granularity.join(self.format.decode(grouped, scale, zero), codes.shape)

    def round_trip(self, x: Tensor) -> Tensor:
        """Encode and decode, in the type of ``x``: what a quantized tensor is replaced by."""
        scale, zero_point = self.parameters(x)
        grouped = self.granularity.split(working(x))
        scale, zero = scale.unsqueeze(-1), _unsqueeze(zero_point)
        values = self.format.decode(self.format.encode(grouped, scale, zero), scale, zero)
        return self.granularity.join(values, x.shape).to(x.dtype)

    @property
    def zero_point_dtype(self) -> torch.dtype:
        return torch.int16 if self.format.zero_point_bits == 16 else torch.uint8

    @property
    def scale_bits(self) -> int:
        return 32 if self.scale_dtype == "float32" else 16

    def stored_bits(self, rows: int, width: int) -> int:
        """Bits of a ``[rows, width]`` tensor on disk: codes padded to bytes by row, scales, zero points."""
        scales = 1 if self.granularity.kind == "tensor" else rows * self.granularity.groups(width)
        codes = 8 * rows * packed_width(width, self.format.code_bits)
        return codes + scales * (self.scale_bits + self.format.zero_point_bits)

    def effective_bits(self, width: int) -> float:
        """Bits of one entry of a row of ``width``, its share of scales and zero points included."""
        per_row = 0 if self.granularity.kind == "tensor" else self.granularity.groups(width)
        return (
            self.format.code_bits
            + per_row * (self.scale_bits + self.format.zero_point_bits) / width
        )


def working(x: Tensor) -> Tensor:
    """fp64 stays fp64; everything else is computed in fp32."""
    return x if x.dtype == torch.float64 else x.float()


def _unsqueeze(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.unsqueeze(-1)
