"""Layers that a rewritten or quantized model is made of.

:class:`QuantizedLinear` holds what is stored: packed codes, scales, an optional online transform of its input
(:mod:`postlude.surgery.transforms`), an optional quantizer of its input, and an optional low-rank branch. It can be
described by a small dictionary and rebuilt, empty, from that description, which is how a saved model is loaded.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from postlude.errors import CheckpointError, SettingsError
from postlude.numerics.low_rank import BranchFormat
from postlude.numerics.packing import pack, packed_width, unpack
from postlude.numerics.schemes import Encoded, Scheme
from postlude.surgery.anatomy import is_transposed
from postlude.surgery.stored_types import StoredTypes
from postlude.surgery.transforms import Transform, build_transform

__all__ = [
    "Execution",
    "LowRankBranch",
    "QuantizedLinear",
    "check_scales",
    "hold_dense",
    "hold_weights",
    "quantized_linears",
]


class Execution(Protocol):
    """What computes a layer in the place of the simulation, see :mod:`postlude.surgery.kernels`."""

    def run(self, layer: QuantizedLinear, x: Tensor) -> Tensor:
        """``[..., in_features]``, after the transform and before the input quantizer, to the output."""

    def codes(self, layer: QuantizedLinear) -> Tensor:
        """The codes as they are stored on disk, also where the weight is kept in another order."""

    def keeps_codes(self) -> bool:
        """Whether the layer keeps its buffer ``codes``."""


def quantized_linears(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """Every quantized layer with its path; the two layers of a branch belong to theirs and are not listed."""
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and not module.factor:
            yield path, module


@contextlib.contextmanager
def hold_dense(module: nn.Module) -> Iterator[None]:
    """Decode the weights below a module once, for as long as the context lasts.

    Worth it where one block runs many batches; costs the block's weights in float meanwhile.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, QuantizedLinear)]
    try:
        for layer in layers:
            layer._held = layer.dense_weight()
        yield
    finally:
        for layer in layers:
            layer._held = None


@contextlib.contextmanager
def hold_weights(weights: Mapping[QuantizedLinear, Tensor]) -> Iterator[None]:
    """Let layers compute with other weights ``[out_features, in_features]``, through which gradients may flow."""
    before = {layer: layer._held for layer in weights}
    try:
        for layer, weight in weights.items():
            layer._held = weight
        yield
    finally:
        for layer, held in before.items():
            layer._held = held


def check_scales(model: nn.Module, *, positive: bool = True) -> None:
    """Refuse a model with scales that cannot be.

    Args:
        model: any; its quantized layers are looked at.
        positive: whether scales are above zero, as Postlude writes them; some libraries write others.

    Raises:
        CheckpointError: a scale that is NaN, infinite, or not positive; names the layer.
    """
    for path, layer in model.named_modules():
        if not isinstance(layer, QuantizedLinear) or layer.weight_scheme is None:
            continue
        scale = layer.scale.float()
        good = torch.isfinite(scale) & (scale > 0) if positive else torch.isfinite(scale)
        if not bool(good.all()):
            raise CheckpointError(
                f"{path} has {int((~good).sum())} scales of {scale.numel()} that are NaN, infinite, negative or "
                "zero; expected positive numbers. The checkpoint is damaged: copy it again, or quantize again."
            )


