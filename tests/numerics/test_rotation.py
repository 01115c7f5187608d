"""Rotations against dense products, defining identities and scipy."""

from __future__ import annotations

import sys

import pytest
import scipy.linalg
import torch

from postlude.errors import MissingDependencyError, SettingsError
from postlude.numerics import rotation
from postlude.numerics.rotation import (
    block_diagonal,
    constant_first_row,
    fast_hadamard,
    group_sizes,
    hadamard,
    hadamard_orders,
    is_hadamard_order,
    outlier_grouping,
    random_orthogonal,
    sylvester,
)

ORDERS = [1, 2, 4, 12, 20, 28, 40, 44, 52, 64, 96, 172, 244, 344, 640, 688, 704, 768, 1376]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_orthogonal(matrix: torch.Tensor) -> None:
    identity = torch.eye(len(matrix), dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, identity, atol=1e-12, rtol=0)


@pytest.mark.parametrize("order", [1, 2, 8, 64, 512])
def test_sylvester_matches_scipy(order: int) -> None:
    expected = torch.from_numpy(scipy.linalg.hadamard(order)).double()
    assert torch.equal(sylvester(order), expected)
    assert torch.equal(hadamard(order), expected)


@pytest.mark.parametrize("order", [0, -4, 3, 12])
def test_sylvester_refuses_other_orders(order: int) -> None:
    with pytest.raises(SettingsError, match="power of two"):
        sylvester(order)


@pytest.mark.parametrize("order", ORDERS)
def test_hadamard_is_hadamard_with_constant_first_row(order: int) -> None:
    matrix = hadamard(order)
    assert matrix.dtype == torch.float64
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))
    assert torch.equal(matrix[0], torch.ones(order, dtype=torch.float64))


def test_every_core_below_260_is_a_hadamard_matrix() -> None:
    for order in range(4, 260, 4):
        assert is_hadamard_order(order), order
        if rotation._find_core_order(order) == order:
            matrix = hadamard(order, torch.float32)
            assert torch.equal(matrix @ matrix.T, order * torch.eye(order)), order
            assert bool((matrix[0] == 1).all())


def test_orders() -> None:
    assert hadamard_orders(24) == [1, 2, 4, 8, 12, 16, 20, 24]
    assert not any(is_hadamard_order(n) for n in (-4, 0, 3, 6, 10, 18, 4 * 67 + 2))
    for width in (
        5120,
        6656,
        8960,
        11008,
        13824,
        14336,
        18944,
        27648,
        29568,
    ):  # of published models
        assert is_hadamard_order(width), width
    with pytest.raises(SettingsError, match="multiple of 4"):
        hadamard(6)


def test_returned_matrices_are_not_shared() -> None:
    hadamard(12).zero_()
    sylvester(4).zero_()
    assert float(hadamard(12).abs().min()) == 1.0


def test_order_k_is_not_symmetric() -> None:
    assert not torch.equal(hadamard(28), hadamard(28).T) or not torch.equal(
        hadamard(12), hadamard(12).T
    )


def test_field_of_prime_power_has_half_squares() -> None:
    for q in (9, 25, 27, 49):
        characters = rotation._character_differences(q)
        assert bool((characters.sum(1) == 0).all()) and bool((characters == 0).sum() == q)
        # Jacobsthal identity: Q Q^T = q I - J.
        product = characters.double() @ characters.double().T
        assert torch.equal(product, q * torch.eye(q, dtype=torch.float64) - 1)


def test_table_missing_or_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rotation._core.cache_clear()
    monkeypatch.setitem(rotation._TABLE_CHECKSUMS, 92, 1)
    with pytest.raises(MissingDependencyError, match="not the one"):
        hadamard(92)
    monkeypatch.setattr(rotation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="serve-formats"):
        hadamard(92)


def test_table_is_read_without_importing_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = ("compressed_tensors", "transformers")
    for package in packages:
        monkeypatch.delitem(sys.modules, package, raising=False)
    rotation._core.cache_clear()
    hadamard(172)
    assert not set(packages) & set(sys.modules)


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


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fast_hadamard_equals_the_dense_product(order: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, order, generator=generator(), dtype=torch.float64).to(dtype)
    expected = x.double() @ hadamard(order)
    result = fast_hadamard(x, order)
    assert result.dtype == dtype and result.shape == x.shape
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    assert float((result.double() - expected).norm()) <= tolerance * float(expected.norm())
    normalized = fast_hadamard(x, order, normalize=True)
    assert float((normalized.double() * order**0.5 - expected).norm()) <= 2 * tolerance * float(
        expected.norm()
    )


@pytest.mark.parametrize("order", [2048, 4096])
def test_fast_hadamard_on_many_factors_and_pieces(order: int) -> None:
    x = torch.randn(70, order, generator=generator(), dtype=torch.float64)
    columns = torch.tensor([0, 1, 63, 64, order // 2 + 5, order - 1])
    expected = x @ sylvester(order, torch.float32)[:, columns].double()
    torch.testing.assert_close(fast_hadamard(x, order)[:, columns], expected)


def test_fast_hadamard_shapes_and_strides() -> None:
    x = torch.randn(172, 6, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(fast_hadamard(x.T, 172), x.T @ hadamard(172))
    torch.testing.assert_close(fast_hadamard(x[:, 0], 172), x[:, 0] @ hadamard(172))
    assert fast_hadamard(torch.zeros(0, 172), 172).shape == (0, 172)


@pytest.mark.parametrize("order", [2, 28, 172, 256])
def test_fast_hadamard_gradient(order: int) -> None:
    weight = torch.randn(3, order, generator=generator(), dtype=torch.float64)
    x = torch.randn(3, order, generator=generator(1), dtype=torch.float64, requires_grad=True)
    (fast_hadamard(x, order, normalize=True) * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight @ hadamard(order).T / order**0.5)


# Forward-mode differentiation in torch 2.13 scripts its own decompositions.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_fast_hadamard_higher_derivatives_and_vmap() -> None:
    x = torch.randn(2, 12, generator=generator(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: fast_hadamard(t, 12), (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda t: fast_hadamard(t, 12).sin(), (x,))
    batch = torch.randn(4, 3, 172, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(
        torch.vmap(lambda t: fast_hadamard(t, 172))(batch), batch @ hadamard(172)
    )


def test_fast_hadamard_after_inference_mode_still_trains() -> None:
    rotation._factors.cache_clear()
    rotation._core.cache_clear()
    with torch.inference_mode():
        fast_hadamard(torch.randn(2, 28), 28)
    x = torch.randn(2, 28, requires_grad=True)
    fast_hadamard(x, 28).sum().backward()
    assert x.grad is not None


def test_fast_hadamard_refuses_wrong_input() -> None:
    with pytest.raises(SettingsError, match="last dimension"):
        fast_hadamard(torch.randn(3, 8), 4)
    with pytest.raises(SettingsError, match="floating-point"):
        fast_hadamard(torch.ones(4, dtype=torch.int64), 4)
    with pytest.raises(SettingsError, match="multiple of 4"):
        fast_hadamard(torch.randn(3, 6), 6)
