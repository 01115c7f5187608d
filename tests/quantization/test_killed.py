"""``postlude quantize`` killed with SIGKILL: the output is absent or whole, and a second run makes the same files."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ..battery.bench import Bench

SCRIPT = Path(__file__).with_name("kill_anywhere.py")
ROOT = SCRIPT.parents[2]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("killed")
    bench = Bench(directory)
    bench.model().save(directory / "model")
    (directory / "text.txt").write_text(bench.text)
    return directory


def words(work: Path) -> list[str]:
    return [
        "quantize", str(work / "model"), "--method", "gptq", "--bits", "w4a4kv4",
        "--calibration", str(work / "text.txt"), "--samples", "4", "--length", "24",
        "--no-check",
    ]  # fmt: skip


def kill(work: Path, count: str, out: str, *more: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(SCRIPT), count, str(work / out), *words(work), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(records: list[dict[str, Any]], old: dict[str, str] | None) -> None:
    whole, *records = records
    assert whole["code"] == 0
    assert whole["steps"] > 40
    new = whole["files"]
    assert new != old
    for record in records:
        assert record["killed"] == -signal.SIGKILL, record
        assert record["after_kill"] in (old, new), record
        assert record["files"] == new, record
        if record["after_kill"] == new and old is None:
            # Finished but for tidying up: the second run sees an output that exists, and says so.
            assert record["code"] == 2, record
        else:
            assert record["code"] == 0, record
            assert record["left"] == [], record


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_at_some_step(work: Path) -> None:
    """Another every time."""
    check(kill(work, "1", "some"), None)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_every_step(work: Path) -> None:
    check(kill(work, "all", "every"), None)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_every_step_while_replacing(work: Path) -> None:
    """The old output stays until the new one is there."""
    shutil.copytree(work / "model", work / "replaced.before")
    files = (work / "replaced.before").iterdir()
    old = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    check(kill(work, "all", "replaced", "--overwrite"), old)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_random_moments(work: Path) -> None:
    """The real command in a process of its own, killed by the clock."""
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def start(out: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "postlude", *words(work), "-o", str(work / out)]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    began = time.monotonic()
    reference = start("undisturbed")
    _, errors = reference.communicate()
    assert reference.returncode == 0, errors
    duration = time.monotonic() - began
    expected = {file.name: file.read_bytes() for file in (work / "undisturbed").iterdir()}

    for _ in range(6):
        process = start("disturbed")
        time.sleep(moments.uniform(0.4, 1.0) * duration)
        process.kill()
        process.communicate()
        if (work / "disturbed").exists():
            break
    if not (work / "disturbed").exists():
        last = start("disturbed")
        _, errors = last.communicate()
        assert last.returncode == 0, (seed, errors)
    found = {file.name: file.read_bytes() for file in (work / "disturbed").iterdir()}
    assert found == expected, seed
    assert load_file(work / "disturbed" / "model.safetensors")
