"""SmoothQuant by loops (arXiv:2211.10438)."""

from __future__ import annotations

import pytest
import torch

from postlude.errors import SettingsError
from postlude.quantization.engine import quantize
from postlude.quantization.rtn import RTN
from postlude.quantization.smoothquant import SmoothQuant, smoothing_scale

from .models import TOKENS, checkpoint, logits, site_inputs, twin


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_scales_and_where_they_go(name: str, alpha: float) -> None:
    before = checkpoint(name)
    made = twin(before)
    settings = SmoothQuant(alpha=alpha)
    settings.fold(made)
    found = settings.statistics(made, TOKENS, 0)
    settings.rewrite(made, found, 0)
    inputs, smoothed = site_inputs(before), site_inputs(made)
    for block, site in before.anatomy.sites():
        key = f"{block.index}.{site.name}"
        x, y = inputs[block.index, site.name], smoothed[block.index, site.name]
        if site.norm is None:
            assert key not in found
            torch.testing.assert_close(y, x)
            continue
        for channel in (0, 7, 63):
            largest = max(abs(float(token[channel])) for s in x for token in s)
            weight = max(
                abs(float(row[channel])) for r in site.readers for row in r.weight(before.model)
            )
            expected = largest**alpha / weight ** (1 - alpha)
            assert float(found[key][channel]) == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(y, x / found[key])
        for reader in site.readers:
            torch.testing.assert_close(
                reader.weight(made.model), reader.weight(before.model) * found[key]
            )


def test_silent_channels_are_left_alone() -> None:
    activations = torch.tensor([0.0, 4.0, 0.0, 9.0])
    weights = torch.tensor([1.0, 0.0, 0.0, 4.0])
    assert smoothing_scale(activations, weights, 0.5).tolist() == [1, 1, 1, 1.5]


def test_outlying_channels_are_evened_out() -> None:
    """Two channels of every norm fifty times the rest: what smoothing is for."""
    original = checkpoint("llama", torch.float32)
    for block in original.anatomy.blocks:
        for site in block.sites:
            if site.norm:
                original.model.get_submodule(site.norm).weight.data[[5, 40]] *= 50
                for reader in site.readers:
                    reader.weight(original.model)[:, [5, 40]] /= 50
    expected = logits(original.model)
    errors = {}
    for settings in (
        SmoothQuant(activation_group="tensor"),
        RTN(8, 8, 16, activation_group="tensor"),
    ):
        made = twin(original)
        quantize(made, settings, TOKENS)
        errors[type(settings)] = float((logits(made.model) - expected).square().mean())
    assert errors[SmoothQuant] < errors[RTN] / 10


def test_what_it_cannot_do() -> None:
    with pytest.raises(SettingsError, match=r"activations stay at 16 bits; use rtn or gptq"):
        SmoothQuant(activations=16)
    with pytest.raises(SettingsError, match=r"alpha is between 0 and 1, got 1\.5"):
        SmoothQuant(alpha=1.5)
