"""The page of an attribution query: what it says, and how it looks in a real browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from postlude.attribution.d_trak import DTRAK
from postlude.report.attribution import render

from .attributed import TEXT, answer
from .browser import Browser


class Reader(HTMLParser):
    """Text, marked tokens, and whether every element is closed."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.marked: list[tuple[str, str, str]] = []
        self.loads: list[str] = []
        self._mark: tuple[str, str] | None = None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loads += [str(given[name]) for name in ("src", "href") if given.get(name)]
        if tag not in self.VOID:
            self.open.append(tag)
        self._mark = (
            (str(given["class"]), str(given["title"])) if tag == "i" and "title" in given else None
        )

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._mark:
            self.marked.append((data, *self._mark))
            self._mark = None
        if not self.open or self.open[-1] != "style":
            self.text += data


def words(page: str) -> str:
    return " ".join(Reader(page).text.split())


def test_it_says_what_was_asked_and_found() -> None:
    page = render(answer())
    text = words(page)
    assert (
        "Of the 2,000 training examples in this index, these support the text below most." in text
    )
    assert "The model is tiny." in text
    assert "story-0, is 13.7 standard deviations above the mean score of all 2,000 examples" in text
    assert "factors, rank 1, format int8" in text
    for expected in (
        "story-37",
        "61.5",
        "+6.8 deviations",
        "1.23 MB, 617 B an example",
        "0.0123 s",
    ):
        assert expected in text
    assert "The last 12 tokens of this example lie beyond the model's context" in text
    assert " ".join(TEXT.split()) in text
    assert "strongest: model.layers.0.self_attn.q_proj" in text
    assert "postlude attribute query index/" in text


def test_it_is_whole_and_loads_nothing() -> None:
    page = render(answer())
    reader = Reader(page)
    assert reader.open == []
    assert "<script" not in page
    assert all(link.startswith(("#", "data:")) for link in reader.loads)
    assert "url(" not in page


def test_marks_follow_the_contributions() -> None:
    marks = Reader(render(answer())).marked
    classes = {mark for _, mark, _ in marks}
    assert {"p6", "n6"} & classes
    for _, mark, value in marks:
        assert ("\u2212" in value[:1]) == mark.startswith("n")
    # The space before a word is not part of the mark.
    assert all(word == word.lstrip() for word, _, _ in marks)


def test_a_break_that_carries_weight_is_shown() -> None:
    results = answer()
    results["queries"][0]["tokens"] = [{"text": "\n", "score": 1.0}, {"text": " ", "score": -1.0}]
    marked = Reader(render(results)).marked
    assert [word for word, _, _ in marked[:2]] == ["\u21b5\n", "\u2423"]


def test_a_long_example_is_cut_to_its_strongest_stretch() -> None:
    results = answer()
    quiet = [{"text": f" w{number}", "score": 0.0} for number in range(1000)]
    quiet[700]["score"] = 5.0
    results["queries"][0]["results"] = [
        {"id": "long", "score": 1.0, "text": "", "tokens": quiet, "query_tokens": [], "layers": {}}
    ]
    page = render(results)
    before, after = re.search(r"\((\d+) tokens before\).*\((\d+) tokens after\)", page).groups()  # type: ignore[union-attr]
    assert int(before) <= 700 < 1000 - int(after)
    assert int(before) + int(after) == 840
    assert "The whole example" in page


def test_everything_from_outside_is_escaped() -> None:
    bad = "<script>alert('x')</script>&amp;"
    results = answer(title=bad, command=bad)
    results["queries"][0]["text"] = bad
    results["queries"][0]["tokens"] = [{"text": bad, "score": 1.0}]
    results["queries"][0]["results"][0] |= {"id": bad, "tokens": [{"text": bad, "score": 1.0}]}
    results["queries"][0]["results"][0]["layers"] = {bad: 1.0}
    page = render(results)
    assert "<script" not in page
    assert Reader(page).text.count(bad) >= 5


