"""AdaLog: a logarithmic grid whose base is searched, for attention and behind GELU.

    c = round(-log2(x / s) 37 / q)        x_hat = s 2^-floor(c q / 37) T[c q mod 37]

A whole ``q`` gives the base ``2^(q/37)``; ``T`` is a table of 37 entries, so decoding is a look-up and a shift. Behind
GELU the values are shifted by 0.16997 to be positive, and the shift leaves the bias of the next linear. ``q``, and
behind GELU the scale, are those of the least error after the next matrix product; base 2 is always among the
candidates.

With ``iterations`` above 0, whether a weight goes down or up on its grid is learned (AdaRound, arXiv:2004.10568,
:mod:`postlude.numerics.learned_rounding`), block by block, on the inputs that the float model gives the block::

    || f(x) - y ||^2 / 10 + 0.01 sum (1 - |2 h - 1|^beta)      beta from 20 to 2; at first no second term

Paper: "AdaLog: Post-Training Quantization for Vision Transformers with Adaptive Logarithm Quantizer"
(arXiv:2407.12951); its calibrated variant, and its retrained one with ``iterations=20000``. What differs: the search
behind GELU refines the best of a coarse grid twice, where the paper keeps 32 candidates for six rounds; ranges of
inputs behind a LayerNorm come from RepQ-ViT's re-parameterisation; scales of activations stay as calibrated, where
the retrained variant trains them; the first term is summed over channels (our choice). Needs calibration images (32 in
the paper, 1024 to retrain).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from postlude.numerics.activation_grids import GELU_SHIFT, ActivationGrid, AdaLog
from postlude.numerics.learned_rounding import Rounding, annealed_power
from postlude.numerics.reconstruction import reconstruct
from postlude.quantization.block_reconstruction import (
    BlockOutput,
    Passage,
    check_steps,
    soft,
    stored,
)
from postlude.quantization.quantizer import FLOAT
from postlude.quantization.rounded import Rounded
from postlude.quantization.vision import VisionQuantizer
from postlude.registry import method
from postlude.surgery.anatomy import Block
from postlude.surgery.static_quantizers import switch_static_quantizers

__all__ = ["AdaLogViT"]

_ERROR, _DECISION, _WARM = 0.1, 0.01, 0.2


@method(
    "quantize",
    "adalog",
    family="scale re-parameterisation and a grid",
    paper="arXiv:2407.12951",
    needs=("calibration",),
)
@dataclasses.dataclass(frozen=True)
class AdaLogViT(VisionQuantizer):
    """A logarithmic grid with a searched base for attention and GELU.

    Attributes:
        iterations: steps in which the rounding of the weights of a block is learned; 0 rounds without learning.
        learning_rate: of those steps.
    """

    output_error: bool = True
    iterations: int = 0
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self._name, self.iterations, self.learning_rate)

    def post_softmax(self) -> ActivationGrid:
        return AdaLog(self.activations)

    def post_gelu(self) -> ActivationGrid:
        return AdaLog(self.activations, shift=GELU_SHIFT, search_scale=True)

    @property
    def reconstructs(self) -> bool:
        return self.iterations > 0 and self.weights < FLOAT

    def round_block(
        self, model: nn.Module, block: Block, passage: Passage, chance: torch.Generator
    ) -> Mapping[str, Rounded]:
        switch_static_quantizers(model.get_submodule(block.name), on=True)
        inside = BlockOutput(model, block)
        trained = inside.trained(Rounding, self.weight_scheme, clip=self.clip)

        def penalty(share: float) -> Tensor:
            if share < _WARM:
                return torch.zeros(())
            power = annealed_power(share, warm=_WARM)
            return _DECISION * torch.stack([one.penalty(power) for one in trained.values()]).sum()

        reconstruct(
            [one.variables for one in trained.values()],
            inside.of(passage.exact, soft(trained)),
            passage.targets,
            iterations=self.iterations,
            learning_rate=self.learning_rate,
            generator=chance,
            decided=inside.of(passage.exact, stored(trained)),
            penalty=penalty,
            scale=_ERROR * inside.width,
        )
        return {path: Rounded(one.encode()) for path, one in trained.items()}
