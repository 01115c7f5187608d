"""What every fault shares: a command in a child process, what may come of it, and the table.

A child is a fork of a process that has imported everything, so a fault costs tenths of a second instead of the seconds
that importing PyTorch takes. It runs the command line as ``postlude`` does, in the same function.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import os
import pkgutil
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

__all__ = [
    "OUTCOMES",
    "UNPROTECTED",
    "Ended",
    "Fault",
    "Trial",
    "Words",
    "Work",
    "all_faults",
    "command",
    "contents",
    "ended",
    "fault",
    "fork",
    "judge_damage",
    "judge_refusal",
    "table",
]

# Of processor time, however busy the machine is: what takes longer on the tiny models of the suite hangs.
PROCESSOR_SECONDS = 60
# What sleeps takes none.
SECONDS = 900.0
# More than this beyond what the process had when it was forked, and a file was believed about its size.
MEBIBYTES = 1024

# Every outcome of a trial, and what it means; the order of the table's columns.
OUTCOMES = {
    "same bits": "the command, started again, ended with exactly the bits of an undisturbed run",
    "refused": "exit code 2 (1 for a full disk) and a message that names the file; nothing written or changed",
    "no effect": "the result is the same as without the fault",
    "not noticed": "another result and no complaint, in a file whose bytes nothing vouches for",
    "FAILED": "anything else: lost or changed files, a traceback, code that ran, a hang, memory without bound",
}
# Files that are right whatever they say: nobody but their author can tell that they were changed.
UNPROTECTED: set[str] = set()


@dataclasses.dataclass(frozen=True)
class Trial:
    """One fault, done once."""

    outcome: str
    about: str = ""


@dataclasses.dataclass(frozen=True)
class Fault:
    """A row of the table.

    Attributes:
        family: kind of fault.
        name: what it is done to.
        trials: does it, as often as it is told to.
        count: how often; the everyday tests do each once at most.
        everyday: whether they do it at all.
    """

    family: str
    name: str
    trials: Callable[[Work, int], Iterator[Trial]]
    count: int
    everyday: bool = False


_FAULTS: list[Fault] = []
# What a command says of the time it took.
_CHANGING = re.compile(r'"[a-z_]*(seconds|per_second|memory)[a-z_]*": [0-9.e+-]+')


def all_faults() -> list[Fault]:
    """Every fault of every file of this folder."""
    package = importlib.import_module("faults")
    for found in pkgutil.walk_packages(package.__path__, "faults."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    return list(_FAULTS)


def fault(
    family: str, name: str, count: int = 1, *, everyday: bool = False
) -> Callable[[Callable[[Work, int], Iterator[Trial]]], Callable[[Work, int], Iterator[Trial]]]:
    """Add a function that yields trials to the suite."""

    def add(
        trials: Callable[[Work, int], Iterator[Trial]],
    ) -> Callable[[Work, int], Iterator[Trial]]:
        _FAULTS.append(Fault(family, name, trials, count, everyday))
        return trials

    return add


class Work:
    """A folder of the suite: what commands are given, and room for what they write.

    Attributes:
        path: the folder.
        inputs: made once, read by every command, and the same at the end.
        seed: of everything drawn at random.
    """

    def __init__(self, path: Path, seed: int) -> None:
        self.path, self.seed = path, seed
        self.inputs = path / "inputs"
        self.inputs.mkdir(parents=True)
        self._made: dict[str, Path] = {}

    def random(self, name: str) -> random.Random:
        """Numbers of one fault, the same in whatever order the faults are done."""
        return random.Random(f"{self.seed} {name}")

    def fresh(self, name: str = "trial") -> Path:
        """An empty folder of that name; what was in it is gone."""
        folder = self.path / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def made(self, name: str, words: Callable[[Path], Sequence[object]]) -> Path:
        """What a command wrote when nothing went wrong; run once.

        Raises:
            RuntimeError: it did not.
        """
        if name not in self._made:
            target = self.path / "made" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            done = command(words(target))
            if done.code:
                raise RuntimeError(f"{name}: {done.shown()}")
            self._made[name] = target
        return self._made[name]

    @property
    def sentinel(self) -> Path:
        """A file that appears if something hostile is executed."""
        return self.path / "executed"


@dataclasses.dataclass(frozen=True)
class Ended:
    """A command that ended.

    Attributes:
        code: its exit code, or minus the signal that ended it.
        out, err: what it printed.
        seconds: from the fork to its end.
        mebibytes: that it took beyond what it was forked with.
    """

    code: int
    out: str
    err: str
    seconds: float
    mebibytes: float

    @property
    def message(self) -> str:
        """What it said, its spaces made single."""
        return " ".join(self.err.split())

    def shown(self) -> str:
        """For a person who looks for what went wrong."""
        return f"exit code {self.code} after {self.seconds:.1f} s: {self.message[-600:]}"


Words = Sequence[object] | Callable[[], object]


def _called(work: Callable[[], object]) -> int:
    """What no command does by itself, refused as a command refuses."""
    from postlude.errors import PostludeError

    try:
        print(work())
    except PostludeError as error:
        print(f"postlude: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def fork(words: Words, log: Path, before: Callable[[], None] | None = None) -> int:
    """Start a command line in a child; gives its process id.

    Args:
        words: of the command line, or a call of the library.
        log: what it prints goes to ``log.out`` and ``log.err``.
        before: called in the child first.
    """
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setpgid(0, 0)
        # Its command line is gone with the fork; a core file of a killed one helps nobody.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS + 5))
        for number, ending in ((1, "out"), (2, "err")):
            target = os.open(
                log.with_suffix(f".{ending}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644
            )
            os.dup2(target, number)
        # What a test runner put in their place belongs to the parent.
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        # Those of a program of its own, not of the tests that may have been forked.
        warnings.resetwarnings()
        if before is not None:
            before()
        from postlude.cli import run

        code = _called(words) if callable(words) else run([str(word) for word in words])
    except BaseException:  # noqa: BLE001 a child must never go on as its parent
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def ended(process: int, log: Path, began: float | None = None, seconds: float = SECONDS) -> Ended:
    """Wait for a child; one that takes longer than that is killed, which its signal tells."""
    began = time.monotonic() if began is None else began
    while True:
        found, status, usage = os.wait4(process, os.WNOHANG)
        if found:
            break
        if time.monotonic() - began > seconds:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            _, status, usage = os.wait4(process, 0)
            break
        time.sleep(0.005)
    had = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Ended(
        os.waitstatus_to_exitcode(status),
        log.with_suffix(".out").read_text(errors="replace"),
        log.with_suffix(".err").read_text(errors="replace"),
        time.monotonic() - began,
        max(0, usage.ru_maxrss - had) / 1024,
    )


def command(
    words: Words,
    before: Callable[[], None] | None = None,
    seconds: float = SECONDS,
) -> Ended:
    """Run a command line in a child."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="postlude-fault-") as folder:
        log = Path(folder) / "log"
        return ended(fork(words, log, before), log, began, seconds)


