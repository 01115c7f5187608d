"""What a model learns from and is asked about, whatever it is: texts for language models, images for denoisers.

An index is built from :class:`Data`: examples in order, each with an id and a place for messages, and a hash over all
of them. What the model is run on is an *example*, which knows how to stand in a batch with others of its kind.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from torch import Tensor

from postlude.errors import ArchitectureError

if TYPE_CHECKING:
    from postlude.attribution.examples import Collection
    from postlude.runs.checkpoint import Checkpoint

__all__ = ["Data", "Item", "batches", "is_path", "open_data"]


class Item(Protocol):
    """One example as a model is run on it."""

    @property
    def id(self) -> int | str:
        """As given in the data, or its number."""

    @property
    def count(self) -> int:
        """Positions that it has in the model: tokens, patches."""

    @property
    def cut(self) -> int:
        """Positions that were cut off."""

    @staticmethod
    def batched(items: Sequence[Any], tokens_per_batch: int) -> list[Any]:
        """Batches of examples of this kind, each with ``rows``, the position of every one in ``items``."""


class Data(ABC):
    """Examples, checked once from end to end.

    Attributes:
        kind: ``texts`` or ``images``.
        path: where they were read from; None for those in memory.
        hash: SHA-256 over all of them, in order.
    """

    kind: ClassVar[str]
    path: Path | None
    hash: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def id(self, number: int) -> int | str:
        """As given, or its number."""

    @abstractmethod
    def text(self, number: int) -> str:
        """What a person reads: the text, or what an image is labelled with."""

    @abstractmethod
    def examples(
        self,
        checkpoint: Checkpoint,
        collection: Collection,
        start: int = 0,
        stop: int | None = None,
    ) -> list[Any]:
        """Some examples as the model is run on them.

        Raises:
            DataError: one that this model cannot be run on; names its place.
        """

    @abstractmethod
    def check(self, checkpoint: Checkpoint, collection: Collection) -> None:
        """Refuse a model, or settings, that cannot run on these examples, before anything is computed."""

    def picture(self, number: int) -> Tensor | None:
        """``[channels, height, width]`` in [-1, 1] to show; None where there is nothing to look at."""
        return None

    @classmethod
    @abstractmethod
    def open(cls, source: Any, name: str = "") -> Self:
        """From what a caller gives; ``name`` is what messages call the only one of a list."""


def open_data(source: Any, kind: str, name: str = "example 0") -> Data:
    """Examples for a kind of model; those that are open already are taken as they are.

    Args:
        source: path, records, texts, images.
        kind: ``language`` or ``diffusion``, of the model.
        name: what messages call the only one of a list.

    Raises:
        ArchitectureError: models of this kind have no data here.
        DataError: examples that cannot be used.
    """
    if isinstance(source, Data):
        return source
    # Not at the top: both are made of what is defined here.
    from postlude.attribution.examples import Records
    from postlude.attribution.images import Images

    known: dict[str, type[Data]] = {"language": Records, "diffusion": Images}
    if kind not in known:
        raise ArchitectureError(
            f"attribution works on {' and '.join(known)} models; this is a {kind} model"
        )
    return known[kind].open(source, name)


def batches(examples: Sequence[Any], tokens_per_batch: int) -> list[Any]:
    """Batches of examples, all of one kind; a function of the arguments alone."""
    found: list[Any] = examples[0].batched(examples, tokens_per_batch) if examples else []
    return found


def is_path(source: Any) -> bool:
    """Whether something names a file or a directory."""
    return isinstance(source, str | os.PathLike)
