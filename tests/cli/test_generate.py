"""``generate`` and ``inspect kernels``, on a stand-in and on real tiny checkpoints."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

import postlude as pl
from postlude.cli import run
from postlude.quantization import RTN

KEYS = {
    "text",
    "tokens",
    "prompt_tokens",
    "tokens_per_second",
    "prefill_seconds",
    "peak_bytes",
    "weight_bytes",
    "kv_bytes_per_token",
    "kernels",
    "seed",
}


@pytest.fixture(scope="module")
def small_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("small") / "w4"
    pl.quantize(
        pl.load(tiny_llama_dir, device="cpu"), RTN(weights=4, activations=16, kv=4), out=out
    )
    return out


def test_options(door: Any, postlude_command: Any) -> None:
    door.results["generate"] = {"text": "b", "tokens": 1}
    done = postlude_command(
        "generate", "ckpt", "a", "--max-new-tokens", 3, "--temperature", 0.5, "--kernel", "tiled",
        "--kv-recent", 4, "--seed", 2, "--dtype", "bfloat16", "--json",
    )  # fmt: skip
    assert done.json == {"text": "b", "tokens": 1}
    name, words, given = door.calls[-1]
    given.pop("stream")
    assert (name, words) == ("generate", ("<ckpt>", "a"))
    assert given == {
        "max_new_tokens": 3,
        "temperature": 0.5,
        "kernel": "tiled",
        "kv_recent": 4,
        "seed": 2,
    }


def test_text_on_stdout_and_figures_on_stderr(small_dir: Path, postlude_command: Any) -> None:
    as_json = postlude_command(
        "generate", small_dir, "The night", "-n", 6, "--device", "cpu", "--json"
    )
    assert set(as_json.json) == KEYS
    # The text streams to stderr meanwhile.
    assert as_json.err == as_json.json["text"] + "\n"
    done = postlude_command("generate", small_dir, "The night", "-n", 6, "--device", "cpu")
    assert done.code == 0
    assert done.out == as_json.json["text"] + "\n"
    assert "tokens_per_second" in done.err and "kv_bytes_per_token" in done.err


def test_text_ends_before_the_figures_begin(door: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both streams go into one file, as in `> log 2>&1`."""
    door.results["generate"] = {"text": "", "tokens": 3}
    log = io.StringIO()
    monkeypatch.setattr("sys.stdout", log)
    monkeypatch.setattr("sys.stderr", log)
    assert run(["generate", "ckpt", "a"]) == 0
    assert log.getvalue().startswith("\ntokens")


def test_a_float_model(tiny_llama_dir: Path, postlude_command: Any) -> None:
    done = postlude_command("generate", tiny_llama_dir, "The", "-n", 2, "--device", "cpu", "--json")
    assert done.json["kernels"] == {}
    assert done.json["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-n", "0"], "max_new_tokens is 0; expected 1 or more"),
        (["--temperature", "-1"], "temperature is -1.0; expected 0"),
        (["--kernel", "int4pak"], "Did you mean 'int4pack'"),
        (["--kernel", "int8pack"], "int8pack takes no layer of this model: it takes 8-bit"),
        (["-n", "5000"], "context holds 64"),
    ],
)
def test_refused(small_dir: Path, postlude_command: Any, words: list[str], message: str) -> None:
    done = postlude_command("generate", small_dir, "a", *words, "--device", "cpu", "--json")
    assert done.code == 2
    assert message in done.json["error"]["message"]


def test_kernels_of_a_checkpoint(small_dir: Path, postlude_command: Any) -> None:
    words = ["inspect", "kernels", small_dir, "--device", "cpu"]
    report = postlude_command(*words, "--json").json
    assert (report["dtype"], report["device"], report["simulated"]) == ("float32", "cpu", 0)
    assert len(report["layers"]) == 14
    first = report["layers"][0]
    assert first["layer"] == "model.layers.0.self_attn.q_proj"
    assert (first["decode"], first["prefill"], first["layout"]) == ("tiled", "tiled", "stored")
    assert "takes bfloat16 activations" in first["refused"]["int4pack"]

    half = postlude_command(*words, "--dtype", "bfloat16", "--json").json["layers"][0]
    assert (half["decode"], half["layout"]) == ("int4pack", "int4pack")

    shown = " ".join(postlude_command(*words).out.split())
    assert "*.self_attn.q_proj 2 int4 channel float" in shown
    assert "takes bfloat16 activations; with float32" in shown
    assert "simulated" not in shown


def test_kernels_asked_for_by_name(small_dir: Path, postlude_command: Any) -> None:
    words = ["inspect", "kernels", small_dir, "--device", "cpu", "--kernel"]
    report = postlude_command(*words, "int8pack", "--json").json
    assert report["simulated"] == 14
    assert "14 of 14 layers are simulated" in postlude_command(*words, "int8pack").out
    assert postlude_command(*words, "int9").code == 2


def test_kernels_of_a_float_model(tiny_llama_dir: Path, postlude_command: Any) -> None:
    words = ["inspect", "kernels", tiny_llama_dir, "--device", "cpu"]
    assert postlude_command(*words, "--json").json["layers"] == []
    assert "no quantized layers" in postlude_command(*words).out
