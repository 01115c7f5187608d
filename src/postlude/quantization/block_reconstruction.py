"""Blocks whose rounded weights are trained against what the float block gives.

Methods say what of a weight is trained (:mod:`postlude.numerics.learned_rounding`) and which inputs the block is shown:
those of the float model, or those of the model as rounded so far. The loop is :mod:`postlude.numerics.reconstruction`.
Only weights are trained; norms, biases, scales and zero points stay.

Cost: a step is a forward and a backward pass of one block and one batch; two hidden states of all calibration data are
kept, and one block's weights twice more in fp32 (four times with Adam's moments).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from postlude.errors import SettingsError
from postlude.numerics.formats import Scheme
from postlude.numerics.learned_rounding import Parameters
from postlude.numerics.rounding import clip_search
from postlude.surgery.anatomy import Block
from postlude.surgery.capture import BlockWalk
from postlude.surgery.layers import QuantizedLinear, hold_weights
from postlude.surgery.rewrite import replace_module

__all__ = ["BlockOutput", "Passage", "check_steps", "grid_of"]

# Weights of a block by path, as they are now.
Weights = Callable[[], Mapping[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class Passage:
    """What reaches a block, and what should leave it.

    Attributes:
        exact: stands before the block, with the hidden states of the float model.
        rounded: the same with those of the model as rounded so far.
        outputs: streams that the float block gives for ``exact``, by batch.
    """

    exact: BlockWalk
    rounded: BlockWalk
    outputs: list[tuple[Tensor, ...]]

    @property
    def targets(self) -> list[Tensor]:
        """All streams of a batch in one tensor ``[rows, entries]``."""
        return [_joined(streams) for streams in self.outputs]


class BlockOutput:
    """What a block gives with other weights.

    Args:
        model: linears of the block that are not :class:`QuantizedLinear` become such, with the same weight.
        block: of the model.

    Attributes:
        weights: of the block's linears by path, ``[out_features, in_features]`` fp32; copies.
    """

    def __init__(self, model: nn.Module, block: Block) -> None:
        self._block = block
        self._layers: dict[str, QuantizedLinear] = {}
        for path in (path for site in block.sites for path in site.modules):
            old = model.get_submodule(path)
            if not isinstance(old, QuantizedLinear):
                layer = QuantizedLinear.like(old)
                reader = next(r for s in block.sites for r in s.readers if r.module == path)
                layer.weight.data.copy_(dataclasses.replace(reader, rows=None).weight(model))
                replace_module(model, path, layer)
                old = layer
            self._layers[path] = old
        self.weights = {
            path: layer.dense_weight().detach().float().clone()
            for path, layer in self._layers.items()
        }

    def of(self, walk: BlockWalk, weights: Weights) -> Callable[[int], Tensor]:
        """What the block gives for a batch of a walk, differentiable in the weights."""

        def output(index: int) -> Tensor:
            held = {self._layers[path]: weight for path, weight in weights().items()}
            with hold_weights(held):
                return _joined(walk.call(self._block, index))

        return output


def check_steps(name: str, iterations: int, learning_rate: float) -> None:
    """Refuse settings of a method that trains.

    Raises:
        SettingsError: steps or rate make no sense.
    """
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 0:
        raise SettingsError(f"{name}: iterations is {iterations!r}; expected 0 or more steps")
    if not 0 < learning_rate < math.inf:
        raise SettingsError(f"{name}: learning_rate is {learning_rate}; expected a positive number")


def grid_of(weight: Tensor, scheme: Scheme, clip: bool) -> Parameters:
    """Scale and zero point that rounding to nearest would take."""
    return scheme.parameters(weight, clip_search(weight, scheme) if clip else 1.0)


def _joined(streams: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([stream.flatten(1) for stream in streams], 1)
