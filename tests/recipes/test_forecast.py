"""A forecast counts what its docstring says, and says what it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest

from postlude.attribution.plan import Hardware
from postlude.cli import app
from postlude.cli._commands import recipe_commands
from postlude.recipes.forecast import Forecasts, forecast
from postlude.recipes.recipe import read

# One operation a second, so that seconds are operations.
COUNTER = Hardware("a counter", 1.0, 1.0, 1.0, 1.0, 1.0)
TEXT = """\
stages:
  small: {quantize: MODEL, bits: w8a8, calibration: TEXT, samples: 2, length: 16}
  packed: {quantize: MODEL, bits: w4}
  quality: {evaluate: "${small}", text: TEXT, reference: MODEL}
  tuned: {tune: [MODEL, TEXT], epochs: 2.0}
  shown: {inspect kernels: "${small}"}
"""


@pytest.fixture
def found(tiny_llama_dir: Path, tmp_path: Path) -> Forecasts:
    text = tmp_path / "text.txt"
    text.write_text("x" * 400)
    file = tmp_path / "recipe.yaml"
    file.write_text(TEXT.replace("MODEL", str(tiny_llama_dir)).replace("TEXT", str(text)))
    return forecast(read(file, recipe_commands(app)), tmp_path / "run", COUNTER)


def test_operations_bytes_and_what_is_not_known(found: Forecasts, tiny_llama_dir: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(tiny_llama_dir / "model.safetensors").values()
    parameters = sum(weight.numel() for weight in weights)
    by_name = {one.stage: one for one in found.stages}
    assert by_name["small"].seconds == 6 * parameters * 2 * 16
    assert by_name["quality"].seconds == 2 * (2 * parameters) * 100
    assert by_name["tuned"].seconds == 6 * parameters * 100 * 2
    assert by_name["packed"].bytes == parameters * 4 / 8 * (1 + 1 / 16)
    assert by_name["shown"].seconds is None and "inspect kernels" in by_name["shown"].why
    assert not any(one.done for one in found.stages)
    assert by_name["quality"].command.startswith("postlude evaluate --text")
