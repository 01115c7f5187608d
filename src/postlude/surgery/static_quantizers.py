"""Activations rounded on grids that calibration fixed: inputs of linears, and the operands of attention.

A :class:`StaticQuantizer` is an online transform of a :class:`~postlude.surgery.layers.QuantizedLinear`. An
:class:`AttentionOperands` sits inside an attention module as ``operands`` and rounds what its two matrix products read:
queries, keys, values, and what the softmax gives. transformers' attention functions never show the last, so a model
that has one runs through the function ``"postlude_operands"``, which is the plain formula.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from postlude.numerics.activation_grids import ActivationGrid
from postlude.numerics.learned_rounding import straight_through
from postlude.surgery.stored_types import StoredTypes

__all__ = [
    "OPERANDS",
    "AttentionOperands",
    "StaticQuantizer",
    "attach_operands",
    "register_operands",
    "switch_static_quantizers",
    "use_operands",
]

OPERANDS = "postlude_operands"
_PARTS = ("query", "key", "value", "probabilities")


class StaticQuantizer(StoredTypes):
    """``x`` on a grid with fixed parameters; gradients pass as if nothing was rounded.

    Args:
        grid: what codes stand for.
        shapes: of its parameters, by name; they broadcast against ``x``.

    Attributes:
        quantize: switched off while statistics of the float model are wanted.
    """

    def __init__(
        self, grid: ActivationGrid, shapes: Mapping[str, tuple[int, ...]], device: Any = None
    ) -> None:
        super().__init__()
        self.grid = grid
        self.quantize = True
        for name in grid.names:
            self.register_buffer(name, torch.ones(tuple(shapes[name]), device=device))

    @classmethod
    def of(cls, grid: ActivationGrid, parameters: Mapping[str, Tensor]) -> StaticQuantizer:
        """One that holds these parameters."""
        shapes = {name: tuple(parameters[name].shape) for name in grid.names}
        made = cls(grid, shapes, parameters[grid.names[0]].device)
        for name in grid.names:
            made.get_buffer(name).copy_(parameters[name])
        return made

    def grid_parameters(self) -> dict[str, Tensor]:
        """Parameters of the grid, by name."""
        return {name: self.get_buffer(name) for name in self.grid.names}

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and type."""
        if not self.quantize:
            return x
        rounded = self.grid.round_trip(x.detach(), self.grid_parameters())
        return straight_through(x, rounded) if x.requires_grad else rounded

    def spec(self) -> dict[str, Any]:
        """What :meth:`from_spec` needs to make an empty one."""
        shapes = {name: list(self.get_buffer(name).shape) for name in self.grid.names}
        return {"kind": "static", "grid": self.grid.to_dict(), "shapes": shapes}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], device: Any = None) -> StaticQuantizer:
        """An empty one from its description."""
        return cls(ActivationGrid.from_dict(spec["grid"]), spec["shapes"], device)

    def extra_repr(self) -> str:
        return f"{self.grid.kind}, {self.grid.bits} bits"


class AttentionOperands(nn.Module):
    """The quantizers of one attention module; layout ``[batch, heads, tokens, ...]``.

    Args:
        query, key, value, probabilities: of each operand.
    """

    def __init__(
        self,
        query: StaticQuantizer,
        key: StaticQuantizer,
        value: StaticQuantizer,
        probabilities: StaticQuantizer,
    ) -> None:
        super().__init__()
        self.query, self.key, self.value = query, key, value
        self.probabilities = probabilities

    def spec(self) -> dict[str, Any]:
        return {part: cast(StaticQuantizer, getattr(self, part)).spec() for part in _PARTS}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], device: Any = None) -> AttentionOperands:
        """An empty one from its description."""
        return cls(*(StaticQuantizer.from_spec(spec[part], device) for part in _PARTS))


def attach_operands(model: nn.Module, attention: str, operands: AttentionOperands) -> None:
    """Put quantizers into the attention module at a path."""
    model.get_submodule(attention).add_module("operands", operands)


def switch_static_quantizers(model: nn.Module, on: bool) -> None:
    """Switch every static quantizer on or off."""
    for module in model.modules():
        if isinstance(module, StaticQuantizer):
            module.quantize = on


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    operands = getattr(module, "operands", None)
    if isinstance(operands, AttentionOperands):
        query, key, value = operands.query(query), operands.key(key), operands.value(value)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = scores.softmax(-1)
    if isinstance(operands, AttentionOperands):
        probabilities = operands.probabilities(probabilities)
    mixed = nn.functional.dropout(probabilities, dropout, module.training) @ value
    return mixed.transpose(1, 2).contiguous(), probabilities


def register_operands() -> None:
    """Make the attention function known to transformers; calling it again changes nothing."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(OPERANDS, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(OPERANDS, eager_mask)


def use_operands(model: nn.Module) -> None:
    """Run every attention module of a transformers model through :data:`OPERANDS`."""
    register_operands()
    cast(Any, model).set_attn_implementation(OPERANDS)
