"""QuaRot: rotate every activation by a Hadamard matrix, so that no channel stands out.

    residual stream   x <- x Q,   Q = diag(random +-1) Hadamard(D) / sqrt(D)           fused into the weights
    values, o_in      kron(Hadamard(heads), Hadamard(dh)): the dh part fused into V, the heads part online
    down_in           Hadamard(d_ff) online
    queries, keys     Hadamard(dh) after the rotary embedding, online

Then GPTQ on the rotated weights, per-token symmetric activations, per-head asymmetric keys and values.

Paper: "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (arXiv:2404.00456). Clip ratios .9 (activations)
and .95 (keys and values). Two things differ from the public code: the embedding's row mean is taken out
only for LayerNorm models (on an RMSNorm model that changes the function), and where a size is no known
Hadamard order an orthonormal DCT takes its place.

Cost: three online transforms a block, O(n log n) each; signs are stored, one byte a channel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.schemes import Scheme
from postlude.quantization.engine import Quantizer, generator
from postlude.registry import method
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import Block, Kind, Site
from postlude.surgery.key_values import KeyValueQuantizer
from postlude.surgery.rewrite import (
    fold_norms,
    rotate_keys,
    rotate_residual,
    rotate_values,
    transform_input,
    untie_head,
)
from postlude.surgery.transforms import BlockHadamard

__all__ = ["QuaRot"]


@method("quantize", "quarot", family="rotation", paper="arXiv:2404.00456", needs=("calibration",))
@dataclasses.dataclass(frozen=True)
class QuaRot(Quantizer):
    """Spread outliers over all channels with random Hadamard rotations, then GPTQ.

    Attributes:
        activation_clip: share of the range of a token's activations that the grid spans.
        kv_clip: the same for keys and values.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("language",)

    rounding: Literal["nearest", "gptq"] = "gptq"
    clip: bool = True
    activation_clip: float = 0.9
    kv_clip: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("activation_clip", "kv_clip"):
            if not 0 < getattr(self, name) <= 1:
                raise SettingsError(
                    f"{name} is {getattr(self, name)}; expected a clip ratio above 0, up to 1"
                )

    def fold(self, checkpoint: Checkpoint) -> None:
        untie_head(checkpoint.model, checkpoint.language)
        fold_norms(checkpoint.model, checkpoint.language)

    def rewrite(self, checkpoint: Checkpoint, statistics: Mapping[str, Tensor], seed: int) -> None:
        model, anatomy = checkpoint.model, checkpoint.language
        hidden = anatomy.hidden_size
        random = BlockHadamard(hidden, hidden).randomize(
            generator(seed, "residual"), keep_first=False
        )
        rotate_residual(model, anatomy, random(torch.eye(hidden, dtype=torch.float64)))
        for block in anatomy.blocks:
            heads = block.heads
            turn = BlockHadamard(heads.size, heads.size)(torch.eye(heads.size, dtype=torch.float64))
            rotate_values(model, block, turn.expand(heads.key_value, -1, -1))
            across = BlockHadamard(heads.query * heads.size, heads.query, inner=heads.size)
            transform_input(model, block.site("o_in"), across)
            down = block.site("down_in")
            transform_input(model, down, BlockHadamard(down.width, down.width))
            rotation = BlockHadamard(heads.size, heads.size)
            rotate_keys(model, block, KeyValueQuantizer(rotation=rotation))

    def input_scheme(self, site: Site) -> Scheme | None:
        scheme = super().input_scheme(site)
        return scheme and dataclasses.replace(scheme, clip=self.activation_clip)

    def key_value_schemes(self, block: Block) -> tuple[Scheme | None, Scheme | None]:
        key, value = (
            scheme and dataclasses.replace(scheme, clip=self.kv_clip)
            for scheme in super().key_value_schemes(block)
        )
        return key, value
