from __future__ import annotations

from typing import Any

import pytest

from postlude import registry
from postlude.cli._settings import make_settings, parse_bits, parse_granularity
from postlude.errors import SettingsError, UnknownNameError

pytestmark = pytest.mark.usefixtures("methods")


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("w4a4kv4", (4, 4, 4)),
        ("W8A8", (8, 8, 16)),
        ("w3", (3, 16, 16)),
        ("kv2", (16, 16, 2)),
        ("w4kv8", (4, 16, 8)),
        (" w16a16kv16 ", (16, 16, 16)),
    ],
)
def test_bits(text: str, bits: tuple[int, int, int]) -> None:
    assert parse_bits(text) == dict(zip(("weights", "activations", "kv"), bits, strict=True))


@pytest.mark.parametrize("text", ["", "4", "a4w4", "w", "w4a", "w-4", "w4.5", "w4a4kv4x", "w٤"])
def test_bits_that_are_none(text: str) -> None:
    with pytest.raises(SettingsError, match="expected the bits of weights, activations"):
        parse_bits(text)


def test_granularity() -> None:
    assert parse_granularity("--group", "Channel", ("channel", "tensor")) == "channel"
    assert parse_granularity("--group", "128", ("channel", "tensor")) == 128
    for text in ("0", "-1", "1.5", "token", ""):
        with pytest.raises(SettingsError, match=r"--group .* expected channel, tensor or a group"):
            parse_granularity("--group", text, ("channel", "tensor"))


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("weights=3", 3),
        ("group=64", 64),
        ("group=tensor", "tensor"),
        ("damping=1", 1.0),
        ("damping=1e-3", 0.001),
        ("alpha=none", None),
        ("alpha=0.25", 0.25),
        ("symmetric=false", False),
        ("symmetric=no", False),
        ("sites=qkv_in,down_in", ("qkv_in", "down_in")),
        ("sites=down_in", ("down_in",)),
        ("sites=", ()),
        ("layers=1,2", [1, 2]),
        ("layers=[1, 2]", [1, 2]),
        ("order=4", "4"),
        ("order=a=b", "a=b"),
        ("activation-group=32", 32),
    ],
)
def test_values_are_read_as_their_fields_types(word: str, value: Any) -> None:
    name = word.partition("=")[0].replace("-", "_")
    found = getattr(make_settings(registry.find("quantize", "grid"), {}, [word]), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("weights=four", "weights=four does not fit grid: expected a whole number"),
        ("weights=4.5", "expected a whole number"),
        ("damping=much", "expected a number"),
        ("alpha=x", "expected a number or none"),
        ("symmetric=2", "expected true or false"),
        ("group=row", "expected a whole number or channel or tensor"),
        ("layers=a,b", "does not fit grid"),
        ("weights", "expected KEY=VALUE"),
        ("=4", "expected KEY=VALUE"),
        ("weights=1", "2 bits or more"),
    ],
)
def test_values_that_do_not_fit(word: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_settings(registry.find("quantize", "grid"), {}, [word])


def test_unknown_key_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"setting of grid named 'damp'\. Did you mean"):
        make_settings(registry.find("quantize", "grid"), {}, ["damp=1"])


def test_given_twice() -> None:
    with pytest.raises(SettingsError, match="'weights' of grid is given twice"):
        make_settings(registry.find("quantize", "grid"), {"weights": 4}, ["weights=3"])
    with pytest.raises(SettingsError, match="given twice"):
        make_settings(registry.find("quantize", "grid"), {}, ["order=a", "order=b"])


def test_a_setting_without_a_default() -> None:
    with pytest.raises(SettingsError, match="needy needs rank: pass --set rank=VALUE"):
        make_settings(registry.find("quantize", "needy"), {})
    assert make_settings(registry.find("quantize", "needy"), {}, ["rank=3"]).rank == 3
