"""``postlude demo``: the whole chain on the built-in model, offline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from postlude.cli import _options as options
from postlude.cli._output import Result

__all__ = ["demo"]

# Heading, key, how to show it, factor.
_COLUMNS = (
    ("perplexity", "perplexity", "{:.2f}", 1),
    ("KL (nats)", "kl", "{:.3f}", 1),
    ("same top token", "top1_agreement", "{:.1f}%", 100),
    ("MB", "bytes", "{:.2f}", 1e-6),
    ("bits/weight", "bits_per_weight", "{:.2f}", 1),
    ("seconds", "seconds", "{:.1f}", 1),
)


def demo(
    output: options.NewDirectory = "runs/demo",
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Inspect the built-in tiny model, quantize it by five methods, measure each, write a report."""
    from postlude import _front_door

    done = _front_door.demo(output, seed=seed, overwrite=overwrite)
    return Result(done, _view(done))


def _view(done: Mapping[str, Any]) -> object:
    """The table of methods, and where the page is."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("method")
    for heading, *_ in _COLUMNS:
        table.add_column(heading, justify="right")
    for row in done.get("methods", []):
        cells = (
            "-" if row.get(key) is None else show.format(row[key] * factor)
            for _, key, show, factor in _COLUMNS
        )
        table.add_row(str(row["name"]), *cells)
    seconds = f" in {done['seconds']:.0f} s" if "seconds" in done else ""
    return Group(table, Text(f"\nReport{seconds}: {done.get('report')}"))
