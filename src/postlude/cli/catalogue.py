"""The method catalogue of the documentation: ``python -m postlude.cli.catalogue > docs/methods.md``."""

from __future__ import annotations

import re
import sys
from itertools import groupby

from postlude import registry

__all__ = ["catalogue"]


def catalogue() -> str:
    """Every registered method as a Markdown page, one table per verb."""
    lines = [
        "# Methods",
        "",
        "Generated from the registry by `make docs`; `postlude methods` prints the same list.",
        "",
    ]
    for verb, methods in groupby(registry.available(), key=lambda info: info.verb):
        lines += [f"## {verb}", ""]
        lines += ["| method | what it does | family | paper | needs | settings |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        for info in methods:
            options = ", ".join(f"`{name}={value!r}`" for name, value in info.options.items())
            cells = [
                f"`{info.name}`",
                info.summary,
                info.family,
                _link(info.paper),
                ", ".join(info.needs),
                options,
            ]
            lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"]
        lines += [""]
    return "\n".join(lines)


def _link(paper: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


if __name__ == "__main__":
    sys.stdout.write(catalogue())
