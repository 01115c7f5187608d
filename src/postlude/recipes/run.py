"""Run the stages of a recipe, each at most once, and go on after a kill.

    recipe.yaml             the recipe of the last run
    run.json                its name, variables, the order of its stages, and how far each is; from the start
    stages/NAME/started.json   the key of the work that is, or was, under way here
    stages/NAME/output...      what the command wrote
    stages/NAME/done.json      key, command line, seconds, result, the hash of every file of the output, and its own

The key of a stage is a hash of its command, arguments and options, of the bytes of every file that they name, of the
keys of the stages whose outputs it reads, and of the version. A stage whose key and files are those of ``done.json``
is not run again; one whose key is that of ``started.json`` goes on, by whatever its command keeps of unfinished work;
any other starts in an empty folder. ``run.json`` holds no time and nothing of how often a run was stopped, so that of a
finished run is the same however it came about.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import postlude
from postlude.errors import PostludeError, RankError, RunDirectoryError, StageError
from postlude.recipes.commands import shell_line
from postlude.recipes.recipe import Recipe
from postlude.recipes.stage import Stage
from postlude.runs.atomic import atomic_write
from postlude.runs.checksums import hash_file
from postlude.runs.processes import Processes

__all__ = ["Done", "Execute", "State", "command_line", "keys", "pending", "run", "state"]

# Runs one command line and returns what it prints as JSON.
Execute = Callable[[Sequence[str]], Any]
# How far a stage is. One that was stopped is ``running`` until the recipe is run again.
State = Literal["waiting", "running", "failed", "done"]

_RUN, _RECIPE, _STAGES = "run.json", "recipe.yaml", "stages"
_STARTED, _DONE = "started.json", "done.json"
_SUM = "sha256"


@dataclasses.dataclass(frozen=True)
class Done:
    """A finished stage.

    Attributes:
        stage: its name.
        key: hash of everything that decides its result.
        command: the words of its command line, outputs included.
        seconds: how long it took.
        result: what the command prints as JSON.
        files: SHA-256 of every file of its output, by path within the stage's folder.
        reused: whether it was done before this run.
    """

    stage: str
    key: str
    command: tuple[str, ...]
    seconds: float
    result: Any
    files: Mapping[str, str]
    reused: bool = False


def keys(recipe: Recipe) -> dict[str, str]:
    """The key of every stage, by name.

    Raises:
        PostludeError: a file that cannot be read.
    """
    found: dict[str, str] = {}
    # A checkpoint that several stages name is read once.
    digests: dict[str, str | None] = {}
    for stage in recipe.stages:
        for text in stage.inputs():
            if text not in digests:
                digests[text] = _digest(Path(text))
        content = {
            "command": stage.command.name,
            "arguments": stage.arguments,
            "options": stage.options,
            "files": {text: digests[text] for text in stage.inputs()},
            "needs": {name: found[name] for name in stage.needs},
            "version": postlude.__version__,
        }
        found[stage.name] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return found


def run(
    recipe: Recipe,
    out: str | os.PathLike[str],
    execute: Execute,
    notify: Callable[[str], object] = lambda _: None,
) -> list[Done]:
    """Run a recipe into a directory.

    Args:
        recipe: checked.
        out: a new directory, or one of an earlier run: its stages are used again where nothing they depend on changed.
        execute: runs a command line.
        notify: called with a line for a person before every stage.

    Raises:
        RunDirectoryError: ``out`` holds something else.
        StageError: a stage failed; those before it are kept.
    """
    with Processes() as processes:
        return _run(recipe, Path(os.path.realpath(out)), execute, notify, processes)


def _run(
    recipe: Recipe,
    place: Path,
    execute: Execute,
    notify: Callable[[str], object],
    processes: Processes,
) -> list[Done]:
    """All ranks of torchrun go through the stages; the first one keeps the records."""
    directory = processes.first(lambda: _prepared(place), lambda: place)
    if processes.is_first:
        _write(directory / _RECIPE, recipe.text)
    names = processes.agree(lambda: keys(recipe))
    outputs: dict[str, str] = {}
    done: list[Done] = []
    summary = _Summary(directory, recipe, names, writes=processes.is_first)
    for number, stage in enumerate(recipe.stages, 1):
        folder = directory / _STAGES / stage.name
        title = f"[{number}/{len(recipe.stages)}] {stage.name}"
        record = processes.agree(functools.partial(_kept, folder, names[stage.name]))
        if record is None:
            words = command_line(stage, folder, outputs)
            notify(f"{title}: {shell_line(words)}")
            summary.note(stage.name, "running")
            try:
                found = _run_stage(stage, folder, names[stage.name], words, execute, processes)
            except StageError as error:
                summary.note(stage.name, "failed", str(error))
                raise
        else:
            notify(f"{title}: unchanged, done before")
            found = _from_record(stage.name, record)
        done.append(found)
        if stage.command.output:
            outputs[stage.name] = str(_output(stage, folder))
        summary.note(stage.name, "done")
    return done


class _Summary:
    """``run.json``: written whole when the run begins, and whenever a stage begins or ends."""

    def __init__(
        self, directory: Path, recipe: Recipe, names: Mapping[str, str], *, writes: bool
    ) -> None:
        self._file, self._writes = directory / _RUN, writes
        # Whether their files are still whole is seen when their turn comes.
        states: dict[str, State] = {
            name: "waiting" if _recorded(directory / _STAGES / name, key) is None else "done"
            for name, key in names.items()
        }
        self._content: dict[str, Any] = {
            "name": recipe.name,
            "about": recipe.about,
            "variables": dict(recipe.variables),
            "seed": recipe.seed,
            "stages": [stage.name for stage in recipe.stages],
            "states": states,
            "version": postlude.__version__,
        }
        self._save()

    def note(self, stage: str, state: State, error: str = "") -> None:
        before = self._content["states"][stage]
        self._content["states"][stage] = state
        if error:
            self._content["error"] = error
        if state != before:
            self._save()

    def _save(self) -> None:
        if self._writes:
            text = json.dumps(self._content, indent=1, ensure_ascii=False)
            _write(self._file, text + "\n")


def state(out: str | os.PathLike[str]) -> tuple[dict[str, Any], list[Done]]:
    """What a run consists of: its summary, and its finished stages in order.

    ``states`` of the summary has a :data:`State` for every stage; ``error`` says why one failed.

    Raises:
        RunDirectoryError: not the directory of a run, or a finished stage whose record is damaged.
    """
    directory = Path(os.path.realpath(out))
    summary = _read(directory / _RUN)
    if summary is None:
        raise RunDirectoryError(
            f"{directory} is not the directory of a run: it has no readable {_RUN}. Run a recipe there first "
            "(postlude run RECIPE -o DIRECTORY)."
        )
    stages = []
    for name in summary["stages"]:
        if summary["states"][name] != "done":
            continue
        record = _read(directory / _STAGES / name / _DONE)
        if record is None or (_SUM in record and record.pop(_SUM) != _sum(record)):
            raise RunDirectoryError(
                f"{directory}: the record of stage {name!r} ({_DONE}) is lost or damaged. Run the recipe again."
            )
        stages.append(_from_record(name, record))
    return summary, stages


def command_line(stage: Stage, folder: Path, outputs: Mapping[str, str]) -> list[str]:
    """The words of a stage's command line, with the outputs that its folder gets."""
    words = stage.words(outputs)
    if stage.command.output:
        words += [stage.command.output, str(_output(stage, folder))]
    if stage.command.page:
        words += [stage.command.page, str(folder / "page.html")]
    # A kill may fall between the output and the record of it.
    return [*words, *stage.command.replace]


