from __future__ import annotations

import math

import pytest
import torch

from postlude.errors import DataError
from postlude.evaluation.samples import judge_samples
from postlude.numerics.image_distance import frechet_distance, gaussian_of
from postlude.zoo.digits_classifier import judge

NUMBERS = {
    *(f"{a}{b}" for a in ("frechet", "frechet_pixels") for b in ("", "_reference", "_floor")),
    *(f"class_accuracy{end}" for end in ("", "_reference", "_real", "_chance", "_by_class")),
    "psnr_db",
    "psnr_db_lowest",
}  # fmt: skip


def noise(count: int, channels: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_real_digits_are_close_and_of_their_class() -> None:
    pytest.importorskip("sklearn")
    from postlude.zoo.digits import digits

    images, labels = digits()
    found = judge_samples(images, labels, reference=images + 0.02 * noise(len(images)))
    assert set(found) == NUMBERS
    assert found["frechet"] < 1e-4 and found["frechet_pixels"] < 1e-6
    # It was trained on four fifths of them.
    assert found["class_accuracy"] > found["class_accuracy_real"] > 0.99
    assert found["class_accuracy_chance"] == 0.1
    assert list(found["class_accuracy_by_class"]) == list(range(10))
    assert found["psnr_db"] == pytest.approx(10 * math.log10(4 / 0.02**2), abs=0.1)
    assert found["psnr_db_lowest"] < found["psnr_db"]
    assert 0 < found["frechet_pixels_reference"] < 0.01


def test_the_floor_is_what_fresh_digits_get() -> None:
    pytest.importorskip("sklearn")
    from postlude.zoo.digits import digits

    images = digits()[0].flatten(1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(5))
    few, rest = images[order[:300]], images[order[300:]]
    found = frechet_distance(gaussian_of(few), gaussian_of(rest))
    floor = judge_samples(noise(300), torch.arange(300) % 10)["frechet_pixels_floor"]
    assert found == pytest.approx(floor, rel=0.3)


def test_noise_is_far_and_of_no_class() -> None:
    labels = torch.arange(400) % 10
    found = judge_samples(noise(400), labels)
    assert found["frechet"] > 10 and found["frechet_pixels"] > 10
    assert found["class_accuracy"] < 0.3
    assert found["psnr_db"] is None and found["frechet_reference"] is None


def test_images_that_are_no_digits() -> None:
    images = noise(50, channels=3)
    found = judge_samples(images, torch.zeros(50), reference=images)
    assert found["frechet"] is None and found["frechet_pixels"] is None
    assert found["class_accuracy"] is None
    assert math.isinf(found["psnr_db"])


def test_real_images_of_the_caller() -> None:
    real = noise(400, channels=3, seed=1)
    found = judge_samples(noise(200, channels=3) + 0.5, real=real, reference=noise(200, channels=3))
    goal = gaussian_of(real.flatten(1))
    assert found["frechet_pixels"] == frechet_distance(
        gaussian_of((noise(200, 3) + 0.5).flatten(1)), goal
    )
    assert found["frechet"] is None
    # Samples of the same distribution are at the floor.
    assert found["frechet_pixels_reference"] == pytest.approx(
        found["frechet_pixels_floor"], rel=0.15
    )
    assert found["frechet_pixels"] > 1.5 * found["frechet_pixels_floor"]


def test_the_classifier_file() -> None:
    one = judge()
    assert one.count == 1797 and one.accuracy > 0.99
    mean, covariance = one.features
    assert covariance.dtype == torch.float64 and mean.shape == (64,)
    assert float(covariance.diagonal().mean()) == pytest.approx(1.0)
    assert judge() is one
    features, classes = one.look(noise(3))
    assert features.shape == (3, 64) and classes.shape == (3,)
    with pytest.raises(DataError, match=r"reads digits \[n, 1, 8, 8\]; found \[3, 3, 8, 8\]"):
        one.look(noise(3, channels=3))


def test_bad_input() -> None:
    with pytest.raises(DataError, match=r"shape \[1, 1, 8, 8\]; expected two or more images"):
        judge_samples(noise(1))
    with pytest.raises(DataError, match="expected the same noise in both"):
        judge_samples(noise(4), reference=noise(5))
    with pytest.raises(DataError, match="expected four or more of the samples' shape"):
        judge_samples(noise(4), real=noise(9, channels=3))
    broken = noise(4)
    broken[1] = math.nan
    with pytest.raises(DataError, match="1 of 4 samples hold NaN"):
        judge_samples(broken)
