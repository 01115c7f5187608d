"""How far a quantized model's residual stream is from the float one's, block by block.

A rotation leaves what a model computes as it is but not the basis of its residual stream: the stream of a rotated
model is ``h Q``. Its embeddings are rotated by the same ``Q`` and stay in floating point, so ``Q`` is the orthogonal
matrix with ``E Q = E'``, found by the polar decomposition of ``E^T E'`` (orthogonal Procrustes), and the stream is
turned back before it is compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from postlude.errors import ArchitectureError
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.batches import token_batches
from postlude.surgery.capture import observe

__all__ = ["StreamError", "basis_change"]


def basis_change(embedding: Tensor, other: Tensor) -> Tensor:
    """Orthogonal ``Q`` with ``embedding Q = other``, fp64 ``[width, width]``.

    Args:
        embedding: ``[vocabulary, width]``.
        other: the same, in another orthonormal basis.

    Raises:
        ArchitectureError: no orthogonal matrix turns one into the other.
    """
    first, second = embedding.double(), other.double()
    left, _, right = torch.linalg.svd(first.T @ second)
    turn = left @ right
    error = float((first @ turn - second).norm() / second.norm())
    # Embeddings stored in bfloat16 are rounded by up to 1 / 256 of an entry after the rotation.
    if not error < 0.02:
        raise ArchitectureError(
            f"the embeddings of the two models differ by {error:.2%} in every orthonormal basis; expected a "
            "quantized model and the float one it was made from, so their residual streams cannot be compared"
        )
    return turn


class StreamError:
    """Compares residual streams with those of one float model.

    Args:
        reference: the float model.
        tokens: ``[sequences, length]`` of text.
    """

    def __init__(self, reference: Checkpoint, tokens: Tensor) -> None:
        self._reference, self._tokens = reference, tokens
        self._expected: Tensor | None = None

    def of(self, checkpoint: Checkpoint) -> dict[str, list[float]]:
        """Relative errors ``|h' - h| / |h|`` of the tokens' hidden states after every block.

        Returns:
            ``median`` and ``p95`` over tokens, one number a block.

        Raises:
            ArchitectureError: the checkpoint was not made from the reference.
        """
        if self._expected is None:
            self._expected = _stream(self._reference, self._tokens)
        turn = basis_change(_embedding(self._reference), _embedding(checkpoint))
        found = _stream(checkpoint, self._tokens).double() @ turn.T
        expected = self._expected.double()
        error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        return {
            "median": error.median(dim=1).values.tolist(),
            "p95": error.quantile(0.95, dim=1).tolist(),
        }


def _embedding(checkpoint: Checkpoint) -> Tensor:
    module = checkpoint.model.get_submodule(checkpoint.language.embeddings[0])
    weight: Tensor = module.weight.detach().cpu()
    return weight


def _stream(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    """``[blocks, tokens, hidden_size]`` after every block, before any norm."""
    seen: list[list[Tensor]] = [[] for _ in checkpoint.language.blocks]

    def residual(layer: int, hidden: Tensor) -> None:
        if layer >= 0:
            seen[layer].append(hidden.float().flatten(0, 1).cpu())

    observe(checkpoint.model, checkpoint.language, token_batches(tokens), {}, residual=residual)
    return torch.stack([torch.cat(batches) for batches in seen])
