"""Every recipe that comes with Postlude can be run: it is checked here against the commands there are."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from postlude.cli import app
from postlude.cli._commands import recipe_commands
from postlude.recipes.recipe import read

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_it_is_a_recipe(file: Path, tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    variables = yaml.safe_load(file.read_text())["variables"]
    open_ones = {name: str(tmp_path) for name, value in variables.items() if value is None}
    recipe = read(file, recipe_commands(app), open_ones)
    assert recipe.about
    used = {word for stage in recipe.stages for word in stage.needs}
    names = {stage.name for stage in recipe.stages}
    assert used <= names
