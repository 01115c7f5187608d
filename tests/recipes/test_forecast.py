"""A forecast counts what its docstring says, and says what it does not know."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import postlude as pl
from postlude.attribution.plan import Hardware
from postlude.cli import app, invoke
from postlude.cli._commands import recipe_commands
from postlude.errors import SettingsError, UnknownNameError
from postlude.recipes.forecast import Forecasts, chosen_hardware, forecast
from postlude.recipes.recipe import read
from postlude.recipes.stage import ASSUMED
from postlude.runs.loading import resolve
from postlude.runs.pipeline import denoiser_files
from postlude.runs.weights import read_header

# One operation a second, so that seconds are operations.
COUNTER = Hardware("a counter", 1.0, 1.0, 1.0, 1.0, 1.0)
TEXT = """\
stages:
  small: {quantize: MODEL, bits: w8a8, calibration: TEXT, samples: 2, length: 16}
  packed: {quantize: MODEL, bits: w4}
  quality: {evaluate: "${small}", text: TEXT, reference: MODEL}
  tuned: {tune: [MODEL, DATA], epochs: 2.0}
  shown: {inspect kernels: "${small}"}
  few: {tune: [MODEL, DATA], steps: 3, batch-size: 4, accumulate: 2}
  cut: {tune: [MODEL, DATA], max-length: 10}
  packed-rows: {tune: [MODEL, DATA], steps: 3, packing: true, max-length: 10}
  adapted: {tune: [MODEL, DATA], adapter: lora}
  kept-close: {tune: [MODEL, DATA], weights: sft-kl}
  preferred: {tune: [MODEL, DATA], objective: dpo}
  rewarded: {tune: [MODEL, DATA], objective: grpo, reward: [speech-verifiable]}
  prior: {tune prior: [MODEL, DATA]}
  lost: {attribute damage: ["${small}", DATA], reference: MODEL, top: 5}
  index: {attribute build: [MODEL, DATA]}
  chosen: {attribute select: ["${index}", "${lost}"], top: 15}
  others: {attribute select: ["${index}", "${lost}"], top: 15, drop: true}
  healed: {tune: [MODEL, "${chosen}"]}
  again: {tune: [MODEL, "${others}"]}
