from __future__ import annotations

import pytest
import torch
from torch import Tensor

from postlude.errors import DataError, SettingsError
from postlude.numerics.kronecker import KroneckerBasis, KroneckerCurvature, low_rank

ROWS, COLUMNS, EXAMPLES = 4, 3, 20


@pytest.fixture
def gradients() -> Tensor:
    return torch.randn(EXAMPLES, ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def moments(gradients: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.einsum("nio,njo->ij", gradients, gradients),
        torch.einsum("nio,nip->op", gradients, gradients),
    )


def test_equals_a_dense_solve_in_the_basis(gradients: Tensor) -> None:
    """H = (Q_A x Q_S) diag(Lambda) (Q_A x Q_S)^T, written out, with vec() row by row."""
    basis = KroneckerBasis.of(*moments(gradients))
    eigenvalues = basis.rotate(gradients).square().mean(0)
    curvature = KroneckerCurvature.of(basis, eigenvalues, 0.3)
    kron = torch.kron(basis.inputs, basis.outputs)
    dense = kron @ torch.diag(eigenvalues.reshape(-1)) @ kron.T + 0.3 * torch.eye(ROWS * COLUMNS)
    expected = torch.linalg.solve(dense, gradients.reshape(EXAMPLES, -1).T).T
    found = curvature.precondition(gradients).reshape(EXAMPLES, -1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_eigenvalues_are_the_second_moments_of_the_basis(gradients: Tensor) -> None:
    """Of all H that are diagonal in this basis, Lambda is nearest to the mean outer product."""
    basis = KroneckerBasis.of(*moments(gradients))
    kron = torch.kron(basis.inputs, basis.outputs)
    flat = gradients.reshape(EXAMPLES, -1)
    fisher = flat.T @ flat / EXAMPLES
    expected = (kron.T @ fisher @ kron).diagonal().reshape(ROWS, COLUMNS)
    torch.testing.assert_close(basis.rotate(gradients).square().mean(0), expected)


def test_exact_where_the_fisher_is_a_kronecker_product() -> None:
    generator = torch.Generator().manual_seed(1)
    a, s = (torch.randn(size, size, generator=generator) for size in (ROWS, COLUMNS))
    a, s = a @ a.T, s @ s.T
    basis = KroneckerBasis.of(a, s)
    eigenvalues = (basis.inputs.T @ a @ basis.inputs).diagonal()[:, None] * (
        basis.outputs.T @ s @ basis.outputs
    ).diagonal()
    gradient = torch.randn(ROWS, COLUMNS, generator=generator)
    found = KroneckerCurvature.of(basis, eigenvalues, 0.5).precondition(gradient)
    dense = torch.kron(a, s) + 0.5 * torch.eye(ROWS * COLUMNS)
    expected = torch.linalg.solve(dense, gradient.reshape(-1)).reshape(ROWS, COLUMNS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_damping_by_the_mean_eigenvalue(gradients: Tensor) -> None:
    basis = KroneckerBasis.of(*moments(gradients))
    eigenvalues = basis.rotate(gradients).square().mean(0)
    found = KroneckerCurvature.of(basis, eigenvalues, None).damping
    assert found == pytest.approx(0.1 * float(eigenvalues.mean()))


def test_refusals(gradients: Tensor) -> None:
    basis = KroneckerBasis.of(*moments(gradients))
    with pytest.raises(SettingsError, match="leaves eigenvalues of zero to divide by"):
        KroneckerCurvature.of(basis, torch.zeros(ROWS, COLUMNS), None)
    bad = torch.full((ROWS, ROWS), torch.nan)
    with pytest.raises(DataError, match="input factor of the curvature holds NaN"):
        KroneckerBasis.of(bad, torch.eye(COLUMNS))


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_low_rank_is_the_truncated_svd(gradients: Tensor, rank: int) -> None:
    u, v = low_rank(gradients, rank)
    for n in range(EXAMPLES):
        left, s, right = torch.linalg.svd(gradients[n], full_matrices=False)
        s[rank:] = 0
        torch.testing.assert_close(u[n] @ v[n].T, left @ torch.diag(s) @ right)
