from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from postlude.errors import SettingsError
from postlude.numerics.activation_grids import (
    GELU_SHIFT,
    ActivationGrid,
    AdaLog,
    LogSqrt2,
    ShiftLog,
    Tangent,
    TwoSided,
    Uniform,
    log_table,
    percentile_range,
)


@pytest.fixture(scope="module")
def attention() -> Tensor:
    """Probabilities, mostly near 0 and a few near 1, ``[4, 3, 20, 20]``."""
    scores = torch.randn(4, 3, 20, 20, generator=torch.Generator().manual_seed(0)) * 3
    return scores.softmax(-1)


@pytest.fixture(scope="module")
def gelu() -> Tensor:
    drawn = torch.randn(300, 24, generator=torch.Generator().manual_seed(1)) * 1.5
    return functional.gelu(drawn)


def test_uniform_is_the_formula() -> None:
    x = torch.linspace(-1, 2, 50)
    found = Uniform(3).round_trip(
        x, {"scale": torch.tensor([0.3]), "zero_point": torch.tensor([2.25])}
    )
    expected = [0.3 * (min(max(round(v / 0.3 + 2.25), 0), 7) - 2.25) for v in x.tolist()]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_percentiles_are_those_of_least_error() -> None:
    rows = torch.randn(3000, 5, generator=torch.Generator().manual_seed(0)).double()
    rows[0, 2] = 90.0
    scale, zero = percentile_range(rows, 4)
    for column in range(5):
        values = rows[:, column].numpy()
        errors, pairs = [], []
        for share in (0.999, 0.9999, 0.99999):
            low, high = np.quantile(values, 1 - share), np.quantile(values, share)
            step = (high - low) / 15
            z = round(-low / step)
            codes = np.clip(np.round(values / step) + z, 0, 15)
            errors.append(((step * (codes - z) - values) ** 2).mean())
            pairs.append((step, z))
        best = pairs[int(np.argmin(errors))]
        assert (float(scale[column]), float(zero[column])) == pytest.approx(best)


def test_log_sqrt2_is_the_formula_with_its_odd_mask() -> None:
    x = torch.rand(400, generator=torch.Generator().manual_seed(0)) ** 6
    found = LogSqrt2(3).round_trip(x, {"scale": torch.tensor([0.9])})
    for value, rounded in zip(x.tolist(), found.tolist(), strict=True):
        raw = round(-2 * math.log2(max(value / 0.9, 1e-15)))
        code = min(max(raw, 0), 7)
        expected = 0.9 * 2 ** -math.ceil(code / 2) * (math.sqrt(2) if code % 2 else 1)
        # A code beyond the last one stands for 0; powers of sqrt 2 are what is left.
        assert rounded == pytest.approx(0.0 if raw > 7 else expected, rel=1e-5)
        assert raw > 7 or expected == pytest.approx(0.9 * 2 ** (-code / 2))


def test_table_of_powers_is_as_close_as_its_bits_allow() -> None:
    exact = torch.exp2(-torch.arange(37, dtype=torch.float64) / 37)
    for bits, most in ((3, 0.0605), (4, 0.0295), (6, 0.0075)):
        table = log_table(bits)
        assert float(((table - exact) / exact).abs().max()) <= most
        assert torch.allclose(
            table * (2 ** (bits + 1) - 2), (table * (2 ** (bits + 1) - 2)).round()
        )
    assert log_table(4)[0] == 1


def test_adalog_of_base_two_is_powers_of_two(attention: Tensor) -> None:
    base_two = {"scale": torch.ones(1), "base": torch.tensor([37.0])}
    found = AdaLog(4).round_trip(attention, base_two)
    exponent = torch.round(-torch.log2(attention.clamp(min=1e-15)))
    expected = torch.where(exponent < 16, torch.exp2(-exponent), torch.zeros_like(exponent))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_a_searched_base_is_never_worse_than_base_two(
    attention: Tensor, gelu: Tensor, bits: int
) -> None:
    grid = AdaLog(bits)
    best = grid.fit(attention)
    two = {"scale": torch.ones(1), "base": torch.tensor([37.0])}
    errors = [
        float((grid.round_trip(attention, p) - attention).square().mean()) for p in (best, two)
    ]
    assert errors[0] <= errors[1]
    shifted = AdaLog(bits, shift=GELU_SHIFT, search_scale=True)
    found = shifted.fit(gelu)
    error = float((shifted.round_trip(gelu, found) - gelu).square().mean())
    for scale in torch.linspace(float(gelu.max()) * 0.5, float(gelu.max()) + GELU_SHIFT, 8):
        of_two = {"scale": scale.reshape(1), "base": torch.tensor([37.0])}
        assert error <= float((shifted.round_trip(gelu, of_two) - gelu).square().mean()) * 1.02


