"""Number formats against slow, obvious references and against their own definitions."""

from __future__ import annotations

import math

import pytest
import torch

from postlude.errors import SettingsError
from postlude.numerics.formats import (
    Codebook,
    Format,
    Integer,
    Logarithmic,
    Minifloat,
    Power,
    Ternary,
)
from postlude.numerics.schemes import Granularity, Scheme

EXACT = "float32"
FORMATS = [
    Integer(4),
    Integer(8, narrow=True),
    Integer(3, symmetric=False, range="free"),
    Integer(4, symmetric=False, range="zero"),
    Minifloat(2, 1),
    Minifloat(3, 2),
    Minifloat(4, 3),
    Power(4, 0.5),
    Logarithmic(4),
    Ternary(),
    Codebook((-1.0, -0.3, 0.0, 0.2, 0.7)),
]


def scheme(form: Format, granularity: str | int = "channel") -> Scheme:
    return Scheme(form, Granularity.parse(granularity), EXACT)


def by_loops(x: list[float], bits: int, symmetric: bool, free: bool) -> list[float]:
    """One group, in Python floats."""
    if symmetric:
        top = 2 ** (bits - 1) - 1
        s = max(map(abs, x)) / top
        return [s * min(max(round(v / s), -top - 1), top) for v in x]
    low, high = (min(x), max(x)) if free else (min(*x, 0.0), max(*x, 0.0))
    s = (high - low) / (2**bits - 1)
    z = round(-low / s)
    return [s * (min(max(round(v / s) + z, 0), 2**bits - 1) - z) for v in x]


@pytest.mark.parametrize("symmetric, free", [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize(
    "granularity, runs", [("channel", [172]), (32, [32] * 5 + [12]), (64, [64, 64, 44])]
)
def test_integers_by_loops(symmetric: bool, free: bool, granularity: str, runs: list[int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 172, dtype=torch.float64) + 0.7
    form = Integer(4, symmetric=symmetric, range="free" if free else "zero")
    got = scheme(form, granularity).round_trip(x)
    for row, values in zip(x, got, strict=True):
        expected = [
            v for run in row.split(runs) for v in by_loops(run.tolist(), 4, symmetric, free)
        ]
        torch.testing.assert_close(
            values, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0
        )


def test_free_and_zero_agree_when_the_range_holds_zero() -> None:
    x = torch.randn(6, 64)
    free = scheme(Integer(4, False, "free")).encode(x)
    zero = scheme(Integer(4, False, "zero")).encode(x)
    assert torch.equal(free.codes, zero.codes)


def test_an_offset_of_whole_steps_costs_nothing() -> None:
    x = torch.randn(6, 64, dtype=torch.float64)
    how = scheme(Integer(4, False, "free"), 32)
    step = how.parameters(x)[0].repeat_interleave(32, -1)
    plain, shifted = how.round_trip(x), how.round_trip(x + 1000 * step)
    # The scale is rounded to fp32 after the shift; nothing else differs.
    torch.testing.assert_close(shifted - 1000 * step, plain, atol=2e-4, rtol=0)
    assert how.encode(x + 1000 * step).codes.float().sub(how.encode(x).codes).abs().max() <= 1


def test_minifloat_levels() -> None:
    assert Minifloat(2, 1).levels()[7:] == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert len(Minifloat(2, 1).levels()) == 15
    fp8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = sorted(set(fp8[fp8.isfinite()].tolist()))
    # torch keeps one code of the top exponent for NaN; ours encodes 480 there.
    assert sorted(set(Minifloat(4, 3).levels()) - {480.0, -480.0}) == finite


def test_minifloat_rounds_like_torch() -> None:
    x = torch.cat([torch.randn(4000) * 10, torch.tensor([1.0625, 1.1875, 0.0009765625, 2.125])])
    form = Minifloat(4, 3)
    codes = form.encode(x, torch.ones(()), None)
    expected = x.to(torch.float8_e4m3fn).float()
    assert torch.equal(form.decode(codes, torch.ones(()), None), expected)


@pytest.mark.parametrize(
    "form", [f for f in FORMATS if not isinstance(f, Integer | Power)], ids=str
)
def test_grids_take_the_nearest_level(form: Format) -> None:
    x = torch.randn(500)
    levels = torch.tensor(form.levels())  # type: ignore[attr-defined]
    values = form.decode(form.encode(x, torch.ones(()), None), torch.ones(()), None)
    torch.testing.assert_close((values - x).abs(), (levels - x[:, None]).abs().amin(1))


def test_power_of_one_is_the_integer_grid() -> None:
    x = torch.randn(3, 50)
    power = scheme(Power(4, 1.0)).round_trip(x)
    torch.testing.assert_close(power, scheme(Integer(4, narrow=True)).round_trip(x))


@pytest.mark.parametrize("exponent", [0.3, 0.5])
def test_power_by_its_formula(exponent: float) -> None:
    x = torch.randn(200, dtype=torch.float64)
    top, peak = 7, float(x.abs().max())
    expected = []
    for v in x.tolist():
        q = round(top * math.copysign(abs(v) ** exponent, v) / peak**exponent)
        expected.append(math.copysign(abs(q * peak**exponent / top) ** (1 / exponent), q))
    got = scheme(Power(4, exponent)).round_trip(x)
    torch.testing.assert_close(
        got, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: Integer(9),
        lambda: Integer(1),
        lambda: Integer(4, False, "other"),  # type: ignore[arg-type]
        lambda: Minifloat(6, 3),
        lambda: Power(4, 2.0),
        lambda: Logarithmic(4, base=1.0),
        lambda: Codebook((1.0, 0.0)),
        lambda: Format.from_dict({"kind": "nf4"}),
    ],
)
def test_bad_settings_are_refused(make: object) -> None:
    with pytest.raises(SettingsError):
        make()  # type: ignore[operator]