def test_parts_that_are_absent_are_left_out() -> None:
    bare = {
        "queries": [
            {"text": "one", "results": [{"id": 3, "score": -2.5e-7, "text": "what it says"}]},
            {"text": "two", "results": []},
        ]
    }
    page = render(bare)
    text = words(page)
    assert "2. The text" in text
    assert "\u22122.50 \u00d7 10^\u22127" in text
    assert "what it says" in text
    for absent in ("opposes", "Score by layer", "Do it again", "How it was measured", "deviations"):
        assert absent not in text


def test_a_page_on_which_nothing_opposes_does_not_speak_of_it() -> None:
    assert "opposes" in words(render(answer()))
    tokens = [{"text": "a", "score": 0.0}, {"text": " boat", "score": 2.0}]
    hit = {"id": 1, "score": 2.0, "text": "a boat", "tokens": tokens, "query_tokens": tokens}
    page = render({"queries": [{"text": "a boat", "tokens": tokens, "results": [hit]}]})
    assert "supports" in words(page)
    assert "opposes" not in words(page) and "\u00b1" not in page
    assert not re.search(r'class="n\d', page)


def test_nothing_that_stands_out_is_said() -> None:
    results = answer()
    results["queries"][0] |= {"mean": 100.0, "deviation": 20.0}
    assert "None stands out" in words(render(results))


# What there is to see of marked words and of the bars of layers.
SEEN = """(() => {
  const box = element => element.getBoundingClientRect();
  const bars = [...document.querySelectorAll(".bars > span")].map(box);
  const drawn = [...document.querySelectorAll(".bars > span > span")].map(box);
  return {
    marks: [...document.querySelectorAll("i[title]")].filter(mark => box(mark).width > 0).length,
    lines: new Set([...document.querySelectorAll("i.p6, i.n6")].map(
      mark => getComputedStyle(mark).borderBottomStyle)).size,
    bars: bars.length,
    narrowest: Math.min(...bars.map(bar => bar.width)),
    outside: drawn.filter((bar, n) => bar.top < bars[n].top - 1 || bar.bottom > bars[n].bottom + 1).length,
    tallest: Math.max(...drawn.map(bar => bar.height)),
    hits: document.querySelectorAll("ol.hits > li").length,
  };
})()"""


@pytest.mark.parametrize("width", [360, 1440])
def test_the_page_in_a_browser(window: Browser, width: int, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(render(answer()), encoding="utf-8")
    window.open(file, width)
    seen = window.evaluate(SEEN)
    assert seen["hits"] == 3
    assert seen["marks"] > 20
    assert seen["lines"] == 2  # solid and dotted
    assert seen["bars"] == 3 * 9
    assert seen["outside"] == 0
    assert seen["tallest"] > 20
    assert seen["narrowest"] > 4


PICTURE = "data:image/png;base64,iVBORw0KGgo="


def test_a_page_of_images_shows_them_and_the_weights_of_layers() -> None:
    given = answer()
    for query in given["queries"]:
        query |= {"picture": PICTURE, "tokens": [], "text": "label 3, three.png"}
        for hit in query["results"]:
            hit |= {"picture": PICTURE, "tokens": None, "query_tokens": None, "text": "label 3"}
    given["queries"][0]["deviation"] = 90.0
    given["method"]["meaning"] = DTRAK().meaning("image")
    given["weights"] = dict(zip(given["queries"][0]["results"][0]["layers"], range(9), strict=True))
    page = render(given)
    reader = Reader(page)
    hits = sum(len(query["results"]) for query in given["queries"])
    # The image that was asked about, and every training image twice: in the overview, and beside its layers.
    assert page.count(PICTURE) == len(given["queries"]) + 2 * hits
    assert not reader.open and "15 tokens" not in reader.text
    assert "What each layer counts for" in reader.text and "The image" in reader.text
    assert "squared norm of the model's output at the image" in reader.text
    assert "None stands out: this image may owe" in reader.text
    for anchor in re.findall('href="#(hit-[0-9-]+)"', page):
        assert f'id="{anchor}"' in page
    plain = render(answer())
    assert PICTURE not in plain and "What each layer counts for" not in plain
