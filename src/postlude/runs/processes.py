"""Several processes on one piece of work, as ``torchrun`` starts them; one process otherwise.

They share a file system and tell each other almost nothing, so the CPU back-end (gloo) is enough whatever
the model runs on.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

import torch.distributed as distributed

__all__ = ["Processes"]

T = TypeVar("T")


class Processes:
    """The processes of this run, inside a ``with`` block.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
    """

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self._group: distributed.ProcessGroup | None = None
        self._started = False

    def __enter__(self) -> Self:
        if not distributed.is_available():
            return self
        asked = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
        if asked and not distributed.is_initialized():
            distributed.init_process_group("gloo")
            self._started = True
        if distributed.is_initialized():
            self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
            if self.size > 1:
                self._group = distributed.new_group(backend="gloo")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._started:
            distributed.destroy_process_group()
        self._group, self._started = None, False

    def wait(self) -> None:
        """Until every process has come this far."""
        if self._group is not None:
            distributed.barrier(group=self._group)

    def agree(self, compute: Callable[[], T]) -> T:
        """What the first process computes, on all of them."""
        if self._group is None:
            return compute()
        box: list[T | None] = [compute() if self.rank == 0 else None]
        distributed.broadcast_object_list(box, src=0, group=self._group)
        result = box[0]
        return result  # type: ignore[return-value]

    def first(self, work: Callable[[], T], others: Callable[[], T] | None = None) -> T:
        """Let the first process do something before the others do it, or something else."""
        if self.rank == 0:
            result = work()
            self.wait()
            return result
        self.wait()
        return (work if others is None else others)()
