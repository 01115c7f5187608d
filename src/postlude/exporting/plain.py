"""A checkpoint as its architecture's own class would hold it, with the quantized layers apart.

What Postlude adds to a model (online transforms, quantized keys and values, norms without weights) has to go back
into the architecture's own parts before another engine can read it, or be refused: an engine that does not know a
rotation runs without it and says nothing.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn

from postlude.errors import SettingsError
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.key_values import KeyValueQuantizer
from postlude.surgery.layers import QuantizedLinear, quantized_linears

__all__ = ["Plain", "plain", "refuse"]


@dataclasses.dataclass(frozen=True)
class Plain:
    """The parts of a checkpoint.

    Attributes:
        config: of the float model; a copy, without a quantization.
        tensors: everything that is not a quantized layer, by the architecture's own names; a tied head is left out.
        layers: the quantized layers by their paths. Their biases are here and not in ``tensors``.
    """

    config: Any
    tensors: dict[str, Tensor]
    layers: dict[str, QuantizedLinear]


def refuse(target: str, reasons: list[str]) -> None:
    """Raise if there are reasons.

    Raises:
        SettingsError: with the first reason, and how many more there are.
    """
    if reasons:
        others = len(reasons) - 1
        more = f" There {'are' if others > 1 else 'is'} {others} more like it." if others else ""
        raise SettingsError(
            f"{target} cannot hold this checkpoint: {reasons[0].rstrip('.')}.{more}"
        )


def plain(
    checkpoint: Checkpoint, target: str, *, transforms: bool = False, instead: str = ""
) -> Plain:
    """Take a checkpoint apart.

    Args:
        checkpoint: float or quantized.
        target: what it is exported to, for messages.
        transforms: whether the target can do what Postlude does online (transforms, rotated and rounded keys and
            values, a head with a bias); it is refused otherwise.
        instead: what to do where it is refused.

    Raises:
        SettingsError: the checkpoint does something that the target has no place for.
    """
    model = checkpoint.model
    refuse(target, _reasons(checkpoint, transforms, instead))
    layers = dict(quantized_linears(model))
    tensors: dict[str, Tensor] = {}
    inside = tuple(f"{path}." for path in layers)
    tied = _tied_head(model)
    for name, tensor in model.state_dict().items():
        if name.startswith(inside) or ".key_values." in name or name == tied:
            continue
        tensors[name] = tensor
    for path, module in model.named_modules():
        if type(module) is nn.RMSNorm and module.weight is None:
            size = module.normalized_shape[0]
            tensors[f"{path}.weight"] = torch.ones(size, dtype=model.dtype, device=model.device)
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return Plain(config, tensors, layers)


def _tied_head(model: Any) -> str | None:
    """Name of the head's weight where it is the embedding's."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not table.weight:
        return None
    path = next(path for path, module in model.named_modules() if module is head)
    return f"{path}.weight"


def _reasons(checkpoint: Checkpoint, transforms: bool, instead: str) -> list[str]:
    model = checkpoint.model
    made_by = getattr(getattr(model.config, "quantization_config", None), "made_by", {})
    method = made_by.get("method", "its method")
    found = [
        f"{method} corrects {path} by a low-rank branch, which this format has no place for. Export a checkpoint of "
        "a method without branches (gptq, for example)"
        for path, layer in quantized_linears(model)
        if layer.branch is not None
    ]
    if transforms:
        return found
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and module.transform is not None:
            kind = type(module.transform).__name__
            found.append(
                f"{method} transforms the input of {path} online ({kind}), and a reader would leave that out "
                f"without an error. {instead}"
            )
        elif isinstance(module, KeyValueQuantizer):
            if module.rotation is not None:
                found.append(
                    f"{method} rotates queries and keys ({path}), and a reader would leave that out without an "
                    f"error. {instead}"
                )
            elif module.key is not None or module.value is not None:
                found.append(
                    f"its keys and values are quantized ({path}) with a scale per token, which no reader of this "
                    "format does; serving engines round the cache by settings of their own. Quantize again with "
                    "kv16 (for example --bits w4a16kv16)"
                )
        elif (
            type(module) is nn.RMSNorm and checkpoint.language.norm_kind != "rms" and not transforms
        ):
            found.append(
                f"{method} turned the LayerNorm {path} into an RMSNorm, which a {model.config.model_type} "
                f"does not have. {instead}"
            )
    head = cast(Any, model).get_output_embeddings()
    if isinstance(head, nn.Linear) and head.bias is not None:
        found.append(
            f"{method} gave the head a bias, which a {model.config.model_type} does not have. {instead}"
        )
    return found
