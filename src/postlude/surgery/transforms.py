"""Online transforms: what a rewritten model does to an activation at run time.

A quantized linear transforms its input before rounding it, an attention module its queries and keys. A transform is
described by a small dictionary and rebuilt, empty, from that description.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from postlude.errors import CheckpointError
from postlude.numerics.hadamard import fast_hadamard, is_hadamard_order
from postlude.numerics.rotation import constant_first_row, group_sizes
from postlude.surgery.static_quantizers import StaticQuantizer
from postlude.surgery.stored_types import StoredTypes

__all__ = [
    "BlockHadamard",
    "HeadRotation",
    "InputOrder",
    "InputScale",
    "Transform",
    "build_transform",
]


class BlockHadamard(nn.Module):
    """``x -> (x * signs) H`` with ``H`` block-diagonal: an orthogonal transform along the last axis.

    Blocks are Hadamard matrices over ``sqrt(order)`` with a constant first row; signs multiply rows of ``H``,
    so flipping any row but the first of a block keeps that row constant. A last block whose size is no
    Hadamard order is an orthonormal matrix with a constant first row (DCT-II).

    With ``inner > 1`` the axis is read as ``[outer, block, inner]`` and the transform mixes the middle one:
    ``kron(I_outer, H_block, I_inner)``, for example across heads.

    Args:
        width: entries of the axis.
        block: order of a block; the whole ``width`` for one full transform.
        inner: stride of the mixed axis.
    """

    signs: Tensor

    def __init__(self, width: int, block: int, inner: int = 1, device: Any = None) -> None:
        super().__init__()
        self.width, self.block, self.inner = width, min(block, width // inner), inner
        self.sizes = group_sizes(width // inner, self.block)
        if width % inner or (inner > 1 and len(set(self.sizes)) > 1):
            raise ValueError(f"width {width} does not divide into blocks of {block} x {inner}")
        self.register_buffer("signs", torch.ones(width, dtype=torch.int8, device=device))

    def randomize(self, generator: torch.Generator, *, keep_first: bool) -> BlockHadamard:
        """Draw the signs; ``keep_first`` leaves the first row of every block as it is."""
        signs = torch.randint(0, 2, (self.width,), generator=generator, dtype=torch.int8) * 2 - 1
        if keep_first:
            starts = torch.tensor([sum(self.sizes[:i]) for i in range(len(self.sizes))])
            signs[starts] = 1
        self.signs.copy_(signs)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` to the same shape; also how it is fused into weights."""
        x = x * self.signs.to(x.dtype)
        if self.inner > 1:
            x = x.unflatten(-1, (-1, self.block, self.inner)).transpose(-1, -2)
            return _mix(x, self.block).transpose(-1, -2).flatten(-3)
        whole = sum(size for size in self.sizes if size == self.block)
        head = x[..., :whole].unflatten(-1, (-1, self.block))
        mixed = _mix(head, self.block).flatten(-2)
        if whole == self.width:
            return mixed
        return torch.cat([mixed, _mix(x[..., whole:], self.sizes[-1])], dim=-1)

    def spec(self) -> dict[str, Any]:
        """What :func:`build_transform` needs to make an empty one."""
        return {"kind": "hadamard", "width": self.width, "block": self.block, "inner": self.inner}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], device: Any = None) -> BlockHadamard:
        """An empty one from its description."""
        return cls(spec["width"], spec["block"], spec["inner"], device)

    def extra_repr(self) -> str:
        return f"width={self.width}, block={self.block}, inner={self.inner}"


class InputOrder(nn.Module):
    """``x -> x[..., order]``: the order in which a layer's weight keeps its inputs.

    GPTQ with ``act_order`` shares scales between inputs that are not neighbours; sorted by group they are.

    Args:
        width: entries of the axis.
    """

    order: Tensor

    def __init__(self, width: int, device: Any = None) -> None:
        super().__init__()
        self.register_buffer("order", torch.zeros(width, dtype=torch.int32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` to the same shape."""
        return x.index_select(-1, self.order)

    def spec(self) -> dict[str, Any]:
        """What :func:`build_transform` needs to make an empty one."""
        return {"kind": "order", "width": len(self.order)}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], device: Any = None) -> InputOrder:
        """An empty one from its description."""
        return cls(spec["width"], device)


class InputScale(StoredTypes):
    """``x -> x * factor``, channel by channel: smoothing that no norm absorbs (SVDQuant, arXiv:2411.05007).

    Args:
        width: entries of the axis.
    """

    factor: Tensor

    def __init__(self, width: int, device: Any = None) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(width, dtype=torch.float32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` to the same shape."""
        return x * self.factor.to(x.dtype)

    def spec(self) -> dict[str, Any]:
        """What :func:`build_transform` needs to make an empty one."""
        return {"kind": "scale", "width": len(self.factor)}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], device: Any = None) -> InputScale:
        """An empty one from its description."""
        return cls(spec["width"], device)


class HeadRotation(nn.Module):
    """One orthogonal matrix per key/value head, shared by the query heads it serves: ``x -> x R[head]``.

    Args:
        heads: key/value heads.
        size: entries of a head.
    """

    matrices: Tensor

    def __init__(
        self, heads: int, size: int, dtype: torch.dtype = torch.float32, device: Any = None
    ) -> None:
        super().__init__()
        self.register_buffer("matrices", torch.zeros(heads, size, size, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, heads, tokens, size]``, with as many heads or a multiple of it."""
        matrices = self.matrices.repeat_interleave(x.shape[1] // len(self.matrices), 0)
        return (x.to(matrices.dtype) @ matrices).to(x.dtype)

    def spec(self) -> dict[str, Any]:
        """What :func:`build_transform` needs to make an empty one."""
        return {"kind": "heads", "heads": len(self.matrices), "size": self.matrices.shape[1]}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], device: Any = None) -> HeadRotation:
        """An empty one from its description."""
        return cls(spec["heads"], spec["size"], device=device)


def _mix(x: Tensor, order: int) -> Tensor:
    """``x @ H`` along the last axis, ``H`` orthonormal of this order with a constant first row."""
    if is_hadamard_order(order):
        return fast_hadamard(x, order, normalize=True)
    return x @ constant_first_row(order, None).to(x.device, x.dtype)


Transform = BlockHadamard | HeadRotation | InputOrder | InputScale | StaticQuantizer
"""Any of them."""

_FROM_SPEC: dict[str, Callable[[Mapping[str, Any], Any], Transform]] = {
    "hadamard": BlockHadamard.from_spec,
    "heads": HeadRotation.from_spec,
    "order": InputOrder.from_spec,
    "scale": InputScale.from_spec,
    "static": StaticQuantizer.from_spec,
}


def build_transform(spec: Mapping[str, Any] | None, device: Any = None) -> Transform | None:
    """An empty online transform from its description; None from None.

    Raises:
        CheckpointError: of a kind that is not known.
    """
    if spec is None:
        return None
    build = _FROM_SPEC.get(str(spec.get("kind")))
    if build is None:
        raise CheckpointError(
            f"online transform {spec.get('kind')!r} is not known to this version of Postlude; "
            "load the checkpoint with the version that wrote it"
        )
    return build(spec, device)
