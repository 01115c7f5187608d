"""`postlude tune` on a tiny checkpoint, through the command line in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [{"prompt": f"{i} and {i} is ", "completion": str(2 * i)} for i in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


SHORT = ("--batch-size", "3", "--max-length", "32", "--device", "cpu", "--json")


def test_prior_then_tune_then_evaluate(
    postlude_command: Any, tiny_llama_dir: Path, data: Path, tmp_path: Path, some_text: str
) -> None:
    prior = postlude_command(
        "tune", "prior", tiny_llama_dir, data, "-o", tmp_path / "prior", "--max-length", 32, "--device", "cpu",
        "--json",
    )  # fmt: skip
    assert prior.code == 0, prior.err
    assert prior.json["response_tokens"] == 13
    tuned = postlude_command(
        "tune", tiny_llama_dir, data, "--weights", "prift-mass", "--prior", tmp_path / "prior",
        "-o", tmp_path / "tuned", "--epochs", 1, "--seed", 0, *SHORT,
    )  # fmt: skip
    assert tuned.code == 0, tuned.err
    result = tuned.json
    assert {"loss", "tokens_per_second", "effective_tokens", "kept_share"} <= result.keys()
    assert result["weighting"]["signal"] == "cached" and result["steps"] == 2
    page = (tmp_path / "tuned" / "report.html").read_text(encoding="utf-8")
    assert "Tuning by prift-mass" in page and "Effective tokens" in page
    text = tmp_path / "other.txt"
    text.write_text(some_text)
    measured = postlude_command(
        "evaluate", tmp_path / "tuned", "--text", text, "--reference", tiny_llama_dir, "--device", "cpu", "--json",
    )  # fmt: skip
    assert measured.code == 0 and measured.json["kl"] >= 0
    again = postlude_command("tune", tiny_llama_dir, data, "-o", tmp_path / "tuned", *SHORT)
    assert again.code == 2 and "--overwrite" in again.err


def test_an_adapter_evaluates_like_a_model(
    postlude_command: Any, tiny_llama_dir: Path, data: Path, tmp_path: Path, some_text: str
) -> None:
    done = postlude_command(
        "tune", tiny_llama_dir, data, "--weights", "dft", "--adapter", "lora", "--rank", 2, "--target", "q_proj,v_proj",
        "--set", "lora_dropout=0.1", "--set", "floor=0.01", "-o", tmp_path / "adapter", *SHORT,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["trained_parameters"] == 2 * 2 * (2 * 32 + 32 + 16)
    assert done.json["weighting"]["floor"] == 0.01
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (stored["r"], stored["lora_alpha"], stored["lora_dropout"]) == (2, 4, 0.1)
    text = tmp_path / "other.txt"
    text.write_text(some_text)
    measured = postlude_command(
        "evaluate", tmp_path / "adapter", "--text", text, "--reference", tiny_llama_dir, "--device", "cpu", "--json",
    )  # fmt: skip
    assert measured.code == 0, measured.err
    assert measured.json["kl"] >= 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--weights", "dftt"), "No tune method named 'dftt'. Did you mean 'dft'"),
        (("--weights", "dpo"), "dpo is no rule but an objective: --objective dpo"),
        (("--objective", "dft"), "dft is no objective but a rule: --weights dft"),
        (("--objective", "dpo", "--weights", "dft"), "--weights is for --objective sft"),
        (("--objective", "dpo", "--signal", "online"), "--signal is for --objective sft"),
        (("--objective", "dpo", "--keep-eos"), "keep_eos belong to supervised tuning"),
        (("--reward", "m:f"), "--reward is for --objective grpo"),
        (("--rank", "4"), "are of an adapter: choose one"),
        (("--merge",), "There is no adapter to merge"),
        (("--adapter", "loro"), "No adapter named 'loro'. Did you mean 'lora'"),
        (("--set", "tua=1"), "named 'tua'"),
        (("--weights", "prift-mass", "--set", "tua=1"), "named 'tua'. Did you mean 'tau'"),
        (("--set", "floor=low"), "floor=low does not fit"),
        (("--prior", "nowhere", "--weights", "prift-mass"), "nowhere holds no prior"),
        (("--weights", "prift-mass", "--signal", "sideways"), "No signal named 'sideways'"),
        (("--schedule", "cosin"), "schedule is 'cosin'"),
        (("--learning-rate", "-1"), "learning_rate is -1"),
        (("--max-length", "65"), "max_length is 65, but the model takes at most 64"),
        (("--dtype", "float13"), "dtype is 'float13'"),
    ],
)  # fmt: skip
def test_what_is_refused(
    postlude_command: Any,
    tiny_llama_dir: Path,
    data: Path,
    tmp_path: Path,
    words: tuple[str, ...],
    message: str,
) -> None:
    done = postlude_command(
        "tune", tiny_llama_dir, data, "-o", tmp_path / "out", *words, "--device", "cpu", "--json"
    )
    assert done.code == 2
    assert message in done.json["error"]["message"]
    assert list(tmp_path.iterdir()) == []


def test_bad_data_names_its_line(
    postlude_command: Any, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}\n')
    done = postlude_command("tune", tiny_llama_dir, file, "-o", tmp_path / "out", *SHORT)
    assert (
        done.code == 2
        and "bad.jsonl line 2: the response is empty" in done.json["error"]["message"]
    )
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]
    missing = postlude_command(
        "tune", tiny_llama_dir, tmp_path / "no.jsonl", "-o", tmp_path / "out", *SHORT
    )
    assert missing.code == 2 and "There is no data at" in missing.err


def test_a_person_sees_what_was_done_and_what_to_do_next(
    postlude_command: Any, tiny_llama_dir: Path, data: Path, tmp_path: Path
) -> None:
    done = postlude_command("tune", tiny_llama_dir, data, "-o", tmp_path / "out", *SHORT[:-1])
    assert done.code == 0, done.err
    text = " ".join(done.out.split())
    assert "Tuning by sft. 6 sequences" in text and "fingerprint" not in text
    assert "report.html" in text and "postlude evaluate" in text and "effective_tokens" in text
    assert "weighting" not in text and "tokens_per_second" not in text
