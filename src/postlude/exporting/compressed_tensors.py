"""compressed-tensors: the checkpoints of llm-compressor, read by vLLM, SGLang and transformers.

A quantized linear becomes, under its own path ([out, in] is the weight's shape)::

    pack-quantized     weight_packed      int32 [out, ceil(in bits / 32)], codes side by side, low bits first
                       weight_scale       [out, groups], in the model's type
                       weight_zero_point  int32 [ceil(out bits / 32), groups], packed down the column
                       weight_shape       int64 [2]
    int-quantized      weight             int8 [out, in];  weight_scale [out, 1]
    float-quantized    weight             float8_e4m3fn [out, in];  weight_scale [out, 1]

Codes keep their bits: what is packed here is unsigned with the offset ``2^(bits-1)``, which is how Postlude stores
it. One scale for a whole tensor is written once per channel, which every reader takes.

Readers multiply in the type of the scale, so a scale has to fit the model's type: fp16 scales do not fit bf16.
``dtype="auto"`` then writes the model in fp16 if its floats survive that, else in fp32, and says so.

Activations rounded at run time are a promise, not data: the reader rounds them its own way (transformers divides by
127.5 where vLLM and Postlude divide by 127). So the check compares weights with the rounding switched off on both
sides, and the difference with rounding is reported beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from postlude.errors import SettingsError
from postlude.exporting.engine import Exporter
from postlude.exporting.plain import Plain, plain, refuse
from postlude.numerics.float8 import float8_e4m3fn
from postlude.numerics.formats import Format, Integer
from postlude.numerics.packing import pack, unpack
from postlude.numerics.schemes import Scheme
from postlude.registry import method
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.quiet import quiet_transformers
from postlude.runs.selfcheck import compare_reload
from postlude.surgery.layers import QuantizedLinear

__all__ = ["CompressedTensors"]

_NAME = "compressed-tensors"
_INSTEAD = (
    "Export a checkpoint made by rtn, gptq or smoothquant; a rotated one runs here (postlude generate) "
    "and in ONNX Runtime (--to onnx)"
)
_DTYPES = ("float16", "bfloat16", "float32")

_LOAD = """
import json, torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
settings = json.load(open(sys.argv[2] + "/config.json")).get("quantization_config", {})
asymmetric = any(not group["weights"]["symmetric"] for group in settings.get("config_groups", {}).values())
# Packed zero points do not fit the parameters that transformers makes for them before it decompresses at leisure.
how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if asymmetric else {}
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype="float32", local_files_only=True, **how).eval()
def logits(tokens):
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_enabled = sys.argv[3] == "rounded"
    return model(input_ids=torch.from_numpy(tokens), use_cache=False).logits.float().numpy()
