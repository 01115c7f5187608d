"""Read a recipe and check all of it before anything starts; an error names the line and the nearest name."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from postlude.errors import DataError, nearest_names
from postlude.recipes.checks import nearest, problems
from postlude.recipes.commands import Command
from postlude.recipes.document import Document, Where
from postlude.recipes.stage import REFERENCE, Stage, replaced

__all__ = ["Recipe", "read"]

_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")
_TOP = ("name", "about", "variables", "stages")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe that was checked.

    Attributes:
        name, about: what it is, for a person.
        stages: in order.
        variables: their values, those that were overridden included.
        text: the file.
        seed: of every stage that has one and names none; 0 leaves the commands' own.
    """

    name: str
    about: str
    stages: tuple[Stage, ...]
    variables: Mapping[str, Any]
    text: str
    seed: int = 0


def read(
    path: str | os.PathLike[str],
    commands: Mapping[str, Command],
    variables: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        commands: what a stage may call, by name.
        variables: values that replace those of the file, as words of a command line.
        seed: of every stage that has one and names none; 0 leaves the commands' own.

    Raises:
        DataError: no such file, no YAML, or a recipe that cannot run; says in which line, and what comes nearest.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        near = nearest(file.name, sorted(one.name for one in file.parent.glob("*.y*ml")))
        raise DataError(f"there is no recipe {file}{near}") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(
            f"{file} cannot be read as a recipe: {reason}. Expected a YAML file."
        ) from error
    return _Reader(file, text, commands, seed).recipe(variables or {})


class _Reader:
    """Checks one file, stage by stage, and notes every mistake."""

    def __init__(self, file: Path, text: str, commands: Mapping[str, Command], seed: int) -> None:
        self._document = Document(file, text)
        self._file, self._commands, self._seed = file, commands, seed
        self._mistakes: list[str] = []
        # Stages as they stand in the file, and those of them that have no mistake.
        self._written: Mapping[Any, Any] = {}
        self._stages: dict[str, Stage] = {}

    def _note(self, where: Where, message: str) -> None:
        self._mistakes.append(str(self._document.error(where, message)))

    def _stop(self) -> NoReturn:
        raise DataError("\n".join(self._mistakes))

    def recipe(self, given: Mapping[str, str]) -> Recipe:
        content = self._document.content
        for key in content:
            if key not in _TOP:
                self._note((key,), f"A recipe has no {key!r}{nearest(key, list(_TOP))}")
        variables = self._variables(content.get("variables") or {}, given)
        stages = content.get("stages")
        if not isinstance(stages, dict) or not stages:
            self._note(("stages",), "expected `stages:` with at least one stage under it.")
            self._stop()
        self._written = stages
        for name, value in stages.items():
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                self._note(
                    ("stages", name),
                    f"a stage is named {name!r}; expected small letters, digits and hyphens, at most 40 of them, "
                    "since its folder is named like it.",
                )
            elif name in variables:
                self._note(
                    ("stages", name), f"{name!r} is the name of a variable, too; rename one."
                )
            else:
                self._stage(name, value, variables)
        if self._mistakes:
            self._stop()
        return Recipe(
            name=str(content.get("name") or self._file.stem),
            about=str(content.get("about") or ""),
            stages=tuple(self._stages.values()),
            variables=variables,
            text=self._document.text,
            seed=self._seed,
        )

    def _variables(self, own: Any, given: Mapping[str, str]) -> dict[str, Any]:
        """Their values; stops at mistakes, since stages are made of them."""
        before = len(self._mistakes)
        if not isinstance(own, dict):
            self._note(("variables",), "expected `variables:` to be a mapping of names to values.")
            self._stop()
        for name, value in own.items():
            if isinstance(value, dict | list):
                kind = type(value).__name__
                self._note(
                    ("variables", name), f"the variable {name!r} is a {kind}; expected one value."
                )
            self._no_reference(("variables", name), name, value)
        for name in given:
            if name not in own:
                known = nearest(name, list(own)) if own else "; it has none."
                self._mistakes.append(f"{self._file} has no variable {name!r}{known}")
        missing = [name for name, value in own.items() if value is None and name not in given]
        if missing:
            names = " and ".join(map(repr, missing))
            how = " ".join(f"--set {name}=VALUE" for name in missing)
            self._note(
                ("variables", missing[0]),
                f"the variable {names} has no value: give one ({how})."
                if len(missing) == 1
                else f"the variables {names} have no values: give them ({how}).",
            )
        values = {**own, **{name: self._given(name, value) for name, value in given.items()}}
        if len(self._mistakes) > before:
            self._stop()
        return values

    def _given(self, name: str, value: str) -> Any:
        """The value of a variable on the command line."""
        shown = f"--set {name}={value[:80]}"
        try:
            found = yaml.safe_load(value)
        except (yaml.YAMLError, RecursionError) as error:
            reason = str(error).splitlines()[0]
            self._mistakes.append(
                f"{shown}: not a value that YAML reads ({reason}). Quote it if it is a word."
            )
            return None
        if isinstance(found, dict | list):
            kind = type(found).__name__
            self._mistakes.append(
                f"{shown}: a {kind}; expected one value. Quote it if it is a word."
            )
        self._no_reference(("variables", name), name, found)
        return found

    def _no_reference(self, where: Where, name: str, value: Any) -> None:
        if isinstance(value, str) and REFERENCE.search(value):
            self._note(
                where,
                f"the variable {name!r} is {value!r}; expected a value: what is named by ${{...}} stands in stages.",
            )

    def _stage(self, name: str, value: Any, variables: Mapping[str, Any]) -> None:
        where = ("stages", name)
        if not isinstance(value, dict):
            self._note(where, f"stage {name!r} is no mapping; expected a command and its options.")
            return
        calls = [key for key in value if key in self._commands]
        if len(calls) != 1:
            self._note(*self._no_command(name, value, calls))
            return
        before = len(self._mistakes)
        command = self._commands[calls[0]]
        arguments = value[command.name]
        listed = (
            arguments if isinstance(arguments, list) else [] if arguments is None else [arguments]
        )
        options = {
            key: self._filled(item, variables, (*where, key))
            for key, item in value.items()
            if key != command.name
        }
        if self._seed and any(option.name == "seed" for option in command.options):
            options.setdefault("seed", self._seed)
        words = [self._filled(one, variables, (*where, command.name)) for one in listed]
        stage = Stage(name, command, tuple(words), options, self._document.line(where))
        for key, message in problems(stage, self._stages):
            self._note((*where, *key), message)
        if len(self._mistakes) == before:
            self._stages[name] = stage

    def _no_command(
        self, name: str, value: Mapping[Any, Any], calls: Sequence[str]
    ) -> tuple[Where, str]:
        """A stage with no command, or with several."""
        found = f"the commands {' and '.join(map(repr, calls))}" if calls else "no command"
        meant = next(iter(value), None)
        known = list(self._commands)
        if not calls and nearest_names(str(meant), known):
            where = ("stages", name, meant)
            return where, f"there is no command {meant!r}{nearest(meant, known)}"
        return (
            ("stages", name),
            f"stage {name!r} has {found}; expected one of {', '.join(sorted(known))}.",
        )

    def _filled(self, value: Any, variables: Mapping[str, Any], where: Where) -> Any:
        """The value with its variables; references to stages stay, and are looked at."""
        if isinstance(value, list):
            return [self._filled(one, variables, where) for one in value]
        if not isinstance(value, str):
            return value
        for name in REFERENCE.findall(value):
            if name in variables:
                if value == f"${{{name}}}":
                    return variables[name]
            elif message := self._unreadable(name, where, variables):
                self._note(where, f"${{{name}}}{message}")
        return replaced(value, {name: str(one) for name, one in variables.items()})

    def _unreadable(self, name: str, where: Where, variables: Iterable[str]) -> str:
        """Why the output of a stage cannot be read, if so; one that has a mistake itself is left out."""
        names, own = list(self._written), where[1]
        if name in self._stages:
            command = self._stages[name].command
            if command.output:
                return ""
            return f": stage {name!r} ({command.name}) has no output that another could read."
        if name not in names:
            known = [*variables, *self._stages]
            return f" is neither a variable nor an earlier stage{nearest(name, known)}"
        if name == own:
            return ": a stage cannot read its own output."
        if names.index(name) < names.index(own):
            return ""
        if f"${{{own}}}" in str(self._written[name]):
            return f": stages {own!r} and {name!r} need each other."
        return f": stage {name!r} stands further down, and stages run in the order of the file: put it above {own!r}."
