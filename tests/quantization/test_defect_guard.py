"""Defect guard on models with a planted massive activation (arXiv:2502.07004)."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from postlude.errors import SettingsError, UnknownNameError
from postlude.numerics.formats import Integer
from postlude.numerics.schemes import Granularity, Scheme
from postlude.quantization.defect_guard import DefectGuard
from postlude.quantization.engine import quantize
from postlude.quantization.rtn import RTN
from postlude.quantization.smoothquant import SmoothQuant
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.layers import QuantizedLinear

from ..battery.bench import divergence
from ..inspection.planted import DECAY, EXPLOSION, planted, tokens
from .models import checkpoint, logits

IDS = tokens(4, 24)


@pytest.fixture(scope="module")
def original() -> Checkpoint:
    return planted("llama", 0).checkpoint


def twin(original: Checkpoint) -> Checkpoint:
    return dataclasses.replace(original, model=copy.deepcopy(original.model))


@pytest.mark.parametrize("base", ["rtn", "smoothquant"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_planted_layers_are_kept(kind: str, base: str) -> None:
    before = planted(kind, 0).checkpoint
    made = twin(before)
    quantize(made, DefectGuard(base=base), IDS)
    per_tensor = Scheme(Integer(8), Granularity("tensor"))
    kept = []
    for block, site in made.anatomy.sites():
        for path in site.modules:
            layer = made.model.get_submodule(path)
            if isinstance(layer, QuantizedLinear):
                assert (layer.weight_scheme, layer.input_scheme) == (per_tensor, per_tensor)
            else:
                kept.append((block.index, site.name))
                assert torch.equal(layer.weight, before.model.get_submodule(path).weight)
    assert kept == [(EXPLOSION, "down_in"), (DECAY, "down_in")]
    made_by = made.model.config.quantization_config.made_by
    assert made_by["kept"] == [
        made.anatomy.blocks[index].site("down_in").modules[0] for index in (EXPLOSION, DECAY)
    ]


def test_most_of_the_loss_is_won_back(original: Checkpoint) -> None:
    expected = logits(original.model, IDS)
    losses = {}
    for name, settings in {
        "rtn": RTN(8, 8, 16, group="tensor", activation_group="tensor"),
        "smoothquant": SmoothQuant(group="tensor", activation_group="tensor"),
        "guarded rtn": DefectGuard(),
        "guarded smoothquant": DefectGuard(base="smoothquant"),
    }.items():
        made = twin(original)
        quantize(made, settings, IDS)
        losses[name] = float(divergence(expected, logits(made.model, IDS)).mean())
    assert losses["guarded rtn"] < losses["rtn"] / 2, losses
    assert losses["guarded smoothquant"] < losses["smoothquant"] / 2, losses


def test_nothing_to_guard_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"no layer where massive .* use rtn itself"):
        quantize(checkpoint("llama", torch.float32), DefectGuard(), IDS % 97)


def test_an_unknown_base_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"'smothquant'. Did you mean 'smoothquant'"):
        DefectGuard(base="smothquant")
    with pytest.raises(SettingsError, match="16 bits"):
        DefectGuard(base="smoothquant", activations=16)
