from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from postlude.errors import CheckpointError, OutputExistsError, SettingsError
from postlude.runs.loading import load
from postlude.zoo.audio_llm import build, build_processor, make
from postlude.zoo.speech_answers import ALL, LONG_QUESTION, question


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor()


def test_the_same_seed_gives_the_same_model(processor: Any) -> None:
    one, same, other = (build(seed, processor=processor, width=32, heads=2) for seed in (1, 1, 2))
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_the_vocabulary_is_the_same_every_time(processor: Any) -> None:
    again = build_processor().tokenizer
    assert again.get_vocab() == processor.tokenizer.get_vocab()
    long = "noi=3 dis=5 con=5 eff=4 nat=4 mos=3 | noise hum 0.8-1.6 | dist none | pause none"
    tokens = again(long)["input_ids"]
    assert again.decode(tokens) == long and len(tokens) < 32
    assert again(LONG_QUESTION)["input_ids"] == [len(again) - 1]
    for dimension in ALL:
        tokens = again(question(dimension))["input_ids"]
        assert again.decode(tokens) == question(dimension) and len(tokens) < 8
    # The digit of a short answer is that of a long one.
    assert again("noi=3")["input_ids"][-1:] == again("3")["input_ids"]


def test_windows_of_the_processor_fit_the_encoder(processor: Any) -> None:
    model = build(processor=processor)
    assert sum(one.numel() for one in model.parameters()) < 1.1e6
    heard = processor(text=["<sound>"], audio=[torch.rand(56_000).numpy()], sampling_rate=16_000)
    # 3.5 s; one embedding for 80 ms.
    assert heard["input_ids"].shape[1] == -(-3500 // 80)
    with torch.no_grad():
        logits = model(**heard).logits
    assert logits.shape[-1] == len(processor.tokenizer) and bool(logits.isfinite().all())


def test_features_of_speech_like_sound_arrive_at_unit_size(processor: Any) -> None:
    model = build(processor=processor)
    time = torch.arange(48_000) / 16_000
    sound = (torch.sin(2 * torch.pi * 140 * time) * torch.sin(3 * time).clamp(min=0)).numpy()
    features = processor(text=["<sound>"], audio=[sound], sampling_rate=16_000)["input_features"]
    with torch.no_grad():
        found = model.model.audio_tower.conv1(features[..., :150])
    assert 0.3 < float(found.std()) < 6


def test_make(tmp_path: Path) -> None:
    made = make(tmp_path / "out", seed=3)
    assert made["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    with pytest.raises(OutputExistsError, match="--overwrite"):
        make(tmp_path / "out")


def test_the_name_says_how_it_is_made() -> None:
    with pytest.raises(CheckpointError, match=r"postlude\.zoo\.audio_llm make -o DIR"):
        load("zoo:audio-llm")


def test_bad_settings(processor: Any) -> None:
    with pytest.raises(SettingsError, match="width is 36 for 4 heads"):
        build(processor=processor, width=36)
