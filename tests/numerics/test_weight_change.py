from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from postlude.numerics.weight_change import (
    change_norms,
    change_spectrum,
    effective_rank,
    energy_rank,
    intruder_cosines,
    rounding_edge,
    spacing,
    stable_rank,
    stored_dtype,
    unchanged_shares,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def test_ranks_of_known_spectra() -> None:
    flat = torch.full((7,), 3.0, dtype=torch.float64)
    assert effective_rank(flat) == pytest.approx(7)
    assert stable_rank(flat) == pytest.approx(7)
    assert (energy_rank(flat, 0.9), energy_rank(flat, 0.99)) == (7, 7)
    # Two of ten hold half each: 50 % is met by one of them.
    two = torch.tensor([1.0, 1.0, 0, 0, 0], dtype=torch.float64)
    assert effective_rank(two) == pytest.approx(2)
    assert (energy_rank(two, 0.5), energy_rank(two, 0.51)) == (1, 2)
    # By hand: p = (3/4, 1/4).
    uneven = torch.tensor([3.0, 1.0], dtype=torch.float64)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(uneven) == pytest.approx(math.exp(entropy))
    assert stable_rank(uneven) == pytest.approx(10 / 9)
    assert (energy_rank(uneven, 0.9), energy_rank(uneven, 0.91)) == (1, 2)
    nothing = torch.zeros(4, dtype=torch.float64)
    assert math.isnan(effective_rank(nothing)) and math.isnan(stable_rank(nothing))
    assert energy_rank(nothing, 0.9) == 0


def test_unchanged_shares_against_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    base, change = random(9, 7), random(9, 7, seed=1) * 10.0 ** -torch.arange(7)
    base[0, 0] = 0  # what was zero has no relative change unless it is still zero
    base[0, 1] = change[0, 1] = 0
    absolute, relative = (0.0, 1e-3, 1e-1), (1e-4, 1e-2)
    expected = [
        sum(
            abs(after - before) <= t * (abs(before) if scaled else 1)
            for before, after in zip(
                base.flatten().tolist(), (base + change).flatten().tolist(), strict=True
            )
        )
        / 63
        for scaled, tolerances in ((False, absolute), (True, relative))
        for t in tolerances
    ]
    found = torch.cat(unchanged_shares(base, base + change, absolute, relative))
    assert found.tolist() == pytest.approx(expected)
    monkeypatch.setattr("postlude.numerics.weight_change._AT_ONCE", 5)
    assert torch.equal(torch.cat(unchanged_shares(base, base + change, absolute, relative)), found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_spacing_is_the_distance_to_the_next_value(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, 1.5, 2.0, 0.0078125, -3.0, 1e-3, 0.0]).to(dtype)
    after = torch.nextafter(values.abs(), torch.full_like(values, 1e4))
    expected = after.double() - values.abs().double()
    assert torch.equal(spacing(values.double(), dtype), expected)


def test_stored_dtype_is_found_in_the_values() -> None:
    values = random(5, 5).float()
    assert stored_dtype(values) is torch.float32
    assert stored_dtype(values.bfloat16().float()) is torch.bfloat16
    assert stored_dtype(values.half().double()) is torch.float16
    assert stored_dtype(random(5, 5)) is torch.float64


@pytest.mark.parametrize("shape", [(60, 60), (40, 90), (90, 40)])
def test_rounding_errors_stay_below_their_edge(shape: tuple[int, int]) -> None:
    weight = random(*shape) * torch.logspace(-3, 0, shape[1], dtype=torch.float64)
    stored = weight.bfloat16().double()
    largest = float(torch.linalg.svdvals(stored - weight)[0])
    assert (
        0.3 * rounding_edge(stored, torch.bfloat16)
        < largest
        < rounding_edge(stored, torch.bfloat16)
    )


@pytest.mark.parametrize("shape", [(48, 48), (30, 64), (64, 30)])
def test_a_spike_is_one_intruder_and_a_dense_change_of_its_norm_is_none(
    shape: tuple[int, int],
) -> None:
    # tall, wide and square: left vectors are those of the rows, whichever way round the matrix is decomposed.
    weight = random(*shape)
    weight[:, 0] *= 30  # directions that a change has to beat
    left, right = random(shape[0], 1, seed=1), random(1, shape[1], seed=2)
    spike = left @ right / (left.norm() * right.norm()) * 4 * weight.norm()
    dense = random(*shape, seed=3)
    dense *= 0.05 * weight.norm() / dense.norm()
    assert int((intruder_cosines(weight, weight + dense, 1) < 0.5).sum()) == 0
    cosines = intruder_cosines(weight, weight + spike, 10)
    left_vectors = [torch.linalg.svd(m, full_matrices=False)[0] for m in (weight, weight + spike)]
    expected = (left_vectors[1].T @ left_vectors[0]).abs().max(1).values[:10]
    assert torch.allclose(cosines, expected, atol=1e-9)
    assert float(cosines[0]) < 0.5 < float(cosines[1])


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4)])
def test_sizes_and_spectrum_of_a_change(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, change = random(*shape), random(*shape, seed=1)
    values = change_spectrum(base, base + change)
    assert torch.allclose(values, torch.linalg.svdvals(change), atol=1e-12)
    monkeypatch.setattr("postlude.numerics.weight_change._AT_ONCE", 7)
    found = change_norms(base, base + change)
    expected = float(change.norm()), float(base.norm()), float(change.abs().max())
    assert found == pytest.approx(expected, rel=1e-12)
