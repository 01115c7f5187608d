"""Everything that can be wrong with what a person gives: exit code 2, a message that helps, nothing written or lost."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def work(tmp_path: Path, tiny_llama_dir: Path, some_text: str) -> Path:
    """A directory with a checkpoint ``model`` and a ``text.txt``; outputs go into it."""
    shutil.copytree(tiny_llama_dir, tmp_path / "model")
    (tmp_path / "text.txt").write_text(some_text)
    return tmp_path


def contents(directory: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


Refused = Callable[..., str]


@pytest.fixture
def refused(
    work: Path,
    postlude_command: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Refused:
    """Run a command that must be refused; gives its message, the spaces in it made single."""
    monkeypatch.chdir(work)

    def run(*words: object) -> str:
        before = contents(work)
        capsys.readouterr()
        plain = postlude_command(*words)
        assert (plain.code, plain.out) == (2, ""), plain.err
        assert plain.err.startswith("postlude: ")
        assert "Traceback" not in plain.err
        as_json = postlude_command(*words, "--json")
        assert as_json.code == 2
        error = as_json.json["error"]
        assert plain.err == f"postlude: {error['message']}\n"
        assert contents(work) == before
        return " ".join(error["message"].split())

    return run


def matches(pattern: str, message: str) -> None:
    assert re.search(pattern, message), message


# Without the check of what was written, which starts a process.
QUANTIZE = ("quantize", "model", "--method", "rtn", "--no-check", "-o", "out")
COMMANDS = {
    "quantize": QUANTIZE,
    "inspect": ("inspect", "model"),
    "evaluate": ("evaluate", "model", "--text", "text.txt"),
}
each_command = pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)


# The checkpoint


@each_command
def test_no_such_directory(work: Path, refused: Refused, words: tuple[str, ...]) -> None:
    shutil.rmtree(work / "model")
    matches(r"no directory model; expected a checkpoint directory .*\(hf download", refused(*words))


@each_command
def test_not_a_checkpoint(work: Path, refused: Refused, words: tuple[str, ...]) -> None:
    (work / "model" / "config.json").unlink()
    matches(r"model is not a checkpoint: it has no config\.json\. Expected a", refused(*words))


def test_no_weights(work: Path, refused: Refused) -> None:
    (work / "model" / "model.safetensors").unlink()
    matches(r"holds no weights; expected model\.safetensors", refused(*QUANTIZE))


@each_command
def test_pickle_only(work: Path, refused: Refused, words: tuple[str, ...]) -> None:
    model = work / "model"
    state = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(state, model / "pytorch_model.bin")
    message = refused(*words)
    matches(r"only as pickle files \(pytorch_model\.bin\); expected model\.safetensors", message)
    matches(r"convert it once: python -c .*use_safetensors=False.*save_pretrained", message)


@each_command
def test_unknown_architecture(work: Path, refused: Refused, words: tuple[str, ...]) -> None:
    file = work / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "mamba"}))
    message = refused(*words)
    matches("no anatomy describes models of type 'mamba'", message)
    matches("gpt2, llama, mistral, qwen2, .*qwen3", message)
    matches(r"docs/add-an-architecture\.md", message)


@each_command
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights(
    work: Path, refused: Refused, words: tuple[str, ...], value: float
) -> None:
    file = work / "model" / "model.safetensors"
    state = load_file(file)
    state["model.layers.1.self_attn.v_proj.weight"][3, 4:6] = value
    save_file(state, file, metadata={"format": "pt"})
    matches(
        r"Tensor 'model\.layers\.1\.self_attn\.v_proj\.weight' in .*model\.safetensors holds 2 NaN or infinite",
        refused(*words),
    )


@each_command
@pytest.mark.parametrize("kept", [4, 500, -1])
def test_truncated_weights(work: Path, refused: Refused, words: tuple[str, ...], kept: int) -> None:
    file = work / "model" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:kept])
    found = len(content[:kept])
    matches(rf"model\.safetensors .*{found}.*(again)", refused(*words))


def test_quantized_already(work: Path, refused: Refused, postlude_command: Any) -> None:
    assert postlude_command(*QUANTIZE, "--bits", "w16a16kv4").code == 0
    message = refused("quantize", "out", "--method", "rtn", "--bits", "w4", "-o", "again")
    matches("already quantized; start from the float one", message)


# The method


def test_unknown_method(refused: Refused) -> None:
    message = refused("quantize", "model", "--method", "gtpq", "-o", "out")
    matches("No quantize method named 'gtpq'. Did you mean 'gptq'", message)
    matches("postlude methods", message)
    message = refused("inspect", "model", "--methods", "outlier")
    matches("Did you mean 'outliers'", message)


@pytest.mark.parametrize(
    ("method", "bits", "expected"),
    [
        ("rtn", "w1", "rtn: weights is 1; expected 2 to 8 bits, or 16"),
        ("rtn", "w4a12", "rtn: activations is 12; expected 2 to 8 bits, or 16"),
        ("gptq", "w4a16kv9", "gptq: kv is 9; expected 2 to 8 bits, or 16"),
        ("smoothquant", "w4a16", "smoothquant .* activations stay at 16 bits; use rtn or gptq"),
        ("rtn", "4", "--bits '4' is not understood: expected .* as in w4a4kv4"),
        ("rtn", "w4b4", "--bits 'w4b4' is not understood"),
    ],
)
def test_bits_that_a_method_cannot_do(
    refused: Refused, method: str, bits: str, expected: str
) -> None:
    message = refused("quantize", "model", "--method", method, "--bits", bits, "-o", "out")
    matches(expected, message)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--group", "row"), "--group 'row' is not understood: expected channel, tensor or"),
        (("--activation-group", "channel"), "--activation-group 'channel'.*token, tensor or"),
        (("--set", "damping=0"), r"damping is 0.*expected a positive fraction"),
        (("--set", "damping=often"), "damping=often does not fit rtn: expected a number"),
        (("--set", "rounding=up"), "rounding=up does not fit rtn: expected nearest or gptq"),
        (
            ("--set", "rondung=nearest"),
            "No setting of rtn named 'rondung'. Did you mean 'rounding'",
        ),
        (("--dtype", "int4"), "dtype is 'int4'; expected auto, float64"),
        (("--device", "warp"), "device 'warp' cannot be used here"),
    ],
)
def test_settings(refused: Refused, words: tuple[str, ...], expected: str) -> None:
    matches(expected, refused(*QUANTIZE, *words))


def test_nothing_to_guard(refused: Refused) -> None:
    words = ("--method", "defect-guard", "--calibration", "text.txt", "-o", "out")
    message = refused("quantize", "model", *words)
    matches("defect-guard found no layer .* use rtn itself", message)


# The text


GPTQ = ("quantize", "model", "--method", "gptq", "-o", "out")


def test_no_calibration(refused: Refused) -> None:
    matches(r"gptq learns from calibration text: give some \(--calibration FILE\)", refused(*GPTQ))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.txt", b"", "holds no text: expected at least one document"),
        ("blank.jsonl", b'\n{"text": " "}\n', "holds no text: expected at least one document"),
        ("short.txt", b"too short", "has 9 tokens; one sample needs 64. Give more text or"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not valid JSON"),
        ("other.jsonl", b'{"body": "a"}\n', r"line 1 has keys \['body'\]; expected \"text\""),
        ("latin.txt", "caf\xe9".encode("latin-1"), "is not UTF-8: byte 3 is 0xe9"),
        ("text.pdf", b"%PDF", r"ends in \.pdf; expected \.txt"),
    ],
)
def test_calibration(
    work: Path, refused: Refused, name: str, content: bytes, expected: str
) -> None:
    (work / name).write_bytes(content)
    matches(expected, refused(*GPTQ, "--calibration", name))
    if "tokens" not in expected:
        matches(expected, refused("evaluate", "model", "--text", name))


def test_calibration_that_is_not_there(work: Path, refused: Refused) -> None:
    matches(r"No text at gone\.txt: expected a \.txt", refused(*GPTQ, "--calibration", "gone.txt"))
    (work / "texts").mkdir()
    matches(r"texts holds no \.txt or \.jsonl file", refused(*GPTQ, "--calibration", "texts"))


def test_calibration_longer_than_the_context(refused: Refused) -> None:
    message = refused(*GPTQ, "--calibration", "text.txt", "--length", "65")
    matches("calibration length is 65 tokens, but the model takes at most 64", message)


def test_no_tokenizer(work: Path, refused: Refused) -> None:
    for file in (work / "model").glob("token*"):
        file.unlink()
    matches("has no tokenizer", refused(*GPTQ, "--calibration", "text.txt"))


# The output


def test_existing_output(work: Path, refused: Refused, postlude_command: Any) -> None:
    assert postlude_command(*QUANTIZE, "--bits", "w8").code == 0
    message = refused(*QUANTIZE, "--bits", "w4")
    matches(r"out already exists and holds \d+ entries.*--overwrite", message)
    assert postlude_command(*QUANTIZE, "--bits", "w4", "--overwrite").code == 0
    config = json.loads((work / "out" / "config.json").read_text())
    assert config["quantization_config"]["made_by"]["settings"]["weights"] == 4
    assert sorted(path.name for path in work.iterdir()) == ["model", "out", "text.txt"]


def test_output_that_is_something_else(work: Path, refused: Refused) -> None:
    (work / "letters").mkdir()
    (work / "letters" / "dear.txt").write_text("precious")
    words = ("quantize", "model", "--method", "rtn", "--overwrite", "-o")
    matches(r"letters exists but holds no config\.json", refused(*words, "letters"))
    matches(r"text\.txt is a file, and the output is a directory", refused(*words, "text.txt"))
    matches("is the working directory or holds it", refused(*words, "."))


def test_output_that_is_the_model(refused: Refused) -> None:
    words = ("quantize", "model", "--method", "rtn", "--overwrite", "-o")
    matches("is the model itself, which would be lost", refused(*words, "./model"))


# The run directory


def test_run_directory_of_another_model(
    work: Path, refused: Refused, postlude_command: Any, make_checkpoint: Callable[..., Path]
) -> None:
    assert postlude_command(*QUANTIZE, "--run", "run").code == 0
    shutil.copytree(make_checkpoint("llama", seed=1), work / "other")
    words = ("quantize", "other", "--method", "rtn", "-o", "small", "--run", "run")
    message = refused(*words)
    matches(
        r"run belongs to another run: the kept run has model \"\w+\", this one asks for \"\w+\" Start it",
        message,
    )
    matches(r"--overwrite .* or choose another run directory \(--run\)\.", message)
    file = work / "other" / "config.json"  # the same weights, read in another way
    shutil.copytree(work / "model", work / "other", dirs_exist_ok=True)
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 0.01}))
    matches("run belongs to another run: the kept run has model", refused(*words))
    words = (*QUANTIZE[:-1], "small", "--run", "run", "--bits", "w8")
    matches(r"has settings\.weights 4, this one asks for 8", refused(*words))
    assert postlude_command(*words, "--overwrite").code == 0


def test_run_directory_that_is_something_else(work: Path, refused: Refused) -> None:
    message = refused(*QUANTIZE, "--run", "model")
    matches(
        r"model is not empty and holds no manifest\.json, so it is not a run directory", message
    )
    (work / "run").mkdir()
    (work / "run" / "manifest.json").write_text("{")
    matches(
        "manifest.json is not valid JSON .* the run directory is damaged",
        refused(*QUANTIZE, "--run", "run"),
    )


def test_damaged_checkpoint_that_postlude_wrote(
    work: Path, refused: Refused, postlude_command: Any
) -> None:
    assert postlude_command(*QUANTIZE).code == 0
    words = ("evaluate", "out", "--text", "text.txt")
    file = work / "out" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["format_version"] = 99
    file.write_text(json.dumps(config))
    matches("Postlude format version 99, this installation reads version 1", refused(*words))
    config["quantization_config"]["format_version"] = 1
    config["quantization_config"]["description"]["kinds"][0]["module"] = "hologram"
    file.write_text(json.dumps(config))
    matches(
        "is described as 'hologram', which this version of Postlude does not know", refused(*words)
    )