def test_the_shift_of_gelu_leaves_the_bias(gelu: Tensor) -> None:
    """Folded: shifted values are multiplied, and ``shift * W 1`` leaves the bias; the same function."""
    assert pytest.approx(
        -float(functional.gelu(torch.linspace(-2, 0, 200001)).min()), abs=1e-6
    ) == (GELU_SHIFT)
    weight = torch.randn(7, 24, generator=torch.Generator().manual_seed(2)).double()
    bias, x = torch.arange(7).double(), gelu.double()
    folded = functional.linear(x + GELU_SHIFT, weight, bias - GELU_SHIFT * weight.sum(-1))
    assert (folded - functional.linear(x, weight, bias)).abs().max() < 1e-12
    grid = AdaLog(4, shift=GELU_SHIFT, search_scale=True)
    parameters = grid.fit(gelu)
    unshifted = AdaLog(4).round_trip(x + GELU_SHIFT, parameters)
    assert (grid.round_trip(x, parameters) + GELU_SHIFT - unshifted).abs().max() < 1e-12


def test_shift_log_gives_powers_of_two_in_as_many_codes_as_its_bits(attention: Tensor) -> None:
    grid = ShiftLog(3)
    parameters = grid.fit(attention)
    found = grid.round_trip(attention.double(), parameters) + parameters["eta"].double()
    assert torch.allclose(torch.log2(found), torch.log2(found).round(), atol=1e-9)
    assert len(found.unique()) <= 8


def test_tangent_of_a_small_angle_is_uniform(attention: Tensor) -> None:
    top = attention.max().reshape(1)
    bent = Tangent(4).round_trip(attention.double(), {"scale": top, "theta": torch.tensor([1e-4])})
    even = torch.round(attention.double() / top * 15) / 15 * top
    assert (bent - even).abs().max() < 1e-6
    wide = Tangent(4).round_trip(attention, {"scale": top, "theta": torch.tensor([1.3])})
    levels = wide.unique()
    assert levels[-1] - levels[-2] < levels[1] - levels[0]


def test_two_sided_is_the_formula_and_finds_the_best_ratio(gelu: Tensor) -> None:
    x = torch.linspace(-1, 2, 61)
    given = {"scale": torch.tensor([0.05]), "shift": torch.tensor([3.0])}
    found = TwoSided(4).round_trip(x, given)
    for value, rounded in zip(x.tolist(), found.tolist(), strict=True):
        step = 0.05 if value < 0 else 0.4
        expected = step * min(max(round(value / step), -7), 7)
        # On a tie either neighbour is nearest.
        assert (
            rounded == pytest.approx(expected, abs=1e-5)
            or abs(abs(rounded - value) - step / 2) < 1e-5
        )
    grid = TwoSided(4)

    def error(parameters: dict[str, Tensor]) -> float:
        return float((grid.round_trip(gelu, parameters) - gelu).square().mean())

    best = grid.fit(gelu)
    m, top = float(best["shift"]), float(best["scale"]) * 2 ** float(best["shift"])
    assert 2 <= m <= 6  # -0.17 below and some 4 above
    others = [
        {"scale": torch.tensor([top / 2**other]), "shift": torch.tensor([float(other)])}
        for other in range(9)
    ]
    assert error(best) == min(error(other) for other in others)
    assert error(best) < error(others[0])
    assert len(grid.round_trip(gelu, best).unique()) <= 15


def test_log_grids_suit_attention_better_than_uniform_ones() -> None:
    drawn = torch.randn(8, 100, 197, generator=torch.Generator().manual_seed(0))
    attention = (drawn * 2).softmax(-1)

    def error(grid: ActivationGrid) -> float:
        return float((grid.round_trip(attention, grid.fit(attention)) - attention).square().mean())

    uniform = error(Uniform(4))
    assert error(LogSqrt2(4)) < uniform / 3 and error(AdaLog(4)) < uniform / 3


def test_grids_are_described_and_refused() -> None:
    for grid in (
        Uniform(3),
        LogSqrt2(4),
        AdaLog(5, shift=0.1),
        ShiftLog(6),
        Tangent(7),
        TwoSided(4),
    ):
        assert ActivationGrid.from_dict(grid.to_dict()) == grid
    with pytest.raises(SettingsError, match="'bent' is not known"):
        ActivationGrid.from_dict({"kind": "bent"})
    with pytest.raises(SettingsError, match="2 to 8 bits, got 9"):
        Uniform(9)


def test_values_that_are_all_the_same_are_held() -> None:
    for grid in (
        Uniform(4),
        LogSqrt2(4),
        AdaLog(4, search_scale=True),
        ShiftLog(4),
        Tangent(4),
        TwoSided(4),
    ):
        for value in (0.0, 0.5):
            x = torch.full((6,), value)
            assert (grid.round_trip(x, grid.fit(x)) - x).abs().max() < 0.13
