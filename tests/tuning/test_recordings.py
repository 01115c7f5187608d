from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import postlude as pl
from postlude.errors import DataError, SettingsError
from postlude.runs.audio import write_wav
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.listening import Listener
from postlude.runs.loading import load
from postlude.runs.progress import Progress
from postlude.surgery.anatomy import anatomy_of
from postlude.surgery.head import LanguageHead
from postlude.tuning import trainer
from postlude.tuning.adapters import Adapter
from postlude.tuning.batches import collate, make_plan, model_inputs
from postlude.tuning.examples import Examples, read_examples
from postlude.tuning.objective import TuneRun
from postlude.tuning.recordings import recordings_for
from postlude.tuning.run import tune
from postlude.tuning.supervised import objective_of

from ..surgery.audio_models import KINDS, make, recording, write, write_data

ROWS = [
    (number, prompt, str((3 * number + len(prompt)) % 5 + 1))
    for number in range(4)
    for prompt in ("Rate the noise", "Rate the distortion of this speech")
]
QUICK = TuneRun(batch_size=8, epochs=2, learning_rate=1e-2, warmup=0.0)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {kind: make(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("clips"), ROWS)


@pytest.fixture(params=KINDS)
def checkpoint(request: pytest.FixtureRequest, models: dict[str, Any]) -> Checkpoint:
    return of(models, request.param)


@pytest.fixture
def flamingo(models: dict[str, Any]) -> Checkpoint:
    return of(models, "audioflamingo3")


def of(models: dict[str, Any], kind: str) -> Checkpoint:
    model, processor = models[kind]
    return Checkpoint(model, processor.tokenizer, anatomy_of(model), processor=processor)


def read(checkpoint: Checkpoint, data: Path) -> Examples:
    return read_examples(data, checkpoint.tokenizer, 256, None, recordings_for(checkpoint))


def states(checkpoint: Checkpoint, examples: Examples, rows: list[list[int]]) -> Tensor:
    batch = collate(examples, rows)
    with torch.no_grad():
        found = LanguageHead(checkpoint.model, checkpoint.language).states(**model_inputs(batch))
    return found.flatten(0, 1)[batch["predictors"]]


def parts(model: Any, prefix: str) -> dict[str, Tensor]:
    return {
        name: value.clone() for name, value in model.state_dict().items() if name.startswith(prefix)
    }


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_tokens_are_those_of_the_processor(checkpoint: Checkpoint, data: Path) -> None:
    examples = read(checkpoint, data)
    listener = Listener(checkpoint)
    for at, (number, prompt, completion) in enumerate(ROWS):
        heard = recording(0.4 + 0.1 * number, number)
        written = listener.written(prompt, completion)
        own = checkpoint.processor(
            text=[written], audio=[heard.samples], sampling_rate=16_000, return_tensors="pt"
        )["input_ids"][0]
        found = examples.ids(at)
        assert torch.equal(found, own[: len(found)])
        assert not listener.tokenizer.decode(own[len(found) :]).strip()
        learned = listener.tokenizer.decode(found[examples.targets(at)])
        assert learned == completion + checkpoint.tokenizer.eos_token
    counts = examples.counts()
    assert counts["recordings"] == 4 and counts["sequences"] == 8 and not counts["converted"]
    assert counts["recorded_seconds"] == pytest.approx(0.4 + 0.5 + 0.6 + 0.7)


def test_padding_packing_and_sharing_change_nothing(checkpoint: Checkpoint, data: Path) -> None:
    examples = read(checkpoint, data)
    together = states(checkpoint, examples, [[index] for index in range(8)])
    single = torch.cat([states(checkpoint, examples, [[index]]) for index in range(8)])
    assert torch.allclose(together, single, atol=1e-5)
    packed = states(checkpoint, examples, [[0, 1, 2], [3], [4, 5, 6, 7]])
    assert torch.allclose(packed, single, atol=1e-5)


def test_weight_one_is_cross_entropy(checkpoint: Checkpoint, data: Path) -> None:
    examples = read(checkpoint, data)
    losses = []
    for index in range(8):
        inputs = model_inputs(collate(examples, [[index]]))
        inputs.pop("recordings")
        with torch.no_grad():
            logits = checkpoint.model(**inputs).logits[0]
        learned = examples.targets(index).nonzero()[:, 0]
        losses.append(
            functional.cross_entropy(
                logits[learned - 1], examples.ids(index)[learned], reduction="none"
            )
        )
    expected = float(torch.cat(losses).mean())
    run = TuneRun(batch_size=8, steps=1, learning_rate=1e-9)
    assert tune(checkpoint, data, objective_of("sft"), run).log[0]["loss"] == pytest.approx(
        expected, rel=1e-5
    )
    dft = tune(checkpoint, data, objective_of("dft"), run).log[0]
    assert dft["mean_loss"] == pytest.approx(expected, rel=1e-5) and dft["loss"] < expected


def test_what_is_trained(checkpoint: Checkpoint, data: Path) -> None:
    anatomy: Any = checkpoint.anatomy
    before = checkpoint.model.state_dict()
    trained = tune(checkpoint, data, objective_of("sft"), QUICK)
    frozen = tune(checkpoint, data, objective_of("sft"), QUICK, encoder="frozen")
    assert trained.result["encoder"] == "trained" and frozen.result["encoder"] == "frozen"
    assert trained.log[-1]["loss"] < trained.log[0]["loss"]
    positions = f"{anatomy.encoder}.{anatomy.positions}"
    for name, old in before.items():
        new, held = (
            trained.checkpoint.model.state_dict()[name],
            frozen.checkpoint.model.state_dict()[name],
        )
        assert torch.equal(held, old) == name.startswith(anatomy.encoder), name
        assert torch.equal(new, old) == (name == positions), name


def test_lora_beside_a_trained_encoder(
    flamingo: Checkpoint, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flamingo = load(write(tmp_path / "base"), device="cpu")
    lora = Adapter("lora", 2, target=("q_proj", "v_proj"))
    tuned = tune(flamingo, data, objective_of("sft"), QUICK, adapter=lora, out=tmp_path / "out")
    names = [n for n, p in tuned.checkpoint.model.named_parameters() if p.requires_grad]
    adapted = [name for name in names if "lora" in name]
    assert len(adapted) == 2 * 2 * 2 and all(".language_model." in name for name in adapted)
    whole = {name.split(".")[3] for name in names if "modules_to_save" in name}
    assert whole == {"audio_tower", "multi_modal_projector"}
    assert not any("embed_positions" in name for name in names)
    merged = pl.load(tmp_path / "out", device="cpu")
    encoder = "model.audio_tower.conv1"
    assert not equal(parts(merged.model, encoder), parts(flamingo.model, encoder))
    embeddings = "model.language_model.embed_tokens"
    assert equal(parts(merged.model, embeddings), parts(flamingo.model, embeddings))
    held = tune(flamingo, data, objective_of("sft"), QUICK, adapter=lora, encoder="frozen")
    names = [n for n, p in held.checkpoint.model.named_parameters() if p.requires_grad]
    assert not any("audio_tower" in name for name in names)
    with pytest.raises(SettingsError, match=r"no linear of the language model is called"):
        tune(
            flamingo, data, objective_of("sft"), QUICK, adapter=Adapter("lora", 2, target=("fc1",))
        )


def test_saved_with_its_processor_and_merged(data: Path, tmp_path: Path) -> None:
    base = load(write(tmp_path / "base"), device="cpu")
    run = TuneRun(batch_size=8, steps=2, learning_rate=1e-2)
    tuned = tune(
        base,
        data,
        objective_of("sft"),
        run,
        adapter=Adapter("lora", 2),
        merge=True,
        out=tmp_path / "m",
    )
    again = load(tmp_path / "m", device="cpu")
    assert again.kind == "audio" and again.processor.chat_template
    assert equal(again.model.state_dict(), tuned.checkpoint.model.state_dict())
    assert tuned.result["reload_difference"] == 0 and tuned.result["merge_difference"] < 1e-4


def test_a_killed_run_resumes_bit_equal(
    flamingo: Checkpoint, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TuneRun(batch_size=2, learning_rate=1e-3, epochs=2)
    goal = objective_of("sft", save_every=2)
    whole = tune(flamingo, data, goal, run)
    original = trainer.Resumable._write_row

    def interrupted(self: Any, step: int) -> None:
        original(self, step)
        if step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Resumable, "_write_row", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(flamingo, data, goal, run, out=tmp_path / "out")
    resumed = tune(flamingo, data, goal, run, out=tmp_path / "out")
    assert [row["loss"] for row in resumed.log] == [row["loss"] for row in whole.log]
    assert equal(resumed.checkpoint.model.state_dict(), whole.checkpoint.model.state_dict())


def test_a_stored_prior(flamingo: Checkpoint, data: Path, tmp_path: Path) -> None:
    run = TuneRun(batch_size=8, steps=2, learning_rate=1e-2)
    pl.tune_prior(flamingo, data, tmp_path / "prior")
    stored = pl.tune(flamingo, data, "prift-prob", run, prior=tmp_path / "prior")
    beside = pl.tune(flamingo, data, "prift-prob", run)
    for one, other in zip(stored.log, beside.log, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["mean_weight"] < 1
    write_wav(data.parent / "wav" / "0.wav", recording(0.4, 9).samples)
    try:
        with pytest.raises(DataError, match="does not belong to this run"):
            pl.tune(flamingo, data, "prift-prob", run, prior=tmp_path / "prior")
    finally:
        write_wav(data.parent / "wav" / "0.wav", recording(0.4, 0).samples)


def test_examples_of_one_recording_stand_together(flamingo: Checkpoint, data: Path) -> None:
    examples = read(flamingo, data)
    recordings: Any = examples.recordings
    order = [5, 0, 3, 6, 1, 2, 7, 4]
    assert recordings.together(order, 8) == [5, 4, 0, 1, 3, 2, 6, 7]
    assert recordings.together(order, 7) == order
    for rows in make_plan(examples, TuneRun(batch_size=8), 256).batches:
        batch = collate(examples, rows)
        assert len(batch["recordings"]) == 8 and len(batch["recordings"].unique()) == 4


def test_lines_without_recordings_may_be_among_them(
    flamingo: Checkpoint, data: Path, tmp_path: Path
) -> None:
    mixed = data.parent / "mixed.jsonl"
    lines = [*data.read_text().splitlines()[:2], json.dumps({"text": "noi=3 dis=4"})]
    mixed.write_text("\n".join(lines) + "\n")
    examples = read(flamingo, mixed)
    alone = [states(flamingo, examples, [[index]]) for index in range(3)]
    assert torch.allclose(
        states(flamingo, examples, [[2], [0], [1]]), torch.cat([alone[2], *alone[:2]]), atol=1e-5
    )
    assert "recordings" not in collate(examples, [[2]])


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        ("wav/none.wav", r"line 1: there is no recording .*none\.wav"),
        ("../other.wav", r'line 1 names the recording "\.\./other\.wav", which is outside'),
        ("/etc/hosts", "which is outside"),
        (3, 'has "audio" as a int'),
        ("silent.wav", r"line 1: .*is silent"),
        ("train.jsonl", r"line 1: .*is not a recording"),
    ],
)
def test_bad_lines_are_named(
    flamingo: Checkpoint, tmp_path: Path, audio: Any, message: str
) -> None:
    write_wav(tmp_path / "silent.wav", np.zeros(16_000, np.float32))
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps({"audio": audio, "prompt": "Rate", "completion": "3"}) + "\n")
    with pytest.raises(DataError, match=message):
        tune(flamingo, file, objective_of("sft"), QUICK)


def test_other_bad_input(
    flamingo: Checkpoint, data: Path, tmp_path: Path, make_model: Any, tiny_tokenizer: Any
) -> None:
    model = make_model("llama")
    deaf = Checkpoint(model, tiny_tokenizer, anatomy_of(model))
    with pytest.raises(DataError, match=r'line 1 has a recording \("audio"\), and the model hears'):
        tune(deaf, data, objective_of("sft"), QUICK)
    with pytest.raises(SettingsError, match="without an audio encoder"):
        tune(deaf, data, objective_of("sft"), QUICK, encoder="frozen")
    with pytest.raises(SettingsError, match="expected trained or frozen"):
        tune(flamingo, data, objective_of("sft"), QUICK, encoder="open")
    with pytest.raises(SettingsError, match="dpo reads no recordings"):
        tune(flamingo, data, objective_of("dpo"), QUICK)
    file = data.parent / "half.jsonl"
    file.write_text(json.dumps({"audio": "wav/0.wav", "prompt": "Rate"}) + "\n")
    with pytest.raises(DataError, match='expected "audio", "prompt" and "completion"'):
        tune(flamingo, file, objective_of("sft"), QUICK)
    file.write_text(json.dumps({"audio": "wav/0.wav", "prompt": "Rate", "completion": ""}) + "\n")
    with pytest.raises(DataError, match="line 1: the response is empty"):
        tune(flamingo, file, objective_of("sft"), QUICK)


def test_conversions_are_said(
    flamingo: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = recording(0.5).samples[:4000]
    write_wav(tmp_path / "slow.wav", samples, rate=8000)
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps({"audio": "slow.wav", "prompt": "a", "completion": "3"}) + "\n")
    run = TuneRun(steps=1)
    tuned = tune(flamingo, file, objective_of("sft"), run, progress=Progress(show=True))
    assert tuned.result["data"]["converted"] == {"8000 Hz to 16000 Hz": 1}
    assert "1 recordings converted: 8000 Hz to 16000 Hz" in capsys.readouterr().err


def test_from_the_command_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from postlude.cli import run as command_line

    base = write(tmp_path / "base")
    words = ["tune", str(base), os.fspath(data), "-o", str(tmp_path / "out"), "--device", "cpu"]
    words += ["--encoder", "frozen", "--batch-size", "8", "--json"]
    assert command_line(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["encoder"] == "frozen" and result["data"]["recordings"] == 4
