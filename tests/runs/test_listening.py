from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from postlude.errors import ArchitectureError, CheckpointError, DataError, SettingsError
from postlude.runs.audio import Recording
from postlude.runs.listening import Listener, generate, join_features
from postlude.runs.loading import load
from postlude.surgery.anatomy import AudioAnatomy

from ..surgery.audio_models import KINDS, recording, write

PROMPTS = ["Rate the noise", "Rate the distortion of this speech"]


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(write(tmp_path_factory.mktemp(request.param), request.param), device="cpu")


@pytest.fixture(scope="module")
def flamingo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(write(tmp_path_factory.mktemp("af3")), device="cpu")


def own_inputs(checkpoint: Any, recordings: list[Recording], texts: list[str]) -> Any:
    """What the processor makes of texts and recordings together."""
    return checkpoint.processor(
        text=texts,
        audio=[one.samples for one in recordings],
        sampling_rate=16_000,
        return_tensors="pt",
        text_kwargs={"padding": True, "padding_side": "left"},
    )


def test_what_is_loaded(checkpoint: Any) -> None:
    assert checkpoint.kind == "audio" and checkpoint.reads_tokens
    assert checkpoint.tokenizer is checkpoint.processor.tokenizer
    assert isinstance(checkpoint.language, AudioAnatomy) and checkpoint.context == 256
    assert len(list(checkpoint.anatomy.linears())) == 2 * 7


def test_inputs_are_those_of_the_processor(checkpoint: Any) -> None:
    listener = Listener(checkpoint)
    heard = [recording(0.6, 1), recording(0.95, 2)]
    found = listener.prepare([listener.features(one) for one in heard], PROMPTS)
    expected = own_inputs(checkpoint, heard, [listener.written(one) for one in PROMPTS])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_padding_is_not_kept(checkpoint: Any) -> None:
    features = Listener(checkpoint).features(recording(0.4))
    kept = next(one for one in features.inputs.values() if one.is_floating_point())
    assert features.columns == 50 and kept.shape[-1] < 25
    assert next(iter(join_features([features]).values())).shape == (1, 16, 50)
    assert join_features([]) == {}


def test_answers_are_those_of_transformers(checkpoint: Any) -> None:
    listener = Listener(checkpoint)
    heard = [recording(0.6, 1), recording(0.95, 2)]
    inputs = own_inputs(checkpoint, heard, [listener.written(one) for one in PROMPTS])
    expected = checkpoint.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    expected = expected[:, inputs["input_ids"].shape[1] :].tolist()
    found = generate(checkpoint, heard, PROMPTS, max_new_tokens=4)
    alone = generate(checkpoint, heard, PROMPTS, max_new_tokens=4, batch_size=1)
    for answer, one, row in zip(found, alone, expected, strict=True):
        assert list(answer.tokens) == row[: len(answer.tokens)]
        assert one.tokens == answer.tokens


def test_one_recording_for_several_questions_is_heard_once(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = recording(0.5, 3)
    separate = [recording(0.5, 3), recording(0.5, 3)]
    rows: list[int] = []
    encoder = checkpoint.model.get_submodule(checkpoint.anatomy.encoder)
    handle = encoder.conv1.register_forward_hook(lambda _, args, out: rows.append(len(out)))
    shared = generate(checkpoint, [heard, heard], PROMPTS, max_new_tokens=3)
    handle.remove()
    assert rows == [1]
    assert shared == generate(checkpoint, separate, PROMPTS, max_new_tokens=3)


def test_long_recordings(checkpoint: Any) -> None:
    listener = Listener(checkpoint)
    long = recording(1.6)
    if checkpoint.anatomy.family and listener.longest == 1:
        # Qwen2-Audio's processor would cut it at its only window.
        with pytest.raises(DataError, match=r"lasts 1\.6 s and the model hears at most 1 s"):
            listener.features(long)
        return
    features = listener.features(long)
    assert features.windows == 2 and features.embeddings > 13


def test_sampling_is_seeded(flamingo: Any) -> None:
    heard = [recording(0.5)] * 2
    first, again = (
        generate(flamingo, heard, PROMPTS, max_new_tokens=6, temperature=1.0, seed=3)
        for _ in range(2)
    )
    assert first == again
    assert first != generate(flamingo, heard, PROMPTS, max_new_tokens=6, temperature=1.0, seed=4)


def test_what_is_refused(flamingo: Any, tiny_tokenizer: Any) -> None:
    import dataclasses

    heard = recording(0.5)
    with pytest.raises(DataError, match="2 recordings and 1 prompts"):
        generate(flamingo, [heard] * 2, ["a"])
    with pytest.raises(DataError, match="becomes 2 recordings"):
        generate(flamingo, [heard], ["is <sound> noisy?"])
    with pytest.raises(DataError, match="8000 samples a second"):
        generate(flamingo, [Recording(np.zeros(8000, np.float32), 8000)], ["a"])
    with pytest.raises(SettingsError, match="the model holds 256"):
        generate(flamingo, [heard], ["a"], max_new_tokens=250)
    with pytest.raises(SettingsError, match="temperature is -1"):
        generate(flamingo, [heard], ["a"], temperature=-1)
    with pytest.raises(DataError, match="has no processor"):
        generate(dataclasses.replace(flamingo, processor=None), [heard], ["a"])


def test_a_language_model_hears_nothing(make_model: Any, tiny_tokenizer: Any) -> None:
    from postlude.runs.checkpoint import Checkpoint
    from postlude.surgery.anatomy import anatomy_of

    model = make_model("llama")
    with pytest.raises(ArchitectureError, match="is a language model and reads no recordings"):
        Listener(Checkpoint(model, tiny_tokenizer, anatomy_of(model)))


def test_saved_and_loaded(flamingo: Any, tmp_path: Path) -> None:
    flamingo.save(tmp_path / "out")
    again = load(tmp_path / "out", device="cpu")
    heard = recording(0.5)
    assert generate(again, [heard], ["a"], max_new_tokens=3) == generate(
        flamingo, [heard], ["a"], max_new_tokens=3
    )


def test_other_classes_are_refused(flamingo: Any, tmp_path: Path) -> None:
    shutil.copytree(flamingo.path, tmp_path / "other")
    file = tmp_path / "other" / "config.json"
    config = json.loads(file.read_text())
    config["architectures"] = ["MusicFlamingoForConditionalGeneration"]
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="expected one of AudioFlamingo3For"):
        load(tmp_path / "other")


def test_the_language_model_is_quantized(tmp_path: Path) -> None:
    import postlude as pl
    from postlude.quantization import RTN

    small = pl.quantize(load(write(tmp_path / "base"), device="cpu"), RTN(weights=4))
    small.save(tmp_path / "small")
    again = load(tmp_path / "small", device="cpu")
    assert again.kind == "audio" and again.made_by()["method"] == "rtn"
    from postlude.surgery.layers import quantized_linears

    paths = {path for path, _ in quantized_linears(again.model)}
    assert paths == set(again.anatomy.linears())
    heard = recording(0.5)
    assert generate(again, [heard], ["a"], max_new_tokens=4) == generate(
        small, [heard], ["a"], max_new_tokens=4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_features_take_the_type_of_the_model(kind: str, tmp_path: Path) -> None:
    narrow = load(write(tmp_path / kind, kind), dtype="bfloat16", device="cpu")
    assert narrow.model.dtype == torch.bfloat16
    assert len(generate(narrow, [recording(0.5)], ["a"], max_new_tokens=2)[0].tokens) >= 1
