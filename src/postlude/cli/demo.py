"""``postlude demo``: the whole chain on the built-in model, offline."""

from __future__ import annotations

from postlude.cli import _options as options
from postlude.cli._output import Result

__all__ = ["demo"]


def demo(
    output: options.NewDirectory = "runs/demo",
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Inspect the built-in tiny model, quantize it by every method, measure each, write a report."""
    from postlude import _front_door

    return Result(_front_door.demo(output, seed=seed, overwrite=overwrite))
