"""What a checkpoint weighs: bytes on disk, and bits for each weight that quantizers may round."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from postlude.errors import ArchitectureError
from postlude.runs.checkpoint import Checkpoint

__all__ = ["size_of"]


def size_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Bytes of a checkpoint, bits of its weights, and what a quantizer left alone.

    Returns:
        ``bytes``: of its safetensors files; of its tensors, each shared one once, while it exists
        only in memory. ``bits_per_weight``: everything stored for the linears of the blocks (codes,
        scales, zero points, signs) over the number of weights they stand for; embeddings, head,
        norms and biases are not in it. Of a quantized checkpoint also ``kept``: the linears of the blocks that
        the method left in floating point; ``weight_error``: ``||W - decoded W|| / ||W||`` over all rounded
        weights, as they were after the method's rewrites; ``branch``: ranks and bytes of low-rank branches,
        where there are any.

    Raises:
        ArchitectureError: a linear of the anatomy holds no weight that can be counted.
    """
    bits = weights = 0
    for name in checkpoint.anatomy.linears():
        module = checkpoint.model.get_submodule(name)
        if hasattr(module, "stored_bits"):
            bits += module.stored_bits()
            weights += module.in_features * module.out_features
        elif isinstance(getattr(module, "weight", None), Tensor):
            bits += module.weight.numel() * module.weight.element_size() * 8
            weights += module.weight.numel()
        else:
            raise ArchitectureError(
                f"{name} is a {type(module).__name__} without a weight and without stored_bits(): "
                "its size cannot be counted"
            )
    size: dict[str, Any] = {"bytes": _bytes(checkpoint), "bits_per_weight": bits / weights}
    made_by = checkpoint.made_by()
    if made_by:
        size["kept"] = list(made_by.get("kept", []))
        size |= {part: made_by[part] for part in ("weight_error", "branch") if part in made_by}
    return size


def _bytes(checkpoint: Checkpoint) -> int:
    if checkpoint.path is not None:
        return sum(file.stat().st_size for file in checkpoint.files())
    seen: dict[tuple[int, int], int] = {}
    for tensor in checkpoint.model.state_dict().values():
        seen[tensor.data_ptr(), tensor.numel()] = tensor.numel() * tensor.element_size()
    return sum(seen.values())
