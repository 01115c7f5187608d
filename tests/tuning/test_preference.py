from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from postlude.errors import DataError, SettingsError
from postlude.tuning.preference import DPO, Pair, preference_losses, read_pairs, weighted_mean

from .jobs import CHAT, killed_at, make_job, parameters, write_lines

pytest.importorskip("trl")

ANSWERS = [
    (" yes", " no"),
    (" of course", " not at all"),
    (" it is", " never, never"),
    (" a", " bb"),
]


def lines(weights: list[float] | None = None) -> list[dict[str, Any]]:
    return [
        {"prompt": f"q{i}:", "chosen": chosen, "rejected": rejected}
        | ({} if weights is None else {"weight": weights[i]})
        for i, (chosen, rejected) in enumerate(ANSWERS)
    ]


def answer_logp(model: Any, tokenizer: Any, prompt: str, answer: str) -> torch.Tensor:
    """One answer at a time, by a loop over its tokens."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = tokenizer(prompt + answer + tokenizer.eos_token)["input_ids"]
    scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return torch.stack([scores[i - 1, ids[i]] for i in range(start, len(ids))]).sum()


def by_hand(model: Any, base: Any, tokenizer: Any, beta: float) -> torch.Tensor:
    losses = []
    for line in lines():
        ratios = []
        for key in ("chosen", "rejected"):
            with torch.no_grad():
                before = answer_logp(base, tokenizer, line["prompt"], line[key])
            ratios.append(answer_logp(model, tokenizer, line["prompt"], line[key]) - before)
        losses.append(-torch.log(torch.sigmoid(beta * (ratios[0] - ratios[1]))))
    return torch.stack(losses)


@pytest.fixture
def tiny(make_model: Callable[..., Any]) -> Any:
    return make_model()


def trainer_of(job: Any, pairs: list[Pair], beta: float = 0.1) -> Any:
    from postlude.tuning import on_trl
    from postlude.tuning.preference import _make_trainer
    from postlude.tuning.trainer import arguments

    trl = on_trl.import_trl()
    args = arguments(
        job.run, job.directory, job.model, 1, kind=trl.DPOConfig, beta=beta,
        per_device_train_batch_size=4, precompute_ref_log_probs=True,
        **on_trl.keep_activations(trl.DPOConfig),
    )  # fmt: skip
    reference = None if job.reference is None else job.reference.model
    return _make_trainer(job.model, args, pairs, job.checkpoint.tokenizer, reference)


# The loss


def test_weights_of_one_give_the_loss_of_trl(
    tmp_path: Path, tiny: Any, make_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    import trl
    from datasets import Dataset

    from postlude.tuning import on_trl

    other = make_model(seed=1)
    job = make_job(
        tiny, tiny_tokenizer, write_lines(tmp_path / "pairs.jsonl", lines()), reference=other
    )
    with on_trl.training(job):
        ours = trainer_of(job, read_pairs(job.data))
        theirs = trl.DPOTrainer(
            copy.deepcopy(tiny),
            ref_model=copy.deepcopy(other),
            args=dataclasses.replace(ours.args, precompute_ref_log_probs=False),
            train_dataset=Dataset.from_list(lines()),
            processing_class=copy.deepcopy(tiny_tokenizer),
        )
        losses, gradients = [], []
        for trainer in (ours, theirs):
            trainer.model.train()
            batch = next(iter(trainer.get_train_dataloader()))
            loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
            losses.append(float(loss.detach()))
            gradients.append([p.grad for p in trainer.model.parameters()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-7)
    for mine, its in zip(*gradients, strict=True):
        assert torch.allclose(mine, its, rtol=0, atol=1e-7)
    assert losses[0] == pytest.approx(
        float(by_hand(tiny, other, tiny_tokenizer, 0.1).mean().detach()), abs=1e-5
    )


def test_the_weighted_loss_against_a_loop(
    tmp_path: Path, tiny: Any, make_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    weights = [0.5, 2.0, 0.25, 4.0]
    other = make_model(seed=1)
    data = write_lines(tmp_path / "pairs.jsonl", lines(weights))
    job = make_job(tiny, tiny_tokenizer, data, reference=other, batch_size=4, steps=1)
    found = DPO(beta=0.3).train(job)
    losses = by_hand(tiny, other, tiny_tokenizer, 0.3).tolist()
    expected = sum(w * one for w, one in zip(weights, losses, strict=True)) / sum(weights)
    assert found.log[0]["loss"] == pytest.approx(expected, abs=1e-5)
    scaled = torch.tensor(losses), torch.tensor(weights)
    assert float(weighted_mean(*scaled)) == pytest.approx(expected, abs=1e-6)
    assert float(weighted_mean(scaled[0], 7 * scaled[1])) == pytest.approx(expected, abs=1e-6)


def test_pure_losses() -> None:
    zero = torch.zeros(2)
    found = preference_losses(torch.tensor([0.0, 3.0]), zero, zero, torch.tensor([0.0, 1.0]), 2.0)
    # d = 0 and 3 - 0 - (0 - 1) = 4
    assert found.tolist() == pytest.approx([math.log(2), math.log(1 + math.exp(-8))])


@pytest.mark.parametrize("split", [(1, 4), (2, 2)])
def test_accumulation_does_not_change_the_step(
    tmp_path: Path, tiny: Any, tiny_tokenizer: Any, split: tuple[int, int]
) -> None:
    data = write_lines(tmp_path / "pairs.jsonl", lines([0.5, 2.0, 0.25, 4.0]))
    found = []
    for batch_size, accumulate in ((4, 1), split):
        job = make_job(
            tiny, tiny_tokenizer, data, batch_size=batch_size, accumulate=accumulate, steps=2,
            directory=f"run{batch_size}", learning_rate=1e-3,
        )  # fmt: skip
        found.append(DPO().train(job).log)
    for first, second in zip(*found, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], abs=1e-6)
        assert first["gradient_norm"] == pytest.approx(second["gradient_norm"], rel=1e-5)


# The run


@pytest.mark.parametrize("lora", [False, True])
def test_training_starts_at_the_reference_and_learns(
    tmp_path: Path, tiny: Any, tiny_tokenizer: Any, lora: bool
) -> None:
    data = write_lines(tmp_path / "pairs.jsonl", lines())
    job = make_job(tiny, tiny_tokenizer, data, steps=6, batch_size=4, lora=lora)
    before = parameters(job.model)
    DPO().check(job)
    found = DPO().train(job)
    assert found.log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found.result["final_loss"] < math.log(2)
    assert found.log[-1]["accuracy"] == 1 and found.log[-1]["margin"] > 0.1
    assert [row["step"] for row in found.log] == list(range(1, 7))
    assert all(isinstance(value, int | float) for row in found.log for value in row.values())
    assert (found.result["pairs"], found.result["left_out"]) == (4, 0)
    for name, value in parameters(job.model).items():
        assert torch.equal(value, before[name]) == (lora and "lora_" not in name), name
    # Nothing of TRL's is left behind.
    inner = job.model.get_base_model() if lora else job.model
    assert "forward" not in vars(inner)
    assert list(getattr(job.model, "peft_config", ["default"])) == ["default"]
    assert (job.checkpoint.tokenizer.pad_token, inner.config.pad_token_id) == (None, None)


def test_an_initialisation_that_changes_the_base_is_its_own_reference(
    tmp_path: Path, tiny: Any, tiny_tokenizer: Any
) -> None:
    # PiSSA takes the largest directions out of the weight and trains them: without the adapter another model is left.
    from .jobs import with_lora

    data = write_lines(tmp_path / "pairs.jsonl", lines())
    job = make_job(tiny, tiny_tokenizer, data, steps=1, batch_size=4)
    job = dataclasses.replace(job, model=with_lora(job.model, init_lora_weights="pissa"))
    assert DPO().train(job).log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_killed_run_ends_with_the_same_bits(
    tmp_path: Path, tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_lines(tmp_path / "pairs.jsonl", lines([1, 2, 3, 4]))
    whole = make_job(tiny, tiny_tokenizer, data, epochs=3, directory="whole")
    expected = DPO().train(whole)
    assert len(expected.log) == 6
    revive = killed_at(monkeypatch, 4)
    job = make_job(tiny, tiny_tokenizer, data, epochs=3)
    with pytest.raises(KeyboardInterrupt):
        DPO().train(job)
    revive()
    again = make_job(tiny, tiny_tokenizer, data, epochs=3)
    found = DPO().train(again)
    assert [{**row, "seconds": 0} for row in found.log] == [
        {**row, "seconds": 0} for row in expected.log
    ]
    for name, value in parameters(again.model).items():
        assert torch.equal(value, parameters(whole.model)[name]), name


def test_a_loss_that_is_not_finite_names_the_step(
    tmp_path: Path, tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from postlude.errors import NonFiniteError
    from postlude.tuning.states import last_state

    calls: list[int] = []

    def broken(*given: Any) -> torch.Tensor:
        calls.append(1)
        return preference_losses(*given) * (math.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr("postlude.tuning.preference.preference_losses", broken)
    data = write_lines(tmp_path / "pairs.jsonl", lines())
    job = make_job(tiny, tiny_tokenizer, data, steps=4, batch_size=4)
    with pytest.raises(NonFiniteError, match="Step 3 of 4 has a loss of nan"):
        DPO().train(job)
    state = last_state(job.directory)
    assert state is not None and state.name == "step-2"
    assert all(bool(value.isfinite().all()) for value in job.model.parameters())


def test_pairs_that_teach_nothing_are_counted(
    tmp_path: Path, tiny: Any, tiny_tokenizer: Any
) -> None:
    many = [
        *lines([1, 1, 0, 1]),
        {"prompt": "x", "chosen": " same", "rejected": " same"},
        {"prompt": "long " * 10, "chosen": " a", "rejected": " b"},
    ]
    job = make_job(
        tiny, tiny_tokenizer, write_lines(tmp_path / "pairs.jsonl", many), steps=1, max_length=32
    )
    found = DPO().train(job)
    assert (found.result["pairs"], found.result["left_out"]) == (3, 3)


def test_chats_go_through_the_template(tmp_path: Path, tiny: Any, tiny_tokenizer: Any) -> None:
    chats = [
        {
            "prompt": [{"role": "user", "content": f"q{i}"}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no, not that"}],
        }
        for i in range(2)
    ]
    data = write_lines(tmp_path / "pairs.jsonl", chats)
    job = make_job(tiny, tiny_tokenizer, data, steps=1)
    with pytest.raises(DataError, match="tokenizer has no chat template"):
        DPO().check(job)
    job.checkpoint.tokenizer.chat_template = CHAT
    DPO().check(job)
    trainer_rows: list[Any] = []
    from postlude.tuning.preference import WeightedPairs

    score = WeightedPairs._reference_scores

    def watched(self: Any, batch: Any) -> Any:
        trainer_rows.append(batch["input_ids"].tolist())
        return score(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightedPairs, "_reference_scores", watched)
        DPO().train(job)
    texts = job.checkpoint.tokenizer.batch_decode(trainer_rows[0])
    assert "<u>q0<a>yes</s>" in texts[0] and "<u>q0<a>no, not that</s>" in texts[2]


def test_what_cannot_be_done(tmp_path: Path, tiny: Any, tiny_tokenizer: Any) -> None:
    data = write_lines(tmp_path / "pairs.jsonl", lines())
    with pytest.raises(SettingsError, match="dpo does not pack rows"):
        DPO().check(make_job(tiny, tiny_tokenizer, data, packing=True))
    with pytest.raises(DataError, match="needs a tokenizer"):
        DPO().check(make_job(tiny, None, data))
    with pytest.raises(DataError, match="No prompt leaves room for an answer within max_length 3"):
        DPO().train(make_job(tiny, tiny_tokenizer, data, max_length=3))
    same = write_lines(tmp_path / "same.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    with pytest.raises(DataError, match="no pair has a weight and two different answers"):
        DPO().train(make_job(tiny, tiny_tokenizer, same))
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(SettingsError, match=r"beta is .*; expected a number above 0"):
            DPO(beta=beta)


# The data


def read(tmp_path: Path, *rows: Any) -> list[Pair]:
    return read_pairs(write_lines(tmp_path / "pairs.jsonl", rows))


USER, GOOD, BAD = (
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "yes"},
    {"role": "assistant", "content": "no"},
)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "yes", "rejected": "no"},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"from": "gpt", "value": "no"},
        },
    ],
)
def test_forms_of_a_chat(tmp_path: Path, row: Any) -> None:
    assert read(tmp_path, row) == [Pair([USER], [GOOD], [BAD])]


def test_strings_and_weights(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "other": 1}
    assert read(tmp_path, row, {**row, "weight": 2}) == [
        Pair("q", "a", "b"),
        Pair("q", "a", "b", 2.0),
    ]


def test_a_json_file_with_a_list(tmp_path: Path) -> None:
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(lines()))
    assert len(read_pairs(file)) == 4


def test_the_demonstration_pairs(data_dir: Path) -> None:
    file = data_dir / "tasks" / "dpo_en_demo.json"
    if not file.is_file():
        pytest.skip(f"no data at {file}")
    pairs = read_pairs(file)
    assert len(pairs) > 100
    assert {turn["role"] for pair in pairs for turn in pair.prompt} <= {
        "system",
        "user",
        "assistant",
    }
    assert all(pair.chosen[-1]["role"] == "assistant" for pair in pairs)


ROW = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "q", "chosen": "a"},
            r"line 2 has keys \['chosen', 'prompt'\]; expected \"prompt\"",
        ),
        ({**ROW, "rejected": ""}, r'line 2: "rejected" is empty'),
        ({**ROW, "weight": -1}, r'line 2 has "weight" -1; expected a finite number of 0 or more'),
        ({**ROW, "weight": "1"}, r"line 2 has \"weight\" '1'"),
        ({**ROW, "weight": True}, r'line 2 has "weight" True'),
        ({**ROW, "weight": math.inf}, r'line 2 has "weight" inf'),
        ({**ROW, "chosen": 3}, r"line 2: expected strings, or messages as objects .*; found 3"),
        (
            {**ROW, "prompt": [{"role": "user"}]},
            r"line 2: expected strings, or messages as objects",
        ),
        ({**ROW, "prompt": []}, r"line 2 has an empty list of messages"),
        (
            {"chosen": "a", "rejected": "b"},
            r'line 2 has no "prompt", and its two answers do not begin',
        ),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
            r"line 1 holds strings and .*line 2 messages",
        ),
    ],
)
def test_lines_that_are_refused(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, ROW, row)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_weights_that_are_all_zero(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="every pair has weight 0"):
        read(tmp_path, {**ROW, "weight": 0})
