"""Continuing a text, against the model's own logits and the cache's own tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import postlude as pl
from postlude.errors import DataError, NonFiniteError, SettingsError, UnknownNameError
from postlude.quantization import RTN
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.generation import _Text, generate
from postlude.surgery.anatomy import anatomy_of
from postlude.surgery.layers import QuantizedLinear

PROMPT = "The night was"


@pytest.fixture
def checkpoint(tiny_llama_dir: Path) -> Checkpoint:
    return pl.load(tiny_llama_dir, device="cpu")


@pytest.fixture
def small(checkpoint: Checkpoint) -> Checkpoint:
    return pl.quantize(checkpoint, RTN(weights=4, activations=8, kv=4))


def greedy(checkpoint: Checkpoint, count: int) -> list[int]:
    """Without a cache: the whole text again for every token."""
    tokens = list(checkpoint.tokenizer(PROMPT)["input_ids"])
    before = len(tokens)
    with torch.no_grad():
        for _ in range(count):
            logits = checkpoint.model(torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
            if tokens[-1] == checkpoint.tokenizer.eos_token_id:
                break
    return tokens[before:]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3", "mistral"])
def test_greedy_is_the_most_probable_token_every_time(
    make_checkpoint: Callable[..., Path], model_type: str
) -> None:
    opened = pl.load(make_checkpoint(model_type), device="cpu")
    expected = greedy(opened, 12)
    pieces: list[str] = []
    made = generate(opened, PROMPT, max_new_tokens=12, stream=pieces.append)
    assert made.tokens == len(expected)
    shown = [token for token in expected if token != opened.tokenizer.eos_token_id]
    assert made.text == opened.tokenizer.decode(shown, skip_special_tokens=True)
    assert "".join(pieces) == made.text
    assert made.kernels == {}


def test_simulated_is_what_the_quantized_model_says(small: Checkpoint) -> None:
    made = generate(small, PROMPT, max_new_tokens=10, kernel="simulate")
    assert made.tokens == len(greedy(small, 10))
    assert made.kernels == {"simulate": 14}


def test_packed_says_the_same_in_fp32(small: Checkpoint) -> None:
    simulated = generate(small, PROMPT, max_new_tokens=10, kernel="simulate")
    packed = generate(small, PROMPT, max_new_tokens=10)
    assert packed.kernels == {"integer": 14}
    assert (packed.text, packed.tokens) == (simulated.text, simulated.tokens)


def test_the_model_simulates_again_afterwards(small: Checkpoint) -> None:
    before = small.fingerprint()
    generate(small, PROMPT, max_new_tokens=2)
    with pytest.raises(SettingsError):
        generate(small, PROMPT, max_new_tokens=1000)
    layers = [m for m in small.model.modules() if isinstance(m, QuantizedLinear)]
    assert all(layer.execution is None for layer in layers)
    assert small.fingerprint() == before


def test_bytes(checkpoint: Checkpoint, small: Checkpoint) -> None:
    made = generate(checkpoint, PROMPT, max_new_tokens=5)
    # 2 blocks, keys and values, 2 heads of 8, fp32.
    assert made.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4
    parameters = {p.data_ptr(): p.nbytes for p in checkpoint.model.parameters()}
    assert made.weight_bytes >= sum(parameters.values())
    assert made.peak_bytes > made.weight_bytes
    packed = generate(small, PROMPT, max_new_tokens=5)
    # 8 codes of 4 bits, a scale of 2 bytes, a zero point of 1.
    assert packed.kv_bytes_per_token == 2 * 2 * 2 * (4 + 2 + 1)
    assert packed.weight_bytes < made.weight_bytes


def test_recent_tokens_in_floating_point(small: Checkpoint) -> None:
    length = len(small.tokenizer(PROMPT)["input_ids"]) + 4
    all_recent = generate(small, PROMPT, max_new_tokens=5, kv_recent=50)
    assert all_recent.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4
    some = generate(small, PROMPT, max_new_tokens=5, kv_recent=3)
    packed, plain = 2 * 2 * 2 * 7, 2 * 2 * 2 * 8 * 4
    assert some.kv_bytes_per_token == pytest.approx((packed * (length - 3) + plain * 3) / length)


def test_sampling(checkpoint: Checkpoint) -> None:
    def text(seed: int, temperature: float) -> str:
        return generate(
            checkpoint, PROMPT, max_new_tokens=12, temperature=temperature, seed=seed
        ).text

    torch.manual_seed(0)
    first = text(1, 2.0)
    torch.manual_seed(5)
    assert text(1, 2.0) == first
    assert len({text(seed, 2.0) for seed in range(4)}) > 1
    assert text(3, 1e-4) == text(0, 0)


def test_one_token(checkpoint: Checkpoint) -> None:
    made = generate(checkpoint, PROMPT, max_new_tokens=1)
    assert (made.tokens, made.tokens_per_second) == (1, None)
    assert made.prefill_seconds > 0


def test_an_end_token_ends_it(checkpoint: Checkpoint) -> None:
    expected = greedy(checkpoint, 3)
    checkpoint.model.generation_config.eos_token_id = [expected[2], 7]
    made = generate(checkpoint, PROMPT, max_new_tokens=9)
    assert made.tokens == 3
    assert made.text == checkpoint.tokenizer.decode(expected[:2], skip_special_tokens=True)


def test_a_character_of_several_tokens_is_shown_whole(tiny_tokenizer: Any) -> None:
    pieces: list[str] = []
    text = _Text(tiny_tokenizer, [1], pieces.append)
    for token in tiny_tokenizer("aé€b", add_special_tokens=False)["input_ids"]:
        text.push(token)
    assert pieces == ["a", "é", "€", "b"]
    assert text.finish() == "aé€b"


def test_an_incomplete_last_character_is_shown_at_the_end(tiny_tokenizer: Any) -> None:
    text = _Text(tiny_tokenizer, [1], None)
    for token in tiny_tokenizer("a€", add_special_tokens=False)["input_ids"][:-1]:
        text.push(token)
    assert text.finish() == "a\ufffd"


def test_bad_input(checkpoint: Checkpoint, small: Checkpoint, plain_tokenizer: Any) -> None:
    with pytest.raises(SettingsError, match=r"max_new_tokens is 0; expected 1 or more"):
        generate(checkpoint, PROMPT, max_new_tokens=0)
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(SettingsError, match=r"temperature is .*expected 0"):
            generate(checkpoint, PROMPT, temperature=wrong)
    with pytest.raises(SettingsError, match=r"kv_recent is -1"):
        generate(checkpoint, PROMPT, kv_recent=-1)
    with pytest.raises(SettingsError, match=r"kv_recent is 4, but the keys .* are not quantized"):
        generate(checkpoint, PROMPT, kv_recent=4, max_new_tokens=1)
    with pytest.raises(SettingsError, match=r"context holds 64\. Ask for at most 50 new tokens"):
        generate(checkpoint, PROMPT, max_new_tokens=51)
    with pytest.raises(UnknownNameError, match=r"No kernel named 'int4pak'\. Did you mean"):
        generate(small, PROMPT, kernel="int4pak")
    with pytest.raises(SettingsError, match=r"int8pack takes no layer of this model"):
        generate(small, PROMPT, kernel="int8pack")
    checkpoint.tokenizer = plain_tokenizer
    with pytest.raises(DataError, match="the prompt is empty"):
        generate(checkpoint, "")
    checkpoint.tokenizer = None
    with pytest.raises(DataError, match="no tokenizer, so it cannot read a prompt"):
        generate(checkpoint, PROMPT)


def test_no_probabilities(make_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = make_model()
    model.lm_head.weight.data[5, 0] = float("inf")
    broken = Checkpoint(model, tiny_tokenizer, anatomy_of(model))
    with pytest.raises(NonFiniteError, match="NaN or infinite, so there is no next token"):
        generate(broken, PROMPT, max_new_tokens=2)
