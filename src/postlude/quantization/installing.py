"""Put quantized layers, and quantizers of keys and values, where a model has its linears and its attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from postlude.numerics.low_rank import BranchFormat
from postlude.numerics.schemes import Encoded
from postlude.quantization.quantizer import Quantizer
from postlude.quantization.rounded import Rounded
from postlude.surgery.anatomy import Block, LanguageBlock, LinearRef, Site
from postlude.surgery.batches import device_of
from postlude.surgery.key_values import KeyValueQuantizer, attach, use_rotating_attention
from postlude.surgery.layers import LowRankBranch, QuantizedLinear
from postlude.surgery.rewrite import replace_module
from postlude.surgery.transforms import InputScale

__all__ = ["attach_key_values", "install", "install_block"]


def attach_key_values(model: nn.Module, blocks: tuple[Block, ...], settings: Quantizer) -> None:
    """Give every attention module its schemes, keeping a rotation that a rewrite put there."""
    for block in blocks:
        if not isinstance(block, LanguageBlock):
            continue  # there is no cache
        schemes = settings.key_value_schemes(block)
        existing = getattr(model.get_submodule(block.attention), "key_values", None)
        rotation = existing.rotation if isinstance(existing, KeyValueQuantizer) else None
        if schemes == (None, None) and rotation is None:
            continue
        quantizer = KeyValueQuantizer(*schemes, rotation)
        quantizer.quantize = False
        attach(model, block.attention, quantizer)
        if rotation is not None:
            use_rotating_attention(model)


def install(
    model: nn.Module, path: str, settings: Quantizer, site: Site, rounded: Rounded | None
) -> None:
    """Put the layer of one linear in its place, where anything about it changes."""
    layer = _layer(model, path, settings, site, rounded)
    if layer is not None:
        replace_module(model, path, layer)


def install_block(
    model: nn.Module,
    block: Block,
    settings: Quantizer,
    statistics: Mapping[str, Tensor],
    done: Mapping[str, Tensor],
) -> None:
    """Put the layers of a finished block in place, from its stored unit."""
    for site in block.sites:
        if settings.skips(block, site, statistics):
            continue
        scheme = settings.weight_scheme(site)
        for path in site.modules:
            existing = model.get_submodule(path)
            if _is_rounded(existing):
                continue  # rounded in this process
            rounded = None
            if scheme is not None:
                device, inside = device_of(existing), f"{path}."
                parts = {
                    name.removeprefix(inside): part.to(device)
                    for name, part in done.items()
                    if name.startswith(inside)
                }
                rounded = Rounded.from_parts(parts, scheme, settings.branch_format)
            install(model, path, settings, site, rounded)


def _layer(
    model: nn.Module, path: str, settings: Quantizer, site: Site, rounded: Rounded | None
) -> QuantizedLinear | None:
    """The layer that takes a linear's place, or None where nothing about it changes."""
    old = model.get_submodule(path)
    weight, input = settings.weight_scheme(site), settings.input_scheme(site)
    transform = old.transform if isinstance(old, QuantizedLinear) else None
    if weight is None and input is None:
        return None
    branch = None
    if rounded is not None:
        device = rounded.main.codes.device
        if rounded.smoothing is not None:
            transform = InputScale(site.width, device)
            transform.factor.copy_(1 / rounded.smoothing.double())
        if rounded.up is not None and rounded.down is not None:
            branch = _branch(settings.branch_format, rounded.up, rounded.down, device)
    layer = QuantizedLinear.like(
        old, weight=weight, input=input, transform=transform, branch=branch
    )
    if rounded is not None:
        layer.store(rounded.main)
    else:
        layer.weight.data.copy_(LinearRef(path, site.readers[0].role).weight(model))
    for part in layer.modules():
        if isinstance(part, QuantizedLinear):
            part.quantize_input = False
    return layer


def _branch(
    format: BranchFormat | None,
    up: Encoded | Tensor,
    down: Encoded | Tensor,
    device: torch.device,
) -> LowRankBranch:
    if format is None:
        raise ValueError("a weight was given a branch by a method that names no format for it")
    a, b = (part if isinstance(part, Tensor) else part.codes for part in (up, down))
    branch = LowRankBranch(b.shape[1], a.shape[0], b.shape[0], format, device)
    branch.store(up, down)
    return branch


def _is_rounded(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLinear) and module.weight_scheme is not None