"""


@method("export", _NAME, family="engine format")
@dataclasses.dataclass(frozen=True)
class CompressedTensors(Exporter):
    """A directory for vLLM, SGLang and transformers, with packed weights.

    Attributes:
        dtype: of scales and of everything that is not quantized; ``auto`` is the model's own where it holds the
            scales exactly.
    """

    marker: ClassVar[str | None] = "config.json"

    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *_DTYPES):
            raise SettingsError(f"dtype is {self.dtype!r}; expected auto, {', '.join(_DTYPES)}")

    def write(self, checkpoint: Checkpoint, out: Path) -> dict[str, Any]:
        family = checkpoint.language.family
        parts = plain(checkpoint, _NAME, instead=_INSTEAD)
        if family == "gpt2":
            refuse(_NAME, ["the layers of GPT-2 are Conv1D, which its readers do not look for."])
        groups = _groups(parts)
        dtype = self._dtype(checkpoint.model.dtype, parts)
        tensors = {
            name: t.to(dtype) if t.is_floating_point() else t for name, t in parts.tensors.items()
        }
        for path, layer in parts.layers.items():
            tensors |= {f"{path}.{name}": t for name, t in _layer(layer, dtype).items()}
        _save(tensors, out)
        _save_config(parts, groups, checkpoint, dtype, out)
        return {
            "dtype": str(dtype).removeprefix("torch."),
            "formats": sorted({group["format"] for group in groups}),
            "layers": len(parts.layers),
        }

    def _dtype(self, own: torch.dtype, parts: Plain) -> torch.dtype:
        """The type to write, which holds every scale exactly."""
        scales = [layer.scale for layer in parts.layers.values()]
        if self.dtype != "auto":
            chosen: torch.dtype = getattr(torch, self.dtype)
            if not _exact(scales, chosen):
                raise SettingsError(
                    f"{_NAME} readers keep scales in the model's type, and these do not fit {self.dtype} exactly; "
                    "use dtype=auto, float16 or float32"
                )
            return chosen
        candidates = [own, torch.float16, torch.float32]
        floats = [t for t in parts.tensors.values() if t.is_floating_point()]
        floats += [layer.bias for layer in parts.layers.values() if layer.bias is not None]
        return next(
            dtype for dtype in candidates if _exact(scales, dtype) and _close(floats, dtype)
        )

    def check(self, checkpoint: Checkpoint, out: Path) -> dict[str, float]:
        model, anatomy = checkpoint.model, checkpoint.language
        what = f"the export to {_NAME}"
        with _rounding_off(model):
            found = compare_reload(model, anatomy, _LOAD, [str(out), "weights"], what=what)
        report = {"reload_max_difference": found.max_difference}
        if any(isinstance(m, QuantizedLinear) and m.input_scheme for m in model.modules()):
            arguments = [str(out), "rounded"]
            found = compare_reload(model, anatomy, _LOAD, arguments, tolerance=math.inf, what=what)
            report["rounded_activations_max_difference"] = found.max_difference
        return report


def _as_words(packed: Tensor) -> Tensor:
    """``uint8 [rows, bytes]`` as ``int32 [rows, words]``, filled with zeros."""
    rows, width = packed.shape
    filled = torch.zeros(rows, width + -width % 4, dtype=torch.uint8, device=packed.device)
    filled[:, :width] = packed
    return filled.view(torch.int32)


def _groups(parts: Plain) -> list[dict[str, Any]]:
    """One config group for every kind of layer, with the paths it holds under ``targets``."""
    reasons: list[str] = []
    groups: list[dict[str, Any]] = []
    for path, layer in parts.layers.items():
        reason = _reason(layer)
        if reason:
            reasons.append(f"{path} {reason}")
            continue
        arguments = _arguments(layer)
        same = next(
            (g for g in groups if {**g, "targets": []} == {**arguments, "targets": []}), None
        )
        if same is None:
            groups.append({**arguments, "targets": [path]})
        else:
            same["targets"].append(path)
    refuse(_NAME, reasons)
    return groups


def _reason(layer: QuantizedLinear) -> str | None:
    """Why the format, or everything that reads it, has no place for a layer."""
    scheme, inputs = layer.weight_scheme, layer.input_scheme
    if scheme is None:
        return "rounds its input and keeps its weight in floating point; quantize weights as well"
    kind, size = scheme.granularity.kind, scheme.granularity.size
    if kind == "group" and layer.in_features % size:
        return (
            f"has {layer.in_features} inputs, which groups of {size} do not divide; quantize again with a group "
            "that does, or --group channel"
        )
    if not isinstance(scheme.format, Integer):
        if not _is_float8(scheme.format):
            return f"has {scheme.format.kind} codes that float8_e4m3fn does not hold; quantize again to integers"
        if kind == "group":
            return "has float8 weights in groups, which no reader takes; quantize again per channel"
    elif not scheme.format.symmetric and scheme.format.range == "free":
        return (
            "has zero points outside its codes (16 bits), where the format packs them in the bits of a code; "
            "quantize again with symmetric weights"
        )
    elif inputs is None and scheme.format.bits not in (4, 8):
        return f"has {scheme.format.bits}-bit weights; readers take 4 and 8 bits. Quantize again to one of them"
    if inputs is None:
        return None
    return _input_reason(scheme, inputs)


def _input_reason(scheme: Scheme, inputs: Scheme) -> str | None:
    if isinstance(scheme.format, Integer):
        whole = scheme.format.symmetric and scheme.format.bits == 8
        if not whole or scheme.granularity.kind == "group":
            return (
                f"multiplies {scheme.format.bits}-bit weights per {scheme.granularity} with rounded activations; "
                "readers take symmetric 8-bit weights per channel there. Quantize again as w8a8kv16, or leave "
                "activations alone (w4a16kv16)"
            )
        fits = (
            isinstance(inputs.format, Integer)
            and inputs.format.bits == 8
            and inputs.format.symmetric
        )
        expected = "symmetric 8 bits"
    else:
        fits = _is_float8(inputs.format) and max(inputs.format.levels()) == 448  # type: ignore[attr-defined]
        expected = "float8_e4m3fn"
    if fits and inputs.granularity.kind == "token" and inputs.clip == 1:
        return None
    return (
        f"rounds its input to {inputs.format.kind} of {inputs.format.code_bits} bits per {inputs.granularity}, "
        f"clipped at {inputs.clip:g}; readers take {expected} per token, unclipped. Quantize again as w8a8kv16, or "
        "leave activations alone (w4a16kv16)"
    )


def _is_float8(format: Format) -> bool:
    levels = getattr(format, "levels", None)
    return levels is not None and set(levels()) <= set(float8_e4m3fn().levels())


def _arguments(layer: QuantizedLinear) -> dict[str, Any]:
    scheme = layer.weight_scheme
    if scheme is None:
        raise TypeError("a layer without a weight scheme was not refused")
    integer = isinstance(scheme.format, Integer)
    grouped = scheme.granularity.kind == "group"
    weights = {
        "num_bits": scheme.format.bits if isinstance(scheme.format, Integer) else 8,
        "type": "int" if integer else "float",
        "symmetric": not scheme.format.zero_point_bits,
        "strategy": "group" if grouped else "channel",
        "group_size": scheme.granularity.size if grouped else None,
        "dynamic": False,
        "observer": "minmax",
    }
    inputs = None
    if layer.input_scheme is not None:
        inputs = {
            "num_bits": 8,
            "type": "int" if integer else "float",
            "symmetric": True,
            "strategy": "token",
            "group_size": None,
            "dynamic": True,
        }
    return {"weights": weights, "input_activations": inputs, "output_activations": None} | {
        "format": _format(integer, inputs is not None)
    }


def _format(integer: bool, inputs: bool) -> str:
    if integer:
        return "int-quantized" if inputs else "pack-quantized"
    return "float-quantized" if inputs else "naive-quantized"


def _layer(layer: QuantizedLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one layer, by their local names."""
    scheme = layer.weight_scheme
    if scheme is None:
        raise TypeError("a layer without a weight scheme was not refused")
    scale = layer.scale.to(dtype)
    if scheme.granularity.kind == "tensor":
        scale = scale.expand(layer.out_features, 1)
    out: dict[str, Tensor] = {"weight_scale": scale.contiguous()}
    if layer.bias is not None:
        out["bias"] = layer.bias.data.to(dtype)
    bits = scheme.format.code_bits
    if not isinstance(scheme.format, Integer):
        codes = unpack(layer.codes, bits, layer.in_features)
        levels = torch.tensor(scheme.format.levels(), device=codes.device)  # type: ignore[attr-defined]
        out["weight"] = levels[codes.long()].to(torch.float8_e4m3fn)
    elif layer.input_scheme is not None:
        out["weight"] = (layer.codes.to(torch.int16) - 128).to(torch.int8)
    else:
        out["weight_packed"] = _as_words(layer.codes)
        out["weight_shape"] = torch.tensor([layer.out_features, layer.in_features])
        if layer.zero_point is not None:
            zero = layer.zero_point
            if scheme.granularity.kind == "tensor":
                zero = zero.expand(layer.out_features, 1)
            out["weight_zero_point"] = _as_words(pack(zero.T.contiguous(), bits)).T.contiguous()
    return out


