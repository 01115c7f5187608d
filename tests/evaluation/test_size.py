from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from postlude.errors import ArchitectureError
from postlude.evaluation.size import size_of
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.loading import load
from postlude.surgery.anatomy import anatomy_of


class Halved(nn.Module):
    """A stand-in for a quantized layer: 4 bits a weight and 16 a row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def stored_bits(self) -> int:
        return self.out_features * (4 * self.in_features + 16)


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 32), ("bfloat16", 16)])
def test_float_checkpoints(make_checkpoint: Callable[..., Path], dtype: str, bits: int) -> None:
    directory = make_checkpoint("llama", dtype=dtype)
    checkpoint = load(directory)
    on_disk = (directory / "model.safetensors").stat().st_size
    assert size_of(checkpoint) == {"bytes": on_disk, "bits_per_weight": bits}
    # In memory: the same without the file's header.
    checkpoint.path = None
    assert 0 < on_disk - size_of(checkpoint)["bytes"] < 4096


@pytest.mark.parametrize("tied", [False, True])
def test_shared_tensors_count_once(make_model: Callable[..., Any], tied: bool) -> None:
    model = make_model(tie_word_embeddings=tied)
    expected = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert size_of(Checkpoint(model, None, anatomy_of(model)))["bytes"] == expected


def test_quantized_layers_count_what_they_store(make_model: Callable[..., Any]) -> None:
    model = make_model()
    anatomy = anatomy_of(model)
    bits = weights = 0
    for index, name in enumerate(anatomy.linears()):
        linear = model.get_submodule(name)
        weights += linear.weight.numel()
        if index % 2:
            bits += linear.weight.numel() * 32
        else:
            model.set_submodule(name, Halved(linear))
            bits += linear.out_features * (4 * linear.in_features + 16)
    size = size_of(Checkpoint(model, None, anatomy))
    assert size["bits_per_weight"] == pytest.approx(bits / weights)


def test_transposed_layers_count(make_model: Callable[..., Any]) -> None:
    model = make_model("gpt2").to(torch.float16)
    assert size_of(Checkpoint(model, None, anatomy_of(model)))["bits_per_weight"] == 16


def test_a_layer_that_cannot_be_counted_is_refused(make_model: Callable[..., Any]) -> None:
    model = make_model()
    anatomy = anatomy_of(model)
    name = next(anatomy.linears())
    model.set_submodule(name, nn.Identity())
    with pytest.raises(ArchitectureError, match=name):
        size_of(Checkpoint(model, None, anatomy))
