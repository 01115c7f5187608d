from __future__ import annotations

import copy
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from postlude.errors import DataError, SettingsError
from postlude.runs.audio import write_wav
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.progress import Progress
from postlude.surgery.anatomy import anatomy_of
from postlude.tuning.audio_groups import AudioGroups
from postlude.tuning.credit import token_dimensions
from postlude.tuning.objective import Job, TuneRun
from postlude.tuning.reinforcement import GRPO
from postlude.tuning.speech_rewards import SPEECH_REWARDS
from postlude.zoo.audio_llm import build, build_processor
from postlude.zoo.speech_answers import LONG_QUESTION

from ..surgery import audio_models
from .jobs import killed_at, parameters, with_lora

COLUMNS = {
    "Background noise": 3,
    "Distortion": 5,
    "Continuity": 5,
    "Listening effort": 4,
    "Naturalness": 4,
    "Overall quality": 3,
    "Noise Description": "hum noise 0.8-1.6s",
    "Distortion description": "not distorted",
    "Unnatural pause": "very smooth",
}
RIGHT = "noi=3 dis=5 con=5 eff=4 nat=4 mos=3 | noise hum 0.8-1.6 | dist none | pause none"
SMALL = {"generations": 4, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    processor = build_processor()
    model = build(0, processor=processor, width=16, encoder_layers=1, layers=1, heads=2)
    return Checkpoint(model, processor.tokenizer, anatomy_of(model), processor=processor)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    lines = []
    for number, seconds in enumerate((0.5, 0.9, 0.7, 0.6)):
        sound = generator.normal(size=int(16000 * seconds)) * 0.05
        write_wav(tmp_path / f"{number}.wav", sound.astype("float32"))
        lines.append({"audio": f"{number}.wav", "prompt": LONG_QUESTION, "id": number, **COLUMNS})
    file = tmp_path / "clips.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def make_job(checkpoint: Checkpoint, data: Path, *, directory: str = "run", lora: bool = False,
             reference: Any = None, **run: Any) -> Job:  # fmt: skip
    model = copy.deepcopy(checkpoint.model)
    given = {"steps": 2, "batch_size": 8, "learning_rate": 1e-2, "warmup": 0.0, **run}
    work = dataclasses.replace(checkpoint, model=model)
    trained = with_lora(model) if lora else model
    return Job(work, trained, data, TuneRun(**given), reference, data.parent / directory)


def letters(completions: list[str]) -> list[float]:
    return [sum(letter.isalpha() for letter in text) / 10 for text in completions]


