from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import pytest

from postlude.report.plots import Line, _apart, heat_map, line_plot


def lines(count: int, length: int = 4) -> list[Line]:
    return [Line(f"line {i}", [1.0 + i + j for j in range(length)]) for i in range(count)]


def draw(*given: Line, **options: object) -> str:
    settings = {"x_label": "block", "y_label": "error", "alt": "what it shows", **options}
    ticks = [str(i) for i in range(max(len(line.values) for line in given))]
    return line_plot("x", given, ticks, **settings).wide  # type: ignore[arg-type]


def test_a_drawing_is_well_formed_and_has_its_words() -> None:
    root = ElementTree.fromstring(draw(*lines(3)))
    words = {element.text for element in root.iter() if element.tag.endswith("text")}
    assert {"block", "error", "line 0", "line 1", "line 2", "0", "3"} <= words


def test_seven_lines_differ_by_dash_and_by_marker() -> None:
    drawing = draw(*lines(7))
    dashes = re.findall(
        r"fill: none; stroke(?:-dasharray: ([^;]+);[^\"]*)?[^\"]*stroke-width: 2\b", drawing
    )
    assert len(set(dashes)) == 7
    assert len(set(re.findall(r'<path id="x-700-(m[0-9a-f]+)" d="([^"]+)"', drawing))) >= 7


@pytest.mark.parametrize("values", [[None, 1.0, 2.0], [0.0, -1.0, 3.0], [float("inf"), 1.0, 2.0]])
def test_values_that_a_logarithm_has_not(values: list[float | None]) -> None:
    assert "line" in draw(Line("line", values), Line("other", [1.0, 2.0, 3.0]), logarithmic=True)


def test_a_line_without_values() -> None:
    draw(Line("nothing", [None, None]), Line("something", [1.0, 2.0]))
    draw(Line("nothing", [None, None]))


def test_constant_and_single_values() -> None:
    draw(Line("a", [1.0, 1.0]), Line("b", [1.0, 1.0]), logarithmic=True)
    draw(Line("a", [1.0]), Line("b", [2.0]), logarithmic=True)


def test_words_are_not_markup_nor_mathematics() -> None:
    drawing = draw(Line("<b>$x^2$</b>", [1.0, 2.0]), Line("b", [1.0, 2.0]), alt='"><script>')
    root = ElementTree.fromstring(drawing)
    assert "<b>$x^2$</b>" in {element.text for element in root.iter()}
    assert root.attrib["aria-label"] == '"><script>'


def test_the_same_drawing_twice() -> None:
    assert draw(*lines(2)) == draw(*lines(2))


def test_heat_map_of_odd_tokens() -> None:
    plot = heat_map(
        "map",
        [[1.0, 2.0, 0.0], [4.0, 1000.0, 3.0]],
        ["$a", "\n", "语言 and much more"],
        ["input", "0"],
        x_label="token",
        y_label="block",
        scale_label="norm",
        alt="which tokens are long",
    )
    words = {element.text for element in ElementTree.fromstring(plot.wide).iter()}
    assert {"$a", "\\n", "token", "block", "norm"} <= words


@pytest.mark.parametrize(
    "wanted", [[], [5.0], [0, 0, 0], [10, 11, 50], [97, 98, 99], list(range(20))]
)
def test_names_do_not_cover_each_other(wanted: list[float]) -> None:
    places = _apart(wanted, 10, 100)
    assert len(places) == len(wanted)
    assert all(b - a >= 10 - 1e-9 for a, b in itertools.pairwise(places))
    if len(wanted) <= 10:
        assert all(0 <= place <= 100 for place in places)


def test_names_stay_where_there_is_room() -> None:
    assert _apart([10, 40, 80], 10, 100) == [10, 40, 80]
