from __future__ import annotations

from pathlib import Path

import pytest
import torch

from postlude.errors import DataError
from postlude.sampling.grid import Panel, draw_grid, write_grid


def shades(count: int, channels: int = 1) -> torch.Tensor:
    """Image ``i`` has the value ``i/10 - 1`` everywhere."""
    return (torch.arange(count) / 10 - 1.0).view(-1, 1, 1, 1).expand(-1, channels, 8, 8)


def seen(picture: object) -> set[int]:
    """Shades of grey that fill more than an image's area."""
    colours = picture.convert("L").getcolors(100_000)  # type: ignore[attr-defined]
    return {value for number, value in colours if number >= 48 * 48}


def test_rows_are_classes() -> None:
    labels = torch.tensor([3, 7, 3, 3, 7])
    picture = draw_grid([Panel("model", shades(5))], labels)
    expected = {0, 13, 25, 38, 51}  # i / 10 of 127.5
    assert expected <= seen(picture)
    # Two rows: the first holds samples 0, 2, 3 and the second 1, 4.
    grey = picture.convert("L")
    columns = [[grey.getpixel((x, y)) for y in range(grey.height)] for x in range(grey.width)]
    rows = {
        (one.index(a), one.index(b))
        for one in columns
        for a, b in ((0, 13), (25, 51))
        if {a, b} <= set(one)
    }
    ((first, second),) = rows
    assert second - first == 48 + 4


def test_panels_stand_side_by_side_and_a_caption_below() -> None:
    one = draw_grid([Panel("a", shades(4))])
    two = draw_grid([Panel("a", shades(4)), Panel("b", shades(4))])
    assert two.width == 2 * one.width and two.height == one.height
    assert draw_grid([Panel("a", shades(4))], caption="euler").height > one.height
    # A long title is not cut.
    assert draw_grid([Panel("a" * 80, shades(1))]).width > 400
    # What is written ends before the edge, and before the next panel.
    title = "difference x 4, grey: none"
    picture = draw_grid([Panel(title, shades(1))] * 2, torch.tensor([7]), caption=title * 3)
    grey = picture.convert("L")
    for x in (picture.width // 2 - 1, picture.width - 1):
        assert {grey.getpixel((x, y)) for y in range(18)} == {255}
    assert {grey.getpixel((picture.width - 1, y)) for y in range(picture.height)} == {255}


def test_colours_and_large_images() -> None:
    red = torch.full((1, 3, 64, 64), -1.0)
    red[:, 0] = 5.0  # clamped
    picture = draw_grid([Panel("", red)])
    colours = {colour for number, colour in picture.getcolors(100_000) if number >= 64 * 64}
    assert (255, 0, 0) in colours


def test_file(tmp_path: Path) -> None:
    from PIL import Image

    write_grid(tmp_path / "grid.png", [Panel("a", shades(9))])
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.format == "PNG" and picture.mode == "RGB"


def test_bad_input() -> None:
    with pytest.raises(DataError, match=r"images have 4 channels; expected 1 \(grey\) or 3"):
        draw_grid([Panel("", shades(2, channels=4))])
    with pytest.raises(DataError, match="images of different shapes cannot stand side by side"):
        draw_grid([Panel("", shades(2)), Panel("", shades(3))])