class Halves:
    """A reward of two dimensions, of the first and the second half of an answer."""

    dimensions = ("first", "second")

    def __call__(self, completions: list[str], **columns: list[Any]) -> list[float]:
        return [sum(one) for one in self.by_dimension(completions, **columns)]

    def by_dimension(self, completions: list[str], **columns: list[Any]) -> list[list[float]]:
        assert set(columns) >= {"audio", "id", "prompts", *COLUMNS}
        return [
            [float(text[: len(text) // 2].count("i")), -float(text[len(text) // 2 :].count("i"))]
            for text in completions
        ]

    def segments(self, completion: str) -> dict[str, tuple[int, int]]:
        half = len(completion) // 2
        return {"first": (0, half), "second": (half, len(completion))}

    def check(self, columns: Any) -> None:
        pass


@pytest.mark.parametrize("lora", [False, True])
def test_the_reward_rises_and_the_log_says_how(
    checkpoint: Checkpoint, data: Path, lora: bool
) -> None:
    rate = 2e-2 if lora else 2e-3
    job = make_job(checkpoint, data, steps=8, lora=lora, batch_size=16, learning_rate=rate)
    before = parameters(job.model)
    # The logits of a random model are small: a low temperature makes it choose among few tokens.
    objective = GRPO(letters, **SMALL, beta=0.01, temperature=0.03)
    objective.check(job)
    held = None
    if not lora:
        held = dataclasses.replace(checkpoint, model=copy.deepcopy(checkpoint.model))
    found = objective.train(dataclasses.replace(job, reference=held))
    rewards = [row["reward"] for row in found.log]
    if not lora:
        # Adapters of rank 2 in the one block of this model move too little to tell.
        assert sum(rewards[-3:]) > sum(rewards[:3]) * 1.3, rewards
    for name in (
        "loss", "learning_rate", "reward", "reward_std", "kl", "completion_length",
        "zero_variance_groups", "truncated_completions", "entropy", "answers_per_second",
    ):  # fmt: skip
        assert all(isinstance(row[name], float) for row in found.log), name
    assert found.log[0]["kl"] == pytest.approx(0, abs=1e-4) and found.log[-1]["kl"] > 1e-3
    assert found.result["steps"] == 8 and found.result["prompts"] == 4
    assert found.result["samples"][0]["prompt"].endswith(f".wav: {LONG_QUESTION}")
    for name, value in parameters(job.model).items():
        fixed = "embed_positions" in name
        if lora:
            assert torch.equal(value, before[name]) == ("lora_" not in name), name
        elif not fixed:
            assert not torch.equal(value, before[name]), name


def test_no_learning_rate_changes_nothing(checkpoint: Checkpoint, data: Path) -> None:
    job = make_job(checkpoint, data, learning_rate=0.0)
    before = parameters(job.model)
    found = GRPO("speech-verifiable", **SMALL, beta=0.04).train(job)
    assert all(torch.equal(value, before[name]) for name, value in parameters(job.model).items())
    assert [row["step"] for row in found.log] == [1, 2]
    assert set(found.result["final_rewards"]) == set(
        SPEECH_REWARDS["speech-verifiable"]("").dimensions
    )


@pytest.mark.parametrize("credit", ["answer", "dimension"])
def test_equal_rewards_teach_nothing_but_the_divergence(
    checkpoint: Checkpoint, data: Path, credit: str
) -> None:
    # An untrained model says nothing that can be parsed: every reward is 0.
    other = dataclasses.replace(checkpoint, model=copy.deepcopy(checkpoint.model))
    with torch.no_grad():
        other.model.lm_head.weight.mul_(1.5)
    for beta, learns in ((0.0, False), (0.5, True)):
        told = io.StringIO()
        job = make_job(checkpoint, data, steps=1, reference=other)
        job = dataclasses.replace(job, progress=Progress(show=True, stream=told))
        found = GRPO("speech-verifiable", **SMALL, beta=beta, credit=credit).train(job)
        assert found.log[0]["zero_variance_groups"] == 1
        assert found.log[0]["zero_variance_dimensions"] == 1
        assert found.log[0]["unreadable_answers"] == 1
        assert "no answer of the first step could be read" in told.getvalue()
        # All clips have the same columns: who says that of each of them is right.
        assert found.result["baseline_answer"] == RIGHT
        assert found.result["baseline_reward"] == pytest.approx(1.1)
        assert (found.log[0]["gradient_norm"] > 0) == learns


@pytest.mark.parametrize("kind", audio_models.KINDS)
def test_the_gradient_against_reading_every_answer_alone(
    data: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model, processor = audio_models.make(kind)
    checkpoint = Checkpoint(model, processor.tokenizer, anatomy_of(model), processor=processor)
    kept: list[Any] = []
    ask = AudioGroups._ask

    def watched(self: Any, model: Any, chosen: Any, number: int) -> Any:
        kept.append(ask(self, model, chosen, number))
        return kept[-1]

    norms: list[dict[str, torch.Tensor]] = []
    clip = AudioGroups._clip_grad_norm

    def caught(self: Any, model: Any) -> Any:
        norms.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return clip(self, model)

    monkeypatch.setattr(AudioGroups, "_ask", watched)
    monkeypatch.setattr(AudioGroups, "_clip_grad_norm", caught)
    job = make_job(checkpoint, data, steps=1, learning_rate=0.0)
    GRPO(Halves(), **SMALL, credit="dimension").train(job)
    group = kept[0]
    model = copy.deepcopy(checkpoint.model).eval()
    loss = torch.zeros(())
    mask = group.answers.mask
    for row, ids in enumerate(group.answers.ids()):
        prompt = row // 4
        inputs = {
            name: value[prompt : prompt + 1] if len(value) == 2 else value
            for name, value in group.inputs.items()
        }
        own = inputs["attention_mask"][0] == 1
        text = torch.cat([inputs["input_ids"][0][own], torch.tensor(ids)])[None]
        audio = {n: v for n, v in inputs.items() if n not in ("input_ids", "attention_mask")}
        logits = model(input_ids=text, attention_mask=torch.ones_like(text), **audio).logits[0]
        every = torch.log_softmax(logits[int(own.sum()) - 1 : -1], -1)
        chosen = every.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        # With one pass the ratio is 1 and its gradient that of the logarithm.
        weight = group.advantages[row, : int(mask[row].sum())]
        loss = loss - (chosen * weight).mean() / len(mask)
    loss.backward()
    assert norms and float(loss.detach().abs()) > 0
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("audio_tower" in name and bool(grad.any()) for name, grad in named.items())
    for name, gradient in named.items():
        assert torch.allclose(norms[0][name], gradient, atol=2e-5, rtol=1e-3), name


def test_divided_credit_reaches_only_the_tokens_of_a_dimension(checkpoint: Checkpoint) -> None:
    tokenizer = checkpoint.tokenizer
    reward: Any = SPEECH_REWARDS["speech-verifiable"]("")
    texts = [RIGHT, RIGHT.replace(" eff=4", "").replace("| pause none", "").strip(), "hum"]
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    found = token_dimensions(tokenizer, ids, texts, reward)
    names = list(reward.dimensions)
    assert found.shape == (3, max(map(len, ids)), len(names))

    def said(row: int, name: str) -> str:
        tokens = [i for i, one in enumerate(ids[row]) if found[row, i, names.index(name)]]
        return " ".join(str(tokenizer.decode([ids[row][i] for i in tokens])).split())

    assert said(0, "noi") == "noi=3" and said(0, "mos") == "mos=3"
    assert said(0, "noise") == "noise hum" and said(0, "noise_times") == "0.8-1.6"
    assert said(0, "dist") == said(0, "dist_times") == "dist none"
    assert said(0, "format") == f"| | |{tokenizer.eos_token}"
    # What is left out is blamed on what stands between.
    assert said(1, "eff") == said(1, "pause") == said(1, "format") == f"| |{tokenizer.eos_token}"
    assert all(said(2, name) == f"hum{tokenizer.eos_token}" for name in names)
    assert not found[2, len(ids[2]) :].any()


def test_a_killed_run_ends_with_the_same_bits(
    checkpoint: Checkpoint, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = GRPO(Halves(), **SMALL, iterations=2, credit="dimension")

    def job(directory: str) -> Job:
        return make_job(checkpoint, data, directory=directory, steps=6, batch_size=4, accumulate=2)

    whole = job("whole")
    expected = objective.train(whole)
    revive = killed_at(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        objective.train(job("run"))
    assert [path.name for path in (data.parent / "run").glob("step-*")] == ["step-2"]
    revive()
    again = job("run")
    found = objective.train(again)
    timed = {"seconds": 0, "answers_per_second": 0}
    assert [{**row, **timed} for row in found.log] == [{**row, **timed} for row in expected.log]
    # The second pass over the same answers has moved from where they were sampled.
    assert expected.log[0]["loss"] != expected.log[1]["loss"]
    assert expected.log[0]["reward"] == expected.log[1]["reward"]
    for name, value in parameters(again.model).items():
        assert torch.equal(value, parameters(whole.model)[name]), name


def test_what_is_refused(checkpoint: Checkpoint, data: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], pattern: str, objective: GRPO, **run: Any) -> None:
        job = make_job(checkpoint, data, **run)
        with pytest.raises(error) as caught:
            objective.check(job)
            objective.train(job)
        assert re.search(pattern, str(caught.value)), str(caught.value)

    with pytest.raises(SettingsError, match="credit is 'token'; expected answer, dimension"):
        GRPO(letters, **SMALL, credit="token")
    refused(SettingsError, "A step holds 6 answers", GRPO(letters, **SMALL), batch_size=6)
    refused(
        SettingsError,
        "loss_type is 'dapo'; expected grpo, bnpo, dr_grpo",
        GRPO(letters, **SMALL, loss_type="dapo"),
    )
    refused(
        SettingsError,
        "credit=dimension is for an audio",
        GRPO(letters, **SMALL, credit="dimension"),
    )
    refused(
        SettingsError,
        r"Prompt and recording of .*line 1 have \d+ tokens",
        GRPO(letters, max_new_tokens=1020, generations=4),
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "x"}, r"line 5 has keys \['prompt'\] and 'audio' is None; expected \"audio\""),
        ({"audio": "0.wav", "prompt": ""}, r"'prompt' is ''"),
        ({"audio": "9.wav", "prompt": "x"}, r"line 5: there is no recording .*9.wav"),
        ({"audio": "../0.wav", "prompt": "x"}, r"outside of"),
        ({"audio": "0.wav", "prompt": "x", "prompts": 1}, r"has a column 'prompts'"),
        ({"audio": "0.wav", "prompt": "x"}, r"line 5: .* has no column 'Background noise'"),
        ({"audio": "0.wav", "prompt": "x", "completion": "y"}, r"Take reinforce.jsonl, which has them"),
        ({"audio": "0.wav", "prompt": "x", **COLUMNS, "Noise Description": "hum 2-1s"}, r"is 'hum 2-1s'"),
    ],
)  # fmt: skip
def test_lines_that_are_refused(
    checkpoint: Checkpoint, data: Path, line: dict[str, Any], message: str
) -> None:
    with open(data, "a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(DataError) as caught:
        GRPO("speech-verifiable", **SMALL).check(make_job(checkpoint, data))
    assert re.search(message, str(caught.value)), str(caught.value)
