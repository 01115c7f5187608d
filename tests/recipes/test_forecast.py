"""A forecast counts what its docstring says, and says what it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest

from postlude.attribution.plan import Hardware
from postlude.cli import app, invoke
from postlude.cli._commands import recipe_commands
from postlude.errors import SettingsError, UnknownNameError
from postlude.recipes.forecast import Forecasts, chosen_hardware, forecast
from postlude.recipes.recipe import ASSUMED, read

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


SCALE = """\
variables: {model: , data: , text: }
stages:
  before: {evaluate: "${model}", text: "${text}"}
  tuned: {tune: ["${model}", "${data}"]}
  small: {quantize: "${model}", method: gptq, calibration: "${text}", samples: 10, length: 100}
  look: {inspect: "${small}"}
  index: {attribute build: ["${model}", "${data}"]}
"""


def test_models_that_are_not_there_and_ranks(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(SCALE)
    assumed = {"model": f"{ASSUMED}8B", "data": f"{ASSUMED}1M", "text": f"{ASSUMED}2K"}
    recipe = read(file, recipe_commands(app), assumed)
    machine = Hardware("a device", 1.0, 1.0, 1.0, 100e9, 1.0)
    one, four, cut = (
        {stage.stage: stage for stage in forecast(recipe, tmp_path / "run", machine, *how).stages}
        for how in ((1,), (4,), (4, True))
    )
    assert one["before"].seconds == 2 * 8e9 * 2000
    assert one["before"].memory == 16e9  # in bf16
    assert one["tuned"].memory == four["tuned"].memory == 128e9
    assert cut["tuned"].memory == 128e9 / 4
    assert [found["tuned"].fits for found in (one, four, cut)] == [False, False, True]
    for name in ("before", "tuned", "small", "index"):
        assert one[name].seconds == pytest.approx(4 * (four[name].seconds or 0))
        assert four[name].ranks == 4
    # Ranks have no part in this one.
    assert four["look"].seconds == one["look"].seconds and four["look"].ranks == 1
    # Rounding by GPTQ comes on top of the passes over the text.
    assert (one["small"].seconds or 0) > 6 * 8e9 * 1000


def test_what_only_a_forecast_takes(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="share its cores"):
        chosen_hardware("this", 2)
    with pytest.raises(UnknownNameError, match="h100"):
        chosen_hardware("h10", 2)
    with pytest.raises(SettingsError, match="add --dry-run"):
        invoke(["run", "recipe.yaml", "--assume", "model=8B", "-o", str(tmp_path)])
    with pytest.raises(SettingsError, match="expected NAME=COUNT"):
        invoke(["run", "recipe.yaml", "--dry-run", "--assume", "model"])
