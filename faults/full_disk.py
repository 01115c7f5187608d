"""No space left: a message that says so, no half output, and the same command goes on once there is room.

A small file system in memory (tmpfs) where this may be mounted, which takes root; otherwise no file may grow beyond a
size (RLIMIT_FSIZE), which fails in the same places but counts each file for itself.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.kills import Words, build_words, quantize_words, results, run_words, tune_words
from faults.suite import Trial, Work, command, fault, harm

__all__ = ["how"]

_FAMILY = "full disk"
_MEBIBYTE = 2**20


@functools.cache
def how() -> str:
    """How a full disk is made here: ``tmpfs`` or ``RLIMIT_FSIZE``."""
    probe = Path(f"/tmp/postlude-mount-{os.getpid()}")
    try:
        with _tmpfs(probe, 65536):
            return "tmpfs"
    except (OSError, subprocess.CalledProcessError):
        return "RLIMIT_FSIZE"


@contextlib.contextmanager
def _tmpfs(folder: Path, size: int) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)
        folder.rmdir()


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


def _no_larger_than(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def fill(work: Work, words: Words, count: int) -> Iterator[Trial]:
    """Run a command where there is room for a part of what it writes, make room, and run it again."""
    # Where the small file system will be, since some outputs say where they are.
    folder = work.fresh("full")
    whole = folder / "out"
    done = command(words(work, whole))
    if done.code:
        raise RuntimeError(done.shown())
    sizes = [one.stat().st_size for one in whole.rglob("*") if one.is_file()]
    expected = results(whole)
    shutil.rmtree(folder)
    for number in range(count):
        share = (number + 0.5) / count
        if how() == "tmpfs":
            with _tmpfs(folder, int(sum(sizes) * share)):
                small = command(words(work, folder / "out"))
                half = results(folder / "out")
                _mount("-o", f"remount,size={64 * _MEBIBYTE}", str(folder))
                again = command(words(work, folder / "out"))
                found = results(folder / "out")
        else:
            work.fresh("full")
            limit = _no_larger_than(int(max(sizes) * share))
            small = command(words(work, folder / "out"), limit)
            half = results(folder / "out")
            again = command(words(work, folder / "out"))
            found = results(folder / "out")
        wrong = harm(work, small)
        if small.code == 0 or not re.search(r"[Nn]o space|too large|quota", small.message):
            wrong.append("it did not say that there is no space left")
        if half and set(half) >= set(expected):
            wrong.append("an output that looks whole")
        at = f"room for {share:.0%}"
        if wrong:
            yield Trial("FAILED", f"{at}: {'; '.join(wrong)}: {small.shown()}")
        elif again.code:
            yield Trial("FAILED", f"{at}, then {again.shown()}")
        elif found != expected:
            yield Trial("FAILED", f"{at}: another result after there was room")
        else:
            yield Trial("same bits", f"{at}: {small.message}")


def _prior(work: Work, out: Path) -> list[object]:
    return [
        "tune",
        "prior",
        work.inputs / "model",
        work.inputs / "train.jsonl",
        "--max-length",
        "48",
        "-o",
        out,
    ]


def _fit(work: Work, out: Path) -> list[object]:
    return ["fit", work.inputs / "picture.png", "--width", "16", "--steps", "3", "-o", out]


@fault(_FAMILY, "`quantize`", 4)
def quantize(work: Work, count: int) -> Iterator[Trial]:
    """Units of work, and the checkpoint."""
    yield from fill(work, quantize_words, count)


@fault(_FAMILY, "`tune`", 3)
def tune(work: Work, count: int) -> Iterator[Trial]:
    """States, and the checkpoint."""
    yield from fill(work, tune_words, count)


@fault(_FAMILY, "`attribute build`", 4)
def build(work: Work, count: int) -> Iterator[Trial]:
    """Shards."""
    yield from fill(work, build_words, count)


@fault(_FAMILY, "`tune prior`", 2)
def prior(work: Work, count: int) -> Iterator[Trial]:
    """Columns."""
    yield from fill(work, _prior, count)


@fault(_FAMILY, "`fit`", 2)
def fit(work: Work, count: int) -> Iterator[Trial]:
    """A picture in a network."""
    yield from fill(work, _fit, count)


@fault(_FAMILY, "`run` of a recipe", 3)
def run(work: Work, count: int) -> Iterator[Trial]:
    """Several stages."""
    yield from fill(work, run_words, count)
