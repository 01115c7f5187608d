"""GGUF: one file for llama.cpp and everything built on it, tokenizer included.

Codes keep their bits wherever a block type of GGUF means the same, see :mod:`postlude.exporting.gguf_blocks`: any
integers per channel, per tensor or in groups that are multiples of 32, symmetric of 2 to 8 bits and asymmetric of 2 to
5. Layers that no type holds are refused, unless ``requantize`` names the type to round them to.

Names are llama.cpp's own (the tables of its ``gguf`` package). Its Llama rotates neighbouring entries of a head where
transformers rotates halves, so rows of Q and K are reordered for that architecture.

The check is transformers, which decodes the blocks: ``from_pretrained(folder, gguf_file=...)``. llama.cpp rounds
activations to 8 bits in blocks of 32, so its own logits differ from these by about that much.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from postlude.errors import (
    ArchitectureError,
    DataError,
    MissingDependencyError,
    SettingsError,
)
from postlude.exporting.engine import Exporter
from postlude.exporting.gguf_blocks import BLOCK, blocks, type_of
from postlude.exporting.gguf_tokenizer import tokenizer_fields
from postlude.exporting.plain import Plain, plain, refuse
from postlude.registry import method
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.selfcheck import compare_reload

__all__ = ["GGUF"]

# model_type: architecture in llama.cpp, and whether it rotates neighbours rather than halves of a head.
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_REQUANTIZE = ("none", "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
_INSTEAD = "Export a checkpoint made by rtn, gptq or smoothquant; a rotated one runs here (postlude generate)"

_LOAD = """
import json, torch
from transformers import AutoConfig, AutoModelForCausalLM
folder, name, unread = sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
config = AutoConfig.from_pretrained(folder, gguf_file=name, local_files_only=True)
for key, value in unread.items():
    setattr(config, key, value)
model = AutoModelForCausalLM.from_pretrained(
    folder, gguf_file=name, config=config, dtype=torch.float32, local_files_only=True
).eval()
def logits(tokens):
    return model(input_ids=torch.from_numpy(tokens), use_cache=False).logits.float().numpy()
