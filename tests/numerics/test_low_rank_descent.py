"""The fit by gradient descent: its gradient against autograd, where it ends, and the rotated bottleneck."""

from __future__ import annotations

import pytest
import torch
from tests.numerics.test_low_rank import EIGHT, FOUR, HALF, error, gaussian
from torch import Tensor

from postlude.numerics.factorize import truncated_svd
from postlude.numerics.formats import Integer, Minifloat
from postlude.numerics.low_rank import BranchFormat, Factors, one_shot, squared_error
from postlude.numerics.low_rank_descent import bottleneck_rotation, descend, hold_codes
from postlude.numerics.schemes import Granularity, Scheme


def naive(x: Tensor, scheme: Scheme) -> Tensor:
    """Codes held by autograd alone."""
    scale, zero = scheme.parameters(x)
    grouped = scheme.granularity.split(x)
    zero = None if zero is None else zero.detach().unsqueeze(-1)
    codes = scheme.format.encode(grouped.detach(), scale.detach().unsqueeze(-1), zero)
    values = scheme.format.decode(codes, scale.unsqueeze(-1), zero)
    return scheme.granularity.join(values, x.shape)


@pytest.mark.parametrize(
    "scheme",
    [
        FOUR,
        Scheme(Integer(3), Granularity("channel")),
        Scheme(Integer(4), Granularity("tensor")),
        Scheme(Integer(4, symmetric=False, range="zero"), Granularity("group", 16)),
        Scheme(Minifloat(), Granularity("group", 16), clip=0.9),
    ],
    ids=lambda s: f"{s.format.kind}-{s.granularity}",
)
@pytest.mark.parametrize("width", [64, 44])
def test_the_gradient_is_that_of_autograd(scheme: Scheme, width: int) -> None:
    x = gaussian(5, 6, width)
    x[:, -1] = (
        x[:, -1].abs() + 0.2
    )  # the last entry, which fills up the ragged group, is its largest
    mine, other = (x.clone().requires_grad_() for _ in range(2))
    (mine - hold_codes(mine, scheme)).square().sum().backward()
    (other - naive(other, scheme)).square().sum().backward()
    assert mine.grad is not None and other.grad is not None
    assert bool(mine.grad.any())
    torch.testing.assert_close(mine.grad, other.grad, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(hold_codes(x, scheme), scheme.round_trip(x), atol=0, rtol=0)


def test_straight_through_with_a_constant_scale_learns_nothing() -> None:
    """The trap that holding the codes avoids."""
    x = gaussian(6, 4, 32).requires_grad_()
    rounded = x + (FOUR.round_trip(x.detach()) - x.detach())
    (x - rounded).square().sum().backward()
    assert x.grad is not None and not bool(x.grad.any())
    other = gaussian(6, 4, 32).requires_grad_()
    (other - hold_codes(other, FOUR)).square().sum().backward()
    assert other.grad is not None and bool(other.grad.any())


def test_descent_never_ends_above_its_start() -> None:
    weight = gaussian(7, 40, 50)
    start = error(weight, one_shot(weight, 4, EIGHT, FOUR.encode))
    wild = descend(weight, 4, EIGHT, FOUR, iterations=5, learning_rate=5.0)
    assert error(weight, wild) <= start * (1 + 1e-6)
    still = descend(weight, 4, EIGHT, FOUR, iterations=0)
    assert error(weight, still) == pytest.approx(start, rel=1e-6)


def test_descent_follows_the_metric() -> None:
    weight = gaussian(8, 40, 40)
    metric = torch.full((40,), 1e-3)
    metric[:4] = 1.0
    plain = descend(weight, 3, EIGHT, FOUR, iterations=60)
    aware = descend(weight, 3, EIGHT, FOUR, iterations=60, metric=metric)
    full = descend(weight, 3, EIGHT, FOUR, iterations=60, metric=metric.diag())
    errors = [float(squared_error(weight - fit.decode(), metric)) for fit in (plain, aware, full)]
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] == pytest.approx(errors[1], rel=0.05)


def test_zeros_are_left_alone() -> None:
    fit = descend(torch.zeros(8, 8), 2, EIGHT, FOUR, iterations=3)
    assert not bool(fit.decode().any())


def test_a_rotated_bottleneck_is_the_same_product() -> None:
    factors = Factors(gaussian(1, 40, 8), gaussian(2, 8, 30))
    turn = bottleneck_rotation(factors, BranchFormat(4), steps=40)
    torch.testing.assert_close(turn @ turn.T, torch.eye(8), atol=1e-5, rtol=0)
    turned = Factors(factors.up @ turn, turn.T @ factors.down)
    torch.testing.assert_close(turned.product(), factors.product(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_learned_rotation_rounds_better(bits: int) -> None:
    branch = BranchFormat(bits)
    u, s, vh = truncated_svd(gaussian(), 16)
    factors = Factors((u * s.sqrt()).float(), (s.sqrt()[:, None] * vh).float())

    def lost(turn: Tensor) -> float:
        up, down = branch.round_trip(factors.up @ turn), branch.round_trip(turn.T @ factors.down)
        return float((factors.product() - up @ down).norm())

    assert lost(bottleneck_rotation(factors, branch, steps=60)) < 0.85 * lost(torch.eye(16))
    still = bottleneck_rotation(factors, branch, steps=0)
    assert torch.equal(still, torch.eye(16))
    assert torch.equal(bottleneck_rotation(factors, HALF), torch.eye(16))
