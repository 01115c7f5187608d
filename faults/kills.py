"""SIGKILL at random moments: what is there is whole, and the same command started again ends with the same bits."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from faults.suite import Trial, Work, command, contents, ended, fault, fork

# Pages and marks of what is under way are no results; these files also say how long something took.
_IGNORED = ("started.json", "report.html")
_TIMED = ("done.json", "tune.json", "steps.jsonl")
_MEASURED = re.compile(r"seconds?$|_mib$|memory|^sha256$")
_FAMILY = "SIGKILL at a random moment"


def quantize_words(work: Work, out: Path) -> list[object]:
    """GPTQ: a calibration, a unit of work a block, a checkpoint."""
    return [
        "quantize", work.inputs / "model", "--method", "gptq", "--bits", "w4a4kv4", "--calibration",
        work.inputs / "text.txt", "--samples", "4", "--length", "24", "--no-check", "-o", out,
    ]  # fmt: skip


def build_words(work: Work, out: Path) -> list[object]:
    """An index of 24 examples in six shards."""
    return [
        "attribute", "build", work.inputs / "model", work.inputs / "train.jsonl", "--shard-examples", "4",
        "--max-length", "32", "-o", out,
    ]  # fmt: skip


def tune_words(work: Work, out: Path) -> list[object]:
    """24 steps."""
    return [
        "tune", work.inputs / "model", work.inputs / "train.jsonl", "--max-length", "48", "--batch-size", "2",
        "--epochs", "2", "--learning-rate", "1e-3", "--save-every", "2", "-o", out,
    ]  # fmt: skip


def run_words(work: Work, out: Path) -> list[object]:
    """A recipe of four stages."""
    given = {"model": "model", "data": "train.jsonl", "text": "text.txt"}
    values = [
        word for name, file in given.items() for word in ("--set", f"{name}={work.inputs / file}")
    ]
    return ["run", work.inputs / "recipe.yaml", *values, "-o", out]


def results(out: Path) -> dict[str, str]:
    """What must be the same: every file's bytes, and of those that hold times everything but these."""
    found = contents(out, _IGNORED)
    for file in out.rglob("*"):
        if file.name in _TIMED:
            rows = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
            plain = [_without_times(json.loads(row)) for row in rows]
            found[str(file.relative_to(out))] = json.dumps(plain, sort_keys=True)
    return found


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        # A record of a stage has the hashes of its files, too, those with times among them.
        return {
            key: _without_times(item)
            for key, item in value.items()
            if not _MEASURED.search(key) and Path(key).name not in (*_TIMED, *_IGNORED)
        }
    return [_without_times(item) for item in value] if isinstance(value, list) else value


Words = Callable[[Work, Path], Sequence[object]]


def kill(work: Work, name: str, words: Words, count: int, real: int = 0) -> Iterator[Trial]:
    """Kill a command ``count`` times in forked children, and ``real`` times as a program of its own."""
    moments = work.random(f"kill {name}")
    out = work.fresh() / "out"
    given = words(work, out)
    durations = []
    for _ in range(2):
        work.fresh()
        whole = command(given)
        if whole.code:
            raise RuntimeError(f"{name}: {whole.shown()}")
        durations.append(whole.seconds)
    expected = results(out)
    for _ in range(count):
        yield _one(work, given, expected, moments.uniform(0, durations[-1]), _forked)
    if real:
        work.fresh()
        took = _program(given, work.path / "log", None)
        undisturbed = _compare(work, out, expected, "in a process of its own", 0)
        if undisturbed.outcome == "FAILED":
            raise RuntimeError(undisturbed.about)
        for _ in range(real):
            yield _one(work, given, expected, moments.uniform(0, took), _program)


