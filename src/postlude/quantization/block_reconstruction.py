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
from typing import TypeVar

import torch
from torch import Tensor, nn

from postlude.errors import SettingsError
from postlude.numerics.learned_rounding import Trained
from postlude.numerics.rounding import clip_search
from postlude.numerics.schemes import ScaleAndZero, Scheme
from postlude.surgery.anatomy import Block, Site
from postlude.surgery.capture import BlockWalk
from postlude.surgery.layers import QuantizedLinear, hold_weights
from postlude.surgery.rewrite import replace_module

__all__ = ["BlockOutput", "Passage", "check_steps", "soft", "stored"]

T = TypeVar("T", bound=Trained)

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
        width: of the stream that the block writes to.
    """

    def __init__(self, model: nn.Module, block: Block) -> None:
        self._block = block
        self.width = block.sites[0].width
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

    def trained(
        self,
        kind: Callable[[Tensor, Scheme, ScaleAndZero], T],
        scheme_of: Callable[[Site], Scheme | None],
        *,
        clip: bool,
        start: Mapping[str, Tensor] | None = None,
    ) -> dict[str, T]:
        """What is trained of every weight that has a grid, by path.

        Args:
            kind: makes it of a weight, its scheme, and the scale and zero point that rounding to nearest would take.
            scheme_of: of the readers of a site; None leaves them alone.
            clip: search the range of every group.
            start: weights in the place of the block's own.
        """
        made: dict[str, T] = {}
        for site in self._block.sites:
            scheme = scheme_of(site)
            if scheme is None:
                continue
            for path in site.modules:
                weight = (start or self.weights)[path].detach()
                grid = scheme.parameters(weight, clip_search(weight, scheme) if clip else 1.0)
                made[path] = kind(weight, scheme, grid)
        return made

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


def soft(trained: Mapping[str, Trained]) -> Weights:
    """The weights that the loss sees."""
    return lambda: {path: one.soft() for path, one in trained.items()}


def stored(trained: Mapping[str, Trained]) -> Weights:
    """The weights as they will be stored."""
    return lambda: {path: one.encode().decode() for path, one in trained.items()}


def _joined(streams: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([stream.flatten(1) for stream in streams], 1)
