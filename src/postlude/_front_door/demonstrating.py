"""The whole chain on the built-in model."""

from __future__ import annotations

from typing import Any

from postlude._front_door.evaluating import evaluate
from postlude._front_door.inspecting import inspect
from postlude._front_door.opening import Path_, load
from postlude._front_door.quantizing import quantize
from postlude.runs.progress import Progress

__all__ = ["demo"]


def demo(
    out: Path_,
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Inspect the built-in model, quantize it by five methods, measure each and write a report.

    Returns:
        See :func:`postlude.report.demo.demo`.

    Raises:
        OutputExistsError: ``out`` exists.
    """
    from postlude.report.demo import Verbs
    from postlude.report.demo import demo as _demo

    verbs = Verbs(load, inspect, quantize, evaluate)
    return _demo(verbs, out, seed=seed, overwrite=overwrite, progress=progress)
