"""Postlude's checkpoint format in the tables of transformers.

``config.json`` carries, under ``quantization_config``, what every replaced module looks like; the weights file
carries codes, scales and the rest under the names of those modules. Loading builds the empty modules from the
description and lets transformers fill them, so ``AutoModelForCausalLM.from_pretrained`` works after
``import postlude``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from postlude.errors import CheckpointError
from postlude.surgery.key_values import ATTENTION, KeyValueQuantizer, attach, register_attention
from postlude.surgery.layers import QuantizedLinear
from postlude.surgery.rewrite import replace_module
from postlude.surgery.static_quantizers import (
    OPERANDS,
    AttentionOperands,
    attach_operands,
    register_operands,
)

__all__ = [
    "FORMAT_VERSION",
    "METHOD",
    "PostludeConfig",
    "PostludeQuantizer",
    "describe",
    "describe_linears",
    "mark",
    "register",
    "restore",
]

METHOD = "postlude"
FORMAT_VERSION = 1


def describe(model: nn.Module) -> dict[str, Any]:
    """Every module that is not what the architecture's own class would build.

    Equal descriptions are stored once: ``modules`` maps a path to an index into ``kinds``.
    """
    specs: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and module.factor:
            continue  # described with the layer that has the branch
        if isinstance(module, QuantizedLinear):
            specs[path] = {"module": "linear", **module.spec()}
        elif isinstance(module, KeyValueQuantizer):
            specs[path] = {"module": "key_values", **module.spec()}
        elif isinstance(module, AttentionOperands):
            specs[path] = {"module": "operands", **module.spec()}
        elif type(module) is nn.RMSNorm and not module.elementwise_affine:
            # One with a gain is the architecture's own.
            size, eps = module.normalized_shape[0], module.eps
            specs[path] = {"module": "rms_norm", "size": size, "eps": eps}
    embeddings_of = getattr(model, "get_output_embeddings", None)
    head = None if embeddings_of is None else embeddings_of()
    if isinstance(head, nn.Linear) and head.bias is not None:
        # No described architecture has one; folding the bias of a final LayerNorm makes one.
        path = next(path for path, module in model.named_modules() if module is head)
        specs[path] = {"module": "bias", "features": head.out_features}
    return _indexed(specs)


def describe_linears(specs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The description of a model whose only replaced modules are these layers, by their paths."""
    return _indexed({path: {"module": "linear", **spec} for path, spec in specs.items()})


def _indexed(specs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = []
    for spec in specs.values():
        if spec not in kinds:
            kinds.append(spec)
    return {"kinds": kinds, "modules": {path: kinds.index(spec) for path, spec in specs.items()}}


def _build(model: nn.Module, description: dict[str, Any], dtype: torch.dtype) -> None:
    """Put empty modules of that description into a model on the meta device."""
    for path, index in description["modules"].items():
        spec = dict(description["kinds"][index])
        kind = spec.pop("module")
        if kind == "linear":
            replace_module(model, path, QuantizedLinear.from_spec(spec, dtype, "meta"))
            # Everything is in the file; GPT-2 would draw weights for projections that now hold codes.
            cast(Any, model.get_submodule(path.rpartition(".")[0]))._is_hf_initialized = True
        elif kind == "key_values":
            attach(model, path.rpartition(".")[0], KeyValueQuantizer.from_spec(spec, "meta"))
        elif kind == "operands":
            operands = AttentionOperands.from_spec(spec, "meta")
            attach_operands(model, path.rpartition(".")[0], operands)
        elif kind == "rms_norm":
            norm = nn.RMSNorm(spec["size"], eps=spec["eps"], elementwise_affine=False)
            replace_module(model, path, norm)
        elif kind == "bias":
            empty = torch.empty(spec["features"], dtype=dtype, device="meta")
            cast(Any, model.get_submodule(path)).bias = nn.Parameter(empty, requires_grad=False)
        else:
            raise CheckpointError(
                f"{path} is described as {kind!r}, which this version of Postlude does not know; "
                "load the checkpoint with the version that wrote it"
            )


class PostludeConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a checkpoint that Postlude wrote.

    Args:
        format_version: of this layout; another one is refused.
        description: see :func:`describe`.
        made_by: method, settings, seed and version that made the checkpoint.
    """

    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        description: dict[str, Any] | None = None,
        made_by: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint has Postlude format version {format_version}, this installation reads "
                f"version {FORMAT_VERSION}; install a matching version, or quantize again"
            )
        self.quant_method = METHOD
        self.format_version = format_version
        self.description = description or {"kinds": [], "modules": {}}
        self.made_by = made_by or {}

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": METHOD,
            "format_version": self.format_version,
            "made_by": self.made_by,
            "description": self.description,
        }

    @property
    def kinds(self) -> list[dict[str, Any]]:
        """Every different description of a module."""
        return list(self.description["kinds"])

    @property
    def rotates_keys(self) -> bool:
        """Whether attention must run through the function that rotates queries."""
        return any(kind.get("rotation") for kind in self.kinds)


class PostludeQuantizer(HfQuantizer):
    """Builds the modules that a Postlude checkpoint fills."""

    requires_calibration = True
    quantization_config: PostludeConfig

    def update_attn_implementation(self, config: Any) -> Any:
        if self.quantization_config.rotates_keys:
            register_attention()
            config._attn_implementation = ATTENTION
        elif any(kind["module"] == "operands" for kind in self.quantization_config.kinds):
            register_operands()
            config._attn_implementation = OPERANDS
        return config

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = cast(Any, model.config)
        _build(model, self.quantization_config.description, config.dtype or torch.float32)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        # Adapters beside the codes are; the codes are buffers, which no optimiser sees.
        return True


def mark(model: nn.Module, made_by: dict[str, Any]) -> None:
    """Write into a model's configuration that it is in Postlude's format, so that it saves itself as such."""
    config = PostludeConfig(description=describe(model), made_by=made_by)
    owner = cast(Any, model)
    if hasattr(owner, "register_to_config"):  # a model of diffusers
        owner.register_to_config(quantization_config=config.to_dict())
        return
    owner.config.quantization_config = config
    owner.hf_quantizer = PostludeQuantizer(config)
    owner.is_quantized = True


def restore(model: nn.Module, quantization: dict[str, Any], dtype: torch.dtype) -> None:
    """Give a float model of diffusers, its parameters on the meta device, the layers of a quantized one.

    Args:
        quantization: the ``quantization_config`` of its configuration.
        dtype: of parameters that stay in floating point.

    Raises:
        CheckpointError: of another version, or a layer of a kind that is not known.
    """
    config = PostludeConfig(**{k: v for k, v in quantization.items() if k != "quant_method"})
    _build(model, config.description, dtype)
    cast(Any, model).register_to_config(quantization_config=config.to_dict())


def register() -> None:
    """Add the format to transformers' quantizer tables; calling it again changes nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(PostludeConfig)
        register_quantizer(METHOD)(PostludeQuantizer)
