"""OffQ: turn the outlier direction into an offset, which the zero point absorbs for free.

The extreme tokens of a model all point in one direction. OffQ rotates so that this direction is one channel,
then applies a Hadamard whose first row is constant: the channel becomes the same number added to every channel
of its group, and a per-group asymmetric quantizer with a free range does not feel it::

    C  = X^T X / n = U Lam U^T      X: one token per sequence, the one of largest L-infinity norm (uncentred)
    T1 = U1 P1 H1                   residual stream, fused; P1 gives every group one outlier channel
    R2                              values, random per head, fused
    H3, or U3 H3 with attention biases       queries and keys after the rotary embedding, online
    P4, H4                          MLP product: permutation fused, group-wise Hadamard online

Paper: "OffQ: Taming Structured Outliers in LLM Quantization by Offsetting" (arXiv:2606.07116).

Choices where the paper is silent: one token is taken per sequence, block and site; the channels of ``P1`` are
ranked by eigenvalue, or by the largest ``|X U1|`` when there are fewer tokens than channels; row signs are
independent per group; ``R2`` is a random Hadamard. A last group that is shorter than the others gets a Hadamard
of its own size, or an orthonormal DCT, whose first row is constant too.

Needs calibration text. Cost: one forward pass for statistics, one ``D x D`` eigendecomposition, GPTQ; online, an
O(n log g) transform of the MLP product and an O(n log dh) one of queries and keys (``dh x dh`` with biases).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.factorize import uncentred_pca
from postlude.numerics.formats import Integer
from postlude.numerics.moments import AbsMax, TopToken
from postlude.numerics.rotation import group_sizes, outlier_grouping
from postlude.numerics.schemes import Granularity, Scheme
from postlude.quantization.engine import FLOAT, Quantizer, generator
from postlude.registry import method
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import Block, Kind, Site
from postlude.surgery.batches import Calibration, token_batches
from postlude.surgery.capture import observe
from postlude.surgery.key_values import KeyValueQuantizer, attach, detach
from postlude.surgery.rewrite import (
    fold_norms,
    permute_product,
    rotate_keys,
    rotate_residual,
    rotate_values,
    transform_input,
    untie_head,
)
from postlude.surgery.transforms import BlockHadamard, HeadRotation

__all__ = ["OffQ", "offset_rotation", "outlier_basis"]


def outlier_basis(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Basis whose first axis is the dominant outlier direction, and a ranking of its axes.

    Args:
        rows: ``[n, width]``, one extreme token a row.

    Returns:
        ``(U, order)``: fp64 ``[width, width]`` with eigenvectors as columns, eigenvalues falling, and the
        axes from most to least outlying.
    """
    eigenvalues, basis = uncentred_pca(rows)
    if len(rows) < rows.shape[1]:
        # The tail eigenvalues are about zero and their order says nothing.
        return basis, torch.argsort(
            (rows.double() @ basis).abs().amax(0), descending=True, stable=True
        )
    return basis, torch.argsort(eigenvalues, descending=True, stable=True)


def offset_rotation(basis: Tensor, order: Tensor, group: int, random: torch.Generator) -> Tensor:
    """``T1 = U P H``, orthogonal fp64 ``[width, width]``.

    ``P`` puts the k-th largest axis first in group k; ``H`` is block-diagonal, each block with a constant first
    row and random signs on the others.
    """
    width = len(basis)
    index = outlier_grouping(order, group_sizes(width, group))
    return BlockHadamard(width, group).randomize(random, keep_first=True)(basis[:, index])


def _update_heads(moments: list[TopToken], key: Tensor) -> None:
    """Keys ``[batch, heads, tokens, size]`` into one moment per head."""
    for head, moment in enumerate(moments):
        moment.update(key[:, head])


