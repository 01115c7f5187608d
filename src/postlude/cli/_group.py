"""A command with a plain form and sub-commands: ``inspect CKPT`` beside ``inspect compare A B``."""

from __future__ import annotations

import difflib
import os
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from postlude.errors import CheckpointError

__all__ = ["PLAIN", "OrderedGroup", "PlainCommand", "PlainFormGroup"]

PLAIN = "plain"


class OrderedGroup(TyperGroup):
    """Lists its commands in the order in which they are used, not in which they were added."""

    order = (
        "inspect",
        "tune",
        "quantize",
        "sample",
        "attribute",
        "evaluate",
        "explain",
        "generate",
        "export",
        "fit",
        "render",
        "run",
        "report",
        "methods",
        "demo",
    )

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in that order."""
        return sorted(super().list_commands(ctx), key=self.order.index)


class PlainFormGroup(TyperGroup):
    """Runs its command ``PLAIN`` when the first word is not the name of another of its commands.

    A checkpoint that lies in a directory named like a sub-command is written ``./compare``.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the name of the plain form in front where it was left out, as it always is."""
        if not args or args[0] == PLAIN or args[0] not in self.commands:
            if args:
                self._refuse_misspelt(args[0])
            args = [PLAIN, *args]
        return super().parse_args(ctx, args)

    def _refuse_misspelt(self, word: str) -> None:
        """A word that is nothing on the disk, and nearly the name of a command, is meant to be that name."""
        if os.sep in word:
            return
        near = difflib.get_close_matches(
            word, [name for name in self.commands if name != PLAIN], n=1, cutoff=0.75
        )
        if near and not os.path.exists(word):
            raise CheckpointError(
                f"There is no directory {word}, and no command of that name. Did you mean `postlude {self.name} "
                f"{near[0]}`?"
            )


class _PlainContext(typer.Context):
    @property
    def command_path(self) -> str:
        return super().command_path.removesuffix(f" {PLAIN}")


class PlainCommand(TyperCommand):
    """The plain form: a command whose usage lines do not show its own name."""

    context_class = _PlainContext
