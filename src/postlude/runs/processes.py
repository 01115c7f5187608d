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

import contextlib
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import torch
import torch.distributed as distributed
from torch import Tensor

from postlude.errors import RankError
from postlude.runs.ranks import rank, ranks

__all__ = ["Processes"]

T = TypeVar("T")

_BEAT = 1.0
_GRACE = 10.0
_PATIENCE = 120.0
_VARIABLE = "POSTLUDE_RANK_TIMEOUT"
_AGAIN = "Finished work is kept: run the same command again, and it goes on from there."


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
        self._link: _Link | None = None

    def __enter__(self) -> Self:
        if ranks() > 1:
            self.rank, self.size = rank(), ranks()
            self._link = _connection(self.rank, self.size)
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


class _Link:
    """What connects this process with the others, for as long as it lives."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.patience = float(os.environ.get(_VARIABLE, _PATIENCE))
        self.failure: RankError | None = None
        self._depth = self._step = self.moved = 0
        self._store, self._watched = self._connect(), self._connect()
        self._group: Any = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._round = 0

    def _connect(self) -> Any:
        """A connection to the store of torchrun, or to one that the first process keeps."""
        kept_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        try:
            store = distributed.TCPStore(
                host,
                int(port),
                self.size,
                is_master=self.rank == 0 and not kept_by_torchrun,
                wait_for_workers=False,
                timeout=timedelta(seconds=self.patience),
                multi_tenant=True,
            )
        except (ValueError, RuntimeError) as error:
            raise RankError(
                f"rank {self.rank} of {self.size} does not reach the others at MASTER_ADDR={host!r} "
                f"MASTER_PORT={port!r} ({_line(error)}). Start them with torchrun, which sets these."
            ) from error
        return distributed.PrefixStore("postlude", store)

    # ----------------------------------------------------------------------------------------------- in and out

    def enter(self) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        self.failure = None
        self._round += 1
        self._stop = threading.Event()
        self._say(0)
        self._thread = threading.Thread(target=self._watch, args=(self._stop,), daemon=True)
        self._thread.start()

    def leave(self, error: BaseException | None) -> None:
        self._depth -= 1
        if self._depth:
            return
        translated = None if error is None else self._translated(error)
        if error is None:
            try:
                self._part()
            except RankError:
                self._stop.set()
                raise
        else:
            with contextlib.suppress(RuntimeError):
                said = None if isinstance(translated, RankError) else _line(error)
                self._say(-1, said)
                if said is not None and self._is_told(said):
                    translated = RankError(f"rank 0 of {self.size} stopped: {said}", told=True)
                self._part_in_anger()
        self._stop.set()
        if translated is not None and translated is not error:
            raise translated from error

    def _is_told(self, said: str) -> bool:
        """Whether the first rank stopped for the same reason, as all do who are given bad input."""
        end = time.monotonic() + 2 * _BEAT
        while self.rank and time.monotonic() < end:
            key = f"state/{self._round}/0"
            if self._store.check([key]):
                first = json.loads(self._store.get(key))["failed"]
                if first is not None:
                    return bool(first == said)
            time.sleep(0.02)
        return False

    def _part(self) -> None:
        """Nobody leaves before all have come to the end, and whoever keeps the store last."""
        self.gather(None)
        self._say(-1)
        if self.rank == 0:
            for other in range(1, self.size):
                self._take(f"left/{self._round}/{other}")
        else:
            self._store.set(f"left/{self._round}/{self.rank}", b"1")

    def _part_in_anger(self) -> None:
        """Give the others the time to read why, where this process keeps the store."""
        self._store.set(f"left/{self._round}/{self.rank}", b"1")
        if self.rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        keys = [f"left/{self._round}/{other}" for other in range(1, self.size)]
        end = time.monotonic() + 5 * _BEAT
        while time.monotonic() < end and not self._store.check(keys):
            time.sleep(0.05)

    def _translated(self, error: BaseException) -> BaseException:
        """A failure of another process, where that is what an error of a collective comes from."""
        text = str(error)
        collective = isinstance(error, distributed.DistError) or (
            isinstance(error, RuntimeError)
            and any(word in text for word in ("gloo", "NCCL", "Connection closed by peer"))
        )
        if not collective:
            return error
        # The others may be about to say why they broke the connection, or have been killed.
        end = time.monotonic() + 4 * _BEAT
        while self.failure is None and time.monotonic() < end:
            time.sleep(0.05)
        if self.failure is not None:
            return self.failure
        return RankError(
            f"rank {self.rank} of {self.size} lost the connection to another rank: it was killed, or its machine or "
            f"network is gone ({_line(error)}). {_AGAIN}"
        )

    # ------------------------------------------------------------------------------------------------- messages

    def agree(self, compute: Callable[[], T]) -> Any:
        key = self._next()
        if self.rank == 0:
            value = compute()
            self._store.set(key, json.dumps(value).encode())
            return value
        return json.loads(self._take(key))

    def gather(self, value: Any) -> list[Any]:
        key = self._next()
        with self._reported():
            self._store.set(f"{key}/{self.rank}", json.dumps(value).encode())
        return [json.loads(self._take(f"{key}/{other}")) for other in range(self.size)]

    def broadcast(self, tensors: Mapping[str, Tensor], source: int) -> dict[str, Tensor]:
        if self._group is None:
            self.gather(None)
            with self._reported():
                self._group = distributed.ProcessGroupGloo(
                    distributed.PrefixStore("tensors", self._store),
                    self.rank,
                    self.size,
                    timedelta(seconds=self.patience),
                )
        key = self._next()
        mine = self.rank == source
        if mine:
            held = {name: one.detach().cpu().contiguous() for name, one in tensors.items()}
            about = [
                [name, str(one.dtype).removeprefix("torch."), list(one.shape)]
                for name, one in held.items()
            ]
            self._store.set(key, json.dumps(about).encode())
        else:
            about = json.loads(self._take(key))
            held = {
                name: torch.empty(shape, dtype=getattr(torch, dtype))
                for name, dtype, shape in about
            }
        # All are there by now, so that what follows takes no longer than the network does.
        self.gather(None)
        with self._reported():
            for one in held.values():
                self.moved += one.nbytes
                if one.numel():
                    self._group.broadcast(one.reshape(-1).view(torch.uint8), source).wait()
        return dict(tensors) if mine else held

    def _next(self) -> str:
        self._step += 1
        return f"step/{self._step}"

    def _take(self, key: str) -> bytes:
        """A value that another process will put there."""
        pause = 0.0005
        with self._reported():
            while not self._store.check([key]):
                if self.failure is not None:
                    raise self.failure
                time.sleep(pause)
                pause = min(1.3 * pause, 0.05)
            return bytes(self._store.get(key))

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            raise self._translated(error) from error

    # ------------------------------------------------------------------------------------------------ the watch

    def _say(self, beat: int, failed: str | None = None) -> None:
        state = json.dumps({"beat": beat, "failed": failed})
        self._watched.set(f"state/{self._round}/{self.rank}", state.encode())

    def _watch(self, stop: threading.Event) -> None:
        """Say that this process is alive, and listen whether the others are."""
        keys = [f"state/{self._round}/{other}" for other in range(self.size)]
        changed = [(b"", time.monotonic())] * self.size
        beat = 0
        while not stop.wait(_BEAT):
            beat += 1
            try:
                self._say(beat)
                for other, key in enumerate(keys):
                    state = self._watched.get(key) if self._watched.check([key]) else b""
                    if state != changed[other][0]:
                        changed[other] = (state, time.monotonic())
                self.failure = self._found(changed)
            except RuntimeError as error:
                self.failure = RankError(
                    f"rank {self.rank} of {self.size} lost the store of the run: torchrun, or the first rank, was "
                    f"killed ({_line(error)}). {_AGAIN}"
                )
            if self.failure is not None:
                break
        if self.failure is not None and not stop.wait(_GRACE):
            print(f"postlude: {self.failure}", file=sys.stderr, flush=True)
            os._exit(self.failure.exit_code)

    def _found(self, changed: Sequence[tuple[bytes, float]]) -> RankError | None:
        now = time.monotonic()
        for other, (text, since) in enumerate(changed):
            if other == self.rank:
                continue
            state: dict[str, Any] = json.loads(text) if text else {"beat": 0, "failed": None}
            if state["failed"] is not None:
                said = f"rank {other} of {self.size} stopped: {state['failed']}"
                return RankError(f"{said} {_AGAIN}", told=True)
            if state["beat"] >= 0 and now - since > self.patience:
                return RankError(
                    f"rank {other} of {self.size} has not been heard of for {now - since:.0f} s: it was killed, or its "
                    f"machine hangs or is gone ({_VARIABLE} says how long to wait). {_AGAIN}"
                )
        return None


@functools.cache
def _connection(rank: int, size: int) -> _Link:
    return _Link(rank, size)


def _line(error: BaseException) -> str:
    """An error on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__
