"""What a recipe will cost, stage by stage, before any of it runs.

Of a model only the size counts (``P`` parameters, from the headers of its files), of a text its bytes (``T`` tokens of
four bytes each, our assumption)::

    inspect      2 P T  for every method          T = 32 sequences of 256 tokens
    quantize     6 P T  where it calibrates       three passes: record, observe, advance; a method's own search
                                                  and a branch's bytes are not counted
    tune         6 P T  for every epoch           12 P bytes of weights, gradients and Adam beside the 4 P of the model
    evaluate     2 P T  for every model
    generate     2 P for every token
    attribute    as its own plan says (``postlude attribute plan``)

Time is operations over what the machine reaches in a large matrix product, so it is an order of magnitude. A stage
whose command is not listed has no forecast, and says so.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from postlude.attribution.plan import Hardware, assumed_shape, plan, this_machine
from postlude.errors import PostludeError
from postlude.recipes.recipe import Recipe, Stage
from postlude.recipes.run import command_line, pending
from postlude.runs.loading import resolve
from postlude.runs.pipeline import denoiser_files, is_denoiser
from postlude.runs.weights import read_header, weight_files

__all__ = ["Forecast", "Forecasts", "forecast"]

_BYTES_OF_A_TOKEN = 4
_INSPECTED = 32 * 256


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Of one stage.

    Attributes:
        stage, command: its name and its command line.
        done: whether an earlier run has it already.
        seconds: None where nothing is known of it.
        memory: bytes held at once.
        bytes: written.
        why: where there is no forecast, or what it rests on.
    """

    stage: str
    command: str
    done: bool
    seconds: float | None = None
    memory: float | None = None
    bytes: float | None = None
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


@dataclasses.dataclass(frozen=True)
class _Model:
    """What is known of a checkpoint: its parameters, and its bytes on the disk."""

    parameters: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class _Cost:
    """Operations, bytes held, bytes written, the model that comes out, and what is not counted."""

    operations: float
    memory: float
    written: float = 0.0
    model: _Model | None = None
    without: str = ""


_Models = Mapping[str, _Model]


def forecast(
    recipe: Recipe, out: str | os.PathLike[str], hardware: Hardware | None = None
) -> Forecasts:
    """What every stage of a recipe will take.

    Args:
        recipe: checked.
        out: where it would run; stages that are finished there are marked.
        hardware: this machine, measured in a second, when None.
    """
    machine = hardware or this_machine()
    directory = Path(os.path.realpath(out))
    waiting = pending(recipe, directory)
    models: dict[str, _Model] = {}
    outputs: dict[str, str] = {}
    stages = []
    for stage in recipe.stages:
        folder = directory / "stages" / stage.name
        words = " ".join(["postlude", *command_line(stage, folder, outputs)])
        one = Forecast(stage.name, words, stage.name not in waiting)
        rule = _RULES.get(stage.command.name)
        if rule is None:
            one = dataclasses.replace(one, why=f"no forecast for `{stage.command.name}`")
        else:
            try:
                cost = rule(stage, models)
            except _Unknown as reason:
                one = dataclasses.replace(one, why=str(reason))
            else:
                seconds = cost.operations / machine.rate
                one = dataclasses.replace(
                    one,
                    seconds=seconds,
                    memory=cost.memory,
                    bytes=cost.written,
                    why=cost.without,
                )
                if cost.model is not None:
                    models[f"${{{stage.name}}}"] = cost.model
        stages.append(one)
        if stage.command.output:
            outputs[stage.name] = f"{folder}/{stage.command.output_for(stage.options)}"
    return Forecasts(recipe.name, machine.name, tuple(stages))


class _Unknown(Exception):
    """Why there is no forecast."""


def _model(text: Any, models: _Models) -> _Model:
    if text in models:
        return models[text]
    if "${" in str(text):
        raise _Unknown(f"nothing is known of {text}")
    try:
        directory = resolve(text)
        files = denoiser_files(directory) if is_denoiser(directory) else weight_files(directory)
    except PostludeError as error:
        raise _Unknown(f"the weights of {text} cannot be read") from error
    return _Model(
        float(sum(_numbers(file) for file in files)),
        float(sum(file.stat().st_size for file in files)),
    )


