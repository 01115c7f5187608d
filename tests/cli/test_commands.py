from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from postlude import errors

VERBS = ["inspect", "quantize", "attribute", "evaluate", "generate", "export", "methods", "demo"]


@pytest.mark.parametrize("words", [["--help"], ["-h"], *([verb, "--help"] for verb in VERBS)])
def test_help(postlude_command: Any, words: list[str]) -> None:
    done = postlude_command(*words)
    assert done.code == 0
    assert "Usage: postlude" in done.out
    assert done.err == ""


def test_help_lists_the_verbs_in_order(postlude_command: Any) -> None:
    out = postlude_command("--help").out
    places = [out.index(f" {verb} ") for verb in VERBS]
    assert places == sorted(places)


GROUPS = [["attribute", one] for one in ("build", "query", "verify", "plan")]
COMMANDS = [["inspect", "compare"], *([one] for one in VERBS if one != "attribute"), *GROUPS]


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_command_takes_json_and_seed(postlude_command: Any, verb: list[str]) -> None:
    out = postlude_command(*verb, "--help").out
    assert "--json" in out
    assert "--seed" in out


def test_version(postlude_command: Any) -> None:
    import postlude

    done = postlude_command("--version")
    assert (done.code, done.out) == (0, f"postlude {postlude.__version__}\n")


def test_unknown_verb_gets_the_nearest(postlude_command: Any) -> None:
    done = postlude_command("quantise")
    assert done.code == 2
    assert "'quantize'" in done.err
    assert done.out == ""


def test_usage_error_as_json(postlude_command: Any) -> None:
    done = postlude_command("evaluate", "ckpt", "--json")
    assert done.code == 2
    assert done.json["error"]["type"] == "UsageError"
    assert "--text" in done.json["error"]["message"]
    assert "--text" in done.err


# inspect


