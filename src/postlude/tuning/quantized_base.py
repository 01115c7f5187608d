"""Adapters beside quantized layers, whose codes cannot be trained: LoRA, and how it becomes part of the model.

A layer computes ``Q x + s B A x``: codes stay as they are, the two factors are trained (QLoRA, arXiv:2305.14314). Its
reference for rules that read one is the same model with the adapter off, which takes no further memory.

Merging cannot add ``s B A`` to codes without rounding it away. It becomes the low-rank branch of the layer instead
(``W = Q + A B``, as the quantizers with a branch store it), in float16: the result is a quantized checkpoint like any
other. A layer with an online transform ``x -> T x`` has a branch that reads ``T x``, so ``A`` goes through it too.

Layers that round their input are refused: no gradient passes a rounding. So are other adapters than LoRA, and layers
that have a branch already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.low_rank import BranchFormat
from postlude.surgery.key_values import KeyValueQuantizer
from postlude.surgery.layers import LowRankBranch, QuantizedLinear, quantized_linears
from postlude.surgery.rewrite import replace_module
from postlude.surgery.transforms import InputScale

__all__ = ["check_adaptable", "is_quantized", "prepare", "to_branches"]

_HALF = BranchFormat()


def is_quantized(model: Any) -> bool:
    """Whether a model holds codes."""
    return any(isinstance(one, QuantizedLinear) for one in model.modules())


def check_adaptable(model: Any, adapter: str) -> None:
    """Refuse a quantized model that no adapter can be trained beside.

    Raises:
        SettingsError: another adapter than LoRA, inputs or a cache that are rounded, or layers with a branch.
    """
    if adapter != "lora":
        raise SettingsError(
            f"the adapter {adapter} changes weights, and those of a quantized model are codes; beside codes only lora "
            "can be trained (--adapter lora)."
        )
    for path, layer in quantized_linears(model):
        if layer.input_scheme is not None:
            raise SettingsError(
                f"{path} rounds its input to {layer.input_scheme.format.code_bits} bits, and no gradient passes a "
                "rounding. Quantize weights only (--bits w4), or tune the float model and quantize the result."
            )
        if layer.branch is not None:
            raise SettingsError(
                f"{path} has a low-rank branch already, and a layer has one; quantize without, or tune the float model "
                "and quantize the result."
            )
    for path, module in model.named_modules():
        if isinstance(module, KeyValueQuantizer) and (module.key or module.value):
            raise SettingsError(
                f"{path} rounds keys and values, and no gradient passes a rounding. Quantize weights only (--bits w4), "
                "or tune the float model and quantize the result."
            )


def prepare(configuration: Any, model: Any) -> Any:
    """peft's configuration of LoRA, taught about quantized layers; unchanged for a float model.

    Where the layers to adapt were not named, or are ``all-linear``, which peft takes for float ones, they are all
    quantized layers.
    """
    layers = [path for path, _ in quantized_linears(model)]
    if not layers:
        return configuration
    from peft.tuners.lora.layer import Linear

    configuration._register_custom_module({QuantizedLinear: Linear})
    if configuration.target_modules in (None, "all-linear"):
        configuration.target_modules = set(layers)
    return configuration


@torch.no_grad()
def to_branches(model: Any) -> Any:
    """The quantized model inside peft's, with every LoRA turned into the branch of its layer.

    Args:
        model: peft's; not to be used afterwards.

    Raises:
        SettingsError: a variant of LoRA that is more than two factors.
    """
    # Not at the top: it imports transformers, and a refused directory should be refused at once.
    from postlude.surgery.huggingface import mark

    inner = model.get_base_model()
    ranks: dict[str, int] = {}
    size = 0
    for path, layer in list(inner.named_modules()):
        base = getattr(layer, "base_layer", None)
        if not isinstance(base, QuantizedLinear):
            continue
        (name,) = layer.active_adapters
        if layer.use_dora.get(name) or layer.lora_bias.get(name) or layer.lora_variant.get(name):
            raise SettingsError(
                f"the adapter of {path} is a variant of lora that is more than two factors; it cannot become a branch: "
                "leave merging out, the adapter alone is saved."
            )
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        base.branch = _branch(base, up.float() * layer.scaling[name], down.float())
        ranks[str(base.branch.rank)] = ranks.get(str(base.branch.rank), 0) + 1
        size += base.branch.stored_bits() // 8
        replace_module(inner, path, base)
    merged = model.merge_and_unload(safe_merge=True)
    config = merged.config.quantization_config
    made = dict(config["made_by"] if isinstance(config, dict) else config.made_by)
    mark(merged, {**made, "branch": {"format": "16", "bytes": size, "layers_of_rank": ranks}})
    return merged


def _branch(layer: QuantizedLinear, up: Tensor, down: Tensor) -> LowRankBranch:
    """The branch that computes ``up @ down @ x`` of what the layer is given, but reads ``x`` transformed."""
    transform = layer.transform
    if isinstance(transform, InputScale):
        down = down / transform.factor
    elif transform is not None:
        # Orthogonal, or an order of channels: the inverse is the transpose.
        down = transform(down)
    branch = LowRankBranch(
        layer.in_features, layer.out_features, len(down), _HALF, device=down.device
    )
    branch.store(up.half(), down.half())
    return branch
