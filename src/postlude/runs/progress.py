"""Progress bars with the time left, on the standard error.

A bar is drawn where a person looks on (a terminal); a log file or a pipe gets nothing unless
asked, and then plain lines. Results never go through here: the standard output stays free for
them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO, TypeVar

from postlude.runs.ranks import rank

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["Progress", "Task"]

Item = TypeVar("Item")

_SECONDS_BETWEEN_LINES = 5.0


class Task:
    """One counted piece of work inside a :class:`Progress`; made by :meth:`Progress.task`."""

    def __init__(
        self, progress: Progress, description: str, total: int | None, done: int = 0
    ) -> None:
        self.description = description
        self.total = total
        self.done = done
        self._progress = progress
        self._started = self._said = time.monotonic()
        # When the first step ended, and what was done then: it often loads, compiles or fits what later ones find
        # ready, so it says nothing of how long they take.
        self._first: tuple[float, int] | None = None
        self._bar: TaskID | None = None
        if progress._rich is not None:
            self._bar = progress._rich.add_task(description, total=total, completed=done)

    def advance(self, steps: int = 1) -> None:
        """Count ``steps`` more as done."""
        self.done += steps
        if self._first is None:
            self._first = (time.monotonic(), self.done)
        if self._bar is not None and self._progress._rich is not None:
            self._progress._rich.advance(self._bar, steps)
        elif self._progress.shown:
            now = time.monotonic()
            # Work that ends at once needs no line; what took longer says so when it ends.
            finished = self.done == self.total and now - self._started >= 1
            if now - self._said >= _SECONDS_BETWEEN_LINES or finished:
                self._said = now
                self._progress.log(self._line(now))

    def rename(self, description: str) -> None:
        """Say something else from now on, such as how fast it goes."""
        self.description = description
        if self._bar is not None and self._progress._rich is not None:
            self._progress._rich.update(self._bar, description=description)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None and self._progress._rich is not None:
            self._progress._rich.remove_task(self._bar)
            self._bar = None

    def _line(self, now: float) -> str:
        passed = now - self._started
        if self.total is None:
            return f"{self.description}: {self.done} in {passed:.0f} s"
        line = f"{self.description}: {self.done}/{self.total} in {passed:.0f} s"
        if self._first is None or self.done <= self._first[1]:
            return line
        since, before = self._first
        left = (now - since) / (self.done - before) * (self.total - self.done)
        return f"{line}, {left:.0f} s left"


class Progress:
    """A display of running work, used as a context; nested work adds tasks to the same one.

    Entering it again while it is open changes nothing, so a function may open the display it is given without
    knowing whether its caller has.

    Args:
        show: True draws bars (plain lines where ``stream`` is no terminal), False shows nothing,
            None shows bars exactly where ``stream`` is a terminal.
        stream: where to draw; the standard error by default.
    """

    def __init__(self, show: bool | None = None, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        # Of the processes that torchrun starts, one speaks.
        self.shown = (self._terminal if show is None else show) and rank() == 0
        self._rich: RichProgress | None = None
        self._depth = 0

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1 and self.shown and self._terminal:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as RichProgress

            self._rich = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
                transient=True,
            )
            self._rich.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth == 0 and self._rich is not None:
            self._rich.stop()
            self._rich = None

    def task(self, description: str, total: int | None = None, done: int = 0) -> Task:
        """Start counting a piece of work; ``total`` steps, or None if unknown, ``done`` of them before."""
        return Task(self, description, total, done)

    def iterate(
        self, items: Iterable[Item], description: str, total: int | None = None
    ) -> Iterator[Item]:
        """Yield ``items`` while a bar counts them, of ``len(items)`` if ``total`` is not given."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        task = self.task(description, total)
        try:
            for item in items:
                yield item
                task.advance()
        finally:
            task.close()

    def log(self, message: str) -> None:
        """Say one line, above the bars; nothing when not shown."""
        if self._rich is not None:
            self._rich.console.print(message, markup=False, highlight=False, soft_wrap=True)
        elif self.shown:
            print(message, file=self._stream, flush=True)
