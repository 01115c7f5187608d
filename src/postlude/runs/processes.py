"""Several processes on one piece of work, as ``torchrun`` starts them; one process otherwise.

They share a file system. What they tell each other is small: numbers and names as JSON through the store that
``torchrun`` sets up, now and then a tensor through gloo, whatever device the model is on. Nothing is pickled.

A process waits for another as long as that one works, and no longer. Each says every second that it is alive. One that
raises says why, and one that says nothing for ``POSTLUDE_RANK_TIMEOUT`` seconds (120 by default) counts as lost; in
both cases the others raise :class:`RankError` at the next point where they meet, and those that meet nowhere within
ten seconds more, because they are stuck in a collective of another library, say so and end. Files appear whole or not
at all, so the same command goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from torch import Tensor

from postlude.runs.link import Link, connection
from postlude.runs.ranks import rank, ranks

__all__ = ["Processes"]

T = TypeVar("T")


class Processes:
    """The processes of this run, inside a ``with`` block that all of them enter.

    Blocks may be nested. What is done in one has to be done by all ranks in the same order.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.

    Raises:
        RankError: another process raised something or was lost.
    """

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self._link: Link | None = None

    def __enter__(self) -> Self:
        if ranks() > 1:
            self.rank, self.size = rank(), ranks()
            self._link = connection(self.rank, self.size)
            self._link.enter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.leave(error)

    @property
    def moved(self) -> int:
        """Bytes of tensors that went from one process to the others so far."""
        return 0 if self._link is None else self._link.moved

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, work: Sequence[T]) -> list[T]:
        """What of some independent pieces of work this process does: every ``size``-th."""
        return list(work[self.rank :: self.size])

    def wait(self) -> None:
        """Until every process has come this far."""
        self.gather(None)

    def agree(self, compute: Callable[[], T]) -> T:
        """What the first process computes, on all of them; a value of JSON."""
        if self._link is None:
            return compute()
        return cast(T, self._link.agree(compute))

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of ranks, on all of them; values of JSON."""
        return [value] if self._link is None else cast(list[T], self._link.gather(value))

    def first(self, work: Callable[[], T], others: Callable[[], T] | None = None) -> T:
        """Let the first process do something before the others do it, or something else."""
        if self.is_first:
            result = work()
            self.wait()
            return result
        self.wait()
        return (work if others is None else others)()

    def once(
        self, unit: Callable[[str, Callable[[], Any]], T]
    ) -> Callable[[str, Callable[[], Any]], T]:
        """A function that keeps units of work, of which the first process computes each and the others read it."""
        return lambda name, compute: self.first(lambda: unit(name, compute))

    def together(
        self,
        unit: Callable[[str, Callable[[], Any]], T],
        name: str,
        compute: Callable[[], Any],
    ) -> T:
        """A unit of work (:meth:`postlude.runs.directory.RunDirectory.unit`) that takes all processes to compute.

        Args:
            unit: keeps finished work where all processes read it.
            name: of the unit.
            compute: called on all processes or, where the unit is finished, on none; its value is that of the first.
        """
        if self._link is None:
            return unit(name, compute)
        if not self.is_first:
            if self.agree(lambda: True):
                compute()
            self.wait()
            return unit(name, compute)
        called = False

        def announced() -> Any:
            nonlocal called
            called = self.agree(lambda: True)
            return compute()

        result = unit(name, announced)
        if not called:
            self.agree(lambda: False)
        self.wait()
        return result

    def broadcast(self, tensors: Mapping[str, Tensor], source: int) -> dict[str, Tensor]:
        """The tensors of one process on all of them, bit for bit; on the CPU where they come from another process."""
        if self._link is None:
            return dict(tensors)
        return self._link.broadcast(tensors, source)
