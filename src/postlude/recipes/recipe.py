"""Read a recipe and check all of it before anything starts; an error names the line and the nearest name."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from postlude import registry
from postlude.errors import (
    DataError,
    PostludeError,
    UnknownNameError,
    did_you_mean,
    nearest_names,
)
from postlude.recipes.commands import Command, Parameter
from postlude.recipes.document import Document, Where

__all__ = ["ASSUMED", "Recipe", "Stage", "read"]

# What begins a word that stands for a model or data of some size, in a forecast: ``assumed:70B``.
ASSUMED = "assumed:"
# What names something that is not in the file system.
_ELSEWHERE = ("zoo:", ASSUMED)

_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")
_REFERENCE = re.compile(r"\$\{([^}]*)\}")
_TOP = ("name", "about", "variables", "stages")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command of a recipe.

    Attributes:
        name: of the stage, and of its folder.
        command: what it calls.
        arguments: under the command's name; variables are replaced, ``${stage}`` is not.
        options: beside it, likewise.
        line: of the file, where the stage begins.
    """

    name: str
    command: Command
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    line: int = 0

    @property
    def needs(self) -> tuple[str, ...]:
        """Stages whose outputs it reads, each once."""
        return tuple(
            dict.fromkeys(name for text in self._texts() for name in _REFERENCE.findall(text))
        )

    def _texts(self) -> Iterable[str]:
        for value in (*self.arguments, *self.options.values()):
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, str):
                    yield one

    def words(self, outputs: Mapping[str, str]) -> list[str]:
        """Its command line without its own output, with ``${stage}`` replaced by that stage's output."""
        options = {name: _replaced(value, outputs) for name, value in self.options.items()}
        return self.command.line([_replaced(one, outputs) for one in self.arguments], options)

    def inputs(self) -> list[str]:
        """Words that may name a file: every text value without a reference."""
        return [text for text in self._texts() if not _REFERENCE.search(text)]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe that was checked.

    Attributes:
        name, about: what it is, for a person.
        stages: in order.
        variables: their values, those that were overridden included.
        text: the file.
    """

    name: str
    about: str
    stages: tuple[Stage, ...]
    variables: Mapping[str, Any]
    text: str


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
        near = _nearest(file.name, sorted(one.name for one in file.parent.glob("*.y*ml")))
        raise DataError(f"there is no recipe {file}{near}") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(
            f"{file} cannot be read as a recipe: {reason}. Expected a YAML file."
        ) from error
    return _Reader(file, text, commands, seed).recipe(variables or {})


class _Reader:
    """Checks one file, stage by stage."""

    def __init__(self, file: Path, text: str, commands: Mapping[str, Command], seed: int) -> None:
        self._document = Document(file, text)
        self._error = self._document.error
        self._file, self._commands, self._seed = file, commands, seed
        self._failed: set[str] = set()

    def recipe(self, given: Mapping[str, str]) -> Recipe:
        content = self._document.content
        self._known((), content, _TOP, "A recipe")
        variables = self._variables(content.get("variables") or {}, given)
        stages = content.get("stages")
        if not isinstance(stages, dict) or not stages:
            raise self._error(("stages",), "expected `stages:` with at least one stage under it.")
        done: dict[str, Stage] = {}
        problems: list[DataError] = []
        for name, value in stages.items():
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise self._error(
                    ("stages", name),
                    f"a stage is named {name!r}; expected small letters, digits and hyphens, at most 40 of them, "
                    "since its folder is named like it.",
                )
            if name in variables:
                raise self._error(
                    ("stages", name), f"{name!r} is the name of a variable, too; rename one."
                )
            try:
                done[name] = self._stage(name, value, variables, done)
            except DataError as error:
                self._failed.add(name)
                problems.append(error)
        if len(problems) == 1:
            raise problems[0]
        if problems:
            raise DataError("\n".join(map(str, problems)))
        return Recipe(
            name=str(content.get("name") or self._file.stem),
            about=str(content.get("about") or ""),
            stages=tuple(done.values()),
            variables=variables,
            text=self._document.text,
        )

    def _known(self, where: Where, given: Iterable[Any], known: Sequence[str], what: str) -> None:
        for key in given:
            if key not in known:
                raise self._error((*where, key), f"{what} has no {key!r}{_nearest(key, known)}")

    def _variables(self, own: Any, given: Mapping[str, str]) -> dict[str, Any]:
        if not isinstance(own, dict):
            raise self._error(
                ("variables",), "expected `variables:` to be a mapping of names to values."
            )
        for name, value in own.items():
            if isinstance(value, dict | list):
                raise self._error(
                    ("variables", name),
                    f"the variable {name!r} is a {type(value).__name__}; expected one value.",
                )
        for name in given:
            if name not in own:
                raise DataError(f"{self._file} has no variable {name!r}{_nearest(name, list(own))}")
        missing = [name for name, value in own.items() if value is None and name not in given]
        if missing:
            names = " and ".join(map(repr, missing))
            how = " ".join(f"--set {name}=VALUE" for name in missing)
            raise self._error(
                ("variables", missing[0]),
                f"the variable {names} has no value: give one ({how})."
                if len(missing) == 1
                else f"the variables {names} have no values: give them ({how}).",
            )
        return {**own, **{name: self._given(name, value) for name, value in given.items()}}

    def _given(self, name: str, value: str) -> Any:
        """The value of a variable on the command line."""
        try:
            found = yaml.safe_load(value)
        except (yaml.YAMLError, RecursionError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"--set {name}={value[:80]}: not a value that YAML reads ({reason}). Quote it if it is a word."
            ) from error
        if isinstance(found, dict | list):
            raise DataError(
                f"--set {name}={value[:80]}: a {type(found).__name__}; expected one value. Quote it if it is a word."
            )
        return found

    def _stage(
        self, name: str, value: Any, variables: Mapping[str, Any], done: Mapping[str, Stage]
    ) -> Stage:
        where = ("stages", name)
        if not isinstance(value, dict):
            raise self._error(
                where, f"stage {name!r} is no mapping; expected a command and its options."
            )
        calls = [key for key in value if key in self._commands]
        if len(calls) != 1:
            found = f"the commands {' and '.join(map(repr, calls))}" if calls else "no command"
            meant = next(iter(value), None)
            if not calls and nearest_names(str(meant), self._commands):
                near = _nearest(meant, list(self._commands))
                raise self._error((*where, meant), f"there is no command {meant!r}{near}")
            raise self._error(
                where,
                f"stage {name!r} has {found}; expected one of {', '.join(sorted(self._commands))}.",
            )
        command = self._commands[calls[0]]
        arguments = value[command.name]
        listed = (
            arguments if isinstance(arguments, list) else [] if arguments is None else [arguments]
        )
        filled = {
            key: self._filled(item, variables, done, (*where, key))
            for key, item in value.items()
            if key != command.name
        }
        if self._seed and any(option.name == "seed" for option in command.options):
            filled.setdefault("seed", self._seed)
        stage = Stage(
            name,
            command,
            tuple(self._filled(one, variables, done, (*where, command.name)) for one in listed),
            filled,
            self._document.line(where),
        )
        self._check_arguments(stage)
        self._check_options(stage)
        return stage

    def _filled(
        self,
        value: Any,
        variables: Mapping[str, Any],
        done: Mapping[str, Stage],
        where: Where,
    ) -> Any:
        """The value with its variables; references to stages stay, once they are known to be good."""
        if isinstance(value, list):
            return [self._filled(one, variables, done, where) for one in value]
        if not isinstance(value, str):
            return value
        for name in _REFERENCE.findall(value):
            if name in variables:
                if value == f"${{{name}}}":
                    return variables[name]
            elif name in self._failed:
                continue
            elif name not in done:
                known = [*variables, *done]
                raise self._error(
                    where,
                    f"${{{name}}} is neither a variable nor an earlier stage{_nearest(name, known)}",
                )
            elif not done[name].command.output:
                raise self._error(
                    where,
                    f"${{{name}}}: stage {name!r} ({done[name].command.name}) has no output that another could read.",
                )
        return _replaced(value, {name: str(one) for name, one in variables.items()})

    def _check_arguments(self, stage: Stage) -> None:
        where = ("stages", stage.name, stage.command.name)
        slots = stage.command.arguments
        least = sum(slot.required for slot in slots)
        most = None if any(slot.many for slot in slots) else len(slots)
        count = len(stage.arguments)
        if count < least or (most is not None and count > most):
            expected = " ".join(slot.name.upper() for slot in slots) or "none"
            raise self._error(
                where,
                f"`{stage.command.name}` takes the arguments {expected}; found {count} of them.",
            )
        for one in stage.arguments:
            if isinstance(one, dict) or one is None:
                raise self._error(
                    where, f"an argument of `{stage.command.name}` is {one!r}; expected a word."
                )

    def _check_options(self, stage: Stage) -> None:
        where = ("stages", stage.name)
        options = stage.command.options
        if "output" in stage.options and stage.command.output:
            raise self._error(
                (*where, "output"),
                f"a stage has no `output`: it writes under RUN/stages/{stage.name}/, and later stages read that as "
                f"${{{stage.name}}}.",
            )
        self._known(where, stage.options, [one.name for one in options], f"`{stage.command.name}`")
        try:
            stage.command.model().model_validate(dict(stage.options))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0])
            raise self._error(
                (*where, key),
                f"`{key}` of `{stage.command.name}` is {stage.options.get(key)!r}: {first['msg']}."
                if key in stage.options
                else f"`{stage.command.name}` needs the option `{key}`.",
            ) from None
        for one in options:
            self._check_names(stage, one)
            self._check_words((*where, one.name), one, stage.options.get(one.name))
        slots = stage.command.arguments
        for number, word in enumerate(stage.arguments):
            slot = slots[min(number, len(slots) - 1)]
            self._check_words((*where, stage.command.name), slot, word)

    def _check_words(self, where: Where, parameter: Parameter, value: Any) -> None:
        for word in value if isinstance(value, list) else [] if value is None else [value]:
            text = str(word)
            if _REFERENCE.search(text):
                continue
            if parameter.path and not text.startswith(_ELSEWHERE) and not Path(text).exists():
                raise self._error(where, f"there is no {text!r} for `{parameter.name}`.")
            if parameter.check is not None:
                try:
                    parameter.check(text)
                except PostludeError as error:
                    raise self._error(where, str(error)) from error

    def _check_names(self, stage: Stage, option: Parameter) -> None:
        value = stage.options.get(option.name)
        if not option.names or value is None:
            return
        for name in value if isinstance(value, list) else [value]:
            try:
                registry.find(option.names, str(name))
            except UnknownNameError as error:
                raise self._error(("stages", stage.name, option.name), str(error)) from error


def _replaced(value: Any, values: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_replaced(one, values) for one in value]
    if not isinstance(value, str):
        return value
    return _REFERENCE.sub(lambda found: values.get(found[1], found[0]), value)


def _nearest(name: object, known: Sequence[str]) -> str:
    """The end of a message on a name that is not known."""
    near = nearest_names(str(name), known)[:1]
    if near:
        return f".{did_you_mean(near)}"
    return f"; known: {', '.join(known)}." if known else "."
