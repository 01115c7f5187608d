"""Every page in a real browser: as wide as a phone and as a desk, without a network, in colours and in greys."""

from __future__ import annotations

import copy
import subprocess
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from postlude import cli
from postlude.inspection.update import Update
from postlude.report import attribution, chain, comparison, page, signals, speech, tuning
from postlude.report.plots import Line, line_plot
from postlude.runs.audio import Recording
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import anatomy_of

from . import test_signals, test_speech, test_tuning
from .attributed import answer
from .browser import Browser
from .made import demo_results, finished_run, picture

WIDTHS = (360, 1440)
PAGES = ("run", "runs", "comparison", "demo", "attribution", "signal", "tuning", "speech")
LONG = "a-model-with-a-name-that-nobody-would-want-to-type-twice"

# What a reader would see, measured in the page.
SEEN = """(() => {
  const box = one => one.getBoundingClientRect();
  const shown = one => box(one).width > 0 && box(one).height > 0;
  const rgb = text => {
    const found = text.match(/[\\d.]+/g).map(Number);
    return found.length > 3 ? found : [...found, 1];
  };
  const light = colour => {
    const [r, g, b] = colour.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const over = (top, below) => [0, 1, 2].map(i => top[3] * top[i] + (1 - top[3]) * below[i]);
  const behind = one => {
    if (!one || one === document) return [255, 255, 255];
    const style = one instanceof SVGElement ? [0, 0, 0, 0] : rgb(getComputedStyle(one).backgroundColor);
    return style[3] === 1 ? style : over(style, behind(one.parentElement));
  };
  const contrast = one => {
    const style = getComputedStyle(one), below = behind(one);
    const ink = over(rgb(one instanceof SVGElement ? style.fill : style.color), below);
    const [a, b] = [light(ink), light(below)].sort((x, y) => y - x);
    return (a + .05) / (b + .05);
  };
  const texts = [...document.querySelectorAll("body *")].filter(one => shown(one) &&
    [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
  const svgs = [...document.querySelectorAll("figure svg")].filter(shown);
  const name = one => one.tagName + " " + one.textContent.trim().slice(0, 40);
  const ids = [...document.querySelectorAll("[id]")].map(one => one.id);
  return {
    visible: document.documentElement.clientWidth,
    needed: document.documentElement.scrollWidth,
    faint: texts.filter(one => contrast(one) < 4.5).map(one => name(one) + " " + contrast(one).toFixed(2)),
    small: texts.filter(one => parseFloat(getComputedStyle(one).fontSize) < 10).map(name),
    links: [...document.querySelectorAll('a[href^="#"]')].map(one => one.getAttribute("href").slice(1)),
    files: [...document.querySelectorAll("a[href]")].map(one => one.getAttribute("href"))
      .filter(one => !one.startsWith("#")),
    ids: ids,
    twice: ids.filter((one, at) => ids.indexOf(one) !== at),
    unlisted: !document.querySelector("nav") ? [] : [...document.querySelectorAll("section h2")].filter(one =>
      !document.querySelector(`nav a[href="#${one.id}"]`)).map(name),
    figures: [...document.querySelectorAll("figure")].map(one =>
      [...one.querySelectorAll("svg, img, .bars")].filter(shown).length > 0),
    unnamed: [...document.querySelectorAll("figure svg, img")].filter(one =>
      !(one.getAttribute("aria-label") || one.getAttribute("alt"))).length,
    scales: svgs.map(one => one.clientWidth / one.viewBox.baseVal.width),
    cut: svgs.flatMap(one => [...one.querySelectorAll("text")].filter(text =>
      box(text).left < box(one).left - 1 || box(text).right > box(one).right + 1 ||
      box(text).top < box(one).top - 1 || box(text).bottom > box(one).bottom + 1).map(name)),
    covered: svgs.flatMap(one => {
      const words = [...one.querySelectorAll("text")].filter(shown), found = [];
      for (const [at, a] of words.entries()) for (const b of words.slice(at + 1)) {
        const [p, q] = [box(a), box(b)];
        if (Math.min(p.right, q.right) - Math.max(p.left, q.left) > 2 &&
            Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 4)
          found.push(a.textContent + " | " + b.textContent);
      }
      return found;
    }),
    tables: [...document.querySelectorAll(".scroll")].filter(shown).map(one => [one.scrollWidth, one.clientWidth]),
  };
})()"""

