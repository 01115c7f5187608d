"""Checkpoints written by llm-compressor and auto-round themselves.

Needs an interpreter that has both, in an environment of its own::

    python -m venv peer && peer/bin/pip install llmcompressor auto-round
    POSTLUDE_PEER_PYTHON=peer/bin/python pytest -m slow tests/runs/importing/test_peers.py
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from postlude.runs.loading import load
from postlude.surgery.layers import QuantizedLinear

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TOKENS = torch.arange(2, 26).reshape(2, 12)


@pytest.fixture(scope="module")
def source(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("llama", hidden_size=64, head_dim=16, intermediate_size=128)


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    default = Path(__file__).resolve().parents[4] / "env" / "peer" / "bin" / "python"
    python = os.environ.get("POSTLUDE_PEER_PYTHON", str(default))
    if not Path(python).exists():
        pytest.skip(f"no interpreter with llm-compressor at {python} (POSTLUDE_PEER_PYTHON)")
    out = tmp_path_factory.mktemp("peers")
    script = Path(__file__).with_name("write_peers.py")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [python, str(script), str(source), str(out)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def at(written: Path, name: str) -> Path:
    """auto-round writes into a directory of its own."""
    return next((written / name).rglob("config.json")).parent


@pytest.mark.parametrize("name", ["w4a16", "w4a16_asym", "w8a16", "w8a8", "fp8"])
def test_logits_of_llm_compressor(written: Path, name: str) -> None:
    directory = at(written, name)
    found = load(directory, dtype="float32")
    with torch.inference_mode():
        logits = found.model(TOKENS, use_cache=False).logits
    theirs = load_file(directory / "logits.safetensors")["logits"]
    # Activations of w8a8 are divided by 127.5 there and by 127 here.
    tolerance = 0.1 if name == "w8a8" else 1e-5
    assert (logits - theirs).norm() / theirs.norm() < tolerance


@pytest.mark.parametrize("name", ["gptq_sym", "gptq_asym", "awq"])
def test_weights_of_auto_round(source: Path, written: Path, name: str) -> None:
    """They are near those they were rounded from: another order or offset would be nowhere near."""
    directory = at(written, name)
    method = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert method["quant_method"] == name.partition("_")[0]
    found: Any = load(directory).model
    float_model = load(source).model
    count = 0
    for path, layer in found.named_modules():
        if isinstance(layer, QuantizedLinear):
            count += 1
            weight = float_model.get_submodule(path).weight
            assert (layer.dense_weight() - weight).norm() / weight.norm() < 0.15, path
    assert count == 14
