"""What a recipe may call: commands with their arguments and options, and a pydantic model of each."""

from __future__ import annotations

import dataclasses
import functools
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import pydantic

__all__ = ["Command", "Parameter", "shell_line"]

# A YAML scalar that stands for a word of a command line; `bits: 4` is as good as `bits: "4"`.
_Word = pydantic.StrictStr | pydantic.StrictInt | pydantic.StrictFloat


@dataclasses.dataclass(frozen=True)
class Parameter:
    """An argument or an option of a command.

    Attributes:
        name: as it stands in a recipe: ``max-new-tokens``.
        flag: as it stands on a command line (``--max-new-tokens``), empty for an argument.
        off: what switches a switch off (``--no-check``), empty where nothing does.
        kind: of one value: str, int, float or bool.
        many: whether it can be given several times.
        required: whether it must be given.
        low, high: range of a number.
        names: the verb whose registered methods it chooses from, empty for any other value.
        takes: what it names that has to be there (``checkpoint``, ``index``, ``file``, ...), empty for other values.
    """

    name: str
    flag: str
    kind: type
    many: bool = False
    required: bool = False
    off: str = ""
    low: float | None = None
    high: float | None = None
    names: str = ""
    takes: str = ""

    def annotation(self) -> Any:
        """The type that pydantic checks its value against; a list of it where it can be given several times."""
        kinds: dict[type, Any] = {
            str: _Word,
            bool: pydantic.StrictBool,
            int: Annotated[pydantic.StrictInt, pydantic.Field(ge=self.low, le=self.high)],
            float: Annotated[
                pydantic.StrictFloat | pydantic.StrictInt,
                pydantic.Field(ge=self.low, le=self.high),
            ],
        }
        kind: Any = kinds[self.kind]
        return kind | list[kind] if self.many else kind

    def words(self, value: Any) -> list[str]:
        """The value on a command line."""
        if self.kind is bool:
            chosen = self.flag if value else self.off
            return [chosen] if chosen else []
        values = value if isinstance(value, list | tuple) else [value]
        if not self.flag:
            return [str(one) for one in values]
        return [word for one in values for word in (self.flag, str(one))]


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: ``quantize``, ``attribute build``.

    Attributes:
        name: its words.
        arguments: what stands under its name, in order.
        options: what stands beside it.
        output: how its output is asked for (``--output``), empty where it writes none.
        output_name: name of the output in the folder of a stage, or a function of the options that gives it.
        page: the option that writes an HTML page, empty where there is none.
        replace: what makes it write over an output that is there already.
        makes: what its output is, in the words of ``takes``; empty where it may be several things.
        check: raises a ``SettingsError`` for a command line that the command would refuse.
    """

    name: str
    arguments: tuple[Parameter, ...]
    options: tuple[Parameter, ...]
    output: str = ""
    output_name: str | Callable[[Mapping[str, Any]], str] = "output"
    page: str = ""
    replace: tuple[str, ...] = ()
    makes: str = ""
    check: Callable[[Sequence[str]], object] | None = None

    @functools.cache  # noqa: B019 there are some dozens of commands, for as long as the program runs
    def model(self) -> type[pydantic.BaseModel]:
        """A model of the options of a stage that calls it; others are refused."""
        fields: dict[str, Any] = {
            # pydantic takes no hyphen in the name of a field; the recipe's own name is its alias.
            f"option_{one.name.replace('-', '_')}": (
                (one.annotation(), pydantic.Field(alias=one.name))
                if one.required
                else (one.annotation() | None, pydantic.Field(None, alias=one.name))
            )
            for one in self.options
        }
        forbidding = pydantic.ConfigDict(extra="forbid")
        model: type[pydantic.BaseModel] = pydantic.create_model(
            "Options", __config__=forbidding, **fields
        )
        return model

    def output_for(self, options: Mapping[str, Any]) -> str:
        """Name of the output of a stage with these options."""
        return self.output_name if isinstance(self.output_name, str) else self.output_name(options)

    def line(self, arguments: list[Any], options: Mapping[str, Any]) -> list[str]:
        """The words of the command line, without its output."""
        words = self.name.split()
        for parameter in self.options:
            if parameter.name in options:
                words += parameter.words(options[parameter.name])
        return [*words, *(str(one) for one in arguments)]


def shell_line(words: Sequence[str]) -> str:
    """The words of a command as a shell takes them, the program's name in front."""
    return shlex.join(["postlude", *words])
