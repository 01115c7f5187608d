"""Which kernel computes which layer.

A layer keeps its weight in one layout, and every kernel that reads this layout may compute it: the cheapest for
the number of rows at hand is taken at every call, so prefill and decode can differ. The layout is the one in
which a prompt of 512 tokens followed by 256 single ones is estimated cheapest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from postlude.errors import SettingsError, UnknownNameError
from postlude.surgery.kernels.dense import Dense
from postlude.surgery.kernels.int4pack import Int4PackMatmul
from postlude.surgery.kernels.int8pack import Int8PackMatmul
from postlude.surgery.kernels.integer import IntegerMatmul
from postlude.surgery.kernels.kernel import Kernel
from postlude.surgery.kernels.layouts import LAYOUTS, Layout
from postlude.surgery.kernels.pages import FilePages
from postlude.surgery.kernels.simulate import Simulate
from postlude.surgery.kernels.tiled import Tiled
from postlude.surgery.kernels.triton_integer import TritonInteger
from postlude.surgery.kernels.triton_packed import TritonPacked
from postlude.surgery.layers import QuantizedLinear
from postlude.surgery.static_quantizers import StaticQuantizer

__all__ = [
    "AUTO",
    "DECODE",
    "KERNELS",
    "PREFILL",
    "Assignment",
    "assign",
    "assignments",
    "extra_bytes",
    "use",
]

AUTO = "auto"
DECODE, PREFILL = 1, 512
# Single tokens for every prompt of PREFILL tokens, when layouts are compared.
_DECODED = 256

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Int4PackMatmul(),
        Int8PackMatmul(),
        IntegerMatmul(),
        TritonPacked(),
        TritonInteger(),
        Dense(),
        Tiled(),
        Simulate(),
    )
}


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What computes one layer, and why nothing else does.

    Attributes:
        layer: its path in the model.
        weight, input: how they are quantized.
        layout: the order its codes are kept in.
        decode, prefill: kernel for one row, and for 512.
        refused: of every kernel that cannot compute it, the reason.
        kernels: every kernel that may compute it, the cheapest taken at each call.
    """

    layer: str
    weight: str
    input: str
    layout: str
    decode: str
    prefill: str
    refused: dict[str, str]
    kernels: tuple[str, ...]

    @property
    def simulated(self) -> bool:
        """Whether no kernel but the reference computes it."""
        return self.kernels == (Simulate.name,)


class _Execution:
    """The kernels of one layer; see :class:`postlude.surgery.layers.Execution`."""

    def __init__(
        self, kernels: tuple[Kernel, ...], layout: Layout, dtype: torch.dtype, wanted: str
    ) -> None:
        self.kernels, self.layout, self.dtype, self.wanted = kernels, layout, dtype, wanted
        self._extras: dict[str, dict[str, Tensor]] = {}
        self._by_rows: dict[int, Kernel] = {}

    def run(self, layer: QuantizedLinear, x: Tensor) -> Tensor:
        if x.dtype != self.dtype:
            raise SettingsError(
                f"kernels were chosen for {self.dtype} activations and got {x.dtype}: call "
                "postlude.surgery.kernels.use again after casting, without autocast"
            )
        if torch.is_grad_enabled() and x.requires_grad:
            raise SettingsError(
                "kernels compute no gradients: call postlude.surgery.kernels.use(model, "
                '"simulate"), or run under torch.no_grad()'
            )
        flat = x.reshape(-1, layer.in_features)
        rows = len(flat)
        if not rows:
            return x.new_empty(*x.shape[:-1], layer.out_features)
        kernel = self._by_rows.get(rows)
        if kernel is None:
            kernel = _cheapest(self.kernels, layer, rows, self.layout.name)
            self._by_rows[rows] = kernel
        if kernel.name not in self._extras:
            self._extras[kernel.name] = kernel.prepare(layer, self.layout)
        out = kernel.run(layer, flat, self.layout, self._extras[kernel.name])
        return out.reshape(*x.shape[:-1], layer.out_features)

    def codes(self, layer: QuantizedLinear) -> Tensor:
        return self.layout.codes(layer)

    def keeps_codes(self) -> bool:
        return self.layout.keeps_codes

    def nbytes(self) -> int:
        """Bytes beyond the layer's own buffers."""
        extras = [part for parts in self._extras.values() for part in parts.values()]
        return self.layout.nbytes + sum(part.nbytes for part in extras)


def _cheapest(kernels: Iterable[Kernel], layer: QuantizedLinear, rows: int, layout: str) -> Kernel:
    return min(kernels, key=lambda kernel: kernel.cost(layer, rows, layout))


def _check_name(name: str) -> None:
    if name != AUTO and name not in KERNELS:
        raise UnknownNameError("kernel", name, [AUTO, *KERNELS])