def contents(path: Path, ignore: Sequence[str] = ()) -> dict[str, str]:
    """SHA-256 of every file by its path, directories too; a link by where it leads; empty where nothing is."""
    if path.is_file():
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    return {
        str(one.relative_to(path)): _content(one)
        for one in sorted(path.rglob("*"))
        if one.name not in ignore
    }


def _content(path: Path) -> str:
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"


def judge_refusal(
    work: Work, done: Ended, inputs: Mapping[str, str], outputs: Sequence[Path], says: str
) -> Trial:
    """Whether a command refused what it was given as it should.

    Args:
        work: of the suite.
        done: the command.
        inputs: :func:`contents` of the inputs before it.
        outputs: what may not be there.
        says: a pattern that its message must hold.
    """
    wrong = harm(work, done)
    if done.code != 2:
        wrong.append(f"exit code {done.code}")
    if not re.search(says, done.message):
        wrong.append(f"the message lacks {says!r}")
    if contents(work.inputs) != inputs:
        wrong.append("inputs changed")
    wrong += [f"wrote {one.name}" for one in outputs if one.exists()]
    if wrong:
        return Trial("FAILED", f"{'; '.join(wrong)}: {done.shown()}")
    return Trial("refused", done.message)


def judge_damage(
    work: Work, name: str, done: Ended, whole: Ended, kept: bool, at: str, says: str
) -> Trial:
    """What a command made of a damaged input.

    Args:
        work: of the suite.
        name: of the row; one of ``UNPROTECTED`` may go unnoticed.
        done: the command.
        whole: the same command on the undamaged input.
        kept: whether its inputs are as they were.
        at: where the damage is.
        says: a pattern that a refusal must hold.
    """
    wrong = harm(work, done)
    if not kept:
        wrong.append("files changed")
    if done.code == 0 and not wrong:
        if _CHANGING.sub("", done.out) == _CHANGING.sub("", whole.out):
            return Trial("no effect", at)
        if name in UNPROTECTED:
            return Trial("not noticed", at)
        wrong.append("another result, unnoticed")
    elif done.code != 2:
        wrong.append(f"exit code {done.code}")
    elif not re.search(says, done.message):
        wrong.append(f"the message lacks {says!r}")
    if wrong:
        return Trial("FAILED", f"{at}: {'; '.join(wrong)}: {done.shown()}")
    return Trial("refused", f"{at}: {done.message}")


def harm(work: Work, done: Ended) -> list[str]:
    """What no fault may lead to."""
    wrong = []
    if work.sentinel.exists():
        work.sentinel.unlink()
        wrong.append("CODE WAS EXECUTED")
    if done.code < 0:
        wrong.append(f"ended by signal {-done.code}")
    if "Traceback" in done.err:
        wrong.append("a traceback")
    if done.mebibytes > MEBIBYTES:
        wrong.append(f"took {done.mebibytes:.0f} MiB")
    return wrong


def table(found: Mapping[tuple[str, str], Sequence[Trial]]) -> list[str]:
    """The counts as a table of Markdown."""
    lines = [
        "| fault | of what | times | " + " | ".join(OUTCOMES) + " |",
        "| --- | --- | ---: |" + " ---: |" * len(OUTCOMES),
    ]
    total: Counter[str] = Counter()
    for (family, name), trials in found.items():
        counts = Counter(trial.outcome for trial in trials)
        total += counts
        cells = [str(counts[outcome] or "") for outcome in OUTCOMES]
        lines.append(f"| {family} | {name} | {len(trials)} | {' | '.join(cells)} |")
    cells = [str(total[outcome]) for outcome in OUTCOMES]
    lines.append(f"| **all** | | **{total.total()}** | {' | '.join(cells)} |")
    return lines
