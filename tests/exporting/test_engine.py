"""What every target shares: outputs appear whole, checked, or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import postlude as pl
from postlude import registry
from postlude.errors import OutputExistsError, SettingsError, UnknownNameError, VerificationError
from postlude.exporting.engine import Exporter, export
from postlude.exporting.plain import plain, refuse
from postlude.numerics.formats import Integer
from postlude.numerics.schemes import Scheme
from postlude.runs.checksums import SUMS, hash_file

from .models import checkpoint, rounded


@dataclasses.dataclass(frozen=True)
class Note(Exporter):
    """A file with a word in it."""

    word: str = "good"
    fails: bool = False

    def write(self, checkpoint: Any, out: Path) -> dict[str, Any]:
        out.write_text(self.word)
        if self.fails:
            raise SettingsError("no")
        return {"letters": len(self.word)}

    def check(self, checkpoint: Any, out: Path) -> dict[str, float]:
        if out.read_text() != "good":
            raise VerificationError("another word")
        return {"reload_max_difference": 0.0}


@dataclasses.dataclass(frozen=True)
class Folder(Note):
    """The same in a directory."""

    marker: ClassVar[str | None] = "note.txt"
    weights: ClassVar[str] = "note.txt"

    def write(self, checkpoint: Any, out: Path) -> dict[str, Any]:
        return super().write(checkpoint, out / "note.txt")

    def check(self, checkpoint: Any, out: Path) -> dict[str, float]:
        return super().check(checkpoint, out / "note.txt")


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    registry.method("export", "note", family="test")(Note)
    registry.method("export", "folder", family="test")(Folder)


@pytest.mark.parametrize("kind", [Note, Folder])
def test_whole_or_not_at_all(make_model: Callable[..., Any], tmp_path: Path, kind: Any) -> None:
    original, out = checkpoint(make_model), tmp_path / "deep" / "out"
    report = export(original, kind(), out)
    sums = out / SUMS
    if kind is Folder:
        assert sums.read_text() == f"{hash_file(out / 'note.txt')}  note.txt\n"
    beside = sums.stat().st_size if kind is Folder else 0
    assert report == {
        "output": str(out), "to": kind.__name__.lower(), "bytes": 4 + beside, "letters": 4,
        "reload_max_difference": 0.0,
    }  # fmt: skip
    with pytest.raises(OutputExistsError, match="already exists"):
        export(original, kind(word="nothing"), out)
    for bad, error in ((kind(word="bad"), VerificationError), (kind(fails=True), SettingsError)):
        with pytest.raises(error):
            export(original, bad, out, overwrite=True)
        assert list(out.parent.iterdir()) == [out]  # nothing beside it, and the old one is whole
        assert (out if out.is_file() else out / "note.txt").read_text() == "good"
    assert (
        export(original, kind(word="bad"), out, overwrite=True, check=False)["bytes"] == 3 + beside
    )


def test_outputs_of_the_other_kind(make_model: Callable[..., Any], tmp_path: Path) -> None:
    original = checkpoint(make_model)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExistsError, match="is a directory, and the output is a file"):
        export(original, Note(), tmp_path / "folder", overwrite=True)
    with pytest.raises(OutputExistsError, match="is a file, and the output is a directory"):
        export(original, Folder(), tmp_path / "file", overwrite=True)


def test_names_and_settings(make_model: Callable[..., Any], tmp_path: Path) -> None:
    original = checkpoint(make_model)
    assert pl.export(original, "note", tmp_path / "a")["to"] == "note"
    with pytest.raises(UnknownNameError, match="No export method named 'ggfu'"):
        pl.export(original, "ggfu", tmp_path / "b")
    with pytest.raises(SettingsError, match="name or the settings of a format, got dict"):
        pl.export(original, {}, tmp_path / "b")  # type: ignore[arg-type]


def test_reasons_are_counted() -> None:
    refuse("X", [])
    with pytest.raises(SettingsError, match=r"^X cannot hold this checkpoint: a\.$"):
        refuse("X", ["a"])
    with pytest.raises(SettingsError, match=r"a\. There are 2 more like it\.$"):
        refuse("X", ["a", "b", "c"])


def test_plain_parts(make_model: Callable[..., Any]) -> None:
    small = rounded(checkpoint(make_model, tie_word_embeddings=True), Scheme(Integer(4)))
    parts = plain(small, "X")
    assert len(parts.layers) == 14
    assert set(parts.tensors) == {
        "model.embed_tokens.weight", "model.norm.weight",
        *(f"model.layers.{i}.{n}.weight" for i in (0, 1) for n in ("input_layernorm", "post_attention_layernorm")),
    }  # fmt: skip
    assert not hasattr(parts.config, "quantization_config")
    assert hasattr(small.model.config, "quantization_config")
    assert all(torch.is_tensor(tensor) for tensor in parts.tensors.values())
