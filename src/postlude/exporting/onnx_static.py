"""Fixed activation grids as nodes of an ONNX graph.

A uniform grid with a whole zero point is QuantizeLinear and DequantizeLinear, with a Clip of the codes below 8 bits.
One whose zero point is not whole (re-parameterised inputs), one for each head, and the other grids are written out in
fp32, operation by operation as in :mod:`postlude.numerics.activation_grids`: ONNX has no integer
format for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.activation_grids import (
    STEPS,
    ActivationGrid,
    AdaLog,
    LogSqrt2,
    ShiftLog,
    Tangent,
    TwoSided,
    Uniform,
    log_table,
)
from postlude.surgery.static_quantizers import StaticQuantizer

if TYPE_CHECKING:
    from postlude.exporting.onnx_graph import Graph

__all__ = ["static_round_trip"]

_SMALLEST = 1e-15


def static_round_trip(graph: Graph, x: str, name: str, quantizer: StaticQuantizer) -> str:
    """``x`` on the grid of a quantizer.

    Raises:
        SettingsError: a grid that has no nodes.
    """
    write = _WRITERS.get(type(quantizer.grid))
    if write is None:
        raise SettingsError(f"ONNX has no nodes for the grid {quantizer.grid.kind} ({name})")
    parameters = {key: value.detach() for key, value in quantizer.grid_parameters().items()}
    return write(graph, x, name, quantizer.grid, parameters)


def _parameters(graph: Graph, name: str, values: Mapping[str, Tensor]) -> dict[str, str]:
    return {key: graph.tensor(f"{name}.{key}", value.float()) for key, value in values.items()}


def _log2(graph: Graph, x: str) -> str:
    return str(graph.op("Mul", graph.op("Log", x), graph.constant(1 / math.log(2))))


def _exp2(graph: Graph, x: str) -> str:
    return str(graph.op("Pow", graph.constant(2.0), x))


def _clip(graph: Graph, x: str, low: float, high: float) -> str:
    return str(graph.op("Clip", x, graph.constant(low), graph.constant(high)))


def _known(graph: Graph, codes: str, value: str, bits: int) -> str:
    """The value, or 0 where the code is beyond the last one."""
    inside = graph.op("Less", codes, graph.constant(float(2**bits)))
    return str(graph.op("Where", inside, value, graph.constant(0.0)))


def _uniform(
    graph: Graph, x: str, name: str, grid: ActivationGrid, values: Mapping[str, Tensor]
) -> str:
    scale, zero = values["scale"].float(), values["zero_point"].float()
    most = 2**grid.bits - 1
    whole = torch.equal(zero, zero.round()) and bool(((zero >= 0) & (zero <= 255)).all())
    if whole and scale.numel() == 1:
        graph.count("QuantizeLinear")
        stored = (
            graph.tensor(f"{name}.scale", scale.reshape(())),
            graph.tensor(f"{name}.zero_point", zero.reshape(()).to(torch.uint8)),
        )
        codes = graph.op("QuantizeLinear", x, *stored)
        if most < 255:
            ends = (graph.constant(0, np.uint8), graph.constant(most, np.uint8))
            codes = graph.op("Clip", codes, *ends)
        return str(graph.op("DequantizeLinear", codes, *stored))
    graph.count("rounded in fp32")
    stored_ = _parameters(graph, name, {"scale": scale, "zero_point": zero})
    shifted = graph.op("Add", graph.op("Div", x, stored_["scale"]), stored_["zero_point"])
    codes = _clip(graph, graph.op("Round", shifted), 0.0, float(most))
    return str(graph.op("Mul", graph.op("Sub", codes, stored_["zero_point"]), stored_["scale"]))


def _log_sqrt2(
    graph: Graph, x: str, name: str, grid: ActivationGrid, values: Mapping[str, Tensor]
) -> str:
    graph.count("rounded in fp32")
    stored = _parameters(graph, name, values)
    ratio = graph.op("Max", graph.op("Div", x, stored["scale"]), graph.constant(_SMALLEST))
    codes = graph.op("Round", graph.op("Mul", _log2(graph, ratio), graph.constant(-2.0)))
    kept = _clip(graph, codes, 0.0, float(2**grid.bits - 1))
    power = _exp2(graph, graph.op("Mul", kept, graph.constant(-0.5)))
    return _known(graph, codes, graph.op("Mul", power, stored["scale"]), grid.bits)


def _adalog(
    graph: Graph, x: str, name: str, grid: ActivationGrid, values: Mapping[str, Tensor]
) -> str:
    if not isinstance(grid, AdaLog):
        raise TypeError("not an AdaLog grid")
    graph.count("rounded in fp32")
    stored = _parameters(graph, name, values)
    shift = graph.constant(grid.shift)
    ratio = graph.op("Div", graph.op("Add", x, shift), stored["scale"])
    logs = _log2(graph, _clip(graph, ratio, _SMALLEST, 1.0))
    steps = graph.op("Mul", logs, graph.constant(float(-STEPS)))
    codes = graph.op("Round", graph.op("Div", steps, stored["base"]))
    exponent = graph.op("Mul", codes, stored["base"])
    octave = graph.op("Floor", graph.op("Div", exponent, graph.constant(float(STEPS))))
    rest = graph.op("Sub", exponent, graph.op("Mul", octave, graph.constant(float(STEPS))))
    table = graph.tensor(f"adalog_table_{grid.bits}", log_table(grid.bits).float())
    entry = graph.op("Gather", table, graph.cast(rest, graph.onnx.TensorProto.INT64))
    value = graph.op("Mul", _exp2(graph, graph.op("Neg", octave)), entry)
    value = _known(graph, codes, graph.op("Mul", value, stored["scale"]), grid.bits)
    return str(graph.op("Sub", value, shift))


def _shift_log(
    graph: Graph, x: str, name: str, grid: ActivationGrid, values: Mapping[str, Tensor]
) -> str:
    graph.count("rounded in fp32")
    low, high = values["low"].float(), values["high"].float()
    step = (high - low) / (2**grid.bits - 1)
    stored = _parameters(graph, name, {"eta": values["eta"], "low": low, "step": step})
    shifted = graph.op("Max", graph.op("Add", x, stored["eta"]), graph.constant(_SMALLEST))
    place = graph.op("Div", graph.op("Sub", _log2(graph, shifted), stored["low"]), stored["step"])
    codes = _clip(graph, graph.op("Round", place), 0.0, float(2**grid.bits - 1))
    logs = graph.op("Add", graph.op("Mul", codes, stored["step"]), stored["low"])
    return str(graph.op("Sub", _exp2(graph, graph.op("Round", logs)), stored["eta"]))


def _tangent(
    graph: Graph, x: str, name: str, grid: ActivationGrid, values: Mapping[str, Tensor]
) -> str:
    graph.count("rounded in fp32")
    scale, theta = values["scale"].float(), values["theta"].float()
    stored = _parameters(
        graph, name, {"scale": scale, "theta": theta, "top": theta.tan(), "back": scale / theta}
    )
    most = graph.constant(float(2**grid.bits - 1))
    ratio = _clip(graph, graph.op("Div", x, stored["scale"]), 0.0, 1.0)
    bent = graph.op("Div", graph.op("Tan", graph.op("Mul", ratio, stored["theta"])), stored["top"])
    even = graph.op("Div", graph.op("Round", graph.op("Mul", bent, most)), most)
    angle = graph.op("Atan", graph.op("Mul", even, stored["top"]))
    return str(graph.op("Mul", angle, stored["back"]))


def _two_sided(
    graph: Graph, x: str, name: str, grid: ActivationGrid, values: Mapping[str, Tensor]
) -> str:
    graph.count("rounded in fp32")
    scale, shift = values["scale"].float(), values["shift"].float()
    stored = _parameters(graph, name, {"below": scale, "above": scale * shift.exp2()})
    below = graph.op("Less", x, graph.constant(0.0))
    step = graph.op("Where", below, stored["below"], stored["above"])
    most = float(2 ** (grid.bits - 1) - 1)
    codes = _clip(graph, graph.op("Round", graph.op("Div", x, step)), -most, most)
    return str(graph.op("Mul", codes, step))


_Writer = Callable[["Graph", str, str, ActivationGrid, Mapping[str, Tensor]], str]
_WRITERS: dict[type[ActivationGrid], _Writer] = {
    Uniform: _uniform,
    LogSqrt2: _log_sqrt2,
    AdaLog: _adalog,
    ShiftLog: _shift_log,
    Tangent: _tangent,
    TwoSided: _two_sided,
}