def pending(recipe: Recipe, directory: Path) -> set[str]:
    """The stages that a run into this directory would run."""
    names = keys(recipe)
    return {
        stage.name
        for stage in recipe.stages
        if _kept(directory / _STAGES / stage.name, names[stage.name]) is None
    }


def _output(stage: Stage, folder: Path) -> Path:
    return folder / stage.command.output_for(stage.options)


def _prepared(directory: Path) -> Path:
    if directory.is_file():
        raise RunDirectoryError(f"{directory} is a file; expected a directory for the run.")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / _RECIPE).is_file():
        raise RunDirectoryError(
            f"{directory} is not empty and holds no {_RECIPE}, so it is not the directory of a run. Choose another "
            "output (-o)."
        )
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _run_stage(
    stage: Stage,
    folder: Path,
    key: str,
    words: Sequence[str],
    execute: Execute,
    processes: Processes,
) -> Done:
    processes.first(lambda: _start(folder, key), lambda: None)
    begin = time.monotonic()
    try:
        result = execute(words)
    except RankError:
        raise
    except PostludeError as error:
        raise StageError(stage.name, stage.line, error) from error
    seconds = time.monotonic() - begin

    def finish() -> dict[str, Any]:
        record = {
            "key": key,
            "command": list(words),
            "seconds": seconds,
            "result": result,
            "files": _files(folder),
        }
        signed = {**record, _SUM: _sum(record)}
        _write(folder / _DONE, json.dumps(signed, indent=1, ensure_ascii=False) + "\n")
        return record

    done = _from_record(stage.name, processes.agree(finish))
    return dataclasses.replace(done, reused=False)


