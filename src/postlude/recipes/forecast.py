"""What a recipe will cost, stage by stage, before any of it runs.

Of a model only the size counts (``P`` parameters, from the headers of its files), of a text its bytes (``T`` tokens of
four bytes each, our assumption)::

                 operations            bytes held by a rank beside activations      ranks
    inspect      2 P T  a method       of files   T = 32 sequences of 256 tokens    one
    quantize     6 P T  calibrating    6 P        the model in fp32, and codes      share batches, or blocks
                 + GPTQ's              + 48 w^2   six matrices of the widest
                                                  input, where GPTQ rounds
                        three passes: record, observe, advance; a method's own search and a branch are not counted
    tune         6 P T  an epoch       16 P       weights, gradients and Adam       share batches; with FSDP2
                                                                                    16 P / ranks
    evaluate     2 P T  a model        those of its files                           share batches
    generate     2 P    a token        those of its files                           one
    attribute    as its own plan says (``postlude attribute plan``), likewise       share examples

GPTQ inverts and factorises ``H [in, in]`` (``in^3``) and takes ``2 in^2 out`` operations for every linear of a
Llama-like model. Time is operations over what the machine reaches in a large matrix product, so it is an order of
magnitude; ranks that share divide it, each on a device of its own, and what they tell each other is not counted. A
stage whose command is not listed has no forecast, and says so.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from postlude.attribution.plan import (
    HARDWARE,
    Hardware,
    assumed_shape,
    parse_count,
    plan,
    this_machine,
)
from postlude.errors import PostludeError, SettingsError, UnknownNameError
from postlude.quantization.blocks import CHUNKS
from postlude.recipes.recipe import ASSUMED, Recipe, Stage
from postlude.recipes.run import command_line, pending
from postlude.runs.loading import resolve
from postlude.runs.pipeline import denoiser_files, is_denoiser
from postlude.runs.weights import read_header, weight_files

__all__ = ["Forecast", "Forecasts", "chosen_hardware", "forecast"]

_BYTES_OF_A_TOKEN = 4
_INSPECTED = 32 * 256
_FILLED = 0.9
_TOKENS_OF_AN_EXAMPLE = 512


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


@dataclasses.dataclass(frozen=True)
class _Model:
    """What is known of a checkpoint: its parameters, and its bytes on the disk."""

    parameters: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class _Cost:
    """Operations, bytes held, bytes written, the model that comes out, what is not counted, and whether ranks share.

    ``most`` is how many ranks can share, 0 for any number; ``divided`` are the bytes of which each rank holds a part,
    if the run is sharded.
    """

    operations: float
    memory: float
    written: float = 0.0
    model: _Model | None = None
    without: str = ""
    shared: bool = False
    most: int = 0
    divided: float = 0.0


_Models = Mapping[str, _Model]


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
                part = ranks if sharded else 1
                memory = cost.memory - cost.divided * (1 - 1 / part)
                sharing = min(ranks, cost.most or ranks) if cost.shared else 1
                one = dataclasses.replace(
                    one,
                    seconds=cost.operations / machine.rate / sharing,
                    memory=memory,
                    bytes=cost.written,
                    ranks=sharing,
                    fits=memory <= _FILLED * machine.memory,
                    why=cost.without,
                )
                if cost.model is not None:
                    models[f"${{{stage.name}}}"] = cost.model
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


class _Unknown(Exception):
    """Why there is no forecast."""


def _model(text: Any, models: _Models) -> _Model:
    if text in models:
        return models[text]
    if str(text).startswith(ASSUMED):
        parameters = _assumed(text)
        return _Model(parameters, 2 * parameters)
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


def _assumed(text: Any) -> float:
    return parse_count(str(text).removeprefix(ASSUMED), "an assumed size")


def _numbers(file: Path) -> int:
    return sum(math.prod(entry["shape"]) for entry in read_header(file).values())


def _tokens(path: Any) -> float:
    if str(path).startswith(ASSUMED):
        return _assumed(path)
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
    return _Cost(2 * model.parameters * _INSPECTED * methods, model.bytes)


def _quantize(stage: Stage, models: _Models) -> _Cost:
    model = _model(stage.arguments[0], models)
    tokens = 0.0
    if "calibration" in stage.options:
        tokens = stage.options.get("samples", 128) * stage.options.get("length", 512)
    bits = _weight_bits(str(stage.options.get("bits", "w4")))
    # Codes, and a sixteenth more for scales; embeddings keep their type, so this is a lower bound.
    written = min(model.bytes, model.parameters * bits / 8 * (1 + 1 / 16))
    small = _Model(model.parameters, written)
    operations, memory = 6 * model.parameters * tokens, 6 * model.parameters
    if "gptq" in (stage.options.get("method"), stage.options.get("rounding")):
        more, held = _gptq(model.parameters)
        operations, memory = operations + more, memory + held
    return _Cost(
        operations,
        memory,
        written,
        small,
        "at least: a search of the method's own is not counted",
        shared=True,
        most=CHUNKS if tokens else 0,
    )


def _gptq(parameters: float) -> tuple[float, float]:
    """Operations of the rounding itself, and bytes of second moments, in a model of the shape of a Llama."""
    if parameters < 1e6:
        return 0.0, 0.0
    layers = assumed_shape(parameters).layers
    operations = sum(
        one.count * (one.in_features**3 + 2 * one.in_features**2 * one.out_features)
        for one in layers
    )
    widest = max(one.in_features for one in layers)
    return float(operations), 6.0 * 8 * widest**2


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
        shared=True,
        divided=16 * model.parameters,
    )


def _evaluate(stage: Stage, models: _Models) -> _Cost:
    judged = [stage.arguments[0]]
    if "reference" in stage.options:
        judged.append(stage.options["reference"])
    found = [_model(one, models) for one in judged]
    parameters = sum(one.parameters for one in found)
    tokens = _tokens(stage.options.get("text"))
    return _Cost(2 * parameters * tokens, sum(one.bytes for one in found), shared=True)


def _generate(stage: Stage, models: _Models) -> _Cost:
    model = _model(stage.arguments[0], models)
    return _Cost(2 * model.parameters * stage.options.get("max-new-tokens", 50), model.bytes)


def _export(stage: Stage, models: _Models) -> _Cost:
    model = _model(stage.arguments[0], models)
    return _Cost(0.0, 8 * model.parameters, model.bytes)


def _build(stage: Stage, models: _Models) -> _Cost:
    model = _model(stage.arguments[0], models)
    tokens = _tokens(stage.arguments[1])
    if str(stage.arguments[1]).startswith(ASSUMED):
        examples = max(1, round(tokens / _TOKENS_OF_AN_EXAMPLE))
    else:
        with open(Path(str(stage.arguments[1])), "rb") as lines:
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
    operations = sum(cost.flops[part] for part in parts)
    return _Cost(operations, model.bytes, cost.bytes["index"], shared=True)


_RULES: Mapping[str, Callable[[Stage, _Models], _Cost]] = {
    "inspect": _inspect,
    "quantize": _quantize,
    "tune": _tune,
    "evaluate": _evaluate,
    "generate": _generate,
    "export": _export,
    "attribute build": _build,
}