def _one(
    work: Work,
    given: Sequence[object],
    expected: dict[str, str],
    moment: float,
    start: Callable[[Sequence[object], Path, float | None], float],
) -> Trial:
    out = work.fresh() / "out"
    start(given, work.path / "log", moment)
    after = results(out)
    whole = after == expected
    # A run's directory grows stage by stage; every other output appears at once.
    if out.exists() and not whole and given[0] not in ("run", "attribute"):
        return Trial(
            "FAILED", f"killed after {moment:.2f} s: a part of the output is there: {sorted(after)}"
        )
    again = command(given)
    at = f"killed after {moment:.2f} s"
    refused_whole = whole and again.code == 2 and "already exists" in again.message
    if again.code and not refused_whole:
        return Trial("FAILED", f"{at}, then {again.shown()}")
    return _compare(work, out, expected, at, again.code)


def _compare(work: Work, out: Path, expected: dict[str, str], at: str, code: int) -> Trial:
    found = results(out)
    if found != expected:
        keys = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))
        return Trial(
            "FAILED", f"{at}: differs in {keys[:5]}: {_difference(found, expected, keys[0])}"
        )
    # Where the output was whole already, what is left of the work stays until the output is replaced.
    left = sorted(one.name for one in out.parent.iterdir() if one != out)
    if left and code == 0:
        return Trial("FAILED", f"{at}: left behind {left}")
    return Trial("same bits", at)


def _difference(found: dict[str, str], expected: dict[str, str], key: str) -> str:
    if key not in found or key not in expected:
        return "missing" if key in expected else "surplus"
    pairs = enumerate(zip(found[key], expected[key], strict=False))
    common = next((at for at, (one, other) in pairs if one != other), len(expected[key]))
    start = max(0, common - 60)
    return f"...{found[key][start : common + 60]}... instead of ...{expected[key][start : common + 60]}..."


def _forked(given: Sequence[object], log: Path, moment: float | None) -> float:
    began = time.monotonic()
    process = fork(given, log)
    if moment is not None:
        time.sleep(moment)
        os.kill(process, signal.SIGKILL)
    return ended(process, log, began).seconds


def _program(given: Sequence[object], log: Path, moment: float | None) -> float:
    began = time.monotonic()
    with open(log.with_suffix(".err"), "wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "postlude", *map(str, given)],
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return time.monotonic() - began


@fault(_FAMILY, "`quantize`", 14, everyday=True)
def quantize(work: Work, count: int) -> Iterator[Trial]:
    """GPTQ on calibration text."""
    yield from kill(work, "quantize", quantize_words, count - count // 7, real=count // 7)


@fault(_FAMILY, "`attribute build`", 14)
def build(work: Work, count: int) -> Iterator[Trial]:
    """Six shards."""
    yield from kill(work, "build", build_words, count - count // 7, real=count // 7)


@fault(_FAMILY, "`tune`", 12)
def tune(work: Work, count: int) -> Iterator[Trial]:
    """24 steps, a state every two of them at most."""
    yield from kill(work, "tune", tune_words, count - count // 6, real=count // 6)


@fault(_FAMILY, "`run` of a recipe", 10)
def run(work: Work, count: int) -> Iterator[Trial]:
    """Four stages."""
    yield from kill(work, "run", run_words, count - count // 5, real=count // 5)


@fault("SIGKILL while an output is replaced", "`quantize --overwrite`", 6)
def replace(work: Work, count: int) -> Iterator[Trial]:
    """The old output stays until the new one is there."""
    moments: random.Random = work.random("replace")
    out = work.fresh() / "out"
    old_words = ["quantize", work.inputs / "model", "--method", "rtn", "--no-check", "-o", out]
    given = [*quantize_words(work, out), "--overwrite"]
    found = []
    for words in (old_words, given):
        done = command(words)
        if done.code:
            raise RuntimeError(done.shown())
        found.append(results(out))
    old, new = found
    for _ in range(count):
        work.fresh()
        command(old_words)
        moment = moments.uniform(0, done.seconds)
        _forked(given, work.path / "log", moment)
        at = f"killed after {moment:.2f} s"
        if results(out) not in (old, new):
            yield Trial("FAILED", f"{at}: neither the old output nor the new one")
            continue
        again = command(given)
        yield (
            Trial("FAILED", f"{at}, then {again.shown()}")
            if again.code
            else _compare(work, out, new, at, 0)
        )