def _start(folder: Path, key: str) -> None:
    """A folder in which a stage begins, or goes on if it was this very work that stopped there."""
    started = _read(folder / _STARTED)
    if started is None or started.get("key") != key:
        # Renamed first: a kill while it is being removed must not leave half of it under this name.
        if folder.exists():
            doomed = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(folder, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        folder.mkdir(parents=True)
        _write(folder / _STARTED, json.dumps({"key": key}) + "\n")
    (folder / _DONE).unlink(missing_ok=True)


def _kept(folder: Path, key: str) -> dict[str, Any] | None:
    """The record of a stage, if it is of this work and its files are as they were."""
    record = _recorded(folder, key)
    return None if record is None or record.get("files") != _files(folder) else record


def _recorded(folder: Path, key: str) -> dict[str, Any] | None:
    """The record of a stage, if it is whole and of this work."""
    record = _read(folder / _DONE)
    if record is None or record.pop(_SUM, None) != _sum(record):
        return None
    return record if record.get("key") == key else None


def _sum(record: Mapping[str, Any]) -> str:
    """Hash of what a record says, kept in it: one of which a byte is damaged is no record."""
    read = json.loads(json.dumps(record))
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def _from_record(name: str, record: Mapping[str, Any]) -> Done:
    return Done(
        name,
        record["key"],
        tuple(record["command"]),
        record["seconds"],
        record["result"],
        record["files"],
        reused=True,
    )


def _files(folder: Path) -> dict[str, str]:
    """SHA-256 by path of everything in a stage's folder but the records of it."""
    return {
        file.relative_to(folder).as_posix(): hash_file(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not (file.parent == folder and file.name in (_STARTED, _DONE))
    }


def _digest(path: Path) -> str | None:
    """Hash of a file, or of the names and bytes of the files of a directory; None where there is neither."""
    try:
        if path.is_file():
            return hash_file(path)
        if path.is_dir():
            files = {
                file.relative_to(path).as_posix(): hash_file(file)
                for file in path.rglob("*")
                if file.is_file()
            }
            return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    except OSError as error:
        if path.exists():
            raise RunDirectoryError(f"{path} cannot be read: {error}") from error
    return None


def _read(file: Path) -> dict[str, Any] | None:
    """A record, or None where there is none that can be read; it is then made again."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _write(file: Path, text: str) -> None:
    with atomic_write(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
