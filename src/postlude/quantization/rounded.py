"""What takes the place of a weight, and what a rounding is shown of its inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from postlude.numerics.low_rank import BranchFormat
from postlude.numerics.schemes import Encoded, Scheme

__all__ = ["Rounded", "Seen"]


class Seen(Protocol):
    """What is gathered from the input of a site before its readers are rounded."""

    def update(self, x: Tensor) -> None:
        """Take in ``x [..., width]``."""


@dataclasses.dataclass(frozen=True)
class Rounded:
    """What takes the place of one weight.

    Attributes:
        main: codes and scales.
        up, down: factors of a low-rank branch, encoded in its format, or in float16 where that has 16 bits.
        smoothing: ``[in_features]``; the stored weight is the given one times this, and its input is divided by it.
    """

    main: Encoded
    up: Encoded | Tensor | None = None
    down: Encoded | Tensor | None = None
    smoothing: Tensor | None = None

    def decode(self) -> Tensor:
        """The weight that it stands for, ``[out_features, in_features]`` fp32."""
        weight = self.main.decode()
        if self.up is not None and self.down is not None:
            weight = weight + _values(self.up) @ _values(self.down)
        return weight if self.smoothing is None else weight / self.smoothing.to(weight)

    def parts(self) -> dict[str, Tensor]:
        """As named tensors."""
        found = _encoded_parts("", self.main)
        for name, factor in (("up", self.up), ("down", self.down)):
            if isinstance(factor, Tensor):
                found[f"{name}.half"] = factor
            elif factor is not None:
                found |= _encoded_parts(f"{name}.", factor)
        return found if self.smoothing is None else {**found, "smoothing": self.smoothing}

    @classmethod
    def from_parts(
        cls, parts: Mapping[str, Tensor], scheme: Scheme, branch: BranchFormat | None
    ) -> Rounded:
        """What :meth:`parts` came from."""

        def factor(name: str) -> Encoded | Tensor | None:
            kind = None if branch is None else branch.factor_scheme
            return parts.get(f"{name}.half") if kind is None else _encoded(parts, f"{name}.", kind)

        main = _encoded(parts, "", scheme)
        return cls(main, factor("up"), factor("down"), parts.get("smoothing"))


def _values(factor: Encoded | Tensor) -> Tensor:
    return factor.float() if isinstance(factor, Tensor) else factor.decode()


def _encoded_parts(prefix: str, encoded: Encoded) -> dict[str, Tensor]:
    found = {f"{prefix}codes": encoded.codes, f"{prefix}scale": encoded.scale}
    if encoded.zero_point is not None:
        found[f"{prefix}zero_point"] = encoded.zero_point
    return found


def _encoded(parts: Mapping[str, Tensor], prefix: str, scheme: Scheme) -> Encoded:
    codes, scale = parts[f"{prefix}codes"], parts[f"{prefix}scale"]
    return Encoded(codes, scale, parts.get(f"{prefix}zero_point"), scheme)
