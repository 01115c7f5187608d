"""I&S-ViT: attention rounded to whole powers of two of ``a + eta``; weights trained block by block in three stages.

Its shift-uniform-log2 grid is ``shift-log`` in :mod:`postlude.numerics.activation_grids`; 2^bits codes in search and
use, where the authors' code uses one more. By squared error of the values that grid is not better than powers of two;
the paper's gain comes with the training ("smooth optimisation strategy"), against the output of the float block::

    1  inputs of linears and attention rounded, one range a channel behind a LayerNorm; float weights W are trained.
       The block reads what the float model gives it.
    2  re-parameterisation to one range (:mod:`postlude.quantization.vision`): the same function
    3  W is rounded, one scale an output channel, and trained straight through. The block reads what the rounded model
       gives it.

Paper: "I&S-ViT: An Inclusive & Stable Method for Pushing the Limit of Post-Training ViTs Quantization"
(arXiv:2311.10126). What differs: stage 2 comes first, in exact arithmetic the same codes, so that weights are trained
in the coordinates of one range; stage 3 starts from the trained or from the given weights, whichever rounds better;
steps are counted alike at all bits, where the paper takes 200 of its 1000 at 6; patch embedding and head stay in
floating point. ``iterations=0`` with ``rounding=gptq`` is a closed stand-in. Needs calibration images (1024 in the
paper).

Cost: twice ``iterations`` passes, forward and back, of every block over one calibration batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from postlude.numerics.activation_grids import ActivationGrid, ShiftLog
from postlude.numerics.learned_rounding import StraightThrough
from postlude.numerics.reconstruction import mean_squared_error, reconstruct
from postlude.quantization.block_reconstruction import BlockOutput, Passage, check_steps, soft
from postlude.quantization.quantizer import FLOAT
from postlude.quantization.rounded import Rounded
from postlude.quantization.vision import VisionQuantizer
from postlude.registry import method
from postlude.surgery.anatomy import Block
from postlude.surgery.static_quantizers import switch_static_quantizers

__all__ = ["IandSViT"]


@method(
    "quantize",
    "iands-vit",
    family="scale re-parameterisation and a grid",
    paper="arXiv:2311.10126",
    needs=("calibration",),
)
@dataclasses.dataclass(frozen=True)
class IandSViT(VisionQuantizer):
    """Powers of two of the shifted attention; weights trained against the output of their block.

    Attributes:
        iterations: steps of training a block, in each of the two stages; 0 trains nothing.
        learning_rate: of those steps.
    """

    iterations: int = 1000
    learning_rate: float = 4e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self._name, self.iterations, self.learning_rate)

    def post_softmax(self) -> ActivationGrid:
        return ShiftLog(self.activations)

    @property
    def reconstructs(self) -> bool:
        return self.iterations > 0 and self.weights < FLOAT

    def round_block(
        self, model: nn.Module, block: Block, passage: Passage, chance: torch.Generator
    ) -> Mapping[str, Rounded]:
        switch_static_quantizers(model.get_submodule(block.name), on=True)
        inside, targets = BlockOutput(model, block), passage.targets
        free = {path: w.clone().requires_grad_() for path, w in inside.weights.items()}
        if self.activations < FLOAT:
            reconstruct(
                list(free.values()),
                inside.of(passage.exact, lambda: free),
                targets,
                iterations=self.iterations,
                learning_rate=self.learning_rate,
                generator=chance,
            )

        def rounded(start: Mapping[str, Tensor]) -> dict[str, StraightThrough]:
            return inside.trained(StraightThrough, self.weight_scheme, clip=self.clip, start=start)

        def output(trained: Mapping[str, StraightThrough]) -> Callable[[int], Tensor]:
            return inside.of(passage.rounded, soft(trained))

        starts = [rounded(inside.weights), rounded(free)]
        trained = min(starts, key=lambda one: mean_squared_error(output(one), targets))
        reconstruct(
            [one.variables for one in trained.values()],
            output(trained),
            targets,
            iterations=self.iterations,
            learning_rate=self.learning_rate,
            generator=chance,
        )
        return {path: Rounded(one.encode()) for path, one in trained.items()}