@method("quantize", "offq", family="rotation", paper="arXiv:2606.07116", needs=("calibration",))
@dataclasses.dataclass(frozen=True)
class OffQ(Quantizer):
    """Rotate the outlier direction into a per-group offset that the zero point absorbs, then GPTQ."""

    kinds: ClassVar[tuple[Kind, ...]] = ("language",)

    activation_group: str | int = 128
    rounding: Literal["nearest", "gptq"] = "gptq"
    clip: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if Granularity.parse(self.activation_group).kind == "tensor":
            raise SettingsError(
                "offq turns outliers into one offset per token and group; activation_group is token or a "
                "number of channels, got 'tensor'"
            )

    def _group(self, width: int) -> int:
        """Channels of one activation group: the transforms and the quantizer must agree on it."""
        return min(Granularity.parse(self.activation_group).size or width, width)

    def fold(self, checkpoint: Checkpoint) -> None:
        untie_head(checkpoint.model, checkpoint.language)
        fold_norms(checkpoint.model, checkpoint.language)

    def statistics(
        self, checkpoint: Checkpoint, calibration: Calibration | None, seed: int
    ) -> Mapping[str, Tensor]:
        model, anatomy = checkpoint.model, checkpoint.language
        if not isinstance(calibration, Tensor):
            raise TypeError("offq learns from tokens")
        stream = {
            (block.index, site.name): TopToken(site.width)
            for block, site in anatomy.sites()
            if site.norm
        }
        product = {
            (block.index, "down_in"): AbsMax(block.site("down_in").width)
            for block in anatomy.blocks
        }
        observers = {key: moment.update for key, moment in {**stream, **product}.items()}
        keys = {}
        if anatomy.attention_bias(model):
            keys = {
                block.index: [TopToken(block.heads.size) for _ in range(block.heads.key_value)]
                for block in anatomy.blocks
            }
        for index, moments in keys.items():
            watcher = KeyValueQuantizer()
            watcher.observer = functools.partial(_update_heads, moments)
            attach(model, anatomy.blocks[index].attention, watcher)
        observe(model, anatomy, token_batches(calibration), observers)
        for index in keys:
            detach(model, anatomy.blocks[index].attention)

        rows = torch.cat([moment.rows() for moment in stream.values()])
        basis, order = outlier_basis(rows)
        found = {"residual.basis": basis, "residual.order": order}
        for (index, _), maximum in product.items():
            found[f"{index}.product"] = torch.argsort(maximum.value(), descending=True, stable=True)
        for index, moments in keys.items():
            bases = [outlier_basis(moment.rows())[0] for moment in moments]
            found[f"{index}.keys"] = torch.stack(bases)
        return found

    def rewrite(self, checkpoint: Checkpoint, statistics: Mapping[str, Tensor], seed: int) -> None:
        model, anatomy = checkpoint.model, checkpoint.language
        basis, order = statistics["residual.basis"], statistics["residual.order"]
        group = self._group(anatomy.hidden_size)
        rotate_residual(
            model,
            anatomy,
            offset_rotation(basis.cpu(), order.cpu(), group, generator(seed, "residual")),
        )
        for block in anatomy.blocks:
            heads, name = block.heads, str(block.index)
            eye = torch.eye(heads.size, dtype=torch.float64)
            turns = [
                BlockHadamard(heads.size, heads.size).randomize(
                    generator(seed, f"{name}.values.{head}"), keep_first=False
                )(eye)
                for head in range(heads.key_value)
            ]
            rotate_values(model, block, torch.stack(turns))

            down = block.site("down_in")
            group = self._group(down.width)
            index = outlier_grouping(
                statistics[f"{name}.product"].cpu(), group_sizes(down.width, group)
            )
            permute_product(model, block, index)
            mixing = BlockHadamard(down.width, group)
            transform_input(
                model, down, mixing.randomize(generator(seed, f"{name}.product"), keep_first=True)
            )

            turn: BlockHadamard | HeadRotation = BlockHadamard(heads.size, heads.size)
            if f"{name}.keys" in statistics:
                matrices = turn(statistics[f"{name}.keys"].double().cpu())
                turn = HeadRotation(heads.key_value, heads.size)
                turn.matrices.copy_(matrices)
            rotate_keys(model, block, KeyValueQuantizer(rotation=turn))

    def input_scheme(self, site: Site) -> Scheme | None:
        """Asymmetric with a free range; ``o_in`` in groups of one head."""
        if self.activations == FLOAT:
            return None
        size = site.heads.size if site.heads else self._group(site.width)
        return Scheme(
            Integer(self.activations, symmetric=False, range="free"), Granularity("group", size)
        )

    def key_value_schemes(self, block: Block) -> tuple[Scheme | None, Scheme | None]:
        """Asymmetric with a free range, per token and head."""
        if self.kv == FLOAT:
            return None, None
        scheme = Scheme(Integer(self.kv, symmetric=False, range="free"), Granularity("token"))
        return scheme, scheme