class QuantizedLinear(StoredTypes):
    """``y = Q_in(T(x)) W_q^T + bias``, and with a low-rank branch ``+ branch(T(x))``.

    Args:
        in_features, out_features: of the linear it replaces.
        bias: whether it has one.
        weight: how the weight is quantized; None keeps it in ``dtype``.
        input: how the input is quantized at run time; None leaves it alone.
        transform: online transform of the input, before quantizing it.
        branch: low-rank correction of the weight; it reads the input before that is quantized.
        half: keep an unquantized weight in float16, whatever type the model has.
        dtype: of the bias and of an unquantized weight; the arithmetic is in the type of the input.

    Attributes:
        codes: ``uint8 [out_features, packed bytes]``; made anew at every reading while a kernel keeps them in
            an order of its own.
        scale: ``[out_features, groups]`` (``[1]`` per tensor), in the scheme's scale type.
        zero_point: shape of ``scale``, or None.
        quantize_input: switched off while statistics of the float input are wanted.
        factor: whether it is one of the two layers of a branch.
        execution: what computes the layer; None for the simulation, which is the reference.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        weight: Scheme | None = None,
        input: Scheme | None = None,
        transform: Transform | None = None,
        branch: LowRankBranch | None = None,
        half: bool = False,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight_scheme, self.input_scheme = weight, input
        self.transform = transform
        self.branch = branch
        self.quantize_input = True
        self.factor = False
        self._held: Tensor | None = None
        self.execution: Execution | None = None
        self.zero_point: Tensor | None
        empty: dict[str, Any] = {"device": device}
        if weight is None:
            self.zero_point = None
            kept = torch.empty(
                out_features, in_features, dtype=torch.float16 if half else dtype, **empty
            )
            if half:
                self.register_buffer("weight", kept)  # parameters are cast with the model
            else:
                self.weight = nn.Parameter(kept, requires_grad=False)
        else:
            bytes_per_row = packed_width(in_features, weight.format.code_bits)
            shape = (
                (1,)
                if weight.granularity.kind == "tensor"
                else (out_features, weight.granularity.groups(in_features))
            )
            codes = torch.zeros(out_features, bytes_per_row, dtype=torch.uint8, **empty)
            scale = torch.ones(shape, dtype=getattr(torch, weight.scale_dtype), **empty)
            zero = torch.zeros(shape, dtype=weight.zero_point_dtype, **empty)
            self.register_buffer("codes", codes)
            self.register_buffer("scale", scale)
            self.register_buffer("zero_point", zero if weight.format.zero_point_bits else None)
        self.bias = (
            nn.Parameter(torch.zeros(out_features, dtype=dtype, **empty), requires_grad=False)
            if bias
            else None
        )

    @classmethod
    def like(
        cls,
        module: nn.Module,
        *,
        weight: Scheme | None = None,
        input: Scheme | None = None,
        transform: Transform | None = None,
        branch: LowRankBranch | None = None,
        dtype: torch.dtype | None = None,
    ) -> QuantizedLinear:
        """An empty layer with the shape, bias and device of a linear (or transposed ``Conv1D``)."""
        matrix = module.weight
        if not isinstance(matrix, Tensor):
            raise TypeError(f"{type(module).__name__} has no weight to be shaped like")
        shape = matrix.T.shape if is_transposed(module) else matrix.shape
        bias = getattr(module, "bias", None)
        layer = cls(
            shape[1],
            shape[0],
            bias=bias is not None,
            weight=weight,
            input=input,
            transform=transform,
            branch=branch,
            dtype=dtype or matrix.dtype,
            device=matrix.device,
        )
        if isinstance(bias, Tensor) and layer.bias is not None:
            layer.bias.data.copy_(bias.data)
        return layer

    def store(self, encoded: Encoded) -> None:
        """Take the codes and scales of ``[out_features, in_features]``."""
        self._refuse_while_executing("be given another weight")
        self.codes = pack(encoded.codes, encoded.scheme.format.code_bits)
        self.scale = encoded.scale
        self.zero_point = encoded.zero_point

    @property
    def qweight(self) -> Tensor:
        """The codes, by the name that peft looks for to find out where a layer is."""
        return self.codes

    def dense_weight(self) -> Tensor:
        """``[out_features, in_features]``, fp32 where it is decoded, without the branch: kernels' reference."""
        if self.weight_scheme is None:
            return self.weight.data
        codes = unpack(self.codes, self.weight_scheme.format.code_bits, self.in_features)
        return self.weight_scheme.decode(codes, self.scale, self.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if self.transform is not None:
            x = self.transform(x)
        # A held weight was asked for by name, and an unquantized input is not what a kernel computes.
        as_stored = self._held is None and (self.input_scheme is None or self.quantize_input)
        run = self.simulate
        if self.execution is not None and as_stored:
            run = functools.partial(self.execution.run, self)
        out = run(x)
        return out if self.branch is None else out + self.branch(x)

    def simulate(self, x: Tensor) -> Tensor:
        """``Q_in(x) W_q^T + bias`` in floating point, of an input that is already transformed; not the branch."""
        x = self.quantized_input(x)
        if x.requires_grad and torch.is_grad_enabled() and self._held is None:
            return _product(x, self)
        weight = self.dense_weight() if self._held is None else self._held
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)

    def quantized_input(self, x: Tensor) -> Tensor:
        """The rounded input, in the type of ``x``."""
        if self.input_scheme is None or not self.quantize_input:
            return x
        return self.input_scheme.round_trip(x)

    def __getattr__(self, name: str) -> Any:
        if name == "codes" and "codes" not in self.__dict__.get("_buffers", ()):
            # A kernel keeps the codes in an order of its own.
            execution = self.__dict__.get("execution")
            if execution is not None:
                return execution.codes(self)
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.execution is not None and not self.execution.keeps_codes():
            destination[prefix + "codes"] = self.codes

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_while_executing("be given another weight")
        super()._load_from_state_dict(*args, **kwargs)

    def _refuse_while_executing(self, what: str) -> None:
        if self.execution is not None:
            raise SettingsError(
                f"a layer that runs on a kernel cannot {what}: call "
                'postlude.surgery.kernels.use(model, "simulate") first, and use() again afterwards'
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._refuse_while_executing("be moved or cast")
        return super()._apply(fn, recurse)

    def stored_bits(self) -> int:
        """Bits on disk of everything that stands for the weight: codes, scales, zero points, signs, branch."""
        parts: list[Tensor] = (
            [self.weight] if self.weight_scheme is None else [self.codes, self.scale]
        )
        if self.zero_point is not None and self.weight_scheme is not None:
            parts.append(self.zero_point)
        if self.transform is not None:
            parts += list(self.transform.buffers())
        own = sum(part.numel() * part.element_size() * 8 for part in parts)
        return own if self.branch is None else own + self.branch.stored_bits()

    def spec(self) -> dict[str, Any]:
        """What :meth:`from_spec` needs to make an empty one."""
        spec = {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "weight": self.weight_scheme.to_dict() if self.weight_scheme else None,
            "input": self.input_scheme.to_dict() if self.input_scheme else None,
            "transform": None if self.transform is None else self.transform.spec(),
        }
        return spec if self.branch is None else {**spec, "branch": self.branch.spec()}

    @classmethod
    def from_spec(
        cls, spec: dict[str, Any], dtype: torch.dtype, device: Any = None
    ) -> QuantizedLinear:
        """An empty layer from its description."""
        return cls(
            spec["in_features"],
            spec["out_features"],
            bias=spec["bias"],
            weight=Scheme.from_dict(spec["weight"]) if spec["weight"] else None,
            input=Scheme.from_dict(spec["input"]) if spec["input"] else None,
            transform=build_transform(spec["transform"], device),
            branch=LowRankBranch.from_spec(spec["branch"], device) if "branch" in spec else None,
            dtype=dtype,
            device=device,
        )

    def extra_repr(self) -> str:
        def show(scheme: Scheme | None) -> str:
            return "float" if scheme is None else f"{scheme.format} per {scheme.granularity}"

        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"weight={show(self.weight_scheme)}, input={show(self.input_scheme)}"
        )


