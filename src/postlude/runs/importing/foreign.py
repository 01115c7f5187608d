"""What every reader of a foreign layout shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from postlude.errors import CheckpointError
from postlude.numerics.formats import Integer
from postlude.numerics.packing import pack, packed_width, unpack
from postlude.numerics.schemes import Granularity, Scheme
from postlude.surgery.layers import QuantizedLinear
from postlude.surgery.transforms import InputOrder

__all__ = [
    "Foreign",
    "Reader",
    "integer_layer",
    "packed_along_rows",
    "refuse",
    "scale_dtype",
    "unpack_words",
]


@dataclasses.dataclass
class Foreign:
    """A checkpoint under way from another layout to Postlude's.

    Attributes:
        tensors: by name; readers take theirs out and put codes, scales and zero points in.
        specs: of every quantized layer by its path, see :meth:`QuantizedLinear.spec`.
    """

    tensors: dict[str, Tensor]
    specs: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def paths(self, ending: str) -> list[str]:
        """Paths of the modules that have a tensor of this name."""
        return [
            name.removesuffix(f".{ending}") for name in self.tensors if name.endswith(f".{ending}")
        ]

    def take(self, path: str, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Take a tensor out.

        Raises:
            CheckpointError: it is not there, or has another shape.
        """
        full = f"{path}.{name}"
        if full not in self.tensors:
            raise CheckpointError(
                f"the checkpoint has no {full}, which {path} needs; it is damaged or not whole"
            )
        tensor = self.tensors.pop(full)
        if shape is not None and tuple(tensor.shape) != shape:
            raise CheckpointError(f"{full} has shape {tuple(tensor.shape)}, expected {shape}")
        return tensor

    def put(self, path: str, layer: QuantizedLinear, tensors: Mapping[str, Tensor]) -> None:
        """Add a layer; ``layer`` is empty and says only how it looks."""
        self.specs[path] = layer.spec()
        for name, tensor in tensors.items():
            self.tensors[f"{path}.{name}"] = tensor.contiguous()


Reader = Callable[[dict[str, Any], Foreign], None]


def refuse(
    layout: str, what: str, instead: str = "Start from the float model it was made from."
) -> CheckpointError:
    """The error for a variant of a layout that is not read."""
    return CheckpointError(
        f"this {layout} checkpoint {what}, which Postlude does not read. {instead}"
    )


def scale_dtype(scale: Tensor, where: str) -> Any:
    """The type that a scale is kept in.

    Raises:
        CheckpointError: not one of those that scales have.
    """
    name = str(scale.dtype).removeprefix("torch.")
    if name not in ("float16", "bfloat16", "float32"):
        raise CheckpointError(
            f"the scales of {where} are {name}; expected float16, bfloat16 or float32"
        )
    return name


def unpack_words(words: Tensor, bits: int, width: int) -> Tensor:
    """``int32 [rows, words]``, low bits first, to ``uint8 [rows, width]``."""
    return unpack(packed_along_rows(words, bits, width), bits, width)


def packed_along_rows(words: Tensor, bits: int, width: int) -> Tensor:
    """``int32 [rows, words]`` as the bytes that Postlude packs ``width`` codes into; what fills up words is dropped."""
    return words.contiguous().view(torch.uint8)[..., : packed_width(width, bits)].contiguous()


def integer_layer(
    foreign: Foreign,
    path: str,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    bits: int,
    in_features: int,
    group: int,
    groups_of: Tensor | None = None,
    input: Scheme | None = None,
) -> None:
    """Put an integer layer.

    Args:
        codes: packed, ``uint8 [out, bytes]``.
        scale: ``[out, groups]``.
        zero_point: ``[out, groups]`` of integers, or None for the middle of the range.
        group: inputs that share a scale; 0 for all of them.
        groups_of: the group of every input, where they are not neighbours.
        input: how the input is rounded at run time.
    """
    if zero_point is not None and bool((zero_point == 2 ** (bits - 1)).all()):
        zero_point = None
    format = Integer(bits) if zero_point is None else Integer(bits, symmetric=False, range="zero")
    granularity = Granularity("group", group) if group and group < in_features else Granularity()
    scheme = Scheme(format, granularity, scale_dtype(scale, path))
    order = _order(groups_of, group or in_features, path)
    if order is not None:
        codes = pack(unpack(codes, bits, in_features)[:, order], bits)
    bias = foreign.tensors.get(f"{path}.bias")
    with torch.device("meta"):
        layer = QuantizedLinear(
            in_features,
            len(codes),
            bias=bias is not None,
            weight=scheme,
            input=input,
            transform=None if order is None else InputOrder(in_features),
        )
    for name, tensor in (("codes", codes), ("scale", scale), ("zero_point", zero_point)):
        expected = getattr(layer, name)
        if tensor is not None and tensor.shape != expected.shape:
            raise CheckpointError(
                f"the {name.replace('_', ' ')} of {path} has shape {tuple(tensor.shape)}, expected "
                f"{tuple(expected.shape)} for {in_features} inputs in groups of {group or in_features}"
            )
    tensors = {"codes": codes, "scale": scale}
    if zero_point is not None:
        tensors["zero_point"] = zero_point.to(torch.uint8)
    if order is not None:
        tensors["transform.order"] = order.to(torch.int32)
    foreign.put(path, layer, tensors)


def _order(groups_of: Tensor | None, group: int, path: str) -> Tensor | None:
    """The order that makes groups neighbours; None where they are."""
    if groups_of is None or bool((groups_of == -1).all()):
        return None
    regular = torch.arange(len(groups_of)) // group
    if torch.equal(groups_of.long(), regular):
        return None
    order = torch.argsort(groups_of, stable=True)
    if not torch.equal(groups_of[order].long(), regular):
        raise CheckpointError(
            f"the groups of {path} do not have {group} inputs each, so its weight cannot be read; the checkpoint is "
            "damaged"
        )
    return order
