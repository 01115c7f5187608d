"""From words on the command line to a method's settings object."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from postlude.errors import SettingsError, UnknownNameError
from postlude.registry import MethodInfo

__all__ = ["make_settings", "parse_bits", "parse_granularity", "parse_numbers", "read_fields"]

_RANGE = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)
_BITS = re.compile(r"(?:w(?P<weights>\d+))?(?:a(?P<activations>\d+))?(?:kv(?P<kv>\d+))?", re.ASCII)


def parse_bits(text: str) -> dict[str, int]:
    """``"w4a4kv4"`` as ``{"weights": 4, "activations": 4, "kv": 4}``; a part left out is 16.

    Raises:
        SettingsError: anything else.
    """
    found = _BITS.fullmatch(text.strip().lower())
    if found is None or not any(found.groups()):
        raise SettingsError(
            f"--bits {text!r} is not understood: expected the bits of weights, activations and KV cache "
            "as in w4a4kv4, w8a8 or w4 (a part left out stays at 16)."
        )
    return {part: int(bits or 16) for part, bits in found.groupdict().items()}


def parse_granularity(option: str, text: str, words: tuple[str, ...]) -> str | int:
    """One of ``words``, or a group size.

    Raises:
        SettingsError: neither.
    """
    text = text.strip().lower()
    if text in words:
        return text
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise SettingsError(
        f"{option} {text!r} is not understood: expected {', '.join(words)} or a group size such as 128."
    )


def parse_numbers(option: str, text: str) -> list[int]:
    """``"0,4-7"`` as ``[0, 4, 5, 6, 7]``.

    Raises:
        SettingsError: anything else.
    """
    numbers: list[int] = []
    for part in text.split(","):
        found = _RANGE.fullmatch(part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise SettingsError(
                f"{option} {text!r} is not understood: expected numbers and ranges of them, as in 0,4-7."
            )
        numbers += range(first, last + 1)
    return numbers


def make_settings(
    info: MethodInfo, given: Mapping[str, object], assignments: Iterable[str] = ()
) -> Any:
    """The settings object of a method.

    Args:
        info: the method.
        given: fields that have an option of their own, already parsed.
        assignments: ``KEY=VALUE`` words, each value read as its field's type.

    Raises:
        UnknownNameError: the method has no such setting; the message carries the nearest ones.
        SettingsError: a value that is not of its field's type, or that the method refuses.
    """
    hints = typing.get_type_hints(info.settings)
    names = [field.name for field in dataclasses.fields(info.settings) if field.init]
    values: dict[str, object] = {}
    for name, value in given.items():
        _require(info, name, names)
        values[name] = _convert(info.name, name, hints[name], str(value))
    for word in assignments:
        name, equals, text = word.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise SettingsError(f"--set {word!r} is not understood: expected KEY=VALUE.")
        _require(info, name, names)
        if name in values:
            raise SettingsError(
                f"the setting {name!r} of {info.name} is given twice; give it once."
            )
        values[name] = _convert(info.name, name, hints[name], text.strip())
    missing = [
        field.name
        for field in dataclasses.fields(info.settings)
        if field.init
        and field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise SettingsError(
            f"{info.name} needs {', '.join(missing)}: pass --set {missing[0]}=VALUE."
        )
    return info.settings(**values)


def _require(info: MethodInfo, name: str, names: list[str]) -> None:
    if name not in names:
        raise UnknownNameError(
            f"setting of {info.name}",
            name,
            names,
            f"`postlude methods {info.name}` lists them all.",
        )


def read_fields(owner: str, kind: type, assignments: Iterable[str]) -> dict[str, Any]:
    """Fields of a data class from ``KEY=VALUE`` words, each value read as its field's type.

    Args:
        owner: whose they are, for messages.
        kind: the data class; it has a field of every name.
        assignments: words.

    Raises:
        SettingsError: a value that is not of its field's type.
    """
    hints = typing.get_type_hints(kind)
    pairs = [word.partition("=") for word in assignments]
    return {
        name.strip(): _convert(owner, name.strip(), hints[name.strip()], text.strip())
        for name, _, text in pairs
    }


def _convert(owner: str, name: str, hint: Any, text: str) -> object:
    """``text`` as a value of the type ``hint``: as JSON if that fits exactly, else as a word."""
    from pydantic import TypeAdapter, ValidationError

    members = typing.get_args(hint) if _is_union(hint) else (hint,)
    if type(None) in members and text.lower() in ("none", "null", ""):
        return None
    adapter = TypeAdapter(hint)
    candidates = [text]
    if any(typing.get_origin(member) in (tuple, list, set, frozenset) for member in members):
        words = [word.strip() for word in text.strip("[]() ").split(",") if word.strip()]
        quoted = ", ".join(_quoted(word) for word in words)
        candidates += [f"[{', '.join(words)}]", f"[{quoted}]"]
    for candidate in candidates:
        try:
            return adapter.validate_json(candidate, strict=True)
        except ValidationError:
            continue
    try:
        return adapter.validate_strings(text)
    except ValidationError:
        raise SettingsError(
            f"{name}={text} does not fit {owner}: expected {_readable(hint)}."
        ) from None


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _quoted(word: str) -> str:
    return json.dumps(word.strip("\"'"))


def _readable(hint: Any) -> str:
    if _is_union(hint):
        return " or ".join(_readable(member) for member in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    if hint is type(None):
        return "none"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    return words.get(hint, str(hint).replace("typing.", ""))
