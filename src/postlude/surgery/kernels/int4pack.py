"""``aten::_weight_int4pack_mm_for_cpu``: 4-bit weights read packed, activations and sums in bf16 / fp32.

The op computes ``x (s_g (q - 8) + o_g)``, with scale and offset in bf16 for every group of 32, 64, 128 or 256
inputs. Symmetric codes fit with ``o = 0``. Scales:

    channel, tensor     the op gets ones, its output is multiplied by the exact scale
    group               the scale is rounded to bf16 (relative error 2^-9, that of a weight in bf16)

An offset ``s (8 - z)`` in bf16 would lose whole steps where a zero point is far outside the codes, so it is added
apart: ``sum_g s_g (8 - z_g) sum_{k in g} x_k``, in fp32.

Inputs that do not fill the last group, and channels that do not fill the last block, are padded; padded inputs
are zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from postlude.surgery.kernels.kernel import Kernel, integer_format, rounding_cost
from postlude.surgery.kernels.layouts import Int4Pack, Layout, group_of, int4pack_block
from postlude.surgery.layers import QuantizedLinear

__all__ = ["Int4PackMatmul"]


class Int4PackMatmul(Kernel):
    """4-bit integer weights per group (multiples of 32), channel or tensor; bf16 on the CPU."""

    name = "int4pack"
    layouts = ("int4pack",)

    def takes(self, layer: QuantizedLinear, dtype: torch.dtype, device: torch.device) -> str | None:
        format_ = integer_format(layer)
        if format_ is None or format_.bits != 4:
            return "takes 4-bit integer weights"
        if device.type != "cpu":
            return f"runs on the CPU, the layer is on {device.type}"
        if dtype != torch.bfloat16:
            name = str(dtype).removeprefix("torch.")
            return f"takes bfloat16 activations; with {name} the op falls to a slow path"
        if not group_of(layer)[0]:
            return f"takes groups that are a multiple of 32, not {layer.weight_scheme.granularity}"  # type: ignore[union-attr]
        if int4pack_block() is None:
            return "PyTorch packs 4-bit weights in an unknown order on this machine"
        return None

    def cost(self, layer: QuantizedLinear, rows: int, layout: str) -> float:
        correction = 0.0
        if layer.zero_point is not None:
            correction = layer.scale.numel() * (0.4 + 0.05 * rows) + 20_000
        weights = layer.in_features * layer.out_features
        product = 15_000 + weights * (0.03 + 0.0125 * rows)
        return product + correction + rounding_cost(layer, rows)

    def prepare(self, layer: QuantizedLinear, weight: Layout) -> dict[str, Tensor]:
        size, width = group_of(layer)
        rows = layer.out_features + -layer.out_features % Int4Pack.step
        table = torch.zeros(width // size, rows, 2, dtype=torch.bfloat16)
        scheme = layer.weight_scheme
        if scheme is not None and scheme.granularity.kind == "group":
            group = torch.arange(width // size) * size // scheme.granularity.size
            table[:, : layer.out_features, 0] = layer.scale[:, group].T
        else:
            table[..., 0] = 1
        extras = {"scales_and_zeros": table}
        if layer.zero_point is not None:
            extras["offset"] = layer.scale.float() * (8 - layer.zero_point.float())
        return extras

    def run(
        self, layer: QuantizedLinear, x: Tensor, weight: Layout, extras: dict[str, Tensor]
    ) -> Tensor:
        if not isinstance(weight, Int4Pack) or layer.weight_scheme is None:
            raise TypeError("int4pack reads the layout int4pack")
        size, width = group_of(layer)
        x = layer.quantized_input(x)
        padded = pad(x, (0, width - layer.in_features)) if width > layer.in_features else x
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            padded.contiguous(), weight.weight, size, extras["scales_and_zeros"]
        )[:, : layer.out_features]
        grouped = layer.weight_scheme.granularity.kind == "group"
        if grouped and "offset" not in extras:
            return out if layer.bias is None else out + layer.bias
        out = out.float()
        if not grouped:
            out *= layer.scale.float().T if layer.scale.ndim == 2 else layer.scale.float()
        if "offset" in extras:
            out += group_sums(layer, x) @ _rows(extras["offset"]).T
        if layer.bias is not None:
            out += layer.bias
        return out.to(x.dtype)


def group_sums(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """Sums of ``x [rows, in_features]`` over the inputs that share a weight scale, in fp32 ``[rows, groups]``."""
    granularity = layer.weight_scheme.granularity if layer.weight_scheme else None
    size = granularity.size if granularity is not None else 0
    if not size:
        return x.sum(-1, keepdim=True, dtype=torch.float32)
    padded = pad(x.float(), (0, -layer.in_features % size))
    sums: Tensor = padded.unflatten(-1, (-1, size)).sum(-1)
    return sums


def _rows(offset: Tensor) -> Tensor:
    """``[out_features, groups]``; one scale of a whole tensor serves every channel."""
    return offset if offset.ndim == 2 else offset.unsqueeze(0)
