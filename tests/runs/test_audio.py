from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from postlude.errors import DataError, MissingDependencyError
from postlude.runs.audio import RATE, read_wav, write_wav

TONE = 0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE // 2) / RATE)


def riff(data: bytes, code: int, channels: int, rate: int, bits: int, extra: bytes = b"") -> bytes:
    """A .wav file, written out by hand."""
    frame = channels * bits // 8
    form = struct.pack("<HHIIHH", code, channels, rate, rate * frame, frame, bits) + extra
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form
    body += b"LIST" + struct.pack("<I", 3) + b"abc\0"  # an odd chunk is padded
    body += b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def integers(sound: np.ndarray[Any, Any], bits: int) -> bytes:
    codes = np.round(sound * (2 ** (bits - 1) - 1)).astype(np.int64)
    if bits == 8:
        codes += 128
    return b"".join(int(v).to_bytes(bits // 8, "little", signed=bits > 8) for v in codes)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", TONE.astype(np.float32))
    found = read_wav(tmp_path / "a.wav")
    assert found.rate == RATE and found.converted == () and found.samples.dtype == np.float32
    np.testing.assert_allclose(found.samples, TONE, atol=0.51 / 32768)
    write_wav(tmp_path / "b.wav", found.samples)
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


@pytest.mark.parametrize("bits", [8, 16, 24, 32])
def test_integers_of_every_width(tmp_path: Path, bits: int) -> None:
    (tmp_path / "a.wav").write_bytes(riff(integers(TONE, bits), 1, 1, RATE, bits))
    found = read_wav(tmp_path / "a.wav")
    np.testing.assert_allclose(found.samples, TONE, atol=1.01 / 2 ** (bits - 1) + 1e-7)
    assert found.converted == (
        () if bits == 16 else (f"{bits}-bit integers to floats of full scale 1",)
    )


@pytest.mark.parametrize("bits", [32, 64])
def test_floats(tmp_path: Path, bits: int) -> None:
    data = (2 * TONE / 0.5).astype(f"<f{bits // 8}").tobytes()
    (tmp_path / "a.wav").write_bytes(riff(data, 3, 1, RATE, bits))
    found = read_wav(tmp_path / "a.wav")
    np.testing.assert_allclose(found.samples, 4 * TONE, rtol=1e-6)
    (said,) = found.converted
    assert "beyond full scale" in said


def test_the_extensible_header_and_a_length_that_a_pipe_did_not_know(tmp_path: Path) -> None:
    guid = struct.pack("<HHIH", 22, 16, 4, 1) + b"\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71"
    whole = riff(integers(TONE, 16), 0xFFFE, 1, RATE, 16, guid)
    (tmp_path / "a.wav").write_bytes(whole)
    place = whole.index(b"data") + 4
    (tmp_path / "b.wav").write_bytes(whole[:place] + b"\xff" * 4 + whole[place + 4 :])
    for name in ("a.wav", "b.wav"):
        np.testing.assert_allclose(read_wav(tmp_path / name).samples, TONE, atol=1e-4)


def test_stereo_and_other_rates_are_converted_and_said(tmp_path: Path) -> None:
    rate = 44100
    times = np.arange(rate) / rate
    fade = np.hanning(rate)
    left, right = (
        0.6 * np.sin(2 * np.pi * 300 * times) * fade,
        0.2 * np.sin(2 * np.pi * 900 * times) * fade,
    )
    data = integers(np.stack([left, right], 1).ravel(), 24)
    (tmp_path / "a.wav").write_bytes(riff(data, 1, 2, rate, 24))
    found = read_wav(tmp_path / "a.wav")
    assert found.converted == (
        "24-bit integers to floats of full scale 1",
        "the mean of 2 channels",
        "44100 Hz to 16000 Hz",
    )
    times = np.arange(len(found.samples)) / RATE
    fade = np.interp(times, np.arange(rate) / rate, fade)
    expected = (
        0.3 * np.sin(2 * np.pi * 300 * times) + 0.1 * np.sin(2 * np.pi * 900 * times)
    ) * fade
    assert found.duration == 1.0
    np.testing.assert_allclose(found.samples, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty, 0 bytes"),
        (b"\x89PNG\r\n\x1a\n0000000", "is not a recording: it begins with"),
        (
            riff(integers(TONE, 16), 1, 1, RATE, 16)[:-100],
            "is truncated: its header declares 16000 bytes",
        ),
        (riff(integers(TONE, 16), 1, 1, RATE, 16)[:44], "has a header and no samples"),
        (riff(b"", 1, 1, RATE, 16), "holds no samples"),
        (riff(integers(TONE[:800], 16), 1, 1, RATE, 16), "lasts 0.050 s"),
        (riff(bytes(RATE), 1, 1, RATE, 16), "is silent: no sample"),
        (riff(integers(np.full(RATE, 0.5), 16), 1, 1, RATE, 16), "is silent"),
        (
            riff(integers(np.stack([TONE, -TONE], 1).ravel(), 16), 1, 2, RATE, 16),
            "2 channels, which cancel",
        ),
        (riff(bytes(RATE * 2), 1, 1, 1, 16), "lasts 16000 s; expected at most 600 s"),
        (riff(bytes(RATE), 7, 1, 8000, 8), "holds mu-law; expected integers"),
        (riff(bytes(RATE), 1, 1, 8000, 20), "holds 20-bit integers"),
        (riff(bytes(RATE), 1, 0, 8000, 16), "has 0 channels"),
        (riff(np.full(RATE, np.nan, "<f4").tobytes(), 3, 1, RATE, 32), "NaN or infinite"),
        (b"RIFF\0\0\0\0WAVEfmt \x02\0\0\0ab", "no description of its format"),
    ],
)
def test_bad_recordings_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_wav(tmp_path / "a.wav")


def test_paths_that_are_no_recordings(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder; expected one recording"):
        read_wav(tmp_path)
    with pytest.raises(DataError, match="there is no recording"):
        read_wav(tmp_path / "a.wav")


def test_other_formats_need_soundfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.flac").write_bytes(b"fLaC" + bytes(100))
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(MissingDependencyError, match="pip install 'postlude\\[audio\\]'"):
        read_wav(tmp_path / "a.flac")


def test_flac_and_damaged_flac(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "a.flac", TONE, RATE)
    found = read_wav(tmp_path / "a.flac")
    assert found.converted == ("FLAC to samples",)
    np.testing.assert_allclose(found.samples, TONE, atol=1e-4)
    (tmp_path / "a.flac").write_bytes(b"fLaC" + bytes(100))
    with pytest.raises(DataError, match="cannot be read as a recording"):
        read_wav(tmp_path / "a.flac")


def test_writing_refuses_what_would_clip(tmp_path: Path) -> None:
    for bad in (np.full(10, 1.5), np.full(10, np.nan)):
        with pytest.raises(DataError, match="expected at most 1"):
            write_wav(tmp_path / "a.wav", bad.astype(np.float32))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="shape"):
        write_wav(tmp_path / "a.wav", np.zeros((2, 2), np.float32))
