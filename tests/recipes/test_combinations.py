"""The recipes that combine systems, run from end to end on models and texts of a few lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from postlude.cli import app, invoke
from postlude.cli._commands import recipe_commands
from postlude.recipes.recipe import read
from postlude.recipes.run import run

RECIPES = Path(__file__).parents[2] / "recipes"
WORDS = [
    "the",
    "old",
    "boat",
    "lay",
    "on",
    "a",
    "shore",
    "and",
    "one",
    "bird",
    "called",
    "over",
    "water",
]

# diffusers 0.42 against numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what takes seconds and is tested elsewhere: reading outputs in a fresh process, plots, forecasts."""
    monkeypatch.setattr("postlude.runs.checkpoint.Checkpoint._read_again", lambda *_: None)
    monkeypatch.setattr("postlude.report.tuning.write", lambda *_: None)
    monkeypatch.setattr("postlude._front_door.attributing.forecast", lambda *_: None)


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    """Files of a few short texts."""
    found = {}
    for at, name in enumerate(("data", "probe", "test")):
        rows = [
            {"text": " ".join(WORDS[(3 * at + i + j) % 13] for j in range(5 + i % 3))}
            for i in range(6)
        ]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found[name] = str(file)
    return found


def results(name: str, out: Path, variables: Mapping[str, Any]) -> dict[str, Any]:
    """What every stage of a recipe prints."""
    given = {key: str(value) for key, value in variables.items()}
    recipe = read(RECIPES / f"{name}.yaml", recipe_commands(app), given)
    return {done.stage: done.result for done in run(recipe, out, invoke)}


def test_heal_compression(tiny_llama_dir: Path, texts: dict[str, str], tmp_path: Path) -> None:
    found = results(
        "heal-compression",
        tmp_path / "run",
        {"model": tiny_llama_dir, **texts, "lost": 2, "recovery": 3, "steps": 2, "rate": 0.01},
    )
    assert found["damage"]["texts"] == 2 and found["damage"]["kl"] > 0
    assert found["chosen"]["kept"] == 3
    # What was healed is a quantized model with branches, and another one than before.
    assert found["after"]["branch"]["layers_of_rank"].keys() == {"8"}
    assert found["after"]["kl"] != found["before"]["kl"]


@pytest.mark.slow
def test_quantized_prior(tiny_llama_dir: Path, texts: dict[str, str], tmp_path: Path) -> None:
    found = results(
        "quantized-prior",
        tmp_path / "run",
        {"model": tiny_llama_dir, "data": texts["data"], "other": texts["test"], "bits": "w2"},
    )
    weights = [found[name]["mean_weight"] for name in ("plain", "own", "from-float")]
    assert weights[0] == 1 and weights[1] < 1 and weights[1] != weights[2]
    forgotten = {found[f"{name}-forgets"]["kl"] for name in ("start", "plain", "own", "from-float")}
    assert len(forgotten) == 4


@pytest.mark.slow
def test_data_free_chat(tiny_llama_dir: Path, texts: dict[str, str], tmp_path: Path) -> None:
    found = results(
        "data-free-chat",
        tmp_path / "run",
        {
            "model": tiny_llama_dir,
            "calibration": texts["data"],
            "test": texts["test"],
            "activation-group": 16,
        },
    )
    # Untrained, it has nothing to be found; the recipe goes on.
    assert found["look"]
    qualities = {found[f"{name}-quality"]["kl"] for name in ("plain", "from-weights", "from-text")}
    assert len(qualities) == 3


def test_any_approximation(tmp_path: Path) -> None:
    found = results(
        "any-approximation",
        tmp_path / "run",
        {"reuse": 2, "sampler": "euler", "steps": 4, "count": 4},
    )
    assert found["drift"]["largest_coefficient"] > 0
    names = ("plain", "corrected", "expected-error-subtracted")
    assert len({found[name]["psnr_db"] for name in names}) == 3
