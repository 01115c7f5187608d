"""The commands that a recipe may call, read from the command line itself."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

import typer
import typer.main

from postlude.cli._group import PLAIN
from postlude.errors import PostludeError, SettingsError, UnknownNameError
from postlude.recipes.commands import Command, Parameter

__all__ = ["recipe_commands"]

# What a recipe does not say: where things go, and how they are printed.
_KEPT_BACK = ("output", "overwrite", "run", "html", "json", "help")
# Commands that are about other commands, or make a whole run themselves.
_NOT_IN_RECIPES = ("run", "report", "methods", "demo")
# Options that choose a registered method, and of which verb.
_METHODS = {
    "quantize": ("method", "quantize"),
    "attribute build": ("method", "attribute"),
    "attribute query": ("method", "attribute"),
    "attribute learn-weights": ("method", "attribute"),
    "attribute select": ("method", "attribute"),
    "export": ("to", "export"),
}
# What names something that has to be there: the words that stand for it in a help text.
_PATHS = (
    "CHECKPOINT",
    "FILE",
    "FOLDER",
    "DATA",
    "TRAIN",
    "DIRECTORY",
    "INDEX",
    "IMAGES",
    "RECORDING.WAV",
)
# What outputs are, where one might be taken for another.
_MAKES = {
    "quantize": "checkpoint",
    "tune": "checkpoint",
    "tune prior": "prior",
    "attribute build": "index",
    "attribute learn-weights": "weights",
    "attribute select": "examples",
    "attribute damage": "examples",
    "sample": "picture",
    "sample calibrate": "drift statistics",
    "explain": "picture",
    "render": "picture",
    "fit": "picture in a network",
}
_EXPORTED = {"gguf": "model.gguf"}
# Outputs that are files: their names.
_FILES = {
    "sample": "samples.png",
    "sample calibrate": "drift.safetensors",
    "attribute learn-weights": "weights.safetensors",
    "attribute select": "examples.jsonl",
    "attribute damage": "examples.jsonl",
    "explain": "picture.png",
    "fit": "picture.inr",
    "render": "picture.png",
}


def recipe_commands(app: typer.Typer) -> dict[str, Command]:
    """Every command of the command line that can be a stage, by name."""
    whole = typer.main.get_command(app)
    return {
        name: dataclasses.replace(_command(name, command), check=functools.partial(_check, whole))
        for name, command in _leaves("", whole)
        if name.split()[0] not in _NOT_IN_RECIPES
    }


def _check(whole: Any, words: Sequence[str]) -> None:
    """Have a command read its command line, as far as its first verb.

    What it says of files is no matter: those of earlier stages are not there yet.
    """
    from postlude import _front_door

    with _front_door.rehearsal(), contextlib.suppress(_front_door.Rehearsed, OSError):
        try:
            whole(list(words), prog_name="postlude", standalone_mode=False)
        except (SettingsError, UnknownNameError):
            raise
        except PostludeError:
            pass
        except typer.TyperException as error:
            raise SettingsError(error.format_message()) from error


def _leaves(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    inner: Mapping[str, Any] | None = getattr(command, "commands", None)
    if inner is None:
        yield name, command
        return
    for word, one in inner.items():
        yield from _leaves(name if word == PLAIN else f"{name} {word}".strip(), one)


def _command(name: str, command: Any) -> Command:
    arguments, options = [], []
    given = {parameter.name for parameter in command.params}
    for parameter in command.params:
        plain = parameter.name.rstrip("_")
        if parameter.param_type_name == "argument":
            arguments.append(_parameter(parameter, plain.replace("_", "-"), "", ""))
        elif plain not in _KEPT_BACK:
            option, verb = _METHODS.get(name, ("", ""))
            long = next(word for word in parameter.opts if word.startswith("--"))
            word = long.removeprefix("--")
            options.append(_parameter(parameter, word, long, verb if word == option else ""))
    output = next((one for one in command.params if one.name == "output"), None)
    # A command whose output is its result has it in the record of the stage.
    writes = output is not None and (output.required or name in _FILES)
    return Command(
        name=name,
        arguments=tuple(arguments),
        options=tuple(options),
        output="--output" if writes else "",
        output_name=_exported if name == "export" else _FILES.get(name, "output"),
        page="--html" if "html" in given else "",
        replace=("--overwrite",) if writes and "overwrite" in given else (),
        makes=_MAKES.get(name, ""),
    )


def _exported(options: Mapping[str, Any]) -> str:
    return _EXPORTED.get(str(options.get("to")), "output")


def _parameter(parameter: Any, name: str, flag: str, verb: str) -> Parameter:
    annotation = parameter.type_descriptor.annotation
    many = get_origin(annotation) is list or parameter.nargs == -1
    kind = get_args(annotation)[0] if get_origin(annotation) is list else annotation
    named = (parameter.metavar or "").split(" ")[0].upper().removesuffix(".JSONL")
    return Parameter(
        name=name,
        flag=flag,
        kind=kind if kind in (int, float, bool) else str,
        many=many,
        required=parameter.required,
        off=next(iter(parameter.secondary_opts), ""),
        low=parameter.min,
        high=parameter.max,
        names=verb,
        takes=named.lower() if named in _PATHS else "",
    )