def _parts(tensors: list[Tensor]) -> Iterator[Tensor]:
    """Slices of 16 M entries, so that no second model is in memory."""
    for tensor in tensors:
        yield from tensor.detach().reshape(-1).split(1 << 24)


def _exact(tensors: list[Tensor], dtype: torch.dtype) -> bool:
    return all(bool((part.to(dtype).double() == part.double()).all()) for part in _parts(tensors))


def _close(tensors: list[Tensor], dtype: torch.dtype) -> bool:
    """Whether the error of a cast is far below that of bf16; entries near zero lose digits in fp16."""
    for part in _parts(tensors):
        exact = part.double()
        error = (part.to(dtype).double() - exact).abs().max()
        if not bool(error <= exact.square().mean().sqrt() / 4096):
            return False
    return True


def _save(tensors: dict[str, Tensor], out: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    whole = {}
    for name, tensor in tensors.items():
        kept = tensor.detach().cpu().contiguous()
        # A view of a larger tensor would be taken for a shared one.
        view = kept.untyped_storage().nbytes() > kept.nbytes
        whole[name] = kept.clone() if view else kept
    save_torch_state_dict(whole, out, metadata={"format": "pt"})


def _save_config(
    parts: Plain,
    groups: list[dict[str, Any]],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    out: Path,
) -> None:
    model = checkpoint.model
    parts.config.dtype = dtype
    parts.config.architectures = [type(model).__name__]
    with quiet_transformers():
        parts.config.save_pretrained(out)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(out)
        if checkpoint.tokenizer is not None:
            checkpoint.tokenizer.save_pretrained(out)
    if not groups:
        return
    formats = sorted({group["format"] for group in groups})
    ignored = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path not in parts.layers
    ]
    if len(groups) == 1:
        groups = [{**groups[0], "targets": ["Linear"]}]
    file = out / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": _NAME,
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups)},
        "ignore": ignored,
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": importlib.metadata.version(_NAME),
    }
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _rounding_off(model: nn.Module) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    before = [layer.quantize_input for layer in layers]
    try:
        for layer in layers:
            layer.quantize_input = False
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.quantize_input = old