def _numbers(file: Path) -> int:
    return sum(math.prod(entry["shape"]) for entry in read_header(file).values())


def _tokens(path: Any) -> float:
    file = Path(str(path))
    if file.is_dir():
        return (
            sum(one.stat().st_size for one in file.rglob("*") if one.is_file()) / _BYTES_OF_A_TOKEN
        )
    if not file.is_file():
        raise _Unknown(f"{path} is not there yet")
    return file.stat().st_size / _BYTES_OF_A_TOKEN


def _inspect(stage: Stage, models: _Models) -> _Cost:
    model = _model(stage.arguments[0], models)
    methods = (
        str(stage.options.get("methods", "outliers,singular-defects,signature")).count(",") + 1
    )
    return _Cost(2 * model.parameters * _INSPECTED * methods, 4 * model.parameters)


def _quantize(stage: Stage, models: _Models) -> _Cost:
    model = _model(stage.arguments[0], models)
    tokens = 0.0
    if "calibration" in stage.options:
        tokens = stage.options.get("samples", 128) * stage.options.get("length", 512)
    bits = _weight_bits(str(stage.options.get("bits", "w4")))
    # Codes, and a sixteenth more for scales; embeddings keep their type, so this is a lower bound.
    written = min(model.bytes, model.parameters * bits / 8 * (1 + 1 / 16))
    small = _Model(model.parameters, written)
    return _Cost(
        6 * model.parameters * tokens,
        2 * 4 * model.parameters,
        written,
        small,
        "at least: a search of the method's own is not counted",
    )


def _weight_bits(text: str) -> int:
    digits = text.lower().partition("w")[2]
    number = "".join(digit for digit in digits[:2] if digit.isdigit())
    return int(number) if number else 16


def _tune(stage: Stage, models: _Models) -> _Cost:
    model = _model(stage.arguments[0], models)
    tokens = _tokens(stage.arguments[1]) * stage.options.get("epochs", 1)
    return _Cost(
        6 * model.parameters * tokens,
        16 * model.parameters,
        12 * model.parameters + model.bytes,
        model,
    )


def _evaluate(stage: Stage, models: _Models) -> _Cost:
    judged = [stage.arguments[0]]
    if "reference" in stage.options:
        judged.append(stage.options["reference"])
    parameters = sum(_model(one, models).parameters for one in judged)
    return _Cost(2 * parameters * _tokens(stage.options.get("text")), 4 * parameters)


def _generate(stage: Stage, models: _Models) -> _Cost:
    model = _model(stage.arguments[0], models)
    return _Cost(
        2 * model.parameters * stage.options.get("max-new-tokens", 50), 4 * model.parameters
    )


def _export(stage: Stage, models: _Models) -> _Cost:
    model = _model(stage.arguments[0], models)
    return _Cost(0.0, 8 * model.parameters, model.bytes)


def _build(stage: Stage, models: _Models) -> _Cost:
    model = _model(stage.arguments[0], models)
    tokens = _tokens(stage.arguments[1])
    data = Path(str(stage.arguments[1]))
    with open(data, "rb") as lines:
        examples = max(1, sum(1 for _ in lines))
    try:
        cost = plan(
            assumed_shape(model.parameters),
            Hardware("counted", 1.0, 1.0, 1.0, 1.0, 1.0),
            examples=examples,
            tokens=max(1.0, tokens / examples),
        )
    except PostludeError as error:
        raise _Unknown(str(error)) from error
    parts = ("gradients", "projection", "outer", "factorisation")
    return _Cost(sum(cost.flops[part] for part in parts), 8 * model.parameters, cost.bytes["index"])


_RULES: Mapping[str, Callable[[Stage, _Models], _Cost]] = {
    "inspect": _inspect,
    "quantize": _quantize,
    "tune": _tune,
    "evaluate": _evaluate,
    "generate": _generate,
    "export": _export,
    "attribute build": _build,
}
