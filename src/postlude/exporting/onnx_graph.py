"""Pieces of an ONNX graph: a builder, and Postlude's layers as nodes.

Everything is computed in fp32. Integer weights of up to 8 bits go to ``com.microsoft.MatMulNBits`` as they are, in 4
or 8 bits a code; with symmetric 8-bit inputs and weights to ``MatMulInteger``. Rounding at run time follows
:class:`postlude.numerics.schemes.Scheme` operation by operation, so that it gives the same codes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from postlude.errors import SettingsError
from postlude.exporting.onnx_static import static_round_trip
from postlude.numerics.formats import MAX_ZERO_POINT, Integer
from postlude.numerics.packing import pack, unpack
from postlude.numerics.schemes import Granularity, Scheme
from postlude.surgery.layers import QuantizedLinear
from postlude.surgery.static_quantizers import StaticQuantizer
from postlude.surgery.transforms import BlockHadamard, HeadRotation, InputOrder

__all__ = ["Graph", "layer_reason"]

_OPSET, _IR_VERSION = 21, 10
_BLOCKS = (256, 128, 64, 32, 16)


class Graph:
    """Nodes and initializers under way; every method takes and returns names of values.

    Args:
        onnx: the library, which is optional.
    """

    def __init__(self, onnx: Any) -> None:
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self._constants: dict[tuple[Any, ...], str] = {}
        self.kinds: dict[str, int] = {}

    def constant(self, value: Any, type: Any = np.float32) -> str:
        """A small constant, each stored once."""
        array = np.asarray(value, dtype=type)
        key = (array.shape, str(array.dtype), array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.tensor(f"constant_{len(self._constants)}", array)
        return self._constants[key]

    def tensor(self, name: str, value: Any) -> str:
        """An initializer; torch tensors keep their type."""
        array = value.detach().cpu().contiguous().numpy() if isinstance(value, Tensor) else value
        if name not in self.initializers:
            self.initializers[name] = self.onnx.numpy_helper.from_array(
                np.ascontiguousarray(array), name
            )
        return name

    def op(
        self, kind: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes: Any
    ) -> Any:
        """Add a node; the name of its output, or a list of them."""
        names = [f"{kind}_{len(self.nodes)}" + (f"_{i}" if i else "") for i in range(outputs)]
        self.nodes.append(
            self.onnx.helper.make_node(
                kind,
                list(inputs),
                names,
                name=f"node_{len(self.nodes)}",
                domain=domain,
                **attributes,
            )
        )
        return names[0] if outputs == 1 else names

    def cast(self, x: str, type: int) -> str:
        return str(self.op("Cast", x, to=type))

    def reshape(self, x: str, *shape: int) -> str:
        return str(self.op("Reshape", x, self.constant(shape, np.int64)))

    def transpose(self, x: str, *axes: int) -> str:
        return str(self.op("Transpose", x, perm=axes))

    def model(self) -> Any:
        """The finished model."""
        graph = self.onnx.helper.make_graph(
            self.nodes, "postlude", self.inputs, self.outputs, list(self.initializers.values())
        )
        return self.onnx.helper.make_model(
            graph,
            producer_name="postlude",
            ir_version=_IR_VERSION,
            opset_imports=[
                self.onnx.helper.make_opsetid("", _OPSET),
                self.onnx.helper.make_opsetid("com.microsoft", 1),
            ],
        )

    def value(self, name: str, type: int, shape: tuple[str | int, ...]) -> Any:
        return self.onnx.helper.make_tensor_value_info(name, type, shape)

    # Layers

    def rms_norm(self, x: str, weight: Tensor, epsilon: float, name: str) -> str:
        """``x / rms(x) * weight`` along the last axis."""
        mean = self.op(
            "ReduceMean", self.op("Mul", x, x), self.constant([-1], np.int64), keepdims=1
        )
        root = self.op("Sqrt", self.op("Add", mean, self.constant(epsilon)))
        return str(self.op("Mul", self.op("Div", x, root), self.tensor(name, weight.float())))

    def linear(self, x: str, name: str, weight: Tensor, bias: Tensor | None) -> str:
        """A layer in floating point; ``weight [out, in]``."""
        self.count("float")
        product = self.op("MatMul", x, self.tensor(f"{name}.weight", weight.float().T.contiguous()))
        return self._bias(product, name, bias)

    def quantized(self, x: str, name: str, layer: QuantizedLinear) -> str:
        """A quantized layer, its online transform and the rounding of its input included."""
        x = self.transform(x, f"{name}.transform", layer.transform)
        scheme, inputs = layer.weight_scheme, layer.input_scheme
        if scheme is None or not isinstance(scheme.format, Integer):
            rounded = x if inputs is None else self.round_trip(x, inputs, layer.in_features)
            return self.linear(rounded, name, layer.dense_weight(), layer.bias)
        if inputs is not None and _integer_product(scheme, inputs):
            return self._matmul_integer(x, name, layer, scheme, inputs)
        if inputs is not None:
            x = self.round_trip(x, inputs, layer.in_features)
        return self._matmul_nbits(x, name, layer, scheme)

    def _bias(self, x: str, name: str, bias: Tensor | None) -> str:
        return (
            x if bias is None else str(self.op("Add", x, self.tensor(f"{name}.bias", bias.float())))
        )

    def count(self, kind: str) -> None:
        """Note one more layer or rounding of a kind, for the report."""
        self.kinds[kind] = self.kinds.get(kind, 0) + 1

    def _matmul_nbits(self, x: str, name: str, layer: QuantizedLinear, scheme: Scheme) -> str:
        self.count("MatMulNBits")
        out, width = layer.out_features, layer.in_features
        bits = 4 if scheme.format.code_bits <= 4 else 8
        block = _block(scheme, width)
        count = -(-width // block)
        codes = unpack(layer.codes, scheme.format.code_bits, width).cpu()
        codes = nn.functional.pad(codes, (0, count * block - width))
        packed = pack(codes, bits).reshape(out, count, block * bits // 8)
        scale = _spread(layer, layer.scale.float(), scheme, block, count)
        inputs = [x, self.tensor(f"{name}.codes", packed), self.tensor(f"{name}.scale", scale)]
        zero = layer.zero_point
        if zero is not None and scheme.format.zero_point_bits == 16:
            # Outside the codes: a zero point of the type of the input is taken as it is.
            spread = _spread(layer, zero.float(), scheme, block, count)
            inputs.append(self.tensor(f"{name}.zero_point", spread))
        elif zero is not None or scheme.format.code_bits != bits:
            middle = torch.full_like(
                layer.scale, 2 ** (scheme.format.code_bits - 1), dtype=torch.uint8
            )
            spread = _spread(layer, middle if zero is None else zero, scheme, block, count)
            inputs.append(self.tensor(f"{name}.zero_point", pack(spread.to(torch.uint8), bits)))
        product = self.op(
            "MatMulNBits",
            *inputs,
            domain="com.microsoft",
            K=width,
            N=out,
            bits=bits,
            block_size=block,
        )
        return self._bias(product, name, layer.bias)

    def _matmul_integer(
        self, x: str, name: str, layer: QuantizedLinear, scheme: Scheme, inputs: Scheme
    ) -> str:
        self.count("MatMulInteger")
        codes, scale = self._symmetric_codes(x, inputs)
        weight = (unpack(layer.codes, 8, layer.in_features).to(torch.int16) - 128).to(torch.int8)
        product = self.op(
            "MatMulInteger",
            self.cast(codes, self.onnx.TensorProto.INT8),
            self.tensor(f"{name}.codes", weight.T.contiguous()),
        )
        channel = layer.scale.float().reshape(-1).expand(layer.out_features)
        product = self.op("Mul", self.cast(product, self.onnx.TensorProto.FLOAT), scale)
        product = self.op("Mul", product, self.tensor(f"{name}.scale", channel.contiguous()))
        return self._bias(product, name, layer.bias)

    # Transforms

    def transform(self, x: str, name: str, transform: nn.Module | None) -> str:
        """An online transform of ``[batch, length, width]``."""
        if transform is None:
            return x
        if isinstance(transform, StaticQuantizer):
            return static_round_trip(self, x, name, transform)
        if isinstance(transform, InputOrder):
            return str(
                self.op("Gather", x, self.tensor(f"{name}.order", transform.order.long()), axis=-1)
            )
        if not isinstance(transform, BlockHadamard):
            raise SettingsError(f"ONNX cannot hold a {type(transform).__name__} ({name})")
        width, block, inner = transform.width, transform.block, transform.inner
        if len(set(transform.sizes)) > 1:
            return str(self.op("MatMul", x, self.tensor(f"{name}.matrix", _matrix(transform))))
        x = self.op("Mul", x, self.tensor(f"{name}.signs", transform.signs.float()))
        bare = BlockHadamard(block, block).to(transform.signs.device)
        matrix = _matrix(bare)
        if inner == 1:
            x = self.op(
                "MatMul", self.reshape(x, 0, 0, width // block, block), self._hadamard(matrix)
            )
        else:
            x = self.reshape(x, 0, 0, width // (block * inner), block, inner)
            x = self.op("MatMul", self._hadamard(matrix.T.contiguous()), x)
        return self.reshape(x, 0, 0, width)

    def rotate_heads(self, x: str, name: str, rotation: nn.Module) -> str:
        """``[batch, heads of the cache, shared, length, size]`` by the rotation of queries and keys."""
        if isinstance(rotation, BlockHadamard):
            return str(self.op("MatMul", x, self._hadamard(_matrix(rotation))))
        if not isinstance(rotation, HeadRotation):
            raise SettingsError(f"ONNX cannot hold a {type(rotation).__name__} ({name})")
        matrices = rotation.matrices.float()
        return str(self.op("MatMul", x, self.tensor(f"{name}.matrices", matrices.unsqueeze(1))))

    def _hadamard(self, matrix: Tensor) -> str:
        return self.constant(matrix.cpu().numpy())

    # Rounding at run time

    def round_trip(self, x: str, scheme: Scheme, width: int) -> str:
        """Codes of ``x`` decoded again; groups run along the last axis, which is ``width`` long."""
        granularity = scheme.granularity
        grouped = granularity.kind == "group"
        rest = width % granularity.size if grouped else 0
        if rest:
            if rest == width:
                return self.round_trip(
                    x, dataclasses.replace(scheme, granularity=Granularity("token")), width
                )
            sizes = self.constant([width - rest, rest], np.int64)
            whole, tail = self.op("Split", x, sizes, outputs=2, axis=-1)
            whole = self.round_trip(whole, scheme, width - rest)
            return str(self.op("Concat", whole, self.round_trip(tail, scheme, rest), axis=-1))
        if grouped:
            shape = self.op("Shape", x)
            inner = self.constant([width // granularity.size, granularity.size], np.int64)
            front = self.op(
                "Slice",
                shape,
                self.constant([0], np.int64),
                self.constant([-1], np.int64),
                self.constant([0], np.int64),
            )
            x = self.op("Reshape", x, self.op("Concat", front, inner, axis=0))
        if not isinstance(scheme.format, Integer):
            raise SettingsError(f"ONNX cannot round activations to {scheme.format.kind}")
        if scheme.format.symmetric:
            codes, scale = self._symmetric_codes(x, scheme)
            result = self.op("Mul", codes, scale)
        else:
            result = self._asymmetric(x, scheme, scheme.format)
        return str(self.op("Reshape", result, shape) if grouped else result)

    def _range(self, x: str, scheme: Scheme) -> tuple[str, str]:
        axes = [] if scheme.granularity.kind == "tensor" else [self.constant([-1], np.int64)]
        low = self.op("ReduceMin", x, *axes, keepdims=1)
        high = self.op("ReduceMax", x, *axes, keepdims=1)
        if scheme.clip != 1:
            ratio = self.constant(scheme.clip)
            low, high = self.op("Mul", low, ratio), self.op("Mul", high, ratio)
        return low, high

    def _stored(self, scale: str, scheme: Scheme) -> str:
        """A scale as it is rounded to its stored type; a group of zeros has a scale of 1."""
        kept = getattr(torch, scheme.scale_dtype)
        zero, one = self.constant(0.0), self.constant(1.0)
        scale = self.op("Where", self.op("Greater", scale, zero), scale, one)
        smallest = torch.finfo(kept).smallest_normal * torch.finfo(kept).eps * 2
        scale = self.op("Max", scale, self.constant(smallest))
        if kept == torch.float32:
            return str(scale)
        narrow = (
            self.onnx.TensorProto.FLOAT16
            if kept == torch.float16
            else self.onnx.TensorProto.BFLOAT16
        )
        return self.cast(self.cast(scale, narrow), self.onnx.TensorProto.FLOAT)

    def _largest(self, low: str, high: str) -> str:
        return str(self.op("Max", self.op("Abs", low), self.op("Abs", high)))

    def _clip(self, x: str, low: float, high: float) -> str:
        return str(self.op("Clip", x, self.constant(low), self.constant(high)))

    def _symmetric_codes(self, x: str, scheme: Scheme) -> tuple[str, str]:
        """Signed codes as floats, and the scale."""
        format = scheme.format
        if not isinstance(format, Integer):
            raise TypeError("not an integer format")
        low, high = self._range(x, scheme)
        scale = self.op("Div", self._largest(low, high), self.constant(float(format.highest)))
        scale = self._stored(scale, scheme)
        lowest = -format.highest if format.narrow else -format.highest - 1
        codes = self.op("Round", self.op("Div", x, scale))
        return self._clip(codes, float(lowest), float(format.highest)), scale

    def _asymmetric(self, x: str, scheme: Scheme, format: Integer) -> str:
        low, high = self._range(x, scheme)
        top = float(2**format.bits - 1)
        if format.range == "zero":
            low = self.op("Min", low, self.constant(0.0))
            high = self.op("Max", high, self.constant(0.0))
        step = self.op("Div", self.op("Sub", high, low), self.constant(top))
        if format.range == "free":
            least = self.op("Div", self._largest(low, high), self.constant(float(MAX_ZERO_POINT)))
            step = self.op("Max", step, least)
        scale = self._stored(step, scheme)
        zero = self.op("Round", self.op("Div", self.op("Neg", low), scale))
        if format.range == "zero":
            zero = self._clip(zero, 0.0, top)
        codes = self.op("Add", self.op("Round", self.op("Div", x, scale)), zero)
        return str(self.op("Mul", self.op("Sub", self._clip(codes, 0.0, top), zero), scale))


def layer_reason(path: str, layer: QuantizedLinear) -> str | None:
    """Why a layer cannot be written, or None."""
    scheme, inputs = layer.weight_scheme, layer.input_scheme
    if scheme is not None and not isinstance(scheme.format, Integer):
        return f"{path} has {scheme.format.kind} codes, and MatMulNBits has integers. Quantize again to integers"
    if scheme is not None and scheme.granularity.kind == "group":
        size = scheme.granularity.size
        if size % _BLOCKS[-1] and size < layer.in_features:
            return (
                f"{path} has groups of {size}, and MatMulNBits has blocks that are multiples of {_BLOCKS[-1]}. "
                "Quantize again with a group of 32, 64 or 128"
            )
    if inputs is not None and not isinstance(inputs.format, Integer):
        return f"{path} rounds its input to {inputs.format.kind} codes. Quantize again to integers"
    return None


def _integer_product(scheme: Scheme, inputs: Scheme) -> bool:
    """Whether the product is one of symmetric 8-bit integers with one scale a row on both sides."""
    return all(
        isinstance(one.format, Integer)
        and one.format.bits == 8
        and one.format.symmetric
        and one.granularity.kind != "group"
        for one in (scheme, inputs)
    )


def _block(scheme: Scheme, width: int) -> int:
    """The size of a block of MatMulNBits: as large as the group allows."""
    if scheme.granularity.kind != "group" or scheme.granularity.size >= width:
        return next((size for size in _BLOCKS if size <= 128 and width % size == 0), 32)
    return next(size for size in _BLOCKS if scheme.granularity.size % size == 0)


def _spread(
    layer: QuantizedLinear, values: Tensor, scheme: Scheme, block: int, count: int
) -> Tensor:
    """``[out, groups]`` or ``[1]`` to ``[out, blocks]``."""
    values = values.cpu()
    if values.ndim == 1 or values.shape[1] == 1:
        return values.reshape(-1, 1).expand(layer.out_features, count).contiguous()
    return values.repeat_interleave(scheme.granularity.size // block, 1)[:, :count].contiguous()


def _matrix(transform: BlockHadamard) -> Tensor:
    """The matrix of a transform, fp32 ``[width, width]``, made in fp64."""
    eye = torch.eye(transform.width, dtype=torch.float64, device=transform.signs.device)
    return transform(eye).float().contiguous()
