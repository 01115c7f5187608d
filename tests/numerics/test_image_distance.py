from __future__ import annotations

import math

import pytest
import torch

from postlude.errors import DataError
from postlude.numerics.image_distance import frechet_distance, gaussian_of, psnr


def rows(count: int, width: int, seed: int, rank: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank or width, width, generator=generator, dtype=torch.float64)
    return (
        torch.randn(count, rank or width, generator=generator, dtype=torch.float64) @ mixing + seed
    )


@pytest.mark.parametrize("rank", [None, 3], ids=["regular", "singular"])
def test_frechet_distance_is_that_of_a_matrix_square_root(rank: int | None) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    first, second = gaussian_of(rows(60, 8, 0, rank)), gaussian_of(rows(40, 8, 1))
    root = torch.from_numpy(linalg.sqrtm((first[1] @ second[1]).numpy()).real)
    expected = (first[0] - second[0]).square().sum() + (first[1] + second[1] - 2 * root).trace()
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-6)
    assert frechet_distance(second, first) == pytest.approx(float(expected), rel=1e-6)


def test_frechet_distance_of_numbers() -> None:
    def of(mean: float, deviation: float) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([mean]), torch.tensor([[deviation**2]])

    # Squared 2-Wasserstein distance of normal distributions on the line.
    assert frechet_distance(of(1.0, 2.0), of(4.0, 0.5)) == pytest.approx(9.0 + 1.5**2)


def test_equal_is_zero_and_a_constant_column_is_no_trouble() -> None:
    features = rows(50, 6, 0)
    features[:, 2] = 1.0
    one = gaussian_of(features)
    assert 0.0 <= frechet_distance(one, one) < 1e-10
    mean, covariance = one
    assert torch.allclose(covariance, features.T.cov())
    assert torch.allclose(mean, features.mean(0))


def test_psnr() -> None:
    reference = torch.zeros(3, 1, 2, 2)
    images = reference.clone()
    images[1] = 0.2
    images[2, 0, 0, 0] = 2.0
    found = psnr(images, reference)
    assert math.isinf(found[0])
    assert found[1:].tolist() == pytest.approx([20.0, 10 * math.log10(4.0)], rel=1e-6)
    assert float(psnr(images, reference, peak=1.0)[1]) == pytest.approx(
        20 - 20 * math.log10(2), rel=1e-6
    )


def test_bad_input() -> None:
    with pytest.raises(
        DataError, match=r"two rows or more of a matrix \[n, d\]; found the shape \[1, 3\]"
    ):
        gaussian_of(torch.zeros(1, 3))
    broken = torch.zeros(4, 3)
    broken[2, 1] = math.nan
    with pytest.raises(DataError, match="1 of 4 samples hold NaN or infinity"):
        gaussian_of(broken)
    with pytest.raises(DataError, match="features of 3 and of 2 numbers"):
        frechet_distance(gaussian_of(rows(9, 3, 0)), gaussian_of(rows(9, 2, 0)))
