"""``aten::_weight_int4pack_mm_for_cpu``: 4-bit weights read packed, activations and sums in bf16 / fp32.

The op computes ``x (s_g (q - 8) + o_g)``, with scale and offset in bf16 for every group of 32, 64, 128 or 256
inputs. Symmetric codes fit with ``o = 0``. Scales:

    channel, tensor     the op gets ones, its output is multiplied by the exact scale
    group               the scale is rounded to bf16 (relative error 2^-9, that of a weight in bf16)

An offset ``s (8 - z)`` in bf16 would lose whole steps where a zero point is far outside the codes, so it is added
apart: ``sum_g s_g (8 - z_g) sum_{k in g} x_k``, in fp32.

The op costs as much for every further row, so from :data:`_MANY` rows on the codes are decoded to bf16, a few
million at a time, and multiplied by ``F.linear``'s own product. The op's rounding of scales holds there too:
``s (q - 8)`` is rounded once, to bf16, so a prompt and the tokens after it see weights that differ by no more.

Inputs that do not fill the last group, and channels that do not fill the last block, are padded; padded inputs
are zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from postlude.surgery.kernels.kernel import (
    Kernel,
    integer_format,
    no_cpu_op,
    rounded_input,
    rounding_cost,
)
from postlude.surgery.kernels.layouts import Int4Pack, Layout, group_of, int4pack_block
from postlude.surgery.layers import QuantizedLinear

__all__ = ["Int4PackMatmul"]

_MANY = 64
# Weights that are decoded at once. In tiles smaller than a layer their product is copied into place.
_WEIGHTS_AT_ONCE = 1 << 22


class Int4PackMatmul(Kernel):
    """4-bit integer weights per group (multiples of 32), channel or tensor; bf16 on the CPU."""

    name = "int4pack"
    layouts = ("int4pack",)

    def takes(self, layer: QuantizedLinear, dtype: torch.dtype, device: torch.device) -> str | None:
        format_ = integer_format(layer)
        if format_ is None or format_.bits != 4:
            return "takes 4-bit integer weights"
        if (reason := no_cpu_op(dtype, device)) is not None:
            return reason
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
        each = 0.03 + 0.0125 * rows if rows < _MANY else 0.5 + 0.0062 * rows
        product = 15_000 + weights * each
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
        x = rounded_input(layer, x)
        padded = pad(x, (0, width - layer.in_features)) if width > layer.in_features else x
        grouped = layer.weight_scheme.granularity.kind == "group"
        if len(x) < _MANY:
            out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
                padded.contiguous(), weight.weight, size, extras["scales_and_zeros"]
            )
        else:
            out = _many(padded, weight, extras["scales_and_zeros"] if grouped else None)
        out = out[:, : layer.out_features]
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


def _many(x: Tensor, weight: Int4Pack, table: Tensor | None) -> Tensor:
    """``x (s (q - 8))`` of every padded channel; scales from the table of the op, or ones."""
    rows, width = len(weight.weight), x.shape[1]
    step = max(_WEIGHTS_AT_ONCE // width // weight.step, 1) * weight.step
    if step >= rows:
        return x @ _decoded(weight, 0, rows, table)
    out = x.new_empty(len(x), rows)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        out[:, start:stop] = x @ _decoded(weight, start, stop, table)
    return out


def _decoded(weight: Int4Pack, start: int, stop: int, table: Tensor | None) -> Tensor:
    """bf16 ``[padded inputs, stop - start]``."""
    values = weight.transposed(start, stop).to(torch.bfloat16)
    if table is None:
        return values.sub_(8)
    scale = table[:, None, start:stop, 0].contiguous()
    grouped = values.unflatten(0, (len(scale), -1))
    # Eight scales are exact in bf16 and the sum is made in fp32: one rounding.
    return torch.addcmul(scale * -8, grouped, scale, out=grouped).flatten(0, 1)


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
