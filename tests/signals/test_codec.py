from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from postlude.errors import CheckpointError, OutputExistsError, SettingsError, UnknownNameError
from postlude.numerics.formats import Integer
from postlude.numerics.rounding import nearest
from postlude.numerics.schemes import Scheme
from postlude.signals.codec import Coding, encode
from postlude.signals.curve import curve, peers_at, stored_psnr
from postlude.signals.inr import WIDTHS, Stored, open_inr
from postlude.signals.picture import Picture, evaluate, fit, render
from postlude.signals.training import Training
from postlude.zoo.smn.networks import NETWORKS, build, settings_for

from .conftest import drawn

CODINGS = [
    Coding(8),
    Coding(4),
    Coding(3),
    Coding(16),
    Coding(32),
    Coding(5.5),
    Coding(6, mixed=True),
    Coding(4, rounding="learned", steps=5),
    Coding(4.5, rounding="learned", steps=5),
]


@pytest.fixture(scope="module")
def fitted() -> tuple[nn.Module, Picture]:
    picture = Picture(drawn(12, 10, 3))
    network = build(settings_for("smn", {"width": 10}), 0)
    fit(network, picture, Training(steps=150, learning_rate=2e-2))
    return network, picture


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_round_trip(fitted: tuple[nn.Module, Picture], coding: Coding, tmp_path: Path) -> None:
    network, picture = fitted
    before = {name: value.clone() for name, value in network.state_dict().items()}
    stored = encode(network, picture, coding, made_by={"steps": 150})
    stored.save(tmp_path / "a.inr")
    again = open_inr(tmp_path / "a.inr")
    assert again.config == stored.config
    assert all(torch.equal(again.tensors[name], value) for name, value in stored.tensors.items())
    first, second = stored.network().state_dict(), again.network().state_dict()
    assert all(torch.equal(first[name], value) for name, value in second.items())
    assert torch.equal(render(again.network(), 12, 10), render(stored.network(), 12, 10))
    assert stored.bytes == sum(file.stat().st_size for file in (tmp_path / "a.inr").iterdir())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("channels", [1, 4])
def test_every_network(name: str, channels: int) -> None:
    picture = Picture(drawn(5, 4, channels))
    network = build(settings_for(name, {"width": 7, "out_features": channels}), 0)
    stored = encode(network, picture, Coding(32))
    state = stored.network().state_dict()
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())
    found = encode(network, picture, Coding(8)).network().state_dict()
    assert list(found) == list(state)


def test_codes_are_those_of_the_grid(fitted: tuple[nn.Module, Picture]) -> None:
    network, picture = fitted
    found = encode(network, picture, Coding(5)).network().state_dict()
    for name, value in network.state_dict().items():
        matrix = name.endswith(".weight") and name != "first.weight"
        expected = nearest(value, Scheme(Integer(5))).decode() if matrix else value
        assert torch.equal(found[name], expected)


def test_more_bits_are_closer(fitted: tuple[nn.Module, Picture]) -> None:
    network, picture = fitted
    files = [encode(network, picture, Coding(bits)) for bits in (3, 5, 8, 32)]
    shown = [stored_psnr(file, picture) for file in files]
    assert shown == sorted(shown)
    assert [file.bytes for file in files] == sorted(file.bytes for file in files)
    assert shown[-1] == pytest.approx(evaluate(network, picture), abs=0.2)


def test_a_mean_is_kept_to(fitted: tuple[nn.Module, Picture]) -> None:
    network, picture = fitted
    names = [name for name in network.state_dict() if name.endswith(".weight")]
    entries = sum(network.state_dict()[name].numel() for name in names)
    for mean in (8.0, 9.5, 12.0):
        stored = encode(network, picture, Coding(mean, mixed=True))
        sizes = [t.numel() * t.element_size() for n, t in stored.tensors.items() if n != "single"]
        single = sum(
            network.state_dict()[name].numel()
            for name, bits in zip(names, stored.config["bits"], strict=True)
            if bits == 32
        )
        assert 8 * sum(sizes) + 32 * single <= mean * entries
    with pytest.raises(SettingsError, match="cheapest options cost"):
        encode(network, picture, Coding(2.5))


