"""A stage of a recipe: one command, its words, and the outputs of other stages that they name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from postlude.recipes.commands import Command

__all__ = ["ASSUMED", "REFERENCE", "Stage", "replaced"]

ASSUMED = "assumed:"
"""What begins a word that stands for a model or data of some size, in a forecast: ``assumed:70B``."""

REFERENCE = re.compile(r"\$\{([^}]*)\}")
"""What stands for a variable, or for the output of a stage."""


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
            dict.fromkeys(name for text in self._texts() for name in REFERENCE.findall(text))
        )

    def _texts(self) -> Iterable[str]:
        for value in (*self.arguments, *self.options.values()):
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, str):
                    yield one

    def words(self, outputs: Mapping[str, str]) -> list[str]:
        """Its command line without its own output, with ``${stage}`` replaced by that stage's output."""
        options = {name: replaced(value, outputs) for name, value in self.options.items()}
        return self.command.line([replaced(one, outputs) for one in self.arguments], options)

    def inputs(self) -> list[str]:
        """Words that may name a file: every text value without a reference."""
        return [text for text in self._texts() if not REFERENCE.search(text)]


def replaced(value: Any, values: Mapping[str, str]) -> Any:
    """A value, or list of them, with the references that are known."""
    if isinstance(value, list):
        return [replaced(one, values) for one in value]
    if not isinstance(value, str):
        return value
    return REFERENCE.sub(lambda found: values.get(found[1], found[0]), value)
