"""Tell what an index will cost before it is built."""

from __future__ import annotations

import dataclasses
from typing import Any

from postlude._front_door.opening import Path_, open_checkpoint
from postlude.attribution import plan as _plan
from postlude.errors import SettingsError, UnknownNameError
from postlude.runs.checkpoint import Checkpoint

__all__ = ["attribution_plan"]


def attribution_plan(
    *,
    checkpoint: Path_ | Checkpoint | None = None,
    parameters: float | None = None,
    hardware: str = "this",
    devices: int = 1,
    examples: float,
    sweep: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """What an index will cost: bytes, operations, bytes read and time.

    Args:
        checkpoint: the model; or
        parameters: how many it has.
        hardware: ``this`` machine, measured, or a name in ``postlude.attribution.plan.HARDWARE``.
        devices: how many of them.
        examples: of the training set.
        sweep: add a table over factors, ranks and formats.
        settings: of :func:`postlude.attribution.plan.plan`.

    Raises:
        SettingsError: neither or both of checkpoint and parameters, or a number out of range.
        UnknownNameError: hardware or format that is not known.
    """
    if (checkpoint is None) == (parameters is None):
        raise SettingsError(
            "a plan is for a checkpoint or for a number of parameters: give one of them"
        )
    shape = (
        _plan.shape_of(open_checkpoint(checkpoint))
        if checkpoint is not None
        else _plan.assumed_shape(float(parameters or 0))
    )
    if hardware != "this" and hardware not in _plan.HARDWARE:
        raise UnknownNameError("hardware", hardware, ["this", *_plan.HARDWARE])
    machine = _plan.this_machine() if hardware == "this" else _plan.HARDWARE[hardware]
    machine = machine.times(devices)
    count = int(examples)
    chosen = _plan.plan(shape, machine, examples=count, **settings)
    result = {
        "model": shape.description,
        "parameters": shape.parameters,
        "layers": shape.count,
        "examples": count,
        "hardware": dataclasses.asdict(machine),
        **dataclasses.asdict(chosen),
    }
    if sweep:
        fixed = {k: v for k, v in settings.items() if k not in ("factor", "rank", "format", "side")}
        rows = _plan.table(shape, machine, examples=count, **fixed)
        result["table"] = [
            {
                "factor": one.factor,
                "rank": one.rank,
                "format": one.format,
                "index_bytes": one.bytes["index"],
                "ratio": one.bytes["ratio"],
                "curvature_bytes": one.bytes["curvature"],
                "build_seconds": one.seconds["build"],
                "score_seconds": one.seconds["score"],
            }
            for one in rows
        ]
    return result
