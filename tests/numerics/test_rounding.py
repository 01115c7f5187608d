"""GPTQ against a column loop with explicit inverses, and the identities of the paper."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.formats import Integer
from postlude.numerics.rounding import clip_search, gptq, inverse_cholesky, nearest
from postlude.numerics.schemes import Granularity, Scheme


def problem(rows: int = 12, width: int = 44) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(rows, width, dtype=torch.float64)
    x = torch.randn(400, width, dtype=torch.float64) @ torch.randn(
        width, width, dtype=torch.float64
    )
    return weight, x, 2 / len(x) * x.T @ x


def scheme(granularity: str | int = "channel", bits: int = 3, symmetric: bool = True) -> Scheme:
    form = Integer(bits, symmetric=symmetric, range="zero")
    return Scheme(form, Granularity.parse(granularity), "float32")


def by_explicit_inverses(weight: Tensor, hessian: Tensor, how: Scheme, damping: float) -> Tensor:
    """Optimal brain quantization in column order: a fresh inverse of the remaining Hessian each time."""
    n = len(hessian)
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    scale, zero = how.parameters(weight)
    w, out = weight.clone(), torch.empty_like(weight)
    for i in range(n):
        remaining = torch.linalg.inv(damped[i:, i:])
        code = how.format.encode(w[:, i], scale[:, 0], None if zero is None else zero[:, 0])
        out[:, i] = how.format.decode(code, scale[:, 0], None if zero is None else zero[:, 0])
        error = (w[:, i] - out[:, i]) / remaining[0, 0]
        w[:, i:] -= error[:, None] * remaining[0]
    return out


@pytest.mark.parametrize("block", [5, 16, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_by_explicit_inverses(block: int, symmetric: bool) -> None:
    weight, _, hessian = problem()
    how = scheme(symmetric=symmetric)
    got = gptq(weight, hessian, how, block=block).decode()
    torch.testing.assert_close(
        got.double(), by_explicit_inverses(weight, hessian, how, 0.01), atol=1e-6, rtol=0
    )


def test_inverse_cholesky() -> None:
    _, _, hessian = problem()
    upper = inverse_cholesky(hessian, 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(44, dtype=torch.float64)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(damped))


@pytest.mark.parametrize("granularity", ["tensor", "channel", 16])
@pytest.mark.parametrize("act_order", [False, True])
def test_identity_hessian_is_nearest_rounding(granularity: str | int, act_order: bool) -> None:
    weight, _, _ = problem()
    how = scheme(granularity)
    expected = nearest(weight.float(), how)
    got = gptq(weight.float(), torch.eye(44), how, act_order=act_order)
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.scale, expected.scale)


@pytest.mark.parametrize("granularity", ["channel", 16])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_output_error_falls(granularity: str | int, act_order: bool, clip: bool) -> None:
    weight, x, hessian = problem()
    how = scheme(granularity)
    plain = nearest(weight, how, clip=clip).decode()
    better = gptq(weight, hessian, how, act_order=act_order, clip=clip, block=16).decode()
    assert ((better - weight) @ x.T).norm() < 0.8 * ((plain - weight) @ x.T).norm()


def test_groups_do_not_depend_on_the_block() -> None:
    weight, _, hessian = problem()
    codes = [gptq(weight, hessian, scheme(12), block=block).codes for block in (5, 12, 128)]
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[0], codes[2])


def test_dead_columns_become_zero() -> None:
    weight, _, hessian = problem()
    hessian[3], hessian[:, 3] = 0, 0
    assert not gptq(weight, hessian, scheme()).decode()[:, 3].any()


def test_indefinite_hessian_is_refused() -> None:
    with pytest.raises(SettingsError, match="raise the damping"):
        gptq(torch.ones(2, 2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), scheme())


def test_clip_search_by_trying_everything() -> None:
    weight, _, _ = problem(rows=3)
    how = scheme()
    errors = torch.stack(
        [
            (how.encode(weight, how.parameters(weight, p / 100)).decode() - weight)
            .abs()
            .pow(2.4)
            .sum(1)
            for p in range(100, 20, -1)
        ]
    )
    expected = 1 - errors.argmin(0).double() / 100
    torch.testing.assert_close(clip_search(weight, how)[:, 0], expected)
