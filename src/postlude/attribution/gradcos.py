"""GradCos: the cosine of gradients, over all layers at once.

    score(q, i) = g_q . g_i / (|g_q| |g_i|),      g = all layers, one after the other

:class:`GradDot` without its preference for long and badly predicted examples, whose gradients are large. One
norm over all layers, not one a layer. The normalisation is that of unit-norm gradient retrieval, for example in
arXiv:2402.04333 (LESS), there of gradients that an optimizer has rescaled. Reads any index of loss gradients.

Cost: as GradDot; the norms of the training examples take a second pass, once for each opened index.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from postlude.attribution.graddot import GradDot
from postlude.attribution.index import Index
from postlude.attribution.queries import Queries
from postlude.registry import method

__all__ = ["GradCos"]


@method("attribute", "gradcos", family="influence", paper="arXiv:2402.04333", needs=("gradients",))
@dataclasses.dataclass(frozen=True)
class GradCos(GradDot):
    """Cosine of gradients, over all layers at once.

    Attributes:
        projection_factor: ``f``; sides of a gradient are this many times narrower.
        format: of the stored numbers: fp32, bf16 or int8.
    """

    def weights(self, index: Index, queries: Queries) -> tuple[Tensor, Tensor]:
        """The inverse norms of both sides; 0 for a gradient of zero."""
        asked = sum(queries.rows(layer).energies().double() for layer in index.layers)
        kept = index.cached("squared norms", squared_norms)
        assert isinstance(asked, Tensor)
        return _inverse_root(asked), _inverse_root(kept)

    @property
    def unit(self) -> str:
        return "cosine"


def squared_norms(index: Index) -> Tensor:
    """fp64 ``[examples]``, over all layers."""
    total = torch.zeros(len(index), dtype=torch.float64)
    for layer in index.layers:
        for first, rows in index.layer(layer.module).chunks():
            total[first : first + len(rows)] += rows.energies().double()
    return total


def _inverse_root(squares: Tensor) -> Tensor:
    return torch.where(squares > 0, squares.clamp(min=torch.finfo(squares.dtype).tiny).rsqrt(), 0.0)