"""


@pytest.fixture
def found(tiny_llama_dir: Path, tmp_path: Path) -> Forecasts:
    text = tmp_path / "text.txt"
    text.write_text("x" * 400)
    # Twenty examples of 15 tokens.
    data = tmp_path / "data.jsonl"
    data.write_text(f'{{"text": "{"y" * 47}"}}\n' * 20)
    file = tmp_path / "recipe.yaml"
    words = {"MODEL": tiny_llama_dir, "TEXT": text, "DATA": data}
    content = TEXT
    for word, path in words.items():
        content = content.replace(word, str(path))
    file.write_text(content)
    return forecast(read(file, recipe_commands(app)), tmp_path / "run", COUNTER)


@pytest.fixture
def parameters(tiny_llama_dir: Path) -> int:
    weights = load_file(tiny_llama_dir / "model.safetensors").values()
    return sum(weight.numel() for weight in weights)


def test_bytes_of_a_quantized_model(found: Forecasts, tiny_llama_dir: Path, tmp_path: Path) -> None:
    pl.quantize(tiny_llama_dir, "rtn", out=tmp_path / "small")
    written = (tmp_path / "small" / "model.safetensors").stat().st_size
    forecast = next(one for one in found.stages if one.stage == "packed").bytes
    assert forecast == pytest.approx(written, rel=0.2)


def test_operations_bytes_and_what_is_not_known(found: Forecasts, parameters: int) -> None:
    by_name = {one.stage: one for one in found.stages}
    assert by_name["small"].seconds == 6 * parameters * 2 * 16
    assert by_name["quality"].seconds == 2 * (2 * parameters) * 100
    assert by_name["tuned"].seconds == pytest.approx(6 * parameters * 20 * 15 * 2)
    assert by_name["shown"].seconds is None and "inspect kernels" in by_name["shown"].why
    assert not any(one.done for one in found.stages)
    assert by_name["quality"].command.startswith("postlude evaluate --text")


def test_tuning_counts_its_steps_and_what_runs_beside_it(found: Forecasts, parameters: int) -> None:
    operations = {one.stage: (one.seconds or 0) / parameters for one in found.stages}
    assert operations["few"] == pytest.approx(6 * 3 * 4 * 2 * 15)
    assert operations["cut"] == pytest.approx(6 * 20 * 10)
    assert operations["packed-rows"] == pytest.approx(6 * 3 * 8 * 10)
    assert operations["adapted"] == pytest.approx(4 * 20 * 15)
    assert operations["kept-close"] == operations["preferred"] == pytest.approx(8 * 20 * 15)
    assert operations["prior"] == pytest.approx(2 * 20 * 15)
    rewarded = next(one for one in found.stages if one.stage == "rewarded")
    assert rewarded.seconds is None and "answers" in rewarded.why


def test_what_stages_write_has_its_size(found: Forecasts, parameters: int) -> None:
    operations = {one.stage: (one.seconds or 0) / parameters for one in found.stages}
    assert operations["lost"] == pytest.approx(2 * 2 * 20 * 15)
    assert operations["healed"] == pytest.approx(6 * 15 * 15)
    assert operations["again"] == pytest.approx(6 * 5 * 15)
    chosen = next(one for one in found.stages if one.stage == "chosen")
    assert chosen.seconds is None and chosen.why == "no forecast for `attribute select`"


DRAWN = """\
stages:
  plain: {quantize: "zoo:tiny-dit", method: rtn}
  small: {quantize: "zoo:tiny-dit", method: gptq, samples: 10}
  drift: {sample calibrate: "${small}", reference: "zoo:tiny-dit", runs: 3, batch: 4, steps: 7}
  drawn: {sample: "zoo:tiny-dit", count: 5, steps: 2, guidance: 1.5, sampler: heun}
  corrected: {sample: "zoo:tiny-dit", count: 5, drift: "${drift}", compare: "${small}", reuse: 2}
  judged: {evaluate samples: "${small}", count: 8}
"""


def test_drawing_images(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(DRAWN)
    stages = forecast(read(file, recipe_commands(app)), tmp_path / "run", COUNTER).stages
    weights = read_header(denoiser_files(resolve("zoo:tiny-dit"))[0]).values()
    parameters = sum(math.prod(one["shape"]) for one in weights)
    tokens = {one.stage: (one.seconds or 0) / 2 / parameters for one in stages}
    patches = 16
    assert tokens == pytest.approx(
        {
            "plain": 0,
            "small": 10 * patches * (3 + 20),
            "drift": 2 * 3 * 4 * 7 * patches,
            "drawn": 5 * 2 * 2 * 2 * patches,
            "corrected": 5 * 7 * (1 / 2 + 1) * patches,
            "judged": 8 * 20 * patches,
        }
    )
    assert stages[4].bytes == 2 * 5 * 64 * 4


def test_files_of_inputs_are_counted(tmp_path: Path) -> None:
    inputs = tmp_path / "inputs.safetensors"
    save_file({"hidden_states": torch.zeros(6, 1, 8, 8), "timestep": torch.zeros(6)}, inputs)
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f'stages: {{small: {{quantize: "zoo:tiny-dit", method: gptq, calibration: {inputs}}}}}'
    )
    (found,) = forecast(read(file, recipe_commands(app)), tmp_path / "run", COUNTER).stages
    few = found.seconds
    save_file({"hidden_states": torch.zeros(12, 1, 8, 8)}, inputs)
    (found,) = forecast(read(file, recipe_commands(app)), tmp_path / "run", COUNTER).stages
    assert found.seconds == 2 * (few or 0)


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
