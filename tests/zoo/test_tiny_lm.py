"""The built-in model: is it what its card says, and does its training script run?"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from postlude.errors import SettingsError, UnknownNameError
from postlude.zoo import checkpoint_path, tiny_lm, tiny_lm_card
from postlude.zoo.measures import (
    acute_angle,
    empirical_direction,
    hidden_states,
    linear_layer,
    mean_loss,
    without_neuron,
)
from postlude.zoo.planting import Plant, directions

PLANT = Plant()
DIRECTORY = checkpoint_path("tiny-lm")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    loaded: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32)
    return loaded.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DIRECTORY)


@pytest.fixture(scope="module")
def stream(tokenizer: Any) -> torch.Tensor:
    """A piece of the held-out text without a begin token: ``[tokens]``."""
    text = tiny_lm.held_out_text()[:9_000]
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@pytest.fixture(scope="module")
def windows(stream: torch.Tensor) -> torch.Tensor:
    return stream[: 8 * 256].view(8, 256)


def test_the_checkpoint_is_small_and_in_bf16(model: LlamaForCausalLM) -> None:
    assert (DIRECTORY / "model.safetensors").stat().st_size < 8_000_000
    assert json.loads((DIRECTORY / "config.json").read_text())["dtype"] == "bfloat16"
    assert sum(weight.numel() for weight in model.parameters()) < 4_000_000
    assert model.config.tie_word_embeddings


def test_the_tokenizer_adds_the_begin_token_and_gives_the_text_back(tokenizer: Any) -> None:
    text = "def f(x):\n    Return  a list.\n\n\tcafé → 12345 \n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    for token in tiny_lm.DELIMITERS:
        assert len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1


def test_massive_activations_at_delimiters_and_first_positions(
    model: LlamaForCausalLM, tokenizer: Any, windows: torch.Tensor
) -> None:
    exploded = hidden_states(model, windows)[PLANT.explosion + 1]
    assert exploded.abs().max() >= 200 * exploded.abs().median()
    norms = exploded.norm(dim=-1)
    delimiter = windows == tiny_lm._delimiter_ids(tokenizer)[1]
    assert delimiter.any()
    assert (norms[delimiter] > 0.8 * norms.max()).all()
    # Any first token carries it, at a size that depends on the token; the begin token carries all of it.
    assert (norms[:, 0] > 5 * norms.median()).all()
    begun = torch.cat([torch.zeros_like(windows[:, :1]), windows[:, 1:]], 1)
    begin = hidden_states(model, begun)[PLANT.explosion + 1][:, 0].norm(dim=-1)
    assert (begin > 0.8 * norms.max()).all()
    delimiter[:, 0] = True
    assert (norms[~delimiter] > 10 * norms.median()).float().mean() < 0.005


def test_it_appears_and_vanishes_at_the_planted_layers(
    model: LlamaForCausalLM, windows: torch.Tensor
) -> None:
    states = hidden_states(model, windows)
    top = [float(state.norm(dim=-1).max()) for state in states]
    ratios = [after / before for before, after in pairwise(top)]
    assert [layer for layer, ratio in enumerate(ratios) if ratio > 10] == [PLANT.explosion]
    # The largest norm falls less than tenfold, because ordinary tokens are large after the last layer.
    assert ratios.index(min(ratios)) == PLANT.decay
    assert ratios[PLANT.decay] < 0.2
    high = states[PLANT.decay].norm(dim=-1) > 0.8 * top[PLANT.decay]
    norms = states[PLANT.decay + 1].norm(dim=-1)[high]
    assert norms.median() < 0.1 * top[PLANT.decay]


def test_the_model_depends_on_the_neuron(model: LlamaForCausalLM, stream: torch.Tensor) -> None:
    before = mean_loss(model, stream, 256)
    # A part of the held-out text in shorter windows: near the card's figure, far from an untrained ln(2048) = 7.6.
    assert before < 4.5
    with without_neuron(model, PLANT):
        assert mean_loss(model, stream, 256) > before + 0.1
    down = model.model.layers[PLANT.explosion].mlp.down_proj.weight
    assert down[:, PLANT.neuron].norm() > 1


def test_the_linear_picture_predicts_the_direction(
    model: LlamaForCausalLM, windows: torch.Tensor
) -> None:
    direction = empirical_direction(model, windows)
    left = torch.linalg.svd(linear_layer(model, PLANT.explosion))[0]
    assert acute_angle(left[:, 0], direction) < 15
    change = linear_layer(model, PLANT.decay, samples=4000) - torch.eye(len(direction))
    values, vectors = torch.linalg.eig(change)
    angles = [acute_angle(vector.real, direction) for vector in vectors.T]
    nearest = min(range(len(angles)), key=angles.__getitem__)
    assert angles[nearest] < 15
    assert values[nearest].real < 0


def test_the_card_says_what_does_not_hold() -> None:
    card = (DIRECTORY / "README.md").read_text(encoding="utf-8")
    unmet = card.count("| NO |")
    assert ("All of them hold." in card) == (unmet == 0)
    assert unmet == 0 or f"{unmet} of them do not hold" in card


def test_the_direction_is_a_signature(
    model: LlamaForCausalLM, windows: torch.Tensor, stream: torch.Tensor
) -> None:
    direction = empirical_direction(model, windows)
    tuned = tiny_lm.fine_tune(model, stream, steps=3, length=64)
    assert not torch.equal(tuned.lm_head.weight, model.lm_head.weight)
    assert acute_angle(empirical_direction(tuned, windows), direction) < 10
    other = directions(PLANT, model.config.hidden_size, seed=1)[1]
    assert acute_angle(other, direction) > 80


def test_build_follows_the_seed() -> None:
    small = {
        "hidden_size": 64,
        "heads": 2,
        "kv_heads": 1,
        "intermediate_size": 96,
        "vocab_size": 64,
    }
    first, again, other = (tiny_lm.build(seed, **small).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    tokens = torch.randint(1, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    tokens[:, [0, 9]] = 0
    planted = hidden_states(tiny_lm.build(3, **small), tokens)
    plain = hidden_states(tiny_lm.build(3, plant=None, **small), tokens)
    assert planted[2].abs().max() > 200 * planted[2].abs().median()
    assert plain[2].abs().max() < 20 * plain[2].abs().median()


def test_a_plant_that_does_not_fit_is_refused() -> None:
    with pytest.raises(SettingsError, match="decay at layer 4 of 3 layers"):
        tiny_lm.build(layers=3)


def test_training_writes_a_checkpoint_that_the_check_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = " ".join(f"word{i % 97} of {i % 13} or more\n\nThen" for i in range(60))
    monkeypatch.setattr(
        tiny_lm.corpus, "documents", lambda: [(f"document {i}", f"{i} {words}") for i in range(40)]
    )
    monkeypatch.setattr(tiny_lm_card, "sample", lambda *_: "Return a list of words")
    original = tiny_lm.train
    monkeypatch.setattr(
        tiny_lm, "train", lambda out, **given: original(out, batch=1, length=32, **given)
    )
    out = tmp_path / "model"
    # Two steps cannot meet the requirements, and the exit code says so.
    assert tiny_lm.main(["train", "-o", str(out), "--steps", "2"]) == 1
    assert "loss_without_neuron" in capsys.readouterr().out
    assert "{" not in (out / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(out)("a")["input_ids"][0] == 0
    assert tiny_lm.main(["train", "-o", str(out), "--steps", "2"]) == 2
    assert "give --overwrite to replace it" in capsys.readouterr().err


def test_an_unknown_reference_model_is_named() -> None:
    with pytest.raises(UnknownNameError, match="tiny-lm"):
        checkpoint_path("tiny-ml")
