"""Variants of OffQ and of its baselines, to tell what each part does. Not methods of the library."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from postlude.numerics.factorize import uncentred_pca
from postlude.numerics.formats import Integer
from postlude.numerics.moments import SecondMoment
from postlude.numerics.rotation import (
    block_diagonal,
    constant_first_row,
    group_sizes,
    outlier_grouping,
    random_orthogonal,
)
from postlude.numerics.schemes import Granularity, Scheme
from postlude.quantization.engine import FLOAT, generator
from postlude.quantization.gptq import GPTQ
from postlude.quantization.offq import OffQ, offset_rotation
from postlude.quantization.offq_weights import OffQWeights, written_moment
from postlude.quantization.quarot import QuaRot
from postlude.registry import method
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import Block, Site
from postlude.surgery.batches import Calibration, token_batches
from postlude.surgery.capture import observe
from postlude.surgery.rewrite import rotate_residual

__all__ = [
    "AllTokensOffQ",
    "EqualOffQ",
    "OffsetGPTQ",
    "OffsetQuaRot",
    "RandomRotationOffQ",
    "WrittenOffQ",
]


def _offset(site: Site, bits: int, group: int) -> Scheme | None:
    """OffQ's quantizer of activations."""
    if bits == FLOAT:
        return None
    return Scheme(Integer(bits, symmetric=False, range="free"), Granularity("group", group))


@method("quantize", "offq (equal groups)", family="ablation", needs=("calibration",))
@dataclasses.dataclass(frozen=True)
class EqualOffQ(OffQ):
    """OffQ with the input of the output projection in the same groups as all else, rather than one a head."""

    def input_scheme(self, site: Site) -> Scheme | None:
        """One group size for every site."""
        return _offset(site, self.activations, self._group(site.width))


@method("quantize", "offq, PCA over all tokens", family="ablation", needs=("calibration",))
@dataclasses.dataclass(frozen=True)
class AllTokensOffQ(EqualOffQ):
    """OffQ with the basis of all tokens, in place of one extreme token a sequence."""

    def statistics(
        self, checkpoint: Checkpoint, tokens: Tensor | None, seed: int
    ) -> Mapping[str, Tensor]:
        """OffQ's, with another residual basis."""
        if tokens is None:
            raise ValueError("offq needs calibration tokens")
        found = dict(super().statistics(checkpoint, tokens, seed))
        moment = SecondMoment(checkpoint.anatomy.hidden_size)
        observers = {
            (block.index, site.name): moment.update
            for block, site in checkpoint.anatomy.sites()
            if site.norm
        }
        observe(checkpoint.model, checkpoint.anatomy, token_batches(tokens), observers)
        eigenvalues, basis = uncentred_pca(moment=moment.value())
        return found | {
            "residual.basis": basis,
            "residual.order": torch.argsort(eigenvalues, descending=True, stable=True),
        }


@method(
    "quantize",
    "offq, random rotation with a constant first row",
    family="ablation",
    needs=("calibration",),
)
@dataclasses.dataclass(frozen=True)
class RandomRotationOffQ(EqualOffQ):
    """OffQ with random rotations of constant first row in place of the residual stream's Hadamard matrices."""

    def rewrite(self, checkpoint: Checkpoint, statistics: Mapping[str, Tensor], seed: int) -> None:
        """OffQ's, then from its residual basis to the other one."""
        super().rewrite(checkpoint, statistics, seed)
        basis, order = statistics["residual.basis"].cpu(), statistics["residual.order"].cpu()
        width, group = len(basis), self._group(len(basis))
        sizes, random = group_sizes(width, group), generator(seed, "constant first row")
        fused = offset_rotation(basis, order, group, generator(seed, "residual"))
        wanted = basis[:, outlier_grouping(order, sizes)] @ block_diagonal(
            [_random_below_first_row(size, random) for size in sizes]
        )
        rotate_residual(checkpoint.model, checkpoint.anatomy, fused.T @ wanted)


def _random_below_first_row(size: int, random: torch.Generator) -> Tensor:
    one = torch.ones(1, 1, dtype=torch.float64)
    rest = block_diagonal([one, random_orthogonal(size - 1, random)]) if size > 1 else one
    return rest @ constant_first_row(size, None)


@method("quantize", "offq-weights, all eigenvectors", family="ablation")
@dataclasses.dataclass(frozen=True)
class WrittenOffQ(OffQWeights):
    """offq-weights whose other axes are the other eigenvectors of what the blocks write."""

    def statistics(
        self, checkpoint: Checkpoint, calibration: Calibration | None, seed: int
    ) -> Mapping[str, Tensor]:
        """Those of offq-weights, with the axes replaced."""
        moment = written_moment(checkpoint.model, checkpoint.language, seed)
        _, basis = uncentred_pca(moment=moment)
        return {**super().statistics(checkpoint, calibration, seed), "residual.basis": basis}


class _OffsetQuantizers:
    """The quantizers of OffQ without its rotation: asymmetric, free range, no clipping of activations."""

    activations: int
    kv: int
    activation_group: str | int

    def input_scheme(self, site: Site) -> Scheme | None:
        """Asymmetric with a free range."""
        size = Granularity.parse(self.activation_group).size or site.width
        return _offset(site, self.activations, min(size, site.width))

    def key_value_schemes(self, block: Block) -> tuple[Scheme | None, Scheme | None]:
        """Asymmetric with a free range, per token and head."""
        scheme = Scheme(Integer(self.kv, symmetric=False, range="free"), Granularity("token"))
        return scheme, scheme


@method("quantize", "quarot with offq's quantizers", family="ablation", needs=("calibration",))
@dataclasses.dataclass(frozen=True)
class OffsetQuaRot(_OffsetQuantizers, QuaRot):
    """QuaRot's rotations, OffQ's quantizers."""


@method("quantize", "gptq with offq's quantizers", family="ablation", needs=("calibration",))
@dataclasses.dataclass(frozen=True)
class OffsetGPTQ(_OffsetQuantizers, GPTQ):
    """No rotation, OffQ's quantizers and weight clipping."""

    clip: bool = True
