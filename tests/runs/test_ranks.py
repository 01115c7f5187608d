"""What several ranks make is what one makes, and what they do when one of them is gone."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL and no fork"),
    pytest.mark.timeout(300),
]

Ranks = Callable[..., dict[str, Any]]
# Seconds of silence after which a rank counts as lost, and the most that the others may then take to stop.
SILENCE, BOUND = 2, 30
QUICK = {"POSTLUDE_RANK_TIMEOUT": str(SILENCE)}


def contents(directory: Path) -> dict[str, str]:
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def value(answer: dict[str, Any]) -> dict[str, Any]:
    """The one JSON object of a run; no other rank prints."""
    assert set(answer["codes"]) == {0}, answer
    assert answer["out"][1:] == [""] * (len(answer["out"]) - 1)
    assert answer["err"][1:] == [""] * (len(answer["err"]) - 1)
    found: dict[str, Any] = json.loads(answer["out"][0])
    for name in ("seconds", "output"):
        found.pop(name, None)
    return found


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, some_text: str) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"text": some_text[13 * n : 13 * n + 20 + 7 * (n % 5)]} for n in range(14)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, some_text: str) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(some_text * 12)
    return path


# ------------------------------------------------------------------------------------------------ the same results


def test_evaluate_gives_the_numbers_of_one_rank(
    on_ranks: Ranks, tiny_llama_dir: Path, train: Path, tmp_path: Path
) -> None:
    model = str(tiny_llama_dir)
    line = ["evaluate", model, "--reference", model, "--text", str(train), "--json"]
    one = value(on_ranks(line, size=1))
    for size in (2, 3):
        out = tmp_path / f"{size}.json"
        found = value(on_ranks([*line, "-o", str(out)], size=size))
        assert found == one
        assert json.loads(out.read_text())["loss"] == one["loss"]


@pytest.mark.slow
def test_attribute_build_writes_the_bytes_of_one_rank(
    on_ranks: Ranks, tiny_llama_dir: Path, train: Path, tmp_path: Path
) -> None:
    line = ["attribute", "build", str(tiny_llama_dir), str(train), "--shard-examples", "3"]
    made = {
        size: value(on_ranks([*line, "--json", "-o", str(tmp_path / f"{size}")], size=size))
        for size in (1, 2)
    }
    assert made[1] == made[2]
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


# Blocks are shared; batches, and the weights of a site; nothing, since what is gathered has no parts.
METHODS = {
    "rtn": (),
    "gptq": ("--set", "act_order=true", "--length", "32", "--samples", "300"),
    "svdquant": ("--rank", "4", "--length", "32", "--samples", "8"),
}


@pytest.mark.parametrize(
    "method",
    ["gptq", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rtn", "svdquant"))],
)
def test_quantize_writes_the_bytes_of_one_rank(
    on_ranks: Ranks, tiny_llama_dir: Path, text: Path, tmp_path: Path, method: str
) -> None:
    line = ["quantize", str(tiny_llama_dir), "--method", method, *METHODS[method], "--no-check"]
    line += ["--calibration", str(text)] if METHODS[method] else []
    made = {}
    for size in (1, 2):
        out = tmp_path / f"{size}"
        made[size] = value(on_ranks([*line, "--json", "-o", str(out)], size=size))
        assert not (tmp_path / f".{size}.run").exists()
    assert made[1] == made[2]
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_as_torchrun_starts_them(tiny_llama_dir: Path, train: Path, tmp_path: Path) -> None:
    """The command of the documentation: an end of all when one is killed, and one JSON object."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "postlude", "attribute", "build", str(tiny_llama_dir), str(train), "--json"]
    command += ["--shard-examples", "3", "-o"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def launch(out: str) -> subprocess.Popen[str]:
        words = [*command, str(tmp_path / out)]
        pipe = subprocess.PIPE
        return subprocess.Popen(words, env=environment, stdout=pipe, stderr=pipe, text=True)

    with launch("killed") as run:
        listed, workers = Path(f"/proc/{run.pid}/task/{run.pid}/children"), []
        while run.poll() is None and len(workers) < 2:
            time.sleep(0.01)
            workers = listed.read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        began = time.monotonic()
        _, said = run.communicate(timeout=450)
        assert time.monotonic() - began < 2 * BOUND
        assert run.returncode == 1
        assert "Signal 9 (SIGKILL)" in said
    for out in ("killed", "whole"):
        with launch(out) as run:
            printed, said = run.communicate(timeout=450)
            assert run.returncode == 0, said
            assert json.loads(printed)["examples"] == 14
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_tune_learns_what_one_rank_learns(
    on_ranks: Ranks, tiny_llama_dir: Path, train: Path, tmp_path: Path
) -> None:
    """Gradients of two halves of a batch are added in another order than those of one, so losses agree to 1e-5."""
    line = ["tune", str(tiny_llama_dir), str(train), "--epochs", "2", "--json"]
    made = {}
    for size in (1, 2):
        words = ["--batch-size", str(4 // size), "-o", str(tmp_path / f"{size}")]
        made[size] = value(on_ranks([*line, *words], size=size))
        assert not (tmp_path / f".{size}.run").exists()
    assert made[2]["steps"] == made[1]["steps"] == 8
    assert made[2]["loss"] == pytest.approx(made[1]["loss"], rel=1e-5)
    rows = [(tmp_path / f"{size}" / "steps.jsonl").read_text().splitlines() for size in (1, 2)]
    for one, two in zip(*rows, strict=True):
        assert json.loads(two)["loss"] == pytest.approx(json.loads(one)["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_model_that_is_cut_over_ranks_learns_the_same(
    on_ranks: Ranks, tiny_llama_dir: Path, train: Path, tmp_path: Path
) -> None:
    """FSDP2: the same gradients as with whole models, a state in parts, and one model at the end."""
    line = ["tune", str(tiny_llama_dir), str(train), "--epochs", "2", "--batch-size", "2", "--json"]
    line += ["--save-every", "2", "-o"]
    value(on_ranks([*line, str(tmp_path / "whole")]))
    after = {"rank": 1, "calls": 5, "of": "postlude.tuning.trainer:Resumable._write_row"}
    stopped = on_ranks([*line, str(tmp_path / "cut")], shard=True, after=after, environment=QUICK)
    killed(stopped, 1)
    state = tmp_path / ".cut.run" / "states" / "step-4"
    assert (state / "tensors-00000.safetensors").is_file()
    assert (state / "tensors-00001.safetensors").is_file()
    resumed = on_ranks([*line, str(tmp_path / "cut")], shard=True)
    assert resumed["codes"] == [0, 0], resumed
    assert "resuming at step 4 of 8" in resumed["err"][0]
    undisturbed = on_ranks([*line, str(tmp_path / "undisturbed")], shard=True)
    assert undisturbed["codes"] == [0, 0], undisturbed
    kept = [contents(tmp_path / name)["model.safetensors"] for name in ("cut", "undisturbed")]
    assert kept[0] == kept[1]
    rows = [(tmp_path / name / "steps.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    for one, two in zip(*rows, strict=True):
        for name in ("loss", "gradient_norm"):
            assert json.loads(two)[name] == pytest.approx(json.loads(one)[name], rel=1e-4)


RECIPE = """
stages:
  measure:
    evaluate: {model}
    text: {text}
  small:
    quantize: {model}
    method: rtn
  look:
    inspect: {model}
    methods: signature
  again:
    evaluate: ${{small}}
    text: {text}
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_recipe_runs_on_all_ranks(
    on_ranks: Ranks, tiny_llama_dir: Path, train: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=tiny_llama_dir, text=train))
    made = {}
    for size in (1, 2):
        out = tmp_path / f"{size}"
        line = ["run", str(recipe), "--json", "-o", str(out)]
        answer = on_ranks(line, size=size, limit=500)
        assert set(answer["codes"]) == {0}, answer
        made[size] = json.loads(answer["out"][0])["stages"]
        assert (out / "report.html").is_file()
    for one, two in zip(made[1], made[2], strict=True):
        for stage in (one, two):
            stage["result"].pop("seconds", None)
            stage["result"].pop("output", None)
        assert one["result"] == two["result"]
    folder = "stages/small/output"
    assert contents(tmp_path / "1" / folder) == contents(tmp_path / "2" / folder)
    again = on_ranks(["run", str(recipe), "--json", "-o", str(tmp_path / "2")])
    assert [stage["reused"] for stage in json.loads(again["out"][0])["stages"]] == [True] * 4


def test_what_one_process_does_is_done_once(on_ranks: Ranks) -> None:
    assert value(on_ranks(["methods", "rtn", "--json"], size=1))["methods"][0]["name"] == "rtn"
    both = on_ranks(["methods", "rtn", "--json"])
    assert both["codes"] == [0, 0]
    assert json.loads(both["out"][0])["methods"][0]["name"] == "rtn"
    assert both["out"][1] == ""
    assert "one process does this; the other 1 of torchrun wait" in both["err"][0]


# ------------------------------------------------------------------------------------------------- when one is gone


def test_bad_input_is_said_once(on_ranks: Ranks) -> None:
    answer = on_ranks(["evaluate", "nothing/here", "--text", "x.txt", "--json"])
    assert 0 not in answer["codes"]
    assert json.loads(answer["out"][0])["error"]["type"] == "CheckpointError"
    assert answer["out"][1] == answer["err"][1] == ""


def killed(answer: dict[str, Any], rank: int) -> str:
    """What the other of two ranks said when this one was killed; it stopped in a bounded time."""
    assert answer["codes"][rank] == -signal.SIGKILL, answer
    assert answer["codes"][1 - rank] not in (0, -signal.SIGKILL), answer
    assert answer["seconds"][1 - rank] - answer["seconds"][rank] < BOUND
    said: str = answer["err"][1 - rank]
    assert "run the same command again" in said, answer
    return said


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_build_is_noticed_and_resumes(
    on_ranks: Ranks, tiny_llama_dir: Path, train: Path, tmp_path: Path, rank: int
) -> None:
    line = ["attribute", "build", str(tiny_llama_dir), str(train), "--shard-examples", "3"]
    line += ["--json", "-o", str(tmp_path / "index")]
    fault = {"kill": {"rank": rank, "step": 6}, "environment": QUICK}
    said = killed(on_ranks(line, **fault), rank)
    assert ("rank 1 of 2 has not been heard of" if rank else "lost the store") in said
    whole = [*line[:-1], str(tmp_path / "whole")]
    found = value(on_ranks(line))
    assert found["examples"] == 14
    value(on_ranks(whole, size=1))
    assert contents(tmp_path / "index") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_killed_quantize_resumes_with_the_same_bits(
    on_ranks: Ranks, tiny_llama_dir: Path, text: Path, tmp_path: Path, method: str, rank: int
) -> None:
    line = ["quantize", str(tiny_llama_dir), "--method", method, *METHODS[method], "--no-check"]
    line += ["--calibration", str(text)] if METHODS[method] else []
    line += ["--json", "-o", str(tmp_path / "out")]
    after = {"rank": rank, "calls": 1, "of": "postlude.quantization.blocks:Rounding.round"}
    answer = on_ranks(line, after=after, environment=QUICK)
    killed(answer, rank)
    assert (tmp_path / ".out.run").is_dir()
    assert not (tmp_path / "out").exists()
    value(on_ranks(line))
    value(on_ranks([*line[:-1], str(tmp_path / "whole")], size=1))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_tune_resumes_with_the_same_bits(
    on_ranks: Ranks, tiny_llama_dir: Path, train: Path, tmp_path: Path, rank: int
) -> None:
    line = ["tune", str(tiny_llama_dir), str(train), "--epochs", "2", "--batch-size", "2", "--json"]
    line += ["--save-every", "2", "-o"]
    after = {"rank": rank, "calls": 5, "of": "postlude.tuning.trainer:Resumable._write_row"}
    answer = on_ranks([*line, str(tmp_path / "out")], after=after, environment=QUICK)
    killed(answer, rank)
    kept = tmp_path / ".out.run" / "states"
    assert (kept / "step-4").is_dir()
    resumed = on_ranks([*line, str(tmp_path / "out")])
    assert "resuming at step 4 of 8" in resumed["err"][0]
    value(on_ranks([*line, str(tmp_path / "whole")]))
    model = "model.safetensors"
    made = [contents(tmp_path / name)[model] for name in ("out", "whole")]
    assert made[0] == made[1]


@pytest.mark.slow
def test_a_rank_that_hangs_counts_as_lost(
    on_ranks: Ranks, tiny_llama_dir: Path, train: Path, tmp_path: Path
) -> None:
    line = ["attribute", "build", str(tiny_llama_dir), str(train), "--shard-examples", "3"]
    line += ["-o", str(tmp_path / "index")]
    answer = on_ranks(line, stop={"rank": 1, "step": 6}, environment=QUICK)
    assert answer["codes"][0] not in (0, -signal.SIGKILL)
    assert "rank 1 of 2 has not been heard of" in answer["err"][0]


@pytest.mark.slow
def test_an_error_of_one_rank_is_told_to_the_others(
    on_ranks: Ranks, tiny_llama_dir: Path, train: Path, tmp_path: Path
) -> None:
    line = ["attribute", "build", str(tiny_llama_dir), str(train), "--shard-examples", "3"]
    answer = on_ranks([*line, "-o", str(tmp_path / "index")], fail={"rank": 1, "step": 6})
    assert 0 not in answer["codes"]
    assert "no space left" in answer["err"][1]
    assert re.search("rank 1 of 2 stopped: .*no space left", answer["err"][0])