"""


@method("export", "gguf", family="engine format")
@dataclasses.dataclass(frozen=True)
class GGUF(Exporter):
    """A file for llama.cpp, with the tokenizer.

    Attributes:
        floats: type of everything that is not a linear of a block, norms and biases excepted (fp32); ``auto`` is the
            model's own.
        requantize: type for linears in floating point and for those whose codes no type holds; ``none`` keeps the
            first as they are and refuses the second.
    """

    floats: Literal["auto", "f32", "f16", "bf16"] = "auto"
    requantize: Literal["none", "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] = (
        "none"
    )

    def __post_init__(self) -> None:
        if self.floats not in ("auto", *_FLOATS):
            raise SettingsError(f"floats is {self.floats!r}; expected auto, {', '.join(_FLOATS)}")
        if self.requantize not in _REQUANTIZE:
            raise SettingsError(
                f"requantize is {self.requantize!r}; expected {', '.join(_REQUANTIZE)}"
            )

    def write(self, checkpoint: Checkpoint, out: Path) -> dict[str, Any]:
        _ = checkpoint.language  # others are refused by what they are
        library = _library()
        config = checkpoint.model.config
        architecture, interleaved = _architecture(config)
        parts = plain(checkpoint, "GGUF", instead=_INSTEAD)
        if checkpoint.tokenizer is None:
            raise DataError(
                f"{checkpoint.path or 'this checkpoint'} has no tokenizer, and a GGUF file carries one; put its "
                "tokenizer files beside the weights"
            )
        vocabulary = checkpoint.model.get_input_embeddings().weight.shape[0]
        fields = tokenizer_fields(checkpoint.tokenizer, vocabulary)
        kept, rounded = self._plan(checkpoint, parts)

        writer = library.GGUFWriter(out, architecture)
        _add_config(writer, library, config, checkpoint, vocabulary)
        for name, value in fields.items():
            getattr(writer, name)(value)
        counts: dict[str, int] = {}
        names = library.get_tensor_name_map(
            next(key for key, name in library.MODEL_ARCH_NAMES.items() if name == architecture),
            len(checkpoint.language.blocks),
        )
        order = _row_orders(checkpoint) if interleaved else {}
        own = _own_float(checkpoint.model.dtype) if self.floats == "auto" else self.floats

        def add(name: str, data: Any, type: str) -> None:
            gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if gguf_name is None:
                raise ArchitectureError(
                    f"llama.cpp's {architecture} has no tensor for {name}; the model is not an ordinary "
                    f"{config.model_type}"
                )
            writer.add_tensor(
                gguf_name, data, raw_dtype=getattr(library.GGMLQuantizationType, type.upper())
            )

        for path, layer in parts.layers.items():
            rows = order.get(path)
            type = kept.get(path) or self.requantize
            data = (
                blocks(layer, type)
                if path in kept
                else _converted(library, layer.dense_weight(), type)
            )
            add(f"{path}.weight", data if rows is None else data[rows.numpy()], type)
            counts[type] = counts.get(type, 0) + 1
            if layer.bias is not None:
                bias = layer.bias.data.float().cpu()
                add(f"{path}.bias", (bias if rows is None else bias[rows]).numpy(), "f32")
        for name, tensor in parts.tensors.items():
            path = name.rpartition(".")[0]
            if name.endswith("rotary_emb.inv_freq"):
                continue
            rows = order.get(path)
            value = tensor if rows is None else tensor[rows.to(tensor.device)]
            type = "f32" if tensor.ndim == 1 else self.requantize if path in rounded else own
            add(name, _converted(library, value, type), type)
            if path in rounded:
                counts[type] = counts.get(type, 0) + 1
        frequencies = _frequency_factors(config, checkpoint)
        if frequencies is not None:
            writer.add_tensor("rope_freqs.weight", frequencies.numpy())
        largest = max(counts, key=lambda type: counts[type]) if counts else own
        writer.add_file_type(_file_type(library, largest))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return {"architecture": architecture, "types": counts, "floats": own}

    def _plan(self, checkpoint: Checkpoint, parts: Plain) -> tuple[dict[str, str], set[str]]:
        """Types of the layers whose codes are kept, and paths of the float linears to be rounded."""
        kept: dict[str, str] = {}
        reasons: list[str] = []
        widths = _widths(checkpoint)
        anew = "q8_0" if all(width % BLOCK == 0 for width in widths.values()) else "f16"
        for path, layer in parts.layers.items():
            type, reason = type_of(layer)
            if type is not None:
                kept[path] = type
            elif self.requantize == "none":
                reasons.append(
                    f"{path} {reason}. Quantize again, or round such layers anew with --set requantize={anew}"
                )
        rounded: set[str] = set()
        if self.requantize != "none":
            rounded = {path for path in checkpoint.language.linears() if path not in parts.layers}
            for path, width in widths.items():
                if path not in kept and self.requantize not in _FLOATS and width % BLOCK:
                    reasons.append(
                        f"{path} has {width} inputs, and blocks of {self.requantize} hold {BLOCK}. Use "
                        "--set requantize=f16"
                    )
        refuse("GGUF", reasons)
        return kept, rounded

    def check(self, checkpoint: Checkpoint, out: Path) -> dict[str, float]:
        if importlib.util.find_spec("accelerate") is None:
            raise MissingDependencyError(
                "transformers reads GGUF files with accelerate: pip install 'postlude[serve-formats]', or leave the "
                "check out (--no-check)"
            )
        config = checkpoint.model.config
        # What transformers does not read from a file of these architectures.
        unread = {
            name: getattr(config, name)
            for name in ("head_dim", "attention_bias", "mlp_bias")
            if getattr(config, name, None) is not None
        }
        if config.rope_parameters.get("rope_type", "default") != "default":
            unread["rope_parameters"] = dict(config.rope_parameters)
        requantized = self.requantize not in ("none", "f32") or self.floats in ("f16", "bf16")
        found = compare_reload(
            checkpoint.model,
            checkpoint.language,
            _LOAD,
            [str(out.parent), out.name, json.dumps(unread)],
            # Another rounding is another model on purpose; it is reported, and only nonsense is refused.
            tolerance=0.5 if requantized else 2e-3,
            what="the export to GGUF",
        )
        return {
            "reload_max_difference": found.max_difference,
            "reload_relative_difference": found.relative,
        }


def _converted(library: Any, tensor: Tensor, type: str) -> Any:
    """A float tensor in a GGUF type, as numpy."""
    value = tensor.detach().cpu()
    if type == "bf16":
        return value.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    if type in _FLOATS:
        return value.to(_FLOATS[type]).contiguous().numpy()
    return library.quantize(
        value.float().contiguous().numpy(), getattr(library.GGMLQuantizationType, type.upper())
    )


def _library() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise MissingDependencyError(
            "GGUF files are written with the package gguf: pip install 'postlude[serve-formats]'"
        ) from error


def _architecture(config: Any) -> tuple[str, bool]:
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ArchitectureError(
            f"the GGUF export does not know models of type {kind!r}; it knows {', '.join(ARCHITECTURES)}. "
            "llama.cpp's own convert_hf_to_gguf.py knows more, for float models."
        )
    activation = getattr(config, "hidden_act", "silu")
    if activation != "silu":
        raise ArchitectureError(
            f"this {kind} has the activation {activation!r}, and llama.cpp's has silu; it cannot be exported"
        )
    if getattr(config, "use_sliding_window", False):
        raise ArchitectureError(
            f"this {kind} uses a sliding window in some layers, which llama.cpp's {kind} does not"
        )
    rope = config.rope_parameters.get("rope_type", "default")
    if rope not in ("default", "linear", "llama3"):
        raise ArchitectureError(
            f"this {kind} stretches its context by {rope!r}; the GGUF export knows linear and llama3"
        )
    return ARCHITECTURES[kind]


def _add_config(
    writer: Any, library: Any, config: Any, checkpoint: Checkpoint, vocabulary: int
) -> None:
    heads = checkpoint.language.blocks[0].heads
    context = checkpoint.language.context
    window = getattr(config, "sliding_window", None)
    if window and config.model_type == "mistral":
        # llama.cpp attends to everything, which is the same as far as the window reaches.
        context = min(context, window)
    rope = config.rope_parameters
    name = checkpoint.path.name if checkpoint.path is not None else config.model_type
    writer.add_type("model")
    # transformers looks up an architecture of that name where a file is called "mistral", and there is none.
    writer.add_name(name.title() if name == "mistral" else name)
    writer.add_quantization_version(library.GGML_QUANT_VERSION)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(checkpoint.language.blocks))
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads.query)
    writer.add_head_count_kv(heads.key_value)
    writer.add_key_length(heads.size)
    writer.add_value_length(heads.size)
    writer.add_rope_dimension_count(heads.size)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(vocabulary)
    if rope.get("rope_type", "default") == "linear":
        writer.add_rope_scaling_type(library.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _frequency_factors(config: Any, checkpoint: Checkpoint) -> Tensor | None:
    """By what every rotary frequency is divided, fp32 ``[head size / 2]``; None where by nothing."""
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "llama3":
        return None
    size = checkpoint.language.blocks[0].heads.size
    plain_frequencies = rope["rope_theta"] ** (
        -torch.arange(0, size, 2, dtype=torch.float64) / size
    )
    stretched = checkpoint.model.get_submodule(f"{checkpoint.language.decoder}.rotary_emb").inv_freq
    return (plain_frequencies / stretched.double().cpu()).float()


def _row_orders(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """For every Q and K, the rows of the file by rows of the model."""
    orders = {}
    for block in checkpoint.language.blocks:
        heads = block.heads
        for role, count in (("query", heads.query), ("key", heads.key_value)):
            rows = torch.arange(count * heads.size).reshape(count, 2, heads.size // 2)
            orders[block.linear(role).module] = rows.transpose(1, 2).flatten()  # type: ignore[arg-type]
    return orders


def _widths(checkpoint: Checkpoint) -> dict[str, int]:
    return {path: site.width for _, site in checkpoint.language.sites() for path in site.modules}


def _own_float(dtype: torch.dtype) -> str:
    return next((name for name, known in _FLOATS.items() if known == dtype), "f32")


def _file_type(library: Any, type: str) -> int:
    name = "ALL_F32" if type == "f32" else f"MOSTLY_{type.upper()}"
    # K-types are named with a size, of which none fits exactly.
    names = library.LlamaFileType.__members__
    return int(names.get(name, names.get(f"{name}_S", library.LlamaFileType.GUESSED)))
