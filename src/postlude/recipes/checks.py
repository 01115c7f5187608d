"""What can be told to be wrong with a stage before it runs: all of it, with the key that each mistake belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic

from postlude import registry
from postlude.errors import PostludeError, did_you_mean, nearest_names
from postlude.recipes.commands import Parameter
from postlude.recipes.stage import ASSUMED, REFERENCE, Stage
from postlude.runs.loading import ZOO, resolve

__all__ = ["Problem", "nearest", "problems"]

Problem = tuple[tuple[str, ...], str]
"""The key within a stage, and what is wrong with it."""


def problems(stage: Stage, before: Mapping[str, Stage]) -> Iterator[Problem]:
    """Every mistake of a stage.

    Args:
        stage: its variables filled in.
        before: stages that it may read, by name.
    """
    command, wrong = stage.command, [*_count(stage), *_options(stage)]
    given: list[tuple[str, Parameter, Any]] = [
        (one.name, one, stage.options.get(one.name)) for one in command.options
    ]
    given += [
        (command.name, slot, word)
        for slot, word in zip(_slots(stage), stage.arguments, strict=False)
    ]
    for key, parameter, value in given:
        for word in value if isinstance(value, list) else [] if value is None else [value]:
            found = [*_word(parameter, str(word)), *_kind(stage, parameter, str(word), before)]
            wrong += [((key,), message) for message in found]
    yield from wrong
    if command.check is not None and not wrong:
        output = [command.output, command.output_for(stage.options)] if command.output else []
        try:
            command.check([*stage.words({}), *output, *command.replace])
        except PostludeError as error:
            yield _blamed(stage, str(error)), str(error)


def _slots(stage: Stage) -> list[Parameter]:
    """The argument that each word is for: the last one takes all that are left, where it takes several."""
    slots = stage.command.arguments
    return [
        slots[min(number, len(slots) - 1)] for number in range(len(stage.arguments) if slots else 0)
    ]


def _count(stage: Stage) -> Iterator[Problem]:
    command = stage.command
    slots, count = command.arguments, len(stage.arguments)
    most = None if any(slot.many for slot in slots) else len(slots)
    if count < sum(slot.required for slot in slots) or (most is not None and count > most):
        expected = " ".join(slot.name.upper() for slot in slots) or "none"
        yield (
            (command.name,),
            f"`{command.name}` takes the arguments {expected}; found {count} of them.",
        )
    for one in stage.arguments:
        if isinstance(one, dict) or one is None:
            yield (
                (command.name,),
                f"an argument of `{command.name}` is {one!r}; expected a word.",
            )


def _options(stage: Stage) -> Iterator[Problem]:
    command, known = stage.command, [one.name for one in stage.command.options]
    for key in stage.options:
        if key == "output" and command.output:
            yield (
                (key,),
                f"a stage has no `output`: it writes under RUN/stages/{stage.name}/, and later stages read that as "
                f"${{{stage.name}}}.",
            )
        elif key not in known:
            yield (key,), f"`{command.name}` has no {key!r}{nearest(key, known)}"
    try:
        command.model().model_validate({k: v for k, v in stage.options.items() if k in known})
    except pydantic.ValidationError as error:
        # A value that is neither of two types has an error for each of them.
        first = {str(one["loc"][0]): one["msg"] for one in reversed(error.errors())}
        for key, message in reversed(first.items()):
            given = key in stage.options
            yield (
                (key,),
                f"`{key}` of `{command.name}` is {stage.options[key]!r}: {message}."
                if given
                else f"`{command.name}` needs the option `{key}`.",
            )


def _word(parameter: Parameter, word: str) -> Iterator[str]:
    """What is wrong with a word that is there now."""
    if REFERENCE.search(word):
        return
    try:
        if parameter.names:
            registry.find(parameter.names, word)
        if parameter.takes and word.startswith(ZOO):
            resolve(word)
    except PostludeError as error:
        yield str(error)
    elsewhere = word.startswith((ZOO, ASSUMED))
    if parameter.takes and not elsewhere and not Path(word).exists():
        yield f"there is no {word!r} for `{parameter.name}`."


def _kind(
    stage: Stage, parameter: Parameter, word: str, before: Mapping[str, Stage]
) -> Iterator[str]:
    """A stage that writes something else than is read here."""
    found = REFERENCE.fullmatch(word)
    other = before.get(found[1]) if found else None
    if other is None or not parameter.takes:
        return
    makes = other.command.makes
    if makes and parameter.takes in ("checkpoint", "index") and makes != parameter.takes:
        yield (
            f"{word}: stage {other.name!r} ({other.command.name}) writes {_a(makes)}; expected {_a(parameter.takes)} "
            f"for `{parameter.name}` of `{stage.command.name}`."
        )


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeio" else f"a {kind}"


def _blamed(stage: Stage, message: str) -> tuple[str, ...]:
    """The option that a message speaks of, if it names one; what it says is missing is no line of the stage."""
    spoken = [
        one.name
        for one in stage.command.options
        if f"--{one.name}" in message or f"`{one.name}`" in message
    ]
    given = [name for name in spoken if name in stage.options]
    if len(given) == 1:
        return (given[0],)
    return ("set",) if "set" in stage.options and not spoken else ()


def nearest(name: object, known: list[str]) -> str:
    """The end of a message on a name that is not known."""
    near = nearest_names(str(name), known)[:1]
    if near:
        return f".{did_you_mean(near)}"
    return f"; known: {', '.join(known)}." if known else "."
