from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest

from postlude.inspection.update import Update
from postlude.report.comparison import render, update_figures
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import anatomy_of


@pytest.fixture(scope="module")
def update(make_model: Callable[..., Any]) -> dict[str, Any]:
    base = make_model()
    tuned = copy.deepcopy(base)
    tuned.model.layers[1].mlp.down_proj.weight.data += 3.0
    pair = [Checkpoint(model, None, anatomy_of(model)) for model in (base, tuned)]
    return Update(top=4).compare(*pair, ("a<b", "tuned")).to_dict()


def page(*updates: dict[str, Any]) -> str:
    pair = {"first": "a<b", "second": "tuned", "angle_degrees": 3.25, "verdict": "related"}
    return render({"pairs": [pair], "updates": updates}, "postlude inspect compare a b")


def test_figures_of_an_update(update: dict[str, Any]) -> None:
    figures = {figure.identifier: figure for figure in update_figures(update)}
    assert list(figures) == ["update-size", "update-unchanged", "update-ranks", "update-intruders"]
    assert set(figures["update-size"].names) == {
        "attention",
        "feed-forward",
        "norms and biases",
        "all",
    }
    # Nothing changed in block 0, and in block 1 the shift of one matrix has rank one.
    (row,) = figures["update-ranks"].rows
    assert row[0] == "1" and row[1] == "1"
    counts = dict(
        zip(figures["update-intruders"].names, figures["update-intruders"].rows[1][1:], strict=True)
    )
    assert counts["down"] == "1" and counts["up"] == "0"
    unchanged = figures["update-unchanged"].rows
    assert unchanged[0][1:] == ("1", "1", "1", "1", "1") and float(unchanged[1][1]) < 1


def test_the_page_is_whole_and_escaped(update: dict[str, Any]) -> None:
    text = page(update)
    assert "a&lt;b" in text and "a<b" not in text
    assert "3.25" in text and "related" in text
    assert "intruder dimensions" in text and "postlude inspect compare a b" in text
    assert text.count("<svg") == 8
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", text)
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))


def test_two_updates_and_one_that_is_absent(update: dict[str, Any]) -> None:
    absent = {"base": "a", "tuned": "c", "absent": "c has 3 blocks.", "method": "update"}
    text = page(update, absent, update)
    assert "There is no update: c has 3 blocks." in text
    assert text.count("<svg") == 16
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))


def test_nothing_changed(make_model: Callable[..., Any]) -> None:
    model = make_model()
    one = Checkpoint(model, None, anatomy_of(model))
    found = Update().compare(one, one).to_dict()
    assert [figure.identifier for figure in update_figures(found)] == [
        "update-size",
        "update-unchanged",
    ]
    assert "100.00% of them are equal" in page(found)
