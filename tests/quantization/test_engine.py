"""What every quantizer shares."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from postlude.errors import DataError, SettingsError
from postlude.quantization.engine import Quantizer, check_calibrated, generator, quantize
from postlude.quantization.gptq import GPTQ
from postlude.quantization.offq import OffQ
from postlude.quantization.quarot import QuaRot
from postlude.quantization.rtn import RTN
from postlude.surgery.anatomy import Block, Site
from postlude.surgery.key_values import KeyValueQuantizer
from postlude.surgery.layers import QuantizedLinear

from .models import TOKENS, checkpoint, logits, twin


def test_random_choices_have_generators_of_their_own() -> None:
    def draw(seed: int, name: str) -> list[int]:
        return torch.randint(0, 1000, (4,), generator=generator(seed, name)).tolist()

    assert draw(0, "residual") == draw(0, "residual")
    drawn = [draw(seed, name) for seed in (0, 1, -1) for name in ("residual", "0.values.1")]
    assert len({tuple(numbers) for numbers in drawn}) == 6


def test_units_come_in_order_and_hold_what_is_needed() -> None:
    names: list[str] = []
    kept: dict[str, dict[str, Tensor]] = {}

    def unit(name: str, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        names.append(name)
        kept[name] = dict(compute())
        return kept[name]

    made = checkpoint("llama", torch.float32)
    quantize(made, OffQ(), TOKENS, unit=unit)
    assert names == ["statistics", "block-0000", "block-0001"]
    path = "model.layers.1.mlp.up_proj"
    assert kept["block-0001"][f"{path}.codes"].shape == (172, 64)
    # From the stored units alone, without computing any of them, comes the same model.
    again = checkpoint("llama", torch.float32)
    quantize(again, OffQ(), TOKENS, unit=lambda name, compute: kept[name])
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)


def test_quantizers_are_on_at_the_end_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    made = checkpoint("llama", torch.float32)
    on: list[bool] = []
    forward = QuantizedLinear.forward

    def watched(self: QuantizedLinear, x: Tensor) -> Tensor:
        on.append(self.quantize_input)
        return forward(self, x)

    monkeypatch.setattr(QuantizedLinear, "forward", watched)
    quantize(made, QuaRot(), TOKENS)
    assert on
    assert not any(on)
    layers = [m for m in made.model.modules() if isinstance(m, QuantizedLinear)]
    caches = [m for m in made.model.modules() if isinstance(m, KeyValueQuantizer)]
    assert len(layers) == 14
    assert len(caches) == 2
    assert all(layer.quantize_input for layer in layers)
    assert all(cache.quantize and cache.schemes() != (None, None) for cache in caches)
    assert all(not layer._forward_pre_hooks for layer in layers)


@pytest.mark.parametrize("method", [RTN, QuaRot, OffQ])
def test_parts_alone(method: type[Quantizer]) -> None:
    """Weights, inputs or cache: the others stay as they are."""
    expected = logits(checkpoint("qwen2", torch.float32).model)
    differences = []
    for bits in ((4, 16, 16), (16, 4, 16), (16, 16, 4)):
        made = checkpoint("qwen2", torch.float32)
        quantize(made, method(*bits), TOKENS)
        layers = [made.model.get_submodule(path) for path in made.anatomy.linears()]
        rounded = [isinstance(m, QuantizedLinear) and m.weight_scheme is not None for m in layers]
        assert all(rounded) if bits[0] == 4 else not any(rounded)
        inputs = [isinstance(m, QuantizedLinear) and m.input_scheme is not None for m in layers]
        assert all(inputs) if bits[1] == 4 else not any(inputs)
        caches = [m for m in made.model.modules() if isinstance(m, KeyValueQuantizer)]
        assert any(cache.key is not None for cache in caches) is (bits[2] == 4)
        differences.append(float((logits(made.model) - expected).abs().max()))
    assert all(1e-3 < difference < expected.std() * 8 for difference in differences)


def test_norms_embeddings_and_head_stay() -> None:
    before = checkpoint("llama", torch.float32)
    made = twin(before)
    quantize(made, RTN(), None)
    for name, tensor in before.model.state_dict().items():
        if not name.startswith("model.layers.") or "norm" in name:
            assert torch.equal(made.model.state_dict()[name], tensor)
    assert made.model.lm_head.weight is made.model.model.embed_tokens.weight  # tied as before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_type_stays_and_so_do_buffers(dtype: torch.dtype) -> None:
    made = checkpoint("qwen2", torch.float32)
    for parameter in made.model.parameters():
        parameter.data = parameter.data.to(dtype)
    frequencies = made.model.model.rotary_emb.inv_freq.clone()
    quantize(made, OffQ(), TOKENS)
    assert {parameter.dtype for parameter in made.model.parameters()} == {dtype}
    assert torch.equal(made.model.model.rotary_emb.inv_freq, frequencies)
    rotation = made.model.model.layers[0].self_attn.key_values.rotation
    identity = torch.eye(16).expand(2, 16, 16)
    torch.testing.assert_close(
        rotation.matrices @ rotation.matrices.mT, identity, atol=1e-5, rtol=0
    )
    assert made.model.model.layers[0].mlp.up_proj.scale.dtype == torch.float16


def test_rewrites_of_a_16_bit_model_are_cast_once() -> None:
    """In fp32 until the end: rounding every step to bf16 would be several times as far off."""
    made = checkpoint("llama", torch.float32)
    for parameter in made.model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    exact = twin(made)
    for parameter in exact.model.parameters():
        parameter.data = parameter.data.float()
    for one in (made, exact):
        quantize(one, QuaRot(16, 16, 16), TOKENS)
    for name, parameter in made.model.named_parameters():
        expected = exact.model.get_parameter(name).to(torch.bfloat16)
        assert torch.equal(parameter, expected), name


def test_a_quantized_model_is_refused() -> None:
    for settings in (RTN(), RTN(16, 16, 4), QuaRot(16, 16, 16)):
        made = checkpoint("llama", torch.float32)
        quantize(made, settings, TOKENS)
        with pytest.raises(SettingsError, match="already quantized; start from the float one"):
            quantize(made, RTN(), None)


def test_calibration_is_asked_for_where_it_is_needed() -> None:
    assert not RTN().needs_calibration
    assert RTN(rounding="gptq").needs_calibration
    assert not RTN(weights=16, rounding="gptq").needs_calibration
    assert GPTQ().needs_calibration
    with pytest.raises(DataError, match="rtn learns from calibration text"):
        quantize(checkpoint("llama"), RTN(rounding="gptq"), None)


def test_what_is_skipped_is_reported_and_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    def skips(_: Any, block: Block, site: Site, statistics: Mapping[str, Tensor]) -> bool:
        return block.index == 1 and site.name == "ug_in"

    monkeypatch.setattr(RTN, "skips", skips)
    made = checkpoint("llama", torch.float32)
    quantize(made, RTN(), None)
    kept = ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]
    assert made.model.config.quantization_config.made_by["kept"] == kept
    plain = [p for p in made.anatomy.linears() if type(made.model.get_submodule(p)) is nn.Linear]
    assert plain == kept


def test_every_thing_that_decides_is_written_down() -> None:
    made = checkpoint("llama", torch.float32)
    quantize(made, RTN(weights=3, group=32), None, seed=7)
    config = made.model.config.quantization_config.to_dict()
    assert config["quant_method"] == "postlude"
    made_by = config["made_by"]
    assert (made_by["method"], made_by["seed"]) == ("rtn", 7)
    assert (made_by["settings"]["weights"], made_by["settings"]["group"]) == (3, 32)


def test_data_that_are_missing_are_asked_for_before_anything_is_loaded(tmp_path: Path) -> None:
    for kind, word in (("llama", "text"), ("vit", "images"), ("unheard-of", "text")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))  # and no weights
        with pytest.raises(SettingsError, match=f"gptq learns from calibration {word}: give some"):
            check_calibrated(GPTQ(), tmp_path)
    check_calibrated(RTN(), tmp_path)
    check_calibrated(GPTQ(), "zoo:tiny-dit")  # samples inputs of its own