def assign(
    path: str,
    layer: QuantizedLinear,
    name: str = AUTO,
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> Assignment:
    """Choose kernels for one layer; changes nothing.

    Args:
        path: what to call the layer.
        layer: it must be in its stored layout.
        name: ``"auto"``, or the one kernel to run on where it takes the layer, ``simulate`` elsewhere.
        dtype: of the activations.
        device: where the layer is; its own when None.
    """
    _check_name(name)
    place = layer.scale.device if layer.weight_scheme is not None else layer.weight.device
    refused: dict[str, str] = {}
    able: list[Kernel] = []
    for kernel in KERNELS.values():
        reason = kernel.takes(layer, dtype, device or place)
        if reason is None:
            able.append(kernel)
        else:
            refused[kernel.name] = reason
    if name != AUTO:
        able = [one for one in able if one.name == name] or [KERNELS[Simulate.name]]
    options = {
        layout: [kernel for kernel in able if layout in kernel.layouts]
        for layout, kind in LAYOUTS.items()
        if kind.takes(layer)
    }
    # Codes of 8 bits are always read as int8 where arithmetic is on integers.
    if "int8" in options:
        options["stored"] = [one for one in options["stored"] if one.name != IntegerMatmul.name]
    options = {layout: kernels for layout, kernels in options.items() if kernels}

    def total(layout: str) -> float:
        return sum(
            share * min(kernel.cost(layer, rows, layout) for kernel in options[layout])
            for rows, share in ((DECODE, _DECODED), (PREFILL, 1))
        )

    layout = min(options, key=total)
    chosen = options[layout]
    return Assignment(
        layer=path,
        weight=_show(layer.weight_scheme),
        input=_input(layer),
        layout=layout,
        decode=_cheapest(chosen, layer, DECODE, layout).name,
        prefill=_cheapest(chosen, layer, PREFILL, layout).name,
        refused=refused,
        kernels=tuple(kernel.name for kernel in chosen),
    )


def _input(layer: QuantizedLinear) -> str:
    if isinstance(layer.transform, StaticQuantizer):
        grid = layer.transform.grid
        return f"{grid.kind} {grid.bits} bits, static"
    return _show(layer.input_scheme)


def _show(scheme: Any) -> str:
    if scheme is None:
        return "float"
    form = scheme.format
    name = "int" if form.kind == "integer" else form.kind
    words = f"{name}{form.code_bits}"
    if form.zero_point_bits:
        words += " asymmetric"
    return f"{words} {scheme.granularity}"


def assignments(
    model: nn.Module, name: str = AUTO, dtype: torch.dtype | None = None
) -> list[Assignment]:
    """What :func:`use` would do, layer by layer.

    Raises:
        UnknownNameError: no kernel of that name.
    """
    _check_name(name)
    kind = _dtype(model) if dtype is None else dtype
    return [assign(path, layer, name, dtype=kind) for path, layer in _layers(model)]


def use(model: nn.Module, name: str = AUTO) -> list[Assignment]:
    """Run the quantized layers of a model on kernels, until called again with another name.

    Layers whose codes lie in another order meanwhile give up the stored ones, so a weight is held once;
    ``state_dict`` and ``save`` still see what was stored. Such a model cannot be moved or cast, and computes no
    gradients.

    Args:
        model: its activations have the type of its parameters.
        name: ``"auto"`` for the cheapest, ``"simulate"`` for the reference, or one kernel of :data:`KERNELS`.

    Returns:
        One entry a layer. Where a kernel refuses a layer, the entry says why; where all do, or the one asked
        for does, the layer is simulated and the entry says that.

    Raises:
        UnknownNameError: no kernel of that name.
        SettingsError: not a single layer can run on the kernel asked for.
    """
    _check_name(name)
    _restore(model)
    if name == Simulate.name:
        return assignments(model, name)
    kind = _dtype(model)
    found = assignments(model, name)
    if found and name != AUTO and all(one.simulated for one in found):
        reasons = sorted({one.refused[name] for one in found})
        raise SettingsError(f"kernel {name} takes no layer of this model: it {'; '.join(reasons)}")
    by_path = {one.layer: one for one in found}
    files = FilePages()
    for path, layer in _layers(model):
        chosen = by_path[path]
        if chosen.simulated:
            continue
        layout = LAYOUTS[chosen.layout](layer)
        if not layout.keeps_codes:
            files.release(layer.codes)
            del layer.codes
        kernels = tuple(KERNELS[one] for one in chosen.kernels)
        layer.execution = _Execution(kernels, layout, kind, name)
    return found


def extra_bytes(model: nn.Module) -> int:
    """Bytes that kernels keep beside the buffers of the model."""
    plans = [layer.execution for _, layer in _layers(model)]
    return sum(plan.nbytes() for plan in plans if isinstance(plan, _Execution))


def _restore(model: nn.Module) -> None:
    """Back to the simulation, every layer with its stored codes."""
    for _, layer in _layers(model):
        plan = layer.execution
        if plan is None:
            continue
        codes = None if plan.keeps_codes() else layer.codes
        layer.execution = None
        if codes is not None:
            layer.register_buffer("codes", codes)


def _layers(model: nn.Module) -> list[tuple[str, QuantizedLinear]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]


def _dtype(model: nn.Module) -> torch.dtype:
    """Type of the activations: that of the first floating-point parameter."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.get_default_dtype()