class _Product(torch.autograd.Function):
    """A layer's product, differentiable in its input alone, that decodes the weight again on its way back.

    Otherwise the tape would hold every weight of the model in floating point (QLoRA, arXiv:2305.14314).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.dense_weight().to(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.dense_weight().to(gradient.dtype), None


# torch leaves Function.apply untyped.
def _product(x: Tensor, layer: QuantizedLinear) -> Tensor:
    result: Tensor = _Product.apply(x, layer)
    return result


class LowRankBranch(nn.Module):
    """``x -> Q_a2( Q_a1(x) B^T ) A^T``: two small layers that are stored, and run, as any quantized layer is.

    Args:
        in_features, out_features: of the layer that it corrects.
        rank: width between the two.
        format: of both factors and of what they multiply.

    Attributes:
        down: holds ``B [rank, in_features]``.
        up: holds ``A [out_features, rank]``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        format: BranchFormat,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.rank, self.format = rank, format

        def layer(inputs: int, outputs: int) -> QuantizedLinear:
            return QuantizedLinear(
                inputs,
                outputs,
                bias=False,
                weight=format.factor_scheme,
                input=format.input_scheme,
                half=True,
                device=device,
            )

        self.down, self.up = layer(in_features, rank), layer(rank, out_features)
        self.down.factor = self.up.factor = True

    def store(self, up: Encoded | Tensor, down: Encoded | Tensor) -> None:
        """Take both factors, encoded in the format, or float16 where that is 16 bits."""
        for layer, factor in ((self.up, up), (self.down, down)):
            if isinstance(factor, Tensor):
                layer.weight.copy_(factor)
            else:
                layer.store(factor)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]``, before it is quantized for the main weight, to ``[..., out_features]``."""
        out: Tensor = self.up(self.down(x))
        return out

    def stored_bits(self) -> int:
        """Bits on disk."""
        return self.up.stored_bits() + self.down.stored_bits()

    def spec(self) -> dict[str, Any]:
        """What :meth:`from_spec` needs to make an empty one."""
        return {
            "in_features": self.down.in_features,
            "out_features": self.up.out_features,
            "rank": self.rank,
            "format": str(self.format),
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], device: Any = None) -> LowRankBranch:
        """An empty branch from its description."""
        return cls(
            spec["in_features"],
            spec["out_features"],
            spec["rank"],
            BranchFormat.parse(spec["format"]),
            device,
        )
