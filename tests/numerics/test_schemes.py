"""Schemes: what is encoded and decoded, and what it takes on disk."""

from __future__ import annotations

import pytest
import torch
from tests.numerics.test_formats import FORMATS, scheme
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.formats import Format, Integer
from postlude.numerics.schemes import Granularity, Scheme


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "channel", 32])
def test_encode_decode(form: Format, granularity: str | int) -> None:
    x = torch.randn(5, 172)
    how = scheme(form, granularity)
    encoded = how.encode(x)
    assert int(encoded.codes.max()) < 2**form.code_bits
    values = encoded.decode()
    assert torch.equal(how.round_trip(x), values)
    again = how.encode(values, (encoded.scale.float(), _floats(encoded.zero_point)))
    assert torch.equal(again.codes, encoded.codes)
    assert Scheme.from_dict(how.to_dict()) == how


def _floats(zero_point: Tensor | None) -> Tensor | None:
    return None if zero_point is None else zero_point.float()


def test_zero_points_fit_16_bits() -> None:
    x = 1000 + torch.rand(4, 32) * 1e-6
    encoded = Scheme(Integer(4, False, "free"), Granularity("token")).encode(x)
    assert encoded.zero_point is not None
    assert encoded.zero_point.dtype == torch.int16
    torch.testing.assert_close(encoded.decode(), x, rtol=1e-4, atol=0)


@pytest.mark.parametrize("value", [0.0, 3.0, -7.0])
@pytest.mark.parametrize("form", [Integer(4), Integer(4, False, "free"), Integer(4, False, "zero")])
def test_constant_groups(form: Integer, value: float) -> None:
    x = torch.full((2, 16), value)
    torch.testing.assert_close(Scheme(form).round_trip(x), x, rtol=1e-3, atol=0)


def test_effective_bits() -> None:
    how = Scheme(Integer(4, False, "free"), Granularity("group", 128))
    assert how.effective_bits(4096) == 4.25
    assert Scheme(Integer(4, False, "free"), Granularity("group", 64)).effective_bits(4096) == 4.5
    # 172 channels in groups of 64: two whole groups and one of 44, each with its own scale and zero point.
    assert how.stored_bits(10, 172) == 10 * (8 * 86 + 2 * 32)


def test_bad_granularities_are_refused() -> None:
    for make in (lambda: Granularity.parse("row"), lambda: Granularity("group", 0)):
        with pytest.raises(SettingsError):
            make()
