from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from postlude.report.picture import draw

from .browser import Browser


def test_it_says_what_was_measured(results: dict[str, Any], window: Browser, tmp_path: Any) -> None:
    picture = draw(results)
    assert len(picture) < 150_000
    root = ElementTree.fromstring(picture)
    words = " ".join(text for one in root.iter() if (text := (one.text or "").strip()))
    assert "Inspect: from block 1 on" in words and "333 times" in words
    assert "rtn raises" in words and "by 200%, offq by 50%" in words
    file = tmp_path / "picture.svg"
    file.write_text(picture)
    window.open(file, 800)
    assert window.errors == [] and window.loaded == [file.as_uri()]
