"""What a recipe will cost, stage by stage, before any of it runs.

Operations, bytes held and bytes written are those of :mod:`postlude.recipes.costs`. Time is operations over what the
machine reaches in a large matrix product, so it is an order of magnitude; ranks that share divide it, each on a device
of its own. What they tell each other is not counted, nor are seconds of importing, loading and checking. A stage whose
command has no rule, or that reads what is not known, has no forecast and says so.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from postlude.attribution.plan import HARDWARE, Hardware, this_machine
from postlude.errors import SettingsError, UnknownNameError
from postlude.recipes.commands import shell_line
from postlude.recipes.costs import cost
from postlude.recipes.recipe import Recipe
from postlude.recipes.run import command_line, pending
from postlude.recipes.sizes import Data, Model, Steps, Unknown

__all__ = ["Forecast", "Forecasts", "chosen_hardware", "forecast"]

_FILLED = 0.9


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Of one stage.

    Attributes:
        stage, command: its name and its command line.
        done: whether an earlier run has it already.
        seconds: None where nothing is known of it.
        memory: bytes held at once, by each rank.
        bytes: written.
        ranks: that share the work.
        fits: whether a device has that memory, and a tenth of its own for activations.
        why: where there is no forecast, or what it rests on.
    """

    stage: str
    command: str
    done: bool
    seconds: float | None = None
    memory: float | None = None
    bytes: float | None = None
    ranks: int = 1
    fits: bool | None = None
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Forecasts:
    """Of every stage, in order, and of the machine that they are for."""

    recipe: str
    machine: str
    stages: tuple[Forecast, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return dataclasses.asdict(self)


def forecast(
    recipe: Recipe,
    out: str | os.PathLike[str],
    hardware: Hardware | None = None,
    ranks: int = 1,
    sharded: bool = False,
) -> Forecasts:
    """What every stage of a recipe will take.

    Args:
        recipe: checked.
        out: where it would run; stages that are finished there are marked.
        hardware: what one rank runs on; this machine, measured in a second, when None.
        ranks: how many torchrun or accelerate would start.
        sharded: whether accelerate shards what is trained (FSDP2).
    """
    machine = hardware or this_machine()
    directory = Path(os.path.realpath(out))
    waiting = pending(recipe, directory)
    known: dict[str, Model | Data | Steps] = {}
    outputs: dict[str, str] = {}
    stages = []
    for stage in recipe.stages:
        folder = directory / "stages" / stage.name
        words = shell_line(command_line(stage, folder, outputs))
        one = Forecast(stage.name, words, stage.name not in waiting)
        try:
            found = cost(stage, known, ranks)
        except Unknown as reason:
            one = dataclasses.replace(one, why=str(reason))
        else:
            if found.output is not None:
                known[f"${{{stage.name}}}"] = found.output
            one = dataclasses.replace(one, why=found.without)
            if found.operations is not None:
                part = ranks if sharded else 1
                memory = found.memory - found.divided * (1 - 1 / part)
                sharing = min(ranks, found.most or ranks) if found.shared else 1
                one = dataclasses.replace(
                    one,
                    seconds=found.operations / machine.rate / sharing,
                    memory=memory,
                    bytes=found.written,
                    ranks=sharing,
                    fits=memory <= _FILLED * machine.memory,
                )
        stages.append(one)
        if stage.command.output:
            outputs[stage.name] = f"{folder}/{stage.command.output_for(stage.options)}"
    name = machine.name if ranks == 1 else f"{ranks} ranks, each on {machine.name}"
    return Forecasts(recipe.name, name, tuple(stages))


def chosen_hardware(name: str, ranks: int) -> Hardware | None:
    """The hardware of a rank by its name; None for this machine.

    Raises:
        UnknownNameError: no such hardware.
        SettingsError: several ranks on this machine, whose cores they would share.
    """
    if name == "this":
        if ranks > 1:
            raise SettingsError(
                f"{ranks} ranks on this machine share its cores, so they are as fast as one: name a --hardware "
                f"({', '.join(HARDWARE)}) that each has one of, or leave --ranks out."
            )
        return None
    if name not in HARDWARE:
        raise UnknownNameError("hardware", name, ["this", *HARDWARE])
    return HARDWARE[name]
