from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from postlude.errors import DataError
from postlude.signals.picture import Picture, evaluate, fit, read_picture, render, write_picture
from postlude.signals.training import Training
from postlude.zoo.smn.grid import points, psnr
from postlude.zoo.smn.networks import build, settings_for

from .conftest import drawn


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_written_and_read(tmp_path: Path, channels: int) -> None:
    pixels = drawn(7, 5, channels)
    write_picture(pixels, tmp_path / "a.png")
    found = read_picture(tmp_path / "a.png")
    assert torch.equal(found.pixels, pixels)
    assert found.size == (7, 5)
    said = " ".join(found.notes)
    assert ("alpha" in said) == (channels in (2, 4))
    assert ("one channel" in said) == (channels == 1)


def test_modes_that_are_converted(tmp_path: Path) -> None:
    from PIL import Image

    rgb = Image.frombytes("RGB", (4, 3), bytes(range(36)))
    for mode, expected in {"P": 3, "1": 1, "CMYK": 3}.items():
        file = tmp_path / ("a.png" if mode != "CMYK" else "a.tiff")
        rgb.convert(mode).save(file)
        found = read_picture(file)
        assert found.channels == expected
        assert f"converted from {mode}" in found.notes[0]
    rgb.convert("P").save(tmp_path / "t.png", transparency=0)
    assert read_picture(tmp_path / "t.png").channels == 4


def test_turned_upright(tmp_path: Path) -> None:
    from PIL import Image

    image = Image.frombytes("L", (2, 3), bytes([0, 50, 100, 150, 200, 250]))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    found = read_picture(tmp_path / "a.png")
    assert found.size == (3, 2)
    assert "upright" in found.notes[-1]


def test_files_that_are_refused(tmp_path: Path, png: Path) -> None:
    from PIL import Image

    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "words.png").write_text("not a picture")
    (tmp_path / "cut.png").write_bytes(png.read_bytes()[:150])
    Image.frombytes("I;16", (2, 2), bytes(8)).save(tmp_path / "deep.png")
    for name, message in {
        "none.png": "not there",
        "": "a directory",
        "empty.png": "empty \\(0 bytes\\)",
        "words.png": "no picture that Pillow reads",
        "cut.png": "damaged",
        "deep.png": "'I;16'; expected 8 bits a channel",
    }.items():
        with pytest.raises(DataError, match=message):
            read_picture(tmp_path / name)


def test_the_size_is_known_before_the_pixels_are_read(tmp_path: Path, png: Path) -> None:
    """Also of a picture that Pillow would call a bomb: only its header is true."""
    import struct
    import zlib

    header = struct.pack(">IIBBBBB", 90_000, 90_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header
    chunk += struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "huge.png").write_bytes(png.read_bytes()[:8] + chunk + png.read_bytes()[33:])
    seen: list[tuple[int, int, int]] = []

    def check(*size: int) -> None:
        seen.append(size)  # type: ignore[arg-type]
        raise DataError("too large")

    with pytest.raises(DataError, match="too large"):
        read_picture(tmp_path / "huge.png", check)
    assert seen == [(90_000, 90_000, 3)]


def test_written_as_the_ending_says(tmp_path: Path) -> None:
    write_picture(drawn(8, 8, 3), tmp_path / "new" / "a.webp")
    assert (tmp_path / "new" / "a.webp").read_bytes()[8:12] == b"WEBP"
    for name, channels, message in (("a.txt", 3, "cannot write"), ("a.jpg", 4, "PNG holds")):
        with pytest.raises(DataError, match=message):
            write_picture(drawn(8, 8, channels), tmp_path / name)
        assert not (tmp_path / name).exists()


def test_fit_evaluate_render(small: Picture) -> None:
    network = build(settings_for("siren", {"width": 16}), 0)
    before = evaluate(network, small)
    losses = fit(network, small, Training(steps=150, learning_rate=2e-3))
    assert evaluate(network, small) > before + 10
    assert losses[-1] < losses[0] / 10
    # Rendering at the size of the training is the fit, pixel by pixel.
    with torch.no_grad():
        direct = network(points(torch.arange(120), 12, 10)).reshape(10, 12, 3)
    shown = render(network, 12, 10)
    assert torch.equal(shown, direct.clamp(0, 1).mul(255).round().to(torch.uint8))
    assert evaluate(network, small) == pytest.approx(psnr(direct, small.pixels / 255))
    # At twice the size the corners are the same points.
    twice = render(network, 24, 20)
    assert twice.shape == (20, 24, 3)
    for row, column in ((0, 0), (-1, 0), (0, -1), (-1, -1)):
        difference = twice[row, column].int() - shown[row, column].int()
        assert difference.abs().max() <= 1


def test_some_pixels_at_a_time(small: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    network = build(settings_for("smn", {"width": 8}), 0)
    whole, quality = render(network, 12, 10), evaluate(network, small)
    monkeypatch.setattr("postlude.signals.picture.POINTS", 37)
    assert torch.equal(render(network, 12, 10), whole)
    assert evaluate(network, small) == pytest.approx(quality)


def test_a_picture_that_is_met_exactly() -> None:
    class Grey(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.value.expand(*x.shape[:-1], 1)

    assert evaluate(Grey(), Picture(torch.full((2, 2, 1), 255, dtype=torch.uint8))) == math.inf


@pytest.mark.parametrize("size", [(1, 1), (5, 1), (1, 4)])
def test_thin_pictures(size: tuple[int, int]) -> None:
    picture = Picture(drawn(*size, 3))
    network = build(settings_for("smn", {"width": 6}), 0)
    fit(network, picture, Training(steps=3, learning_rate=1e-2, batch=2))
    assert render(network, *size).shape == (size[1], size[0], 3)


def test_same_seed_same_fit(small: Picture) -> None:
    states = []
    for seed in (0, 0, 1):
        network = build(settings_for("gauss", {"width": 6}), 0)
        fit(network, small, Training(steps=10, learning_rate=1e-2, batch=20), seed=seed)
        states.append(network.readout.weight.detach())  # type: ignore[union-attr]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
