"""Tiny models as checkpoints without a tokenizer, and what is often looked at in them."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn

from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import anatomy_of

from ..surgery.models import build

TOKENS = torch.randint(0, 97, (6, 10), generator=torch.Generator().manual_seed(4))


def checkpoint(name: str, dtype: torch.dtype = torch.float64) -> Checkpoint:
    model = build(name, dtype)
    return Checkpoint(model, None, anatomy_of(model))


def twin(original: Checkpoint) -> Checkpoint:
    return dataclasses.replace(original, model=copy.deepcopy(original.model))


def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(tokens, use_cache=False).logits
    return result


def site_inputs(original: Checkpoint, tokens: Tensor = TOKENS) -> dict[tuple[int, str], Tensor]:
    """What every site's readers are called with, ``[sequences, length, width]``, by hooks on the whole model."""
    found: dict[tuple[int, str], Tensor] = {}
    handles = []
    for block, site in original.anatomy.sites():

        def look(
            _: nn.Module, args: tuple[Tensor], key: tuple[int, str] = (block.index, site.name)
        ) -> None:
            found[key] = args[0].clone()

        reader = original.model.get_submodule(site.modules[0])
        handles.append(reader.register_forward_pre_hook(look))
    logits(original.model, tokens)
    for handle in handles:
        handle.remove()
    return found
