from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import postlude as pl
from postlude.errors import SettingsError
from postlude.signals.inr import open_inr
from postlude.signals.picture import Picture, read_picture, write_picture
from postlude.signals.training import Training

WORDS = ("--width", 8, "--steps", 12, "--batch", 64)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (10, 12, 3), generator=draw, dtype=torch.uint8)
    write_picture(pixels, tmp_path / "a.png")
    return tmp_path / "a.png"


def test_fit_and_render(picture: Path, tmp_path: Path, postlude_command: Any) -> None:
    out = tmp_path / "a.inr"
    done = postlude_command("fit", picture, "-o", out, *WORDS, "--bits", 6, "--json")
    assert done.code == 0, done.err
    assert done.json["bytes"] == sum(file.stat().st_size for file in out.iterdir())
    assert done.json["bits"] == [32, 6, 6, 6, 6, 6]
    assert done.json["predicted_memory"] > 0
    assert "12 x 10 pixels, about" in done.err
    # Nothing but the output is left.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.inr", "a.png"]
    drawn = postlude_command("render", out, "-o", tmp_path / "b.png", "--scale", 2, "--json")
    assert (drawn.code, drawn.json["size"]) == (0, [24, 20])
    assert read_picture(tmp_path / "b.png").size == (24, 20)
    person = postlude_command("fit", picture, "-o", tmp_path / "c.inr", *WORDS, "--bits", 6).out
    for words in ("12 x 10 pixels", " dB", " MiB", "32, 6, 6, 6, 6, 6 a number"):
        assert words in person
    again = postlude_command("fit", picture, "-o", out, *WORDS)
    assert again.code == 2
    assert "already exists" in again.err
    again = postlude_command("render", out, "-o", tmp_path / "b.png")
    assert again.code == 2


def test_page(
    picture: Path, tmp_path: Path, postlude_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from postlude.signals import curve

    monkeypatch.setattr(curve, "CODINGS", {"nearest": curve.CODINGS["nearest"][:2]})
    monkeypatch.setattr(
        curve.curve, "__kwdefaults__", {**curve.curve.__kwdefaults__, "lines": ["nearest"]}
    )
    page = tmp_path / "a.html"
    done = postlude_command(
        "fit", picture, "-o", tmp_path / "a.inr", *WORDS, "--model", "siren", "--html", page
    )
    assert done.code == 0, done.err
    assert "PSNR against bytes" in page.read_text(encoding="utf-8")


def test_same_seed_same_bytes(picture: Path, tmp_path: Path) -> None:
    training = Training(steps=6, learning_rate=1e-2, batch=40)
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pl.fit(picture, "smn", width=6, training=training, seed=seed, out=tmp_path / name)
        found.append((tmp_path / name / "weights.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]
    assert torch.equal(pl.render(tmp_path / "a"), pl.render(open_inr(tmp_path / "a")))


def test_killed_it_resumes(picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on the disk after a kill between two chunks is used, and the bytes are those of one run."""
    from postlude.runs import directory

    training = Training(steps=9, learning_rate=1e-2, batch=40, chunk=3)
    pl.fit(picture, "smn", width=6, training=training, out=tmp_path / "whole")
    unit = directory.RunDirectory.unit
    calls: list[str] = []

    def dying(self: Any, name: str, compute: Any) -> Any:
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return unit(self, name, compute)

    monkeypatch.setattr(directory.RunDirectory, "unit", dying)
    with pytest.raises(KeyboardInterrupt):
        pl.fit(picture, "smn", width=6, training=training, out=tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert (tmp_path / ".again.run").is_dir()

    def counting(self: Any, name: str, compute: Any) -> Any:
        return unit(self, name, lambda: calls.append("computed") or compute())

    monkeypatch.setattr(directory.RunDirectory, "unit", counting)
    pl.fit(picture, "smn", width=6, training=training, out=tmp_path / "again")
    assert calls.count("computed") == 1
    for name in ("config.json", "weights.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / ".again.run").exists()


def test_channels(tmp_path: Path) -> None:
    for channels in (1, 2, 4):
        pixels = torch.randint(256, (5, 4, channels), dtype=torch.uint8)
        fitted = pl.fit(Picture(pixels), width=4, training=Training(steps=2))
        assert pl.render(fitted.stored).shape == (5, 4, channels)
        assert fitted.to_dict()["channels"] == channels


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", "none.png", "-o", "x.inr"], "none.png is not there"),
        (["fit", "PICTURE", "-o", "x.inr", "--model", "smm"], "Did you mean 'smn'"),
        (["fit", "PICTURE", "-o", "x.inr", "--bits", "1"], "bits are 2, 3, 4"),
        (["fit", "PICTURE", "-o", "x.inr", "--rounding", "up"], "rounding of a network"),
        (["fit", "PICTURE", "-o", "x.inr", "--width", "0"], "width is 0"),
        (["fit", "PICTURE", "-o", "x.inr", "--steps", "0"], "steps is 0"),
        (["fit", "PICTURE", "-o", "x.inr", "--rate", "-1"], "learning rate is -1"),
        (["fit", "PICTURE", "-o", "x.inr", "--set", "omega=3"], "setting of smn"),
        (["fit", "PICTURE", "-o", "x.inr", "--set", "in_features=3"], "has 2 coordinates"),
        (["fit", "PICTURE", "-o", "x.inr", "--width", "9000", "--batch", "999999999"], "are free"),
        (["render", "PICTURE", "-o", "x.png"], "is a file; expected an .inr directory"),
        (["render", "none.inr", "-o", "x.png"], "is not there; expected an .inr"),
    ],
)
def test_bad_input(
    words: list[str],
    message: str,
    picture: Path,
    tmp_path: Path,
    postlude_command: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("postlude.signals.memory.available_memory", lambda: 2**22)
    done = postlude_command(
        *[str(picture) if word == "PICTURE" else word for word in words], "--json"
    )
    assert done.code == 2
    assert message in json.loads(done.out)["error"]["message"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png"]


def test_scales_that_are_refused(picture: Path, tmp_path: Path) -> None:
    fitted = pl.fit(picture, width=4, training=Training(steps=1))
    for scale in (0.0, -1.0, 100.0, float("nan")):
        with pytest.raises(SettingsError, match="above 0 and at most 64"):
            pl.render(fitted.stored, scale=scale)
    assert pl.render(fitted.stored, scale=0.01).shape == (1, 1, 3)


def test_a_model_that_is_none(picture: Path) -> None:
    with pytest.raises(SettingsError, match="takes the name or the settings of a network, got int"):
        pl.fit(picture, 3)  # type: ignore[arg-type]
