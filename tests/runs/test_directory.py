from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from postlude.errors import RunDirectoryError
from postlude.runs.directory import RunDirectory, fingerprint

MANIFEST = {"model": "abc", "settings": {"bits": "w4a4kv4", "group": 128}, "seed": 0}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 15, (4, 6), generator=generator, dtype=torch.uint8)
    return {"codes": codes, "scale": torch.randn(4, 1, generator=generator, dtype=torch.bfloat16)}


def test_a_unit_is_computed_once_and_comes_back_with_its_bits(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", MANIFEST)
    first = run.unit("block-0", lambda: tensors(1))
    again = RunDirectory(tmp_path / "run", MANIFEST)
    second = again.unit("block-0", lambda: pytest.fail("computed twice"))
    assert first.keys() == second.keys() == {"codes", "scale"}
    for name, expected in tensors(1).items():
        assert torch.equal(first[name], expected) and torch.equal(second[name], expected)
        assert second[name].dtype == expected.dtype
    assert again.is_finished("block-0") and not again.is_finished("block-1")
    assert again.finished() == ["block-0"]


def test_views_and_shared_memory_are_stored(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, MANIFEST)
    whole = torch.arange(12.0).reshape(3, 4)
    stored = run.unit("x", lambda: {"whole": whole, "column": whole[:, 1], "row": whole[2]})
    assert torch.equal(stored["whole"], whole)
    assert torch.equal(stored["column"], whole[:, 1]) and torch.equal(stored["row"], whole[2])
    assert run.unit("empty", dict) == {}


def test_a_damaged_unit_is_computed_again_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDirectory(tmp_path, MANIFEST)
    run.unit("block-0", lambda: tensors(1))
    (file,) = (tmp_path / "units").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        stored = run.unit("block-0", lambda: tensors(1))
    assert torch.equal(stored["codes"], tensors(1)["codes"])
    assert "damaged" in caplog.text and file.name in caplog.text
    assert run.is_finished("block-0")


def test_another_run_is_refused_with_every_differing_key(tmp_path: Path) -> None:
    RunDirectory(tmp_path, MANIFEST).unit("block-0", lambda: tensors(1))
    other = {"model": "abd", "settings": {"bits": "w8a8kv8", "group": 128}, "steps": 3}
    with pytest.raises(RunDirectoryError) as caught:
        RunDirectory(tmp_path, other)
    message = str(caught.value)
    assert 'the kept run has model "abc", this one asks for "abd"' in message
    assert 'the kept run has settings.bits "w4a4kv4", this one asks for "w8a8kv8"' in message
    assert "the kept run has seed 0, this one has none" in message
    assert "the kept run has no steps, this one asks for 3" in message
    assert "group" not in message
    assert "--overwrite" in message
    assert message.endswith("or choose another output (-o).")
    assert caught.value.exit_code == 2
    assert RunDirectory(tmp_path, MANIFEST).is_finished("block-0")

    afresh = RunDirectory(tmp_path, other, overwrite=True)
    assert afresh.finished() == []
    assert json.loads((tmp_path / "manifest.json").read_text()) == other


def test_overwrite_keeps_the_work_of_the_same_run(tmp_path: Path) -> None:
    RunDirectory(tmp_path, MANIFEST).unit("block-0", lambda: tensors(1))
    assert RunDirectory(tmp_path, MANIFEST, overwrite=True).is_finished("block-0")


def test_a_manifest_survives_json(tmp_path: Path) -> None:
    manifest = {"shape": (1, 2), "nested": {"empty": {}}}
    RunDirectory(tmp_path, manifest)
    RunDirectory(tmp_path, manifest)


def test_what_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(RunDirectoryError, match="not a run directory"):
        RunDirectory(tmp_path, MANIFEST, overwrite=True)
    with pytest.raises(RunDirectoryError, match="is a file"):
        RunDirectory(tmp_path / "thesis.tex", MANIFEST)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(RunDirectoryError, match="not valid JSON"):
        RunDirectory(tmp_path, MANIFEST)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a@b", "a*"])
def test_unit_names_are_plain(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="unit name"):
        RunDirectory(tmp_path, MANIFEST).unit(name, dict)


def test_a_name_does_not_match_a_longer_one(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, MANIFEST)
    run.unit("block.1.q", lambda: tensors(1))
    assert not run.is_finished("block.1") and not run.is_finished("q")


RESUMABLE = """
import os, signal, sys, torch
from postlude.runs import atomic
from postlude.runs.directory import RunDirectory

path, moment = sys.argv[1:]
if moment == "compute" and os.fork():
    # Of two that are killed, the second imports nothing again.
    assert os.wait()[1] == signal.SIGKILL
    moment = "write"
run = RunDirectory(path, {"seed": 0})

def die():
    os.kill(os.getpid(), signal.SIGKILL)

state = torch.arange(8.0)
for step in range(4):
    def compute(state=state, step=step):
        print("computed", step, flush=True)
        if step == 2 and moment == "compute":
            die()
        return {"state": torch.sin(state * (step + 1)) + step}
    if step == 2 and moment == "write":
        atomic._sync_file = lambda path: die()
    state = run.unit(f"step-{step}", compute)["state"]
"""


def test_a_killed_run_resumes_and_ends_bit_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def finish(path: Path) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["-c", str(path), "never"])
        exec(RESUMABLE, {})
        return capsys.readouterr().out.split()

    killed = subprocess.run(
        [sys.executable, "-c", RESUMABLE, str(tmp_path / "killed"), "compute"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert RunDirectory(tmp_path / "killed", {"seed": 0}).finished() == ["step-0", "step-1"]
    # The second attempt already used the first two steps of the first.
    assert killed.stdout.split() == [
        "computed",
        "0",
        "computed",
        "1",
        "computed",
        "2",
        "computed",
        "2",
    ]
    assert finish(tmp_path / "killed") == ["computed", "2", "computed", "3"]
    assert len(finish(tmp_path / "whole")) == 8
    # The names are the hashes of the bytes.
    assert sorted(os.listdir(tmp_path / "killed" / "units")) == sorted(
        os.listdir(tmp_path / "whole" / "units")
    )


def test_a_fingerprint_follows_configuration_and_weights(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text("{}")
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    first = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("no part of it")
    assert fingerprint(tmp_path) == first and len(first) == 64
    save_file({"w": torch.tensor([0.0, 1e-30])}, tmp_path / "model.safetensors")
    second = fingerprint(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert len({first, second, fingerprint(tmp_path)}) == 3


def test_killed_before_the_manifest_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "_write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            RunDirectory(tmp_path / "run", MANIFEST)
    assert RunDirectory(tmp_path / "run", MANIFEST).finished() == []
