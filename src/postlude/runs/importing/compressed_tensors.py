"""compressed-tensors: the checkpoints of llm-compressor (``quant_method: compressed-tensors``).

Formats ``pack-quantized``, ``int-quantized``, ``float-quantized`` and ``naive-quantized``; see
:mod:`postlude.exporting.compressed_tensors` for their tensors. Which group of settings a layer belongs to is decided
as the library does: the first whose targets name it, match it as a regular expression, or name its class.

A checkpoint with a transform is refused rather than read without it: it would load, and be another model.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from postlude.errors import CheckpointError
from postlude.numerics.float8 import float8_codes, float8_e4m3fn
from postlude.numerics.formats import Format, Integer
from postlude.numerics.packing import pack
from postlude.numerics.schemes import Granularity, Scheme
from postlude.runs.importing.foreign import (
    Foreign,
    integer_layer,
    packed_along_rows,
    refuse,
    scale_dtype,
    unpack_words,
)
from postlude.surgery.layers import QuantizedLinear

__all__ = ["read_compressed_tensors"]

_NAME = "compressed-tensors"
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


def read_compressed_tensors(quantization: dict[str, Any], foreign: Foreign) -> None:
    """Read every quantized layer of the checkpoint.

    Raises:
        CheckpointError: a variant that is not known, or tensors that do not fit together.
    """
    if quantization.get("transform_config"):
        raise refuse(_NAME, "rotates or transforms activations (transform_config)")
    if quantization.get("kv_cache_scheme"):
        raise refuse(_NAME, "quantizes keys and values by scales of its own (kv_cache_scheme)")
    if quantization.get("sparsity_config"):
        raise refuse(_NAME, "is sparse (sparsity_config)")
    status = quantization.get("quantization_status", "compressed")
    if status != "compressed":
        raise refuse(_NAME, f"has the status {status!r} (expected compressed)")
    groups = list((quantization.get("config_groups") or {}).values())
    paths = foreign.paths("weight_scale")
    if not groups or not paths:
        raise CheckpointError(
            f"the configuration says {_NAME}, but names no group of settings or no layer has a weight_scale; the "
            "checkpoint is not whole"
        )
    for path in paths:
        group = _group_of(path, groups)
        _layer(foreign, path, group, group.get("format") or quantization.get("format"))


def _group_of(path: str, groups: list[Any]) -> dict[str, Any]:
    for matches in (_names, _is_class):
        for group in groups:
            if isinstance(group, dict) and any(
                matches(target, path) for target in group.get("targets", ())
            ):
                return group
    raise CheckpointError(
        f"{path} is quantized, but no group of the configuration names it; the configuration is of another checkpoint"
    )


def _names(target: str, path: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), path) is not None
    return target == path


def _is_class(target: str, path: str) -> bool:
    return target == "Linear"


def _layer(foreign: Foreign, path: str, group: dict[str, Any], format: Any) -> None:
    settings = group.get("weights")
    if not isinstance(settings, dict):
        raise refuse(_NAME, f"rounds the input of {path} and not its weight")
    if group.get("output_activations"):
        raise refuse(_NAME, f"rounds the output of {path}")
    if format not in _FORMATS:
        raise refuse(_NAME, f"stores {path} as {format!r} (expected {', '.join(_FORMATS)})")
    if settings.get("strategy") not in ("tensor", "channel", "group"):
        raise refuse(
            _NAME,
            f"shares the scales of {path} by {settings.get('strategy')!r} (expected channel or group)",
        )
    input = _input_scheme(path, group.get("input_activations"))
    if settings.get("type", "int") == "float":
        _float_layer(foreign, path, settings, input)
    else:
        _integer_layer(foreign, path, settings, format, input)


def _integer_layer(
    foreign: Foreign, path: str, settings: dict[str, Any], format: str, input: Scheme | None
) -> None:
    bits = settings.get("num_bits", 8)
    if bits not in (4, 8):
        raise refuse(_NAME, f"has {bits}-bit codes in {path} (expected 4 or 8)")
    half = 2 ** (bits - 1)
    if format == "pack-quantized":
        out, width = (int(n) for n in foreign.take(path, "weight_shape", (2,)))
        codes = packed_along_rows(foreign.take(path, "weight_packed"), bits, width)
    else:
        weight = foreign.take(path, "weight")
        if weight.dtype != torch.int8:
            raise refuse(_NAME, f"has {path}.weight as {weight.dtype} (expected int8)")
        out, width = weight.shape
        codes = pack((weight.to(torch.int16) + half).to(torch.uint8), bits)
    scale = _scale(foreign, path, out)
    zero = None
    if not settings.get("symmetric", True):
        zero = foreign.take(path, "weight_zero_point")
        if zero.dtype == torch.int32:
            zero = unpack_words(zero.T, bits, out).T.to(torch.int16)
        else:
            zero = zero.reshape(-1, 1).expand(out, 1) if zero.numel() == 1 else zero
            zero = zero.to(torch.int16) + half
    else:
        foreign.tensors.pop(f"{path}.weight_zero_point", None)
    groups_of = foreign.tensors.pop(f"{path}.weight_g_idx", None)
    integer_layer(
        foreign,
        path,
        codes,
        scale,
        zero,
        bits=bits,
        in_features=width,
        group=settings.get("group_size") or 0 if settings["strategy"] == "group" else 0,
        groups_of=groups_of,
        input=input,
    )


def _float_layer(
    foreign: Foreign, path: str, settings: dict[str, Any], input: Scheme | None
) -> None:
    weight = foreign.take(path, "weight")
    if weight.dtype != torch.float8_e4m3fn or settings["strategy"] == "group":
        raise refuse(
            _NAME,
            f"has {path} as {weight.dtype} per {settings['strategy']} (expected float8_e4m3fn per channel)",
        )
    scale = _scale(foreign, path, len(weight))
    if scale.shape != (len(weight), 1):
        raise CheckpointError(
            f"{path}.weight_scale has shape {tuple(scale.shape)}, expected {(len(weight), 1)}"
        )
    bias = f"{path}.bias" in foreign.tensors
    scheme = Scheme(float8_e4m3fn(), Granularity(), scale_dtype(scale, path))
    with torch.device("meta"):
        layer = QuantizedLinear(weight.shape[1], len(weight), bias=bias, weight=scheme, input=input)
    foreign.put(path, layer, {"codes": float8_codes(weight), "scale": scale})


def _scale(foreign: Foreign, path: str, out: int) -> Tensor:
    """``[out, groups]``; one scale for a whole tensor is given to every channel."""
    scale = foreign.take(path, "weight_scale")
    if scale.numel() == 1:
        scale = scale.reshape(1, 1).expand(out, 1)
    return scale


def _input_scheme(path: str, settings: Any) -> Scheme | None:
    if not settings:
        return None
    if settings.get("dynamic") is not True:
        raise refuse(
            _NAME,
            f"rounds the input of {path} by a stored scale (expected one per token, at run time)",
        )
    bits, symmetric = settings.get("num_bits", 8), settings.get("symmetric", True)
    format: Format
    if settings.get("type", "int") == "int":
        format = Integer(bits, symmetric=symmetric, range="zero")
    elif bits == 8 and symmetric:
        format = float8_e4m3fn()
    else:
        raise refuse(_NAME, f"rounds the input of {path} to floats of {bits} bits (expected 8)")
    strategy = settings.get("strategy")
    if strategy not in ("token", "tensor", "group"):
        raise refuse(_NAME, f"rounds the input of {path} per {strategy!r} (expected token)")
    size = settings.get("group_size") or 0
    granularity = Granularity("group", size) if strategy == "group" else Granularity(strategy)
    return Scheme(format, granularity, "float32")