def test_inspect(door: Any, postlude_command: Any) -> None:
    door.results["inspect"] = {"outliers": {"largest": 3.5}}
    done = postlude_command(
        "inspect", "ckpt", "--methods", "outliers", "--text", "a.txt", "--seed", 3,
        "--dtype", "float32", "--device", "cpu", "--json",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    assert done.json == {"outliers": {"largest": 3.5}}
    assert door.calls == [
        ("load", ("ckpt",), {"dtype": "float32", "device": "cpu"}),
        ("inspect", ("<ckpt>", ["outliers"]), {"text": "a.txt", "seed": 3}),
    ]


def test_inspect_without_methods_asks_for_all(door: Any, postlude_command: Any) -> None:
    assert postlude_command("inspect", "--json", "ckpt").code == 0
    assert door.calls[-1] == ("inspect", ("<ckpt>", None), {"text": None, "seed": 0})


def test_inspect_refuses_an_unknown_method_before_loading(door: Any, postlude_command: Any) -> None:
    done = postlude_command("inspect", "ckpt", "--methods", "outliers,outlires", "--json")
    assert done.code == 2
    assert done.json["error"]["type"] == "UnknownNameError"
    assert "Did you mean 'outliers'" in done.json["error"]["message"]
    assert door.calls == []


def test_compare(door: Any, postlude_command: Any) -> None:
    door.results["compare"] = {"angle": 4.0}
    done = postlude_command("inspect", "compare", "a", "b", "c", "--seed", 1, "--json")
    assert done.json == {"angle": 4.0}
    name, given, options = door.calls[-1]
    assert (name, given) == ("compare", (["<a>", "<b>", "<c>"],))
    assert options.pop("command").startswith("postlude")
    assert options == {"text": None, "layers": None, "seed": 1, "html": None}


def test_compare_takes_some_blocks(door: Any, postlude_command: Any) -> None:
    assert postlude_command("inspect", "compare", "a", "b", "--layers", "0, 4-6").code == 0
    assert door.calls[-1][2]["layers"] == [0, 4, 5, 6]


@pytest.mark.parametrize("layers", ["", "x", "3-1", "1,,2", "-1"])
def test_compare_refuses_other_words(door: Any, postlude_command: Any, layers: str) -> None:
    done = postlude_command("inspect", "compare", "a", "b", f"--layers={layers}")
    assert done.code == 2
    assert "expected numbers and ranges of them, as in 0,4-7" in " ".join(done.err.split())
    assert door.calls == []


def test_compare_needs_two(door: Any, postlude_command: Any) -> None:
    done = postlude_command("inspect", "compare", "a")
    assert done.code == 2
    assert "two or more checkpoints, got 1" in done.err
    assert door.calls == []


@pytest.mark.parametrize("path", ["./compare", "plain", "dir/compare"])
def test_a_checkpoint_may_be_called_like_a_command(
    door: Any, postlude_command: Any, path: str
) -> None:
    assert postlude_command("inspect", path, "--json").code == 0
    assert door.calls[0][1] == (path,)


def test_plain_form_does_not_show_its_name(postlude_command: Any) -> None:
    done = postlude_command("inspect")
    assert done.code == 2
    assert "Usage: postlude inspect [OPTIONS]" in done.err
    assert "postlude inspect -h" in done.err


# quantize


def test_quantize(door: Any, postlude_command: Any) -> None:
    done = postlude_command(
        "quantize", "ckpt", "--method", "grid", "--bits", "w4a8kv4", "--group", 128,
        "--activation-group", "tensor", "--calibration", "c.txt", "--samples", 8, "--length", 64,
        "--set", "damping=0.1", "--run", "r", "--overwrite", "-o", "out", "--seed", 2, "--json",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    assert done.json["output"] == "out"
    assert (done.json["method"], done.json["bytes"]) == ("grid", 7)
    assert done.json["float_bytes"] == 7
    assert done.json["notes"] == ["100% of the bytes of the model that it was made from"]
    assert done.json["settings"]["damping"] == 0.1
    assert done.json["seed"] == 2
    name, (model, settings), rest = door.calls[-1]
    assert (name, model) == ("quantize", "<ckpt>")
    assert (settings.weights, settings.activations, settings.kv) == (4, 8, 4)
    assert (settings.group, settings.activation_group, settings.damping) == (128, "tensor", 0.1)
    assert rest == {
        "calibration": "c.txt",
        "samples": 8,
        "length": 64,
        "timesteps": "uniform",
        "seed": 2,
        "out": "out",
        "overwrite": True,
        "run": "r",
        "inplace": True,
        "check": True,
    }


def test_quantize_leaves_defaults_to_the_method(door: Any, postlude_command: Any) -> None:
    assert postlude_command("quantize", "ckpt", "--method", "grid", "-o", "out").code == 0
    _, (_, settings), rest = door.calls[-1]
    assert settings == type(settings)()
    assert (rest["samples"], rest["length"], rest["overwrite"]) == (128, None, False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "gird"], "Did you mean 'grid'"),
        (["--method", "grid", "--bits", "4"], "expected the bits of weights"),
        (["--method", "grid", "--bits", "w1"], "2 bits or more for weights, got 1"),
        (["--method", "grid", "--group", "row"], "expected channel, tensor or a group size"),
        (["--method", "grid", "--activation-group", "0"], "expected token, tensor or a group"),
        (["--method", "grid", "--set", "dampening=1"], "Did you mean 'damping'"),
        (["--method", "plain", "--bits", "w4"], "No setting of plain named 'weights'"),
        (["--method", "grid", "--samples", "0"], "--samples"),
        (["--method", "grid", "--seed", "-1"], "--seed"),
        (["--method", "grid", "--seed", str(2**32)], "--seed"),
    ],
)
def test_quantize_refuses_before_loading(
    door: Any, postlude_command: Any, words: list[str], message: str
) -> None:
    done = postlude_command("quantize", "ckpt", "-o", "out", *words)
    assert done.code == 2
    assert message in " ".join(done.err.split())
    assert done.out == ""
    assert door.calls == []


# evaluate


def test_evaluate(door: Any, postlude_command: Any) -> None:
    door.results["evaluate"] = {"loss": 1.25, "perplexity": float("inf"), "tokens": 10}
    done = postlude_command(
        "evaluate",
        "ckpt",
        "--text",
        "t.jsonl",
        "--reference",
        "base",
        "--max-length",
        256,
        "--json",
    )
    assert done.json == {"loss": 1.25, "perplexity": None, "tokens": 10}
    load = {"dtype": "auto", "device": None}
    assert door.calls == [
        ("load", ("ckpt",), load),
        ("load", ("base",), load),
        (
            "evaluate",
            ("<ckpt>", "t.jsonl"),
            {"reference": "<base>", "max_length": 256, "seed": 0},
        ),
    ]


def test_evaluate_for_a_person(door: Any, postlude_command: Any) -> None:
    door.results["evaluate"] = {"loss": 1.25, "tokens": 10}
    done = postlude_command("evaluate", "ckpt", "--text", "t.txt")
    assert done.code == 0
    assert [line.split() for line in done.out.splitlines()] == [["loss", "1.25"], ["tokens", "10"]]


