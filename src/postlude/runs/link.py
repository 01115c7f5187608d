"""How one process of several hears from the others: messages, tensors, and whether they are alive.

Messages are values of JSON in the store that ``torchrun`` keeps (without it, the first process does); tensors go
through gloo as bytes. A thread of every process writes a sign of life into the store and reads those of the others. Use
:class:`postlude.runs.processes.Processes`.
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
from typing import Any, TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor

from postlude.errors import RankError

__all__ = ["Link", "connection"]

T = TypeVar("T")

_BEAT = 1.0
_GRACE = 10.0
_PATIENCE = 120.0
_VARIABLE = "POSTLUDE_RANK_TIMEOUT"
_AGAIN = "Finished work is kept: run the same command again, and it goes on from there."


class Link:
    """What connects this process with the others, for as long as it lives."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.patience = float(os.environ.get(_VARIABLE, _PATIENCE))
        # Several signs of life within the time that a rank may be silent.
        self.beat = min(_BEAT, self.patience / 8)
        self.failure: RankError | None = None
        self._depth = self._step = self.moved = 0
        self._store, self._watched = self._connect(), self._connect()
        self._group: Any = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._round = 0
        self._lock, self._parted = threading.Lock(), False

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
        self.failure, self._parted = None, False
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
                own = not isinstance(translated, RankError)
                said = _line(error if translated is None else translated)
                self._say(-1, said, own)
                if own and self._is_told(said):
                    translated = RankError(f"rank 0 of {self.size} stopped: {said}", told=True)
                self._part_in_anger()
        self._stop.set()
        if translated is not None and translated is not error:
            raise translated from error

    def _is_told(self, said: str) -> bool:
        """Whether the first rank stops for the same reason, as all do who are given bad input."""
        end = time.monotonic() + 10 * self.beat
        key = f"state/{self._round}/0"
        while self.rank and time.monotonic() < end:
            first = json.loads(self._store.get(key)) if self._store.check([key]) else {"beat": 0}
            if first["beat"] < 0:
                return bool(first["failed"] == said)
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
        end = time.monotonic() + 5 * self.beat
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
        end = time.monotonic() + 4 * self.beat
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

    def _say(self, beat: int, failed: str | None = None, own: bool = True) -> None:
        """A sign of life, or with a ``beat`` of -1 the last word, after which there is none.

        Args:
            beat: how many there were before.
            failed: why this process stops.
            own: whether that happened here, and not on another rank.
        """
        with self._lock:
            if self._parted:
                return
            self._parted = beat < 0
            state = json.dumps({"beat": beat, "failed": failed, "own": own})
            self._watched.set(f"state/{self._round}/{self.rank}", state.encode())

    def _watch(self, stop: threading.Event) -> None:
        """Say that this process is alive, and listen whether the others are."""
        keys = [f"state/{self._round}/{other}" for other in range(self.size)]
        changed = [(b"", time.monotonic())] * self.size
        beat = 0
        while not stop.wait(self.beat):
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
        """What stops this process: where it began, rather than who stopped because of it."""
        now = time.monotonic()
        unheard: dict[str, Any] = {"beat": 0, "failed": None, "own": True}
        states = {
            other: (json.loads(text) if text else unheard, now - since)
            for other, (text, since) in enumerate(changed)
            if other != self.rank
        }
        failed = [
            (not state["own"], other) for other, (state, _) in states.items() if state["failed"]
        ]
        silent = [
            other
            for other, (state, passed) in states.items()
            if state["beat"] >= 0 and passed > self.patience
        ]
        if failed and (not min(failed)[0] or not silent):
            other = min(failed)[1]
            said = f"rank {other} of {self.size} stopped: {states[other][0]['failed']}"
            return RankError(f"{said} {_AGAIN}", told=True)
        if silent:
            return RankError(
                f"rank {silent[0]} of {self.size} has not been heard of for {states[silent[0]][1]:.0f} s: it was "
                f"killed, or its machine hangs or is gone ({_VARIABLE} says how long to wait). {_AGAIN}"
            )
        return None


@functools.cache
def connection(rank: int, size: int) -> Link:
    """The one of this process, made once."""
    return Link(rank, size)


def _line(error: BaseException) -> str:
    """An error on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__
