"""Statistics that are gathered while batches stream by: what all of them have.

Every one has the same four verbs, so that a run can be split over batches, processes and restarts:

* ``update(x)`` takes a batch ``[..., width]`` (every leading axis counts as tokens);
* ``merge(other)`` adds what another one has seen, as if it had been fed here; returns ``self``;
* ``state()`` is a flat dictionary of tensors, ready for safetensors;
* ``from_state(state)`` restores it: continuing from it equals never having stopped.

Sums are kept in fp64. Buffers live on the device of the first batch unless a statistic is given one; nothing takes
part in autograd.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Self

import torch
from torch import Tensor

from postlude.errors import DataError, SettingsError

__all__ = [
    "Statistic",
    "beside_batch",
    "beside_other",
    "blocks",
    "fields_of",
    "positive",
    "require_same",
    "token_rows",
]

_BLOCK_ENTRIES = 2**22  # entries of a batch that are converted and worked on at a time


class Statistic(ABC):
    """The four verbs.

    Attributes:
        count: number of tokens seen (``TopToken``: of sequences; ``MagnitudeHistogram``: of values).
    """

    count: int = 0

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Take in a batch."""

    @abstractmethod
    def merge(self, other: Self) -> Self:
        """Take in everything that ``other`` has seen; returns ``self``."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """All that was gathered, as copies."""

    @classmethod
    @abstractmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """The statistic that ``state`` was taken from."""

    def _require_data(self, *results: Tensor) -> None:
        if self.count == 0:
            raise DataError(
                f"{type(self).__name__} has seen no data; call update before reading it."
            )
        for result in results:
            if not bool(torch.isfinite(result).all()):
                raise DataError(
                    f"{type(self).__name__} holds NaN or infinity after {self.count} entries: "
                    "an activation overflowed. Run the model in float32 or bfloat16 and check its weights."
                )


def positive(number: int, name: str) -> int:
    """The number.

    Raises:
        SettingsError: it is below 1.
    """
    if number < 1:
        raise SettingsError(f"{name} must be at least 1; got {number}.")
    return number


def require_same(name: str, ours: int, theirs: int) -> None:
    """Let only statistics of the same width, or the like, merge.

    Raises:
        SettingsError: the two differ.
    """
    if ours != theirs:
        raise SettingsError(
            f"Cannot merge statistics of {name} {ours} and {theirs}; they must be equal."
        )


def token_rows(x: Tensor, width: int) -> Tensor:
    """``x [..., width]`` as ``[tokens, width]``, apart from autograd.

    Raises:
        DataError: another width, or no floating-point numbers.
    """
    if x.ndim < 1 or x.shape[-1] != width:
        raise DataError(
            f"A statistic of width {width} got a tensor of shape {tuple(x.shape)}; the last dimension must be {width}."
        )
    if not x.is_floating_point():
        raise DataError(f"A statistic needs a floating-point tensor; got {x.dtype}.")
    return x.detach().reshape(-1, width)


def blocks(rows: Tensor) -> Iterator[Tensor]:
    """Pieces of ``rows [tokens, width]``: large enough for a fast product, small enough to convert."""
    step = min(max(_BLOCK_ENTRIES // rows.shape[1], 256), 4096)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def beside_batch(buffer: Tensor, rows: Tensor, count: int) -> Tensor:
    """A buffer on the device of a batch: an empty one moves there, a used one asks for the same device.

    Raises:
        DataError: the buffer holds something, on another device.
    """
    if buffer.device == rows.device:
        return buffer
    if count == 0:
        return buffer.to(rows.device)
    raise DataError(
        f"A statistic gathered on {buffer.device} got a batch on {rows.device}; "
        "keep one statistic per device and merge them."
    )


def beside_other(ours: Tensor, theirs: Tensor, count: int) -> Tensor:
    """Our buffer; on the device of theirs as long as it is empty."""
    return ours.to(theirs.device) if count == 0 else ours


def fields_of(state: Mapping[str, Tensor], *names: str) -> tuple[Tensor, ...]:
    """The entries of a state, in the order asked for.

    Raises:
        DataError: it has others, or fewer.
    """
    if set(state) != set(names):
        raise DataError(
            f"The state of a statistic has the entries {sorted(state)}; expected {sorted(names)}. "
            "It was saved by another statistic or version."
        )
    return tuple(state[name] for name in names)
