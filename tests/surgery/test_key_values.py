"""The packed cache behaves as transformers' own does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from postlude.errors import SettingsError
from postlude.numerics.formats import Integer
from postlude.numerics.schemes import Granularity, Scheme
from postlude.surgery.anatomy import anatomy_of
from postlude.surgery.key_values import KeyValueQuantizer
from postlude.surgery.rewrite import rotate_keys
from postlude.surgery.transforms import BlockHadamard

from .models import build

TOKENS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))
OPTIONS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def quantized(name: str) -> Any:
    model = build(name, torch.float32)
    scheme = Scheme(Integer(8, symmetric=False, range="free"), Granularity("token"))
    for block in anatomy_of(model).blocks:
        rotation = BlockHadamard(16, 16)
        rotate_keys(model, block, KeyValueQuantizer(scheme, scheme, rotation))
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ways_to_generate(name: str) -> None:
    model = quantized(name)
    beams = model.generate(TOKENS, num_beams=3, **OPTIONS)
    assert torch.equal(beams, model.generate(TOKENS, num_beams=3, use_cache=False, **OPTIONS))
    repeated = TOKENS[:1].repeat(1, 2)
    looked_up = model.generate(repeated, prompt_lookup_num_tokens=2, **OPTIONS)
    assert torch.equal(looked_up, model.generate(repeated, **OPTIONS))
    padding = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(TOKENS)], 1)
    padded = model.generate(torch.cat([padding, TOKENS], 1), attention_mask=mask, **OPTIONS)
    assert torch.equal(padded[:, 15:], model.generate(TOKENS, **OPTIONS)[:, 12:])
    assert (
        model.generate(TOKENS, num_return_sequences=2, **{**OPTIONS, "do_sample": True}).shape[0]
        == 4
    )


@torch.no_grad()
def test_a_cache_taken_back_goes_on_as_if_never_longer() -> None:
    model = quantized("llama")
    cache = DynamicCache(config=model.config)
    model(TOKENS, past_key_values=cache)
    longest = cache.layers[0].stored_bytes()
    cache.crop(-5)
    assert cache.get_seq_length() == 7
    assert cache.layers[0].stored_bytes() == longest * 7 // 12
    again = model(TOKENS[:, 7:], past_key_values=cache).logits
    torch.testing.assert_close(again, model(TOKENS).logits[:, 7:], atol=2e-2, rtol=0)
    cache.reset()
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_what_a_packed_cache_cannot_do() -> None:
    sliding = quantized("mistral")  # a window of 6
    cache = DynamicCache(config=sliding.config)
    sliding(TOKENS[:, :4], past_key_values=cache)
    cache.crop(-1)
    sliding(TOKENS[:, 3:], past_key_values=cache)
    with pytest.raises(RuntimeError, match="left the sliding window are gone"):
        cache.crop(-1)
    model = quantized("llama")
    with pytest.raises(SettingsError, match=r"layer 0 is a StaticLayer .* an empty DynamicCache"):
        model.generate(TOKENS, cache_implementation="static", **OPTIONS)
    filled = DynamicCache(config=model.config)
    filled.update(torch.zeros(2, 2, 3, 16), torch.zeros(2, 2, 3, 16), 0)
    with pytest.raises(SettingsError, match="already filled"):
        model(TOKENS, past_key_values=filled)
