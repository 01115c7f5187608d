from __future__ import annotations

import math

import pytest
import torch

from postlude.errors import DataError, SettingsError
from postlude.numerics.directions import (
    acute_angle,
    gaussian_linearisation,
    leading_singular_directions,
    mean_pairwise_acute_angle,
    nearest_eigenpair,
    project_out,
    unit,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_acute_angle_ignores_sign_and_scale() -> None:
    a, b = torch.randn(2, 5, 7, generator=generator(), dtype=torch.float64)
    angles = acute_angle(a, b)
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    plain = torch.rad2deg(torch.acos(cosine))
    torch.testing.assert_close(angles, 90 - (plain - 90).abs())
    torch.testing.assert_close(acute_angle(-3 * a, 1e20 * b), angles)
    torch.testing.assert_close(acute_angle(a[0], b), torch.stack([acute_angle(a[0], x) for x in b]))


def test_small_angles_keep_their_digits() -> None:
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    b = torch.tensor([1.0, 1e-11], dtype=torch.float64)
    assert float(acute_angle(a, b)) == pytest.approx(math.degrees(1e-11), rel=1e-4)
    assert float(acute_angle(a, -b)) == pytest.approx(math.degrees(1e-11), rel=1e-4)
    assert float(acute_angle(a, a)) == 0
    assert float(acute_angle(a, torch.tensor([0.0, 2.0]))) == pytest.approx(90)


def test_vectors_without_direction_are_refused() -> None:
    for bad in (0.0, math.nan, math.inf):
        with pytest.raises(DataError, match="no direction"):
            unit(torch.tensor([[1.0, 2.0], [bad, bad]]))


def test_unit_survives_extreme_scales() -> None:
    for scale in (1e-300, 1e300):
        vector = torch.tensor([3.0, 4.0], dtype=torch.float64) * scale
        torch.testing.assert_close(unit(vector), torch.tensor([0.6, 0.8], dtype=torch.float64))


def test_mean_pairwise_angle_is_the_mean_over_pairs() -> None:
    rows = torch.randn(9, 4, generator=generator(1))
    pairs = [float(acute_angle(rows[i], rows[j])) for i in range(9) for j in range(i)]
    expected = sum(pairs) / len(pairs)
    for chunk in (1, 4, 9, 100):
        assert mean_pairwise_acute_angle(rows, chunk) == pytest.approx(expected)
    assert mean_pairwise_acute_angle(rows[:1]) == 0
    assert mean_pairwise_acute_angle(torch.stack([rows[0], -2 * rows[0]])) == pytest.approx(
        0, abs=1e-5
    )
    with pytest.raises(DataError, match="at least one"):
        mean_pairwise_acute_angle(rows[:0])


def test_singular_directions() -> None:
    matrix = torch.randn(6, 4, generator=generator(2))
    left, values, right = leading_singular_directions(matrix, 2)
    torch.testing.assert_close(matrix.double() @ right, left * values)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix.double())[:2])
    assert bool((left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all())
    assert leading_singular_directions(matrix).values.shape == (4,)
    with pytest.raises(SettingsError, match="between 1 and 4"):
        leading_singular_directions(matrix, 5)
    with pytest.raises(DataError, match="NaN"):
        leading_singular_directions(matrix * math.nan)


def test_nearest_eigenpair_finds_a_planted_one() -> None:
    planted = unit(torch.randn(8, generator=generator(3)))
    # A rotation elsewhere gives complex pairs, which must not get in the way.
    noise = 0.1 * torch.randn(8, 8, generator=generator(4), dtype=torch.float64)
    matrix = -5 * torch.outer(planted, planted) + noise - noise.T
    pair = nearest_eigenpair(matrix, planted)
    assert pair.value == pytest.approx(-5, abs=0.2)
    assert pair.angle < 5
    assert float(acute_angle(pair.vector, planted)) == pytest.approx(pair.angle)


def test_linearisation_is_exact_for_linear_maps_and_fits_least_squares() -> None:
    matrix = torch.randn(3, 5, generator=generator(5))
    found = gaussian_linearisation(lambda x: x @ matrix.T, 5, 50, generator(6), chunk=7)
    torch.testing.assert_close(found, matrix.double(), atol=1e-5, rtol=1e-5)

    def curved(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x @ matrix.T)

    x = torch.randn(400, 5, generator=generator(7), dtype=torch.float64)
    expected = torch.linalg.lstsq(x, torch.nn.functional.silu(x @ matrix.double().T)).solution.T
    matrix = matrix.double()
    found = gaussian_linearisation(curved, 5, 400, generator(7), dtype=torch.float64, chunk=400)
    torch.testing.assert_close(found, expected)


def test_linearisation_agrees_with_steins_lemma() -> None:
    """For x ~ N(0, I), E[y x^T] = E[dy/dx]; for y = relu(x) the derivative is 1/2."""
    found = gaussian_linearisation(torch.relu, 4, 40_000, generator(8))
    torch.testing.assert_close(found, torch.eye(4, dtype=torch.float64) / 2, atol=0.02, rtol=0)


def test_linearisation_refuses_too_few_samples() -> None:
    with pytest.raises(SettingsError, match="at least 8"):
        gaussian_linearisation(torch.relu, 8, 7, generator())


def test_project_out_leaves_nothing_along_the_direction() -> None:
    x = torch.randn(2, 3, 6, generator=generator(9))
    direction = 7 * torch.randn(6, generator=generator(10))
    out = project_out(x, direction)
    torch.testing.assert_close(out @ direction, torch.zeros(2, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(project_out(out, direction), out)
    assert out.dtype == x.dtype