def test_output_file(door: Any, postlude_command: Any, tmp_path: Path) -> None:
    door.results["evaluate"] = {"loss": 1.25}
    file = tmp_path / "new" / "loss.json"
    words = ["evaluate", "ckpt", "--text", "t.txt", "-o", file]
    assert postlude_command(*words).code == 0
    assert json.loads(file.read_text()) == {"loss": 1.25}

    door.calls.clear()
    done = postlude_command(*words)
    assert done.code == 2
    assert "already exists" in done.err
    assert "--overwrite" in done.err
    assert door.calls == []

    door.results["evaluate"] = {"loss": 2.5}
    assert postlude_command(*words, "--overwrite").code == 0
    assert json.loads(file.read_text()) == {"loss": 2.5}


# methods and demo


def test_methods(methods: None, postlude_command: Any) -> None:
    found = postlude_command("methods", "--json").json["methods"]
    assert [(m["verb"], m["name"]) for m in found] == [
        ("inspect", "outliers"),
        ("quantize", "grid"),
        ("quantize", "needy"),
        ("quantize", "plain"),
    ]
    grid = found[1]
    assert grid["paper"] == "arXiv:2210.17323"
    assert grid["needs"] == ["calibration"]
    assert grid["summary"] == "Rounds to a grid."
    assert grid["options"]["weights"] == 4


def test_methods_for_a_person(methods: None, postlude_command: Any) -> None:
    out = postlude_command("methods", "--verb", "quantize").out
    assert "Rounds to a grid." in out
    assert "outliers" not in out
    out = postlude_command("methods", "grid").out
    assert "activation_group" in out
    assert "bits of a weight, on two lines." in out and out.count("bits of the others.") == 2
    assert "needy" not in out


def test_methods_refuses_unknown_names(methods: None, postlude_command: Any) -> None:
    done = postlude_command("methods", "gird")
    assert (done.code, done.out) == (2, "")
    assert "Did you mean 'grid'" in done.err
    done = postlude_command("methods", "--verb", "quantise")
    assert done.code == 2
    assert "'quantize'" in done.err


def test_demo(door: Any, postlude_command: Any) -> None:
    door.results["demo"] = {"report": "somewhere/report.html"}
    done = postlude_command("demo", "-o", "somewhere", "--overwrite", "--json")
    assert done.json == {"report": "somewhere/report.html"}
    assert door.calls == [("demo", ("somewhere",), {"seed": 0, "overwrite": True})]


# failures


@pytest.mark.parametrize(
    "error",
    [
        errors.CheckpointError("no config.json in x: name a model directory"),
        errors.UnknownNameError("quantize method", "gtpq", ["gptq"]),
        errors.NonFiniteError("w holds NaN"),
        errors.OutputExistsError("out exists: pass --overwrite"),
        errors.MissingDependencyError("gguf is needed: pip install postlude[serve-formats]"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_input_errors(door: Any, postlude_command: Any, error: errors.PostludeError) -> None:
    door.results["load"] = error
    done = postlude_command("inspect", "ckpt")
    assert (done.code, done.out) == (2, "")
    assert done.err == f"postlude: {error}\n"
    done = postlude_command("inspect", "ckpt", "--json")
    assert done.code == 2
    assert done.json == {"error": {"type": type(error).__name__, "message": str(error)}}
    assert str(error) in done.err


def test_an_unexpected_error_is_not_hidden(door: Any, postlude_command: Any) -> None:
    door.results["load"] = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        postlude_command("inspect", "ckpt")


def test_interrupt(door: Any, postlude_command: Any) -> None:
    door.results["load"] = KeyboardInterrupt()
    done = postlude_command("inspect", "ckpt")
    assert (done.code, done.out) == (130, "")
    assert "Interrupted" in done.err


def test_nothing_else_reaches_stdout_with_json(door: Any, postlude_command: Any) -> None:
    def chatty(*_: object) -> dict[str, int]:
        print("a library says hello")
        return {"loss": 1}

    door.results["evaluate"] = chatty
    done = postlude_command("evaluate", "ckpt", "--text", "t.txt", "--json")
    assert done.json == {"loss": 1}
    assert "says hello" in done.err


def test_as_a_process() -> None:
    """Traceback and exit code 1 for a bug; a closed pipe is no bug."""
    script = """
        import sys, types, postlude
        door = types.ModuleType("postlude._front_door")
        door.load = lambda *a, **k: 1 / 0
        sys.modules[door.__name__] = postlude._front_door = door
        from postlude.cli import main
        main()
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(
        [*command, "inspect", "x", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert done.stdout == ""

    module = [sys.executable, "-m", "postlude", "--help"]
    with subprocess.Popen(module, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
