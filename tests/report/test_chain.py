"""The page of a recipe's run says what every stage measured, escapes what it is given, and loads nothing."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest

from postlude.errors import RunDirectoryError
from postlude.report.chain import render, write

# One red pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)


def a_run(folder: Path, perplexity: float, size: int = 2_000_000) -> Path:
    """The directory of a finished run, as ``postlude run`` leaves it."""
    results = {
        "small": {"bytes": size, "settings": {"weights": 4}, "seed": 0},
        "quality": {"perplexity": perplexity, "reference_perplexity": 40.0, "bytes": size},
        "picture": {"note": "<script>alert(1)</script>"},
    }
    for name, result in results.items():
        stage = folder / "stages" / name
        stage.mkdir(parents=True)
        files = {}
        if name == "picture":
            (stage / "grid.png").write_bytes(PNG)
            (stage / "page.html").write_text("<p>own page")
            files = {"grid.png": "0", "page.html": "0"}
        record = {
            "key": "k",
            "command": [name, "<&>"],
            "seconds": 1.5,
            "result": result,
            "files": files,
        }
        (stage / "done.json").write_text(json.dumps(record))
    summary = {
        "name": "Four bits <b>",
        "about": "",
        "variables": {"text": "a b.txt"},
        "stages": list(results),
        "states": dict.fromkeys(results, "done"),
    }
    (folder / "run.json").write_text(json.dumps(summary))
    (folder / "recipe.yaml").write_text("stages: {}")
    return folder


def test_one_run(tmp_path: Path) -> None:
    run = a_run(tmp_path / "one", 44.5)
    page = write([run]).read_text()
    assert (run / "report.html").read_text() == page
    assert "Four bits &lt;b&gt;" in page and "Four bits <b>" not in page
    assert "&lt;script&gt;" in page and "<script" not in page
    assert "44.5" in page and "2,000,000" in page
    assert 'id="glance-perplexity"' in page
    assert 'id="glance-bytes"' not in page  # one checkpoint has nothing to be compared with
    assert 'href="stages/picture/page.html"' in page
    assert "data:image/png;base64," in page
    assert "--set text=&#39;a b.txt&#39;" in page
    # Every entry of the contents leads somewhere, and nothing is loaded.
    anchors = re.findall(r'href="#([^"]+)"', page.split("</nav>")[0])
    assert anchors and all(f'id="{one}"' in page for one in anchors)
    assert not re.search(r'(src|href)="(https?:)?//', page)


def test_several_runs_side_by_side(tmp_path: Path) -> None:
    first, second = a_run(tmp_path / "w4", 44.5), a_run(tmp_path / "w8", 40.25, 4_000_000)
    page = write([first, second], tmp_path / "pages" / "both.html").read_text()
    assert 'id="glance-bytes"' in page
    assert re.search(r"<td[^>]*>perplexity</td><td[^>]*>44.5</td><td[^>]*>40.25</td>", page)
    assert "reference perplexity</td>" not in page.split("</section>")[0]  # equal in both
    assert 'href="../w4/stages/picture/page.html"' in page


def test_what_was_asked_differently_stands_beside_what_was_measured(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / one / "chat", 44.5) for one in ("w4", "w8")]
    for run, bits in zip(runs, (4, 8), strict=True):
        summary = json.loads((run / "run.json").read_text())
        summary["seed"], summary["variables"]["model"] = bits - 4, f"lm{bits}"
        (run / "run.json").write_text(json.dumps(summary))
        recipe = f"stages:\n small:\n  quantize: ${{model}}\n  bits: w{bits}\n  set: [a=1, b=2]\n"
        (run / "recipe.yaml").write_text(recipe)
    page = render(runs)
    rows = page.split('id="asked"')[1].split("</table>")[0]
    for name, *cells in (("model", "lm4", "lm8"), ("seed", "0", "4"), ("bits", "w4", "w8")):
        columns = "".join(rf"<td[^>]*>{cell}</td>" for cell in cells)
        assert re.search(rf">{name}</td>{columns}", rows)
    assert "quantize" not in rows and "a=1" not in rows and "b.txt" not in rows  # the same in both
    # Folders of one name are told apart by those above them.
    assert ">w4/chat</th>" in rows and ">w8/chat</th>" in rows
    assert page.count("--seed 4") == 1 and "--seed 0" not in page


def test_an_inspection_says_what_it_found(tmp_path: Path) -> None:
    run = a_run(tmp_path / "one", 44.5)
    file = run / "stages/small/done.json"
    record = json.loads(file.read_text())
    layer = {"layer": 2, "absmax": 20.0, "ratio": 27.0}
    record |= {
        "command": ["inspect", "zoo:tiny-lm"],
        "result": {
            "outliers": {"method": "outliers", "samples": 32, "layers": [layer]},
            "signature": {"massive": True, "hidden_size": 64},
        },
    }
    file.write_text(json.dumps(record))
    page = render([run])
    assert "after block 2 the largest entry of a hidden state is 20, 27 times the median" in page
    assert "is kept in stages/small/done.json" in page
    assert "outliers: samples" in page and "outliers: method" not in page


def test_measures_have_units_and_numbers_stay_whole(tmp_path: Path) -> None:
    run = a_run(tmp_path / "one", 44.5)
    file = run / "stages/quality/done.json"
    record = json.loads(file.read_text())
    record["result"] |= {
        "kl": 7.2374e-05,
        "loss": 3.1,
        "seconds": 3.25,
        "note": "more words than fit",
    }
    file.write_text(json.dumps(record))
    page = render([run])
    assert '>kl (nats per token)</th><td class="number">7.2374e-05</td>' in page
    assert ">loss (nats per token)</th>" in page and ">seconds</th>" not in page
    assert '<td class="number word">more words than fit</td>' in page


def test_an_index_is_no_checkpoint_and_what_was_asked_for_no_measure(tmp_path: Path) -> None:
    run = a_run(tmp_path / "one", 44.5)
    file = run / "stages/picture/done.json"
    record = json.loads(file.read_text())
    record |= {
        "command": ["attribute", "build", "lm", "data.jsonl", "--output", "index"],
        "result": {"bytes": 123_456, "checkpoint": "lm", "examples": 7},
    }
    file.write_text(json.dumps(record))
    page = render([run])
    assert 'id="glance-bytes"' not in page
    assert '>bytes of the index</th><td class="number">123,456</td>' in page
    assert ">examples</th>" in page and ">checkpoint</th>" not in page


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="not the directory of a run"):
        render([tmp_path])
    run = a_run(tmp_path / "one", 44.5)
    (run / "stages/small/done.json").unlink()
    with pytest.raises(RunDirectoryError, match="record of stage 'small'"):
        render([run])


def test_a_run_that_is_not_finished(tmp_path: Path) -> None:
    run = a_run(tmp_path / "one", 44.5)
    file = run / "run.json"
    summary = json.loads(file.read_text())
    summary["states"] |= {"quality": "running", "picture": "waiting"}
    file.write_text(json.dumps(summary))
    page = render([run])
    assert "1 of 3 stages are done, 2 s of work so far" in page
    sections = dict(re.findall(r'<h2 id="stage-([a-z]+)">.*?</h2>\n<p>(.*?)</p>', page))
    assert sections["small"].startswith("postlude small, 1.5 s.")
    assert sections["quality"].startswith("Begun and not finished")
    assert sections["picture"].startswith("Waiting")
    # What an earlier run left there is not shown.
    assert "44.5" not in page and "data:image/png" not in page
    summary["states"]["quality"], summary["error"] = "failed", "no such <text>."
    file.write_text(json.dumps(summary))
    assert "Failed. no such &lt;text&gt;." in render([run])
    other = a_run(tmp_path / "two", 44.5)
    assert "Failed. no such" in render([other, run])
