"""The page: everything is there, nothing is loaded from elsewhere, nothing a model says becomes markup."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from postlude.report import figures
from postlude.report.page import render
from postlude.report.plots import Plot

NONE = "\u2013"
VOID = {"meta", "path", "use", "image"}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No drawings, which are most of the work."""

    def nothing(identifier: str, *given: object, **options: object) -> Plot:
        return Plot("<svg></svg>", "<svg></svg>")

    monkeypatch.setattr(figures, "line_plot", nothing)
    monkeypatch.setattr(figures, "heat_map", nothing)


class Page(HTMLParser):
    """The elements of a page, its visible text, and the cells of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.rows: list[list[tuple[str, bool]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append(("", False))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words.append(data)
        if self.rows and {"td", "th"} & set(self.open):
            text, bold = self.rows[-1][-1]
            self.rows[-1][-1] = (text + data, bold or "strong" in self.open)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.mark.usefixtures("quick")
def test_the_table_marks_the_best_in_bold(results: dict[str, Any]) -> None:
    page = Page(render(results))
    rows = {row[0][0]: row[1:] for row in page.rows[:4]}
    assert list(rows) == ["method", "float", "rtn", "offq"]
    assert [text for text, _ in rows["float"]] == [
        "3.00",
        NONE,
        NONE,
        "7.00 MB",
        "16.00",
        NONE,
        NONE,
    ]
    assert rows["offq"][:4] == [("4.50", True), ("0.450", True), ("22.2", True), ("2.56 MB", True)]
    # Equal as printed is equally good; the baseline is never marked.
    assert rows["rtn"][3:] == [("2.56 MB", True), ("4.06", True), ("4.25", True), ("1.5", True)]
    assert rows["rtn"][0] == ("9.00", False)
    assert not any(bold for _, bold in rows["float"])


@pytest.mark.usefixtures("quick")
def test_the_verdict_and_the_findings(results: dict[str, Any]) -> None:
    text = Page(render(results)).text
    assert "offq lost least: perplexity 4.50 against 3.00 of the float model; rtn lost most" in text
    assert "massive hidden states appear in block 1" in text
    assert "4.6 degrees from the one measured on text" in text
    assert "massive hidden states vanish in block 2" in text
    assert "eigenvalue -35.1, negative" in text
    assert (
        r"tokens that stand first (97% of the vocabulary) and, elsewhere, '\n\n' (35 times)" in text
    )
    assert "the loss goes from 2.500 to 3.750 nats per token: the model relies on it" in text
    assert "neither supports nor refutes the benchmark numbers of any paper" in text


@pytest.mark.usefixtures("quick")
def test_no_difference_is_not_a_victory(results: dict[str, Any]) -> None:
    for row in results["methods"][1:]:
        row["perplexity"] = 3.01
    assert "No method raised the perplexity by more than 1%" in render(results)


def test_every_plot_is_there_twice_with_a_description(results: dict[str, Any]) -> None:
    page = Page(render(results))
    drawings = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(drawings) == 8
    for attributes in drawings:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"] or "") > 40
    figures = [attributes["id"] for tag, attributes in page.elements if tag == "figure"]
    assert figures == ["error", "norms", "map", "angles"]
    for label in ("L2 norm of a token", "acute angle (degrees)", "relative error (median token)"):
        assert page.words.count(label) == 2
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))


def test_lines_differ_in_more_than_colour(results: dict[str, Any]) -> None:
    page = render(results)
    figure = page[page.index('id="error"') : page.index('id="norms"')]
    assert "stroke-dasharray" in figure
    assert figure.count(">offq<") >= 2  # named at the end of the line, in both drawings


def test_nothing_is_loaded_and_nothing_runs(results: dict[str, Any]) -> None:
    text = render(results)
    assert "http" not in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    for tag, attributes in Page(text).elements:
        assert tag not in ("script", "link", "iframe", "img", "object", "embed", "base")
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name != "src"
            if name == "href":
                assert (value or "").startswith(("#", "data:image/png;base64,"))


def poisoned(value: Any, word: str) -> Any:
    """``value`` with ``word`` behind every text in it."""
    if isinstance(value, str):
        return value + word
    if isinstance(value, dict):
        return {name: poisoned(item, word) for name, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item, word) for item in value]
    return value


@pytest.mark.parametrize(
    "word", ['<script>alert("x")</script>', "\"'><img src=x onerror=alert(1)>"]
)
def test_texts_are_escaped(results: dict[str, Any], word: str) -> None:
    plain = Page(render(results))
    page = Page(render(poisoned(results, word)))
    assert word.split(">")[-2][:10] in page.text
    assert "script" not in {tag for tag, _ in page.elements}
    assert "img" not in {tag for tag, _ in page.elements}
    assert len(page.rows) == len(plain.rows)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "missing", ["model", "settings", "methods", "inspections", "prompt", "commands", "environment"]
)
def test_what_is_absent_is_left_out(results: dict[str, Any], missing: str) -> None:
    del results[missing]
    assert Page(render(results)).open == []


@pytest.mark.usefixtures("quick")
def test_nearly_nothing() -> None:
    page = Page(render({"methods": [{"name": "rtn", "perplexity": None, "loss": 800.0}]}))
    assert page.rows[-1] == [("rtn", False)]
    assert Page(render({})).text.startswith("Results")


@pytest.mark.usefixtures("quick")
def test_a_model_without_massive_activations(results: dict[str, Any]) -> None:
    report = results["inspections"]["singular-defects"]
    report |= {"massive": False, "explosion": {"layer": None}, "decay": {"layer": None}}
    report["explosion_path"] = None
    results["inspections"]["signature"]["massive"] = False
    text = Page(render(results)).text
    assert "Singular defects: none." in text
    assert "massive hidden states appear" not in text


@pytest.mark.usefixtures("quick")
def test_inspections_alone_make_a_page(results: dict[str, Any]) -> None:
    page = Page(render({"inspections": results["inspections"]}))
    assert [a["id"] for tag, a in page.elements if tag == "figure"] == ["norms", "map", "angles"]


@pytest.mark.usefixtures("quick")
def test_commands_can_be_pasted(results: dict[str, Any]) -> None:
    original = results["commands"][0]
    text = render(results).replace("&#34;", '"')
    block = text[text.index("postlude quantize") :].split("</code>")[0]
    assert max(map(len, block.splitlines())) <= 82
    assert re.sub(r" \\\n +", " ", block).strip() == original


@pytest.mark.usefixtures("quick")
def test_how_long_a_continuation_keeps_to_the_float_model(results: dict[str, Any]) -> None:
    text = Page(render(results)).text
    assert "rtn as the float model for 2 tokens" in text
    assert "offq the same as the float model" in text


def test_rendering_changes_nothing(results: dict[str, Any]) -> None:
    before = copy.deepcopy(results)
    assert render(results) == render(results)
    assert results == before
