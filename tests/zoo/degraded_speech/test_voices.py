from __future__ import annotations

import io
import tarfile
import wave
from pathlib import Path

import numpy as np
import pytest

from postlude.errors import DataError, MissingDependencyError
from postlude.zoo.degraded_speech.columns import RATE
from postlude.zoo.degraded_speech.voices import (
    LEVEL,
    Digits,
    Espeak,
    Source,
    Toy,
    active_level,
    find_digits,
)


def recording(pitch: float) -> bytes:
    """0.3 s at 8 kHz."""
    times = np.arange(2400) / 8000
    codes = 12000 * np.sin(2 * np.pi * pitch * times) * np.hanning(2400)
    written = io.BytesIO()
    with wave.open(written, "wb") as opened:
        opened.setnchannels(1)
        opened.setsampwidth(2)
        opened.setframerate(8000)
        opened.writeframes(codes.astype("<i2").tobytes())
    return written.getvalue()


def archive(path: Path, leave_out: str = "", also: str = "") -> Path:
    speakers = (*Digits.train, *Digits.test)
    names = [f"recordings/{d}_{s}_{t}.wav" for s in speakers for d in range(10) for t in range(2)]
    with tarfile.open(path, "w:gz") as file:
        for name in [n for n in names if leave_out not in n or not leave_out] + [also] * bool(also):
            content = recording(200 + 10 * len(name))
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("recordings/link.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    return path


def check(source: Source) -> None:
    """What every source promises."""
    assert not set(source.train) & set(source.test)
    said: dict[str, set[str]] = {"train": set(), "test": set()}
    for split in said:
        for voice in source.voices(split):
            random = np.random.default_rng(0)
            text = source.sentence(split, voice, random)
            found = source.speak(text, voice, random)
            said[split].add(text)
            assert active_level(found.samples) == pytest.approx(LEVEL)
            powers = np.abs(np.fft.rfft(found.samples * np.hanning(len(found.samples)))) ** 2
            frequencies = np.fft.rfftfreq(len(found.samples), 1 / RATE)
            # Nothing tells at which rate a voice was recorded.
            assert powers[frequencies > 3700].sum() < 1e-5 * powers.sum()
            if found.words is not None:
                flat = [t for word in found.words for t in word]
                assert flat == sorted(flat) and len(found.words) == len(text.split())
                assert flat[0] == 0 and flat[-1] == pytest.approx(len(found.samples) / RATE)
                between = found.samples[round(flat[1] * RATE) : round(flat[2] * RATE)]
                assert len(between) and not between.any()
            again = np.random.default_rng(0)
            assert source.sentence(split, voice, again) == text
            np.testing.assert_array_equal(source.speak(text, voice, again).samples, found.samples)
    assert not said["train"] & said["test"]


def test_a_toy_voice() -> None:
    check(Toy())


def test_digits_of_an_archive_which_is_not_unpacked(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = archive(tmp_path / "in" / "a.tar.gz", also="../../../evil.wav")
    check(Digits(path))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tar.gz", "in"]


def test_digits_of_a_folder(tmp_path: Path) -> None:
    with tarfile.open(archive(tmp_path / "a.tar.gz")) as file:
        for member in file:
            opened = file.extractfile(member) if member.isfile() else None
            if opened is not None:
                (tmp_path / Path(member.name).name).write_bytes(opened.read())
    random = np.random.default_rng(0)
    packed = Digits(tmp_path / "a.tar.gz").speak("one two", "theo", random)
    random = np.random.default_rng(0)
    loose = Digits(tmp_path).speak("one two", "theo", random)
    np.testing.assert_array_equal(packed.samples, loose.samples)


def test_bad_archives(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="has no recording of theo saying 7; expected names as 7_theo_0"
    ):
        Digits(archive(tmp_path / "a.tar.gz", leave_out="7_theo"))
    with pytest.raises(DataError, match="there are no spoken digits at"):
        Digits(tmp_path / "none")
    (tmp_path / "b.tar.gz").write_bytes((tmp_path / "a.tar.gz").read_bytes()[:2000])
    with pytest.raises(DataError, match="cannot be read as an archive"):
        Digits(tmp_path / "b.tar.gz")
    (tmp_path / "c.tar.gz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="cannot be read as an archive"):
        Digits(tmp_path / "c.tar.gz")


def test_the_spoken_digits_of_people() -> None:
    path = find_digits()
    if path is None:
        pytest.skip("no audio/fsdd_recordings.tar.gz in POSTLUDE_DATA")
    check(Digits(path))


@pytest.mark.skipif(not Espeak.available(), reason="no espeak-ng on this machine")
def test_espeak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Espeak, "train", ("en-us", "de+f2"))
    check(Espeak())


def test_sentences_of_the_two_sets_share_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Espeak, "available", staticmethod(lambda: True))
    source = Espeak()
    said: dict[str, set[str]] = {"train": set(), "test": set()}
    random = np.random.default_rng(0)
    for split in said:
        for voice in ("en-us", "de"):
            for _ in range(100):
                drawn = source.sentence(split, voice, random)
                # Two sentences in one are taken apart again.
                said[split] |= {
                    part.rstrip(".").lower()
                    for part in drawn.replace(" while ", " und ").split(" und ")
                    if part.count(" ") > 2
                }
    assert min(map(len, said.values())) > 5
    assert not {p for p in said["train"] if p in said["test"]}


def test_no_espeak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingDependencyError, match="apt-get install espeak-ng"):
        Espeak()
