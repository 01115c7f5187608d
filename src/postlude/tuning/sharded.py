"""Models that accelerate has cut over ranks (FSDP2): each holds a part of every parameter, gradient and moment.

A state is kept in parts, one file a rank, so keeping it takes no more memory than training does. The finished model is
put together once, on the CPU of the first rank.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from postlude.errors import SettingsError

__all__ = [
    "asked",
    "check_cut",
    "check_shardable",
    "is_sharded",
    "local",
    "put_local",
    "trained_on",
    "whole",
]


def _is_cut(tensor: Any) -> bool:
    return hasattr(tensor, "to_local") and hasattr(tensor, "full_tensor")


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks hold parts of its parameters."""
    return any(_is_cut(parameter) for parameter in model.parameters())


def asked() -> bool:
    """Whether accelerate was told to cut the model, by its configuration file."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def trained_on(model: Any) -> str:
    """Type of the device of the training: of a model that will be cut, the accelerator, where it is not yet."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    found: str = model.device.type
    return accelerator.type if asked() and accelerator is not None else found


def check_shardable(model: nn.Module, kind: str, reference: bool) -> None:
    """Refuse what cannot be cut, or put together again.

    Args:
        model: what is trained.
        kind: of model.
        reference: whether a frozen model is run beside it.

    Raises:
        SettingsError: adapters, a frozen model, or no language model.
    """
    if reference:
        raise SettingsError(
            "accelerate is asked to shard (FSDP), and the rule runs a frozen model, which would not be cut: store what "
            "it says first (postlude tune prior) and pass that (--prior), or use torchrun without FSDP."
        )
    if hasattr(model, "peft_config"):
        raise SettingsError(
            "accelerate is asked to shard (FSDP) and an adapter is trained: its base would be cut, too. Train all "
            "weights, or the adapter under torchrun, where each rank holds the base."
        )
    if kind != "language":
        raise SettingsError(
            f"accelerate is asked to shard (FSDP), which is for language models; this one is of kind {kind!r}: use "
            "torchrun, where each rank holds the model."
        )


def check_cut(model: nn.Module) -> None:
    """See that a model is cut where accelerate was told to.

    Raises:
        SettingsError: it is not, as on a CPU or on a single process.
    """
    if asked() and not is_sharded(model):
        raise SettingsError(
            "accelerate is asked to shard (FSDP) but has not: it does so with FSDP version 2, on several processes, "
            "each with an accelerator. Mend its configuration (fsdp_version: 2), or use torchrun without it."
        )


def local(tensor: Tensor) -> Any:
    """The part of a tensor that this rank holds; all of one that is not cut."""
    return cast(Any, tensor).to_local() if _is_cut(tensor) else tensor


def put_local(state: Mapping[str, Any], parameters: list[Tensor]) -> dict[str, Any]:
    """An optimizer's state with this rank's parts as the cut tensors that they are parts of.

    Args:
        state: of ``optimizer.state_dict()``, whose tensors are parts.
        parameters: of the optimizer, in its order.
    """
    from torch.distributed.tensor import DTensor

    moments: dict[Any, Any] = {}
    for number, values in state["state"].items():
        parameter: Any = parameters[int(number)]
        cut = _is_cut(parameter)
        moments[number] = {
            name: DTensor.from_local(
                value,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
            if cut and isinstance(value, Tensor) and value.ndim
            else value
            for name, value in values.items()
        }
    return {**state, "state": moments}


@torch.no_grad()
def whole(model: nn.Module, first: bool) -> nn.Module:
    """The model in one piece on the CPU of the first rank; every rank has to call this.

    Args:
        model: a cut model of transformers.
        first: whether this is the first rank; others get a model without weights.
    """
    held: dict[str, Tensor] = {}
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        # Every rank takes part in putting one together, and one keeps it.
        full = cast(Any, tensor).full_tensor() if _is_cut(tensor) else tensor
        if first:
            held[name] = full.detach().cpu().clone()
    kind = next(one for one in type(model).__mro__ if not one.__name__.startswith("FSDP"))
    with torch.device("cpu" if first else "meta"):
        plain: nn.Module = kind(copy.deepcopy(model.config))
    if first:
        plain.to(next(iter(held.values())).dtype)
        plain.load_state_dict(held, strict=False, assign=True)
        cast(Any, plain).tie_weights()
    return plain
