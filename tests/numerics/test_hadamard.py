"""Hadamard matrices against scipy and their defining identity, the fast transform against dense products."""

from __future__ import annotations

import sys

import pytest
import scipy.linalg
import torch

from postlude.errors import MissingDependencyError, SettingsError
from postlude.numerics import hadamard as module
from postlude.numerics.hadamard import (
    fast_hadamard,
    hadamard,
    hadamard_orders,
    is_hadamard_order,
    sylvester,
)

ORDERS = [1, 2, 4, 12, 20, 28, 40, 44, 52, 64, 96, 172, 244, 344, 640, 688, 704, 768, 1376]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
        if module._find_core_order(order) == order:
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
        characters = module._character_differences(q)
        assert bool((characters.sum(1) == 0).all()) and bool((characters == 0).sum() == q)
        # Jacobsthal identity: Q Q^T = q I - J.
        product = characters.double() @ characters.double().T
        assert torch.equal(product, q * torch.eye(q, dtype=torch.float64) - 1)


def test_table_missing_or_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module._core.cache_clear()
    monkeypatch.setitem(module._TABLE_CHECKSUMS, 92, 1)
    with pytest.raises(MissingDependencyError, match="not the one"):
        hadamard(92)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="serve-formats"):
        hadamard(92)


def test_table_is_read_without_importing_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = ("compressed_tensors", "transformers")
    for package in packages:
        monkeypatch.delitem(sys.modules, package, raising=False)
    module._core.cache_clear()
    hadamard(172)
    assert not set(packages) & set(sys.modules)


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
    module._factors.cache_clear()
    module._core.cache_clear()
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