# Colours of the lines and of the bars of a plot, and by what else they differ.
TOLD_APART = """[...document.querySelectorAll("figure svg")].map(one => {
  const dashes = {}, hatches = {};
  for (const path of one.querySelectorAll("path")) {
    const style = getComputedStyle(path);
    const group = path.closest("g[id*='line2d']"), bar = path.closest("g[id*='patch']");
    if (group && style.fill === "none" && parseFloat(style.strokeWidth) === 2) {
      const mark = group.querySelector("use");
      (dashes[style.stroke] ??= new Set()).add(style.strokeDasharray + " " + (mark && mark.getAttribute("href")));
    }
  }
  return Object.values(dashes).map(found => [...found].sort().join(" / "));
})"""


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Any]
) -> Callable[[str], Path]:
    """The file of a page, with words that are long enough to push it apart."""
    folder = tmp_path_factory.mktemp("pages")

    def one_run() -> str:
        run = finished_run(folder / "chat-in-four-bits", seed=0)
        return chain.render([run], folder)

    def several() -> str:
        made = [finished_run(folder / f"run-{bits}", seed=bits) for bits in (2, 3, 4, 8)]
        return chain.render(made, folder)

    def compared() -> str:
        base = make_model()
        tuned = copy.deepcopy(base)
        for block in tuned.model.layers:
            block.mlp.down_proj.weight.data += 0.1
        pair = [Checkpoint(model, None, anatomy_of(model)) for model in (base, tuned)]
        update = Update(top=4).compare(*pair, ("base", LONG)).to_dict()
        angle = {"first": "base", "second": LONG, "angle_degrees": 3.25, "verdict": "related"}
        return comparison.render(
            {"pairs": [angle], "updates": [update, update]}, f"postlude inspect compare a {LONG}"
        )

    def demo() -> str:
        results = demo_results()
        results["title"] = f"{LONG} in W4A4KV4"
        results["environment"]["processor"] = "x" * 200
        results["methods"][1]["continuation"] = "of" * 150
        return page.render(results)

    def attributed() -> str:
        results = answer(title=LONG)
        results["environment"]["processor"] = "x" * 200
        results["queries"][0]["results"][2] |= {
            "id": "y" * 150,
            "tokens": [{"text": "of" * 300, "score": 1.0}],
        }
        return attribution.render(results)

    def signal() -> str:
        return signals.render(
            test_signals.RESULT,
            test_signals.POINTS,
            {"the picture": picture()},
            "postlude fit a.png",
        )

    def tuned() -> str:
        return tuning.render(test_tuning.RESULT, [test_tuning.row(n) for n in range(1, 101)])

    def heard() -> str:
        sound = numpy.random.default_rng(0).normal(size=24000).astype("float32") * 0.1
        answers = [{"question": "Assess?", "answer": "of" * 150}]
        result = {**test_speech.RESULT, "recording": f"{LONG}.wav", "answers": answers}
        return speech.render(
            result, Recording(sound), f"postlude explain {LONG}.wav --model {LONG}"
        )

    pages = (one_run, several, compared, demo, attributed, signal, tuned, heard)
    makers = dict(zip(PAGES, pages, strict=True))

    def write(name: str) -> Path:
        file = folder / f"{name}.html"
        if not file.exists():
            file.write_text(makers[name](), encoding="utf-8")
        return file

    return write


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page(window: Browser, written: Callable[[str], Path], name: str, width: int) -> None:
    file = written(name)
    window.open(file, width)
    seen = window.evaluate(SEEN)
    assert window.errors == []
    assert {one for one in window.loaded if not one.startswith("data:")} == {file.as_uri()}
    assert seen["needed"] == seen["visible"] == width, "wider than the window"
    assert set(seen["links"]) <= set(seen["ids"]), "contents lead nowhere"
    assert seen["twice"] == [] and seen["unlisted"] == []
    assert all((file.parent / one).is_file() for one in seen["files"])
    assert seen["faint"] == [] and seen["small"] == []
    assert all(seen["figures"]), "a figure without a drawing"
    assert seen["unnamed"] == 0
    assert seen["cut"] == [] and seen["covered"] == []
    # At nearly its own size, so that letters stay as large as they were drawn.
    assert all(0.9 < scale < 1.3 for scale in seen["scales"])
    if width == max(WIDTHS):
        assert all(inside <= box for inside, box in seen["tables"]), "a desk has room for a table"


@pytest.mark.parametrize("name", ["run", "runs", "comparison", "demo"])
def test_plots_show_something_in_any_colours(
    window: Browser, written: Callable[[str], Path], name: str
) -> None:
    window.open(written(name), 1440)
    for alike in window.evaluate(TOLD_APART):
        assert len(set(alike)) == len(alike), "lines that differ by nothing but colour"
    count = window.evaluate("document.querySelectorAll('figure').length")
    assert count
    window.eyes("achromatopsia")
    try:
        for number in range(count):
            window.evaluate(
                "document.querySelectorAll('figure').forEach((one, at) =>"
                f" one.classList.toggle('here', at === {number}))"
            )
            grey = window.picture("figure.here svg, figure.here img")
            red, green, blue = grey.split()
            assert ink(red) > 0.01, f"figure {number} is blank"
            assert red.tobytes() == green.tobytes() == blue.tobytes()
    finally:
        window.eyes("none")


def ink(picture: Image.Image) -> float:
    """The share of pixels that are not as the commonest one."""
    counts = picture.histogram()
    return 1 - max(counts) / sum(counts)


def test_lines_of_one_style_are_noticed(window: Browser, tmp_path: Path) -> None:
    lines = [Line(f"line {n}", [1.0, 2.0 + n]) for n in range(3)]
    plot = line_plot("x", lines, ["a", "b"], x_label="x", y_label="y", alt="none")
    file = tmp_path / "page.html"
    file.write_text(f"<meta charset=utf-8><figure>{plot.wide}</figure>")
    window.open(file, 1440)
    (styles,) = window.evaluate(TOLD_APART)
    assert len(styles) == len(set(styles)) == 3


@pytest.mark.slow
def test_open_really_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the browser that the environment names, which is asked for the page and nothing else."""
    run = finished_run(tmp_path / "a run")
    asked = tmp_path / "asked"
    script = tmp_path / "browser.py"
    script.write_text(f"import sys; open({str(asked)!r}, 'w').write('\\n'.join(sys.argv[1:]))")
    monkeypatch.setenv("BROWSER", f"{sys.executable} {script} %s")
    subprocess.run([sys.executable, "-m", "postlude", "report", str(run), "--open"], check=True)
    assert asked.read_text() == (run / "report.html").as_uri()


def test_without_a_browser_the_place_of_the_page_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path / "run")
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) and False)
    assert cli.run(["report", str(run), "--open"]) == 0
    assert opened == [(run / "report.html").as_uri()]
    said = capsys.readouterr()
    assert str(run / "report.html") in said.out
    assert "no browser" in said.err
