"""OffQ without data: the outlier direction is read from the weights.

OffQ (arXiv:2606.07116) finds the direction of extreme tokens by running text. Massive activations are made, and unmade,
by single blocks, and what a block does to a lone token is nearly linear (singular defects, arXiv:2502.07004)::

    Delta_l = (I + F_l)(I + A_l) - I       linear picture of block l, from its weights (surgery/probes.py)
    C       = sum_l Delta_l Delta_l^T      what the blocks write for isotropic inputs

The leading eigenvector of ``C`` takes the place of OffQ's ``U1``: a block that makes the outlier and one that removes
it both have their largest singular value along it. The other axes are random; all else is OffQ's.

A combination of both papers, in neither. Our choices: every block counts, since which one makes the outlier is known
from data only; the sum is over blocks as they are, so those that write most have most say; the other eigenvectors of
``C`` are not taken, because they say where blocks write much, and not where single tokens stand out (they quantize
worse than random axes); the channels of ``P4`` are ranked by ``||up row|| ||gate row||``, the size of their product for
isotropic inputs; keys get the plain Hadamard, also with attention biases. Rounding is to nearest, so that nothing needs
text; ``rounding=gptq`` asks for some, and then only the rotation is without data.

Cost: for every block ``6 samples hidden_size product_size`` operations (16 Gaussian samples a channel) and two
``D x D`` products, one eigendecomposition. Online as OffQ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from postlude.numerics.factorize import uncentred_pca
from postlude.quantization.engine import generator
from postlude.quantization.offq import OffQ
from postlude.registry import method
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import LanguageAnatomy, LanguageBlock
from postlude.surgery.batches import Calibration
from postlude.surgery.probes import approximate_block

__all__ = ["OffQWeights", "axes_around", "product_sizes", "written_moment"]

_SAMPLES_PER_CHANNEL = 16


def written_moment(model: nn.Module, anatomy: LanguageAnatomy, seed: int) -> Tensor:
    """``C = sum Delta Delta^T`` over all blocks: fp64 ``[hidden_size, hidden_size]``.

    Args:
        model: float.
        anatomy: of it.
        seed: of the Gaussian inputs that the feed-forward layers are linearised with.
    """
    samples = _SAMPLES_PER_CHANNEL * anatomy.hidden_size
    changes = [
        approximate_block(model, anatomy, block, samples, seed).change for block in anatomy.blocks
    ]
    return sum((one @ one.T for one in changes[1:]), changes[0] @ changes[0].T)


def axes_around(direction: Tensor, random: torch.Generator) -> Tensor:
    """An orthogonal fp64 ``[width, width]`` whose first column is a unit vector ``[width]``, the others random."""
    width = len(direction)
    others = torch.randn(width, width - 1, generator=random, dtype=torch.float64)
    first = direction.double()[:, None]
    basis, triangle = torch.linalg.qr(torch.cat([first, others.to(first.device)], 1))
    # The first column comes out with either sign.
    return basis * triangle.diagonal().sign()


def product_sizes(model: nn.Module, block: LanguageBlock) -> Tensor:
    """How large each channel of the feed-forward product is for isotropic inputs, up to a factor: fp64 ``[width]``."""
    size = block.linear("up").weight(model).double().norm(dim=1)
    return size * block.linear("gate").weight(model).double().norm(dim=1) if block.gated else size


@method("quantize", "offq-weights", family="rotation", paper="arXiv:2606.07116")
@dataclasses.dataclass(frozen=True)
class OffQWeights(OffQ):
    """OffQ with the outlier direction of the blocks' own weights (arXiv:2502.07004); needs no text."""

    rounding: Literal["nearest", "gptq"] = "nearest"

    def statistics(
        self, checkpoint: Checkpoint, calibration: Calibration | None, seed: int
    ) -> Mapping[str, Tensor]:
        model, anatomy = checkpoint.model, checkpoint.language
        _, vectors = uncentred_pca(moment=written_moment(model, anatomy, seed))
        found = {
            "residual.basis": axes_around(vectors[:, 0], generator(seed, "axes")),
            "residual.order": torch.arange(anatomy.hidden_size),
        }
        for block in anatomy.blocks:
            sizes = product_sizes(model, block)
            found[f"{block.index}.product"] = torch.argsort(sizes, descending=True, stable=True)
        return found
