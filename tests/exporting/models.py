"""Tiny models whose linears hold codes of any format."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from postlude.numerics.schemes import Scheme
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import anatomy_of
from postlude.surgery.huggingface import mark
from postlude.surgery.layers import QuantizedLinear
from postlude.surgery.rewrite import replace_module

TOKENS = torch.randint(0, 259, (2, 12), generator=torch.Generator().manual_seed(7))


def checkpoint(make_model: Callable[..., Any], kind: str = "llama", **settings: Any) -> Checkpoint:
    settings = {} if kind == "gpt2" else {"intermediate_size": 64, **settings}
    model = make_model(kind, **settings)
    return Checkpoint(model, None, anatomy_of(model))


def rounded(
    original: Checkpoint,
    weight: Scheme | None,
    input: Scheme | None = None,
    leave: tuple[str, ...] = (),
) -> Checkpoint:
    """Every linear of every block to nearest, in place, except those whose path ends in ``leave``."""
    model = original.model
    for path in set(original.anatomy.linears()):
        if path.endswith(leave or ("no such path",)):
            continue
        old = model.get_submodule(path)
        layer = QuantizedLinear.like(old, weight=weight, input=input)
        matrix = old.weight.data.T if type(old).__name__ == "Conv1D" else old.weight.data
        if weight is None:
            layer.weight.data.copy_(matrix)
        else:
            layer.store(weight.encode(matrix))
        replace_module(model, path, layer)
    mark(model, {"method": "rounded", "settings": {}, "seed": 0})
    return original


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(input_ids=tokens, use_cache=False).logits.float()
    return result


@contextlib.contextmanager
def unrounded(model: Any) -> Iterator[None]:
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    for layer in layers:
        layer.quantize_input = False
    yield
    for layer in layers:
        layer.quantize_input = True
