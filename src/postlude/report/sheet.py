"""What every page is made with: its template, its style, commands that fit its lines, numbers that can be shown."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import jinja2

__all__ = ["NONE", "finite", "folded", "short", "shown", "style", "template"]

# Stands where there is no value.
NONE = "\u2013"

_TEMPLATES = Path(__file__).parent / "templates"


@functools.cache
def template(name: str, trim_blocks: bool = False) -> jinja2.Template:
    """The template of that file name; values are escaped, and one that is missing is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=trim_blocks,
        undefined=jinja2.StrictUndefined,
    ).get_template(name)


def style(name: str) -> str:
    """The style sheet of that file name."""
    return _TEMPLATES.joinpath(name).read_text(encoding="utf-8")


def folded(command: str, width: int = 78) -> str:
    """A command in lines of at most ``width`` letters where its options allow, to be pasted as it is."""
    lines: list[str] = []
    for number, part in enumerate(command.split(" --")):
        word = part if number == 0 else f"--{part}"
        if lines and len(lines[-1]) + len(word) + 3 <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word if number == 0 else f"    {word}")
    return " \\\n".join(lines)


def finite(value: object) -> bool:
    """Whether a value from JSON is a number that can be shown."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def short(value: float) -> str:
    """Three digits, and from a thousand on all that stand before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def shown(value: object, digits: int = 4) -> str:
    """A value of a result in a table: whole numbers whole, others to so many digits."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
