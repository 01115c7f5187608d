"""Rotations against their defining identities, dense products and scipy; groups against published examples."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch

from postlude.errors import SettingsError
from postlude.numerics.rotation import (
    block_diagonal,
    constant_first_row,
    group_sizes,
    outlier_grouping,
    random_orthogonal,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_orthogonal(matrix: torch.Tensor) -> None:
    identity = torch.eye(len(matrix), dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, identity, atol=1e-12, rtol=0)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 12, 18, 64, 172])
def test_constant_first_row(n: int) -> None:
    for matrix in (constant_first_row(n), constant_first_row(n, generator())):
        assert matrix.dtype == torch.float64
        assert_orthogonal(matrix)
        torch.testing.assert_close(matrix[0], torch.full((n,), n**-0.5, dtype=torch.float64))
    assert torch.equal(constant_first_row(n, generator(3)), constant_first_row(n, generator(3)))


def test_constant_first_row_random_signs_are_random() -> None:
    assert not torch.equal(
        constant_first_row(64, generator(0)), constant_first_row(64, generator(1))
    )
    assert not torch.equal(
        constant_first_row(10, generator(0)), constant_first_row(10, generator(1))
    )


def test_constant_first_row_without_hadamard_is_the_dct() -> None:
    expected = torch.from_numpy(scipy.fft.dct(torch.eye(9).double().numpy(), axis=0, norm="ortho"))
    torch.testing.assert_close(constant_first_row(9), expected)


def test_constant_first_row_turns_channel_zero_into_an_offset() -> None:
    x = torch.zeros(1, 20, dtype=torch.float64)
    x[0, 0] = 7.0
    torch.testing.assert_close(
        x @ constant_first_row(20, generator()),
        torch.full((1, 20), 7.0 / 20**0.5, dtype=torch.float64),
    )


def test_random_orthogonal() -> None:
    matrix = random_orthogonal(17, generator())
    assert_orthogonal(matrix)
    assert torch.equal(matrix, random_orthogonal(17, generator()))
    # Haar: every entry has mean 0. Without the sign fix it has not.
    samples = torch.stack([random_orthogonal(2, generator(seed)) for seed in range(100)])
    assert float(samples.mean(0).abs().max()) < 0.3
    with pytest.raises(SettingsError):
        random_orthogonal(0)


def test_block_diagonal() -> None:
    blocks = [random_orthogonal(n, generator(n)) for n in (3, 1, 4)]
    matrix = block_diagonal(blocks)
    assert_orthogonal(matrix)
    x = torch.randn(5, 8, dtype=torch.float64, generator=generator())
    expected = torch.cat(
        [part @ block for part, block in zip(x.split([3, 1, 4], 1), blocks, strict=True)], 1
    )
    torch.testing.assert_close(x @ matrix, expected)
    with pytest.raises(SettingsError, match="square"):
        block_diagonal([torch.zeros(2, 3)])
    with pytest.raises(SettingsError, match="at least one"):
        block_diagonal([])


def test_group_sizes() -> None:
    assert group_sizes(256, 128) == [128, 128]
    assert group_sizes(172, 128) == [128, 44]
    assert group_sizes(44, 128) == [44]
    with pytest.raises(SettingsError):
        group_sizes(0, 8)


def test_outlier_grouping_reproduces_the_published_example() -> None:
    values = torch.tensor([1, 2, 3, 4, 50, 60])
    order = values.argsort(descending=True)
    assert values[outlier_grouping(order, [3, 3])].tolist() == [60, 1, 2, 50, 3, 4]


def test_outlier_grouping_index_form() -> None:
    order = torch.randperm(12, generator=generator())
    count, size = 3, 4
    lead, rest = order[:count].tolist(), order[count:].tolist()[::-1]
    expected = [
        c for k in range(count) for c in [lead[k], *rest[k * (size - 1) : (k + 1) * (size - 1)]]
    ]
    assert outlier_grouping(order, [size] * count).tolist() == expected


def test_outlier_grouping_ragged() -> None:
    values = torch.tensor([10, 20, 30, 40, 50, 60, 70])
    order = values.argsort(descending=True)
    assert values[outlier_grouping(order, [3, 3, 1])].tolist() == [70, 10, 20, 60, 30, 40, 50]
    index = outlier_grouping(torch.randperm(172, generator=generator()), group_sizes(172, 128))
    assert index.sort().values.tolist() == list(range(172))


def test_outlier_grouping_refuses_wrong_input() -> None:
    with pytest.raises(SettingsError, match="sum"):
        outlier_grouping(torch.arange(6), [3, 4])
    with pytest.raises(SettingsError, match="at least 1"):
        outlier_grouping(torch.arange(6), [6, 0])
    with pytest.raises(SettingsError, match="permutation"):
        outlier_grouping(torch.tensor([0, 0, 1]), [3])