def test_learned_rounding_is_better(fitted: tuple[nn.Module, Picture]) -> None:
    network, picture = fitted
    plain = stored_psnr(encode(network, picture, Coding(3)), picture)
    learned = stored_psnr(
        encode(network, picture, Coding(3, rounding="learned", steps=150)), picture
    )
    assert learned > plain + 0.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 1}, "bits are 2, 3, 4"),
        ({"bits": 9}, "bits are 2, 3, 4"),
        ({"bits": 40.5}, "2 to 32 on average"),
        ({"rounding": "neerest"}, "Did you mean 'nearest'"),
        ({"steps": 0}, "takes 1 step or more"),
    ],
)
def test_codings_that_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises((SettingsError, UnknownNameError), match=message):
        Coding(**values)


def test_directories_that_are_none(fitted: tuple[nn.Module, Picture], tmp_path: Path) -> None:
    stored = encode(*fitted, Coding(4))
    stored.save(tmp_path / "a.inr")
    with pytest.raises(OutputExistsError, match="already exists"):
        stored.save(tmp_path / "a.inr")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    for path, message in {
        "none": "is not there; expected an .inr directory. `postlude fit",
        "empty": "is without a config.json",
        "a.inr/config.json": "is a file",
        "model": "the format in its config.json is None",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            open_inr(tmp_path / path)


def damaged(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "of version 2, and this Postlude reads 1"),
        ({"bits": [32, 4]}, "damaged"),
        ({"bits": [32, 4, 4, 4, 4, 5]}, "fewer than config.json asks for"),
        ({"bits": [32, 4, 4, 4, 4, 3]}, "more than the"),
        ({"bits": [32, 4, 4, 4, 4, 11]}, "has 11 bits"),
        ({"picture": [0, 4]}, "0 x 4 pixels"),
        ({"picture": 3}, "damaged"),
        ({"network": {"name": "smn", "width": 0}}, "width is 0"),
        ({"network": {}}, "damaged"),
    ],
)
def test_damaged(
    fitted: tuple[nn.Module, Picture], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    encode(*fitted, Coding(4)).save(tmp_path / "a.inr")
    damaged(tmp_path / "a.inr", **changes)
    with pytest.raises((CheckpointError, SettingsError), match=message):
        open_inr(tmp_path / "a.inr")


def test_cut_weights(fitted: tuple[nn.Module, Picture], tmp_path: Path) -> None:
    encode(*fitted, Coding(4)).save(tmp_path / "a.inr")
    file = tmp_path / "a.inr" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        open_inr(tmp_path / "a.inr")
    file.unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        open_inr(tmp_path / "a.inr")


def test_curve(fitted: tuple[nn.Module, Picture]) -> None:
    network, picture = fitted
    found = curve(network, picture, lines=["nearest", "mixed"])
    by_line: dict[str, list[tuple[int, float]]] = {}
    for point in found:
        by_line.setdefault(point.line, []).append((point.bytes, point.psnr))
    assert len(by_line["nearest"]) == 6
    stored = encode(network, picture, Coding(4))
    assert (stored.bytes, stored_psnr(stored, picture)) in by_line["nearest"]
    largest = max(point.bytes for point in found if point.line == "nearest")
    for name in ("JPEG", "WEBP"):
        assert all(size <= largest for size, _ in by_line.get(name, []))


def test_peers_against_every_quality() -> None:
    import io

    from PIL import Image

    picture = Picture(drawn(32, 32, 3))
    image = Image.frombytes("RGB", (32, 32), bytes(picture.pixels.numpy()))
    sizes = []
    for quality in range(1, 101, 9):
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=quality, optimize=True)
        sizes.append(buffer.tell())
    limit = sorted(sizes)[6]
    found = {point.line: point for point in peers_at(picture, [limit])}
    assert found["JPEG"].bytes <= limit
    assert found["JPEG"].psnr > 20
    assert {point.line for point in peers_at(Picture(drawn(16, 16, 4)), [5000])} == {"WEBP"}
    assert peers_at(picture, [10]) == []


def test_all_widths_are_choices() -> None:
    assert all(Coding(bits) for bits in WIDTHS)
    assert not any(Coding(bits).is_mixed for bits in WIDTHS)
    assert Stored({"picture": [3, 2]}, {}).size == (3, 2)
