"""One hostile input, and how it is tried."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.suite import Trial, Words, Work, command, contents, harm, judge_refusal

__all__ = [
    "FAMILY",
    "Case",
    "Payload",
    "changed",
    "code",
    "copied_model",
    "evaluating",
    "pickled",
    "tried",
]

FAMILY = "hostile"


@dataclasses.dataclass(frozen=True)
class Case:
    """One hostile input.

    Attributes:
        name: for a person who looks for what went wrong.
        make: writes it into a folder and gives the command.
        says: a pattern that the refusal must hold; None where the command works as if it were not there.
    """

    name: str
    make: Callable[[Work, Path], Words]
    says: str | None


def tried(work: Work, cases: list[Case]) -> Iterator[Trial]:
    """Each case in a folder of its own."""
    for case in cases:
        folder = work.fresh()
        words = case.make(work, folder)
        inputs, before = contents(work.inputs), contents(folder)
        done = command(words)
        if case.says is not None:
            trial = judge_refusal(work, done, inputs, [], case.says)
            if trial.outcome == "refused" and contents(folder) != before:
                trial = Trial("FAILED", f"its folder changed: {done.shown()}")
        else:
            wrong = harm(work, done) + ([f"exit code {done.code}"] if done.code else [])
            trial = (
                Trial("FAILED", f"{'; '.join(wrong)}: {done.shown()}")
                if wrong
                else Trial("no effect")
            )
        yield dataclasses.replace(trial, about=f"{case.name}: {trial.about}")


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self._sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._sentinel}",)


def pickled(work: Work) -> bytes:
    """Bytes that touch the sentinel when they are unpickled."""
    return pickle.dumps({"model.weight": Payload(work.sentinel)}, protocol=2)


def code(work: Work) -> str:
    """Python that touches the sentinel when it is imported."""
    return f"import pathlib\npathlib.Path({str(work.sentinel)!r}).touch()\n"


def copied_model(work: Work, folder: Path) -> Path:
    """The checkpoint of the suite, to be changed."""
    return Path(shutil.copytree(work.inputs / "model", folder / "model"))


def evaluating(work: Work, model: Path) -> Words:
    """A command that loads a checkpoint and uses its tokenizer."""
    return ["evaluate", model, "--text", work.inputs / "text.txt", "--json"]


def changed(file: Path, **values: Any) -> None:
    """Put values into a JSON file."""
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**content, **values}))
