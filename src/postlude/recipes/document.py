"""A YAML file as plain values, with the line of every key, for messages that name it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from postlude.errors import DataError

__all__ = ["Document", "Where"]

# Keys from the top of a document to a value.
Where = tuple[Any, ...]

# Kinds of values that YAML itself has; others are what a program makes objects of.
_TAG = "tag:yaml.org,2002:"
_KINDS = {"map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge", "value"}
# Values of a file, those repeated by reference counted each time; a long recipe has some hundred.
_LARGEST = 20_000


class Document:
    """A file that holds a mapping.

    Args:
        file: for messages.
        text: what is in it.

    Attributes:
        content: plain values. No objects are made of tags, and no key is given twice.

    Raises:
        DataError: not YAML, no mapping, or too much of it; names the line where there is one.
    """

    def __init__(self, file: Path, text: str) -> None:
        self.file, self.text = file, text
        self._lines: dict[Where, int] = {}
        self._nodes = 0
        self.content = self._read()

    def line(self, where: Where) -> int:
        """Where a key stands, or the nearest above it that stands anywhere."""
        while where and where not in self._lines:
            where = where[:-1]
        return self._lines.get(where, 1)

    def error(self, where: Where, message: str) -> DataError:
        """An error that names the line."""
        return DataError(f"{self.file}, line {self.line(where)}: {message}")

    def _read(self) -> dict[str, Any]:
        try:
            node = yaml.compose(self.text, Loader=yaml.SafeLoader)
            content = None if node is None else self._value(node, ())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            raise DataError(
                f"{self.file}{where}: not YAML: {error.problem or error.context}."
            ) from error
        except yaml.YAMLError as error:
            raise DataError(f"{self.file} is not YAML: {error}") from error
        except RecursionError as error:
            raise DataError(
                f"{self.file} is no recipe: its lists and mappings lie too deep in each other."
            ) from error
        if not isinstance(content, dict):
            raise DataError(
                f"{self.file} is no recipe: expected a mapping with `stages:`, found "
                f"{'an empty file' if content is None else type(content).__name__}."
            )
        return content

    def _value(self, node: yaml.Node, where: tuple[Any, ...]) -> Any:
        """The plain value of a node; notes the line of every key on the way."""
        self._nodes += 1
        if self._nodes > _LARGEST:
            line = node.start_mark.line + 1
            raise DataError(
                f"{self.file}, line {line}: more than {_LARGEST} values, since what `*` repeats holds repetitions; "
                "expected a recipe."
            )
        if node.tag.removeprefix(_TAG) not in _KINDS:
            line = node.start_mark.line + 1
            tag = node.tag.replace(_TAG, "!!")
            raise DataError(
                f"{self.file}, line {line}: a value is marked {tag}; expected plain values, lists and mappings."
            )
        if isinstance(node, yaml.MappingNode):
            value: dict[Any, Any] = {}
            for key_node, item in node.value:
                key = self._scalar(key_node)
                here = (*where, key)
                if key in value:
                    line = key_node.start_mark.line + 1
                    raise DataError(f"{self.file}, line {line}: {key!r} is given twice.")
                self._lines[here] = key_node.start_mark.line + 1
                value[key] = self._value(item, here)
            return value
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, where) for item in node.value]
        return self._scalar(node)

    @staticmethod
    def _scalar(node: yaml.Node) -> Any:
        value = yaml.SafeLoader("").construct_object(node, deep=True)
        return value if isinstance(value, str | int | float | bool | None) else str(node.value)
