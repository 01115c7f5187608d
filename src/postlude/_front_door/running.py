"""Run a recipe: a chain of commands."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from postlude._front_door.opening import Path_
from postlude.recipes import forecast as _forecast
from postlude.recipes.recipe import Recipe, read
from postlude.recipes.run import Done
from postlude.recipes.run import run as _run
from postlude.recipes.stage import ASSUMED
from postlude.runs.processes import Processes

__all__ = ["forecast", "report", "run"]


def run(
    recipe: Path_,
    out: Path_,
    variables: Mapping[str, str] | None = None,
    *,
    seed: int = 0,
    notify: Callable[[str], object] = lambda _: None,
) -> list[Done]:
    """Run the stages of a recipe, each at most once.

    Args:
        recipe: a YAML file.
        out: directory of the run. In one of an earlier run, stages that nothing they depend on changed are not run
            again, and a run that was killed goes on where it stopped.
        variables: values of its variables, in the place of its own.
        seed: of every stage that has one and names none.
        notify: called with a line for a person before every stage.

    Raises:
        DataError: a recipe that cannot run; nothing was started.
        StageError: a stage failed; those before it are kept.
        RunDirectoryError: ``out`` holds something else.
    """
    with Processes() as processes:
        tell = notify if processes.is_first else lambda _: None
        done = _run(_read(recipe, variables, seed), out, _line().invoke, tell)
        processes.first(lambda: report([out]), lambda: None)
    return done


def forecast(
    recipe: Path_,
    out: Path_,
    variables: Mapping[str, str] | None = None,
    *,
    assume: Mapping[str, str] | None = None,
    hardware: str = "this",
    ranks: int = 1,
    sharded: bool = False,
    seed: int = 0,
) -> _forecast.Forecasts:
    """Check a recipe and tell what it would take, without running it; see :func:`run`.

    Args:
        recipe, out, variables, seed: as for :func:`run`.
        assume: variables that stand for a model of so many parameters, or for data of so many tokens, as in
            ``{"model": "70B"}``; such files need not be there.
        hardware: what a rank runs on: ``this`` machine, or a name of :data:`postlude.attribution.plan.HARDWARE`.
        ranks: how many torchrun would start.
        sharded: whether accelerate shards what is trained (FSDP2).
    """
    assumed = {name: f"{ASSUMED}{size}" for name, size in (assume or {}).items()}
    found = _read(recipe, {**(variables or {}), **assumed}, seed)
    machine = _forecast.chosen_hardware(hardware, ranks)
    return _forecast.forecast(found, out, machine, ranks, sharded)


def report(runs: Sequence[Path_], out: Path_ | None = None) -> Path:
    """Write the page of a run, or of several side by side; of one that is not finished as far as it is.

    Args:
        runs: directories that :func:`run` wrote, or is writing.
        out: the file; ``report.html`` of the first run when None.

    Raises:
        RunDirectoryError: not the directory of a run.
    """
    from postlude.report.chain import write

    return write(runs, out)


def _read(recipe: Path_, variables: Mapping[str, str] | None, seed: int) -> Recipe:
    commands = importlib.import_module("postlude.cli._commands")
    return read(recipe, commands.recipe_commands(_line().app), variables, seed)


def _line() -> Any:
    # A stage is a command, so that what a recipe does can be done by hand; this verb alone goes through them.
    return importlib.import_module("postlude.cli")
