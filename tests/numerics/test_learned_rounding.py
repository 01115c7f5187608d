from __future__ import annotations

import itertools

import pytest
import torch

from postlude.errors import SettingsError
from postlude.numerics.formats import Integer, Ternary
from postlude.numerics.learned_rounding import (
    Rounding,
    StraightThrough,
    annealed_power,
    straight_through,
)
from postlude.numerics.rounding import clip_search, nearest
from postlude.numerics.schemes import Granularity, Scheme

SCHEMES = [
    Scheme(Integer(3), Granularity("channel")),
    Scheme(Integer(4), Granularity("group", 5)),
    Scheme(Integer(2), Granularity("tensor"), "float32"),
    Scheme(Integer(3, symmetric=False, range="free"), Granularity("channel")),
    Scheme(Integer(4, symmetric=False, range="zero"), Granularity("group", 4)),
    Scheme(Integer(3), Granularity("channel"), clip=0.6),
]


def weight(seed: int = 0, rows: int = 6, columns: int = 13) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_undecided_it_is_the_weight_and_decided_at_once_the_nearest(scheme: Scheme) -> None:
    w = weight()
    rounding = Rounding(w, scheme)
    expected = nearest(w, scheme)
    off, rounded = (rounding.soft() - w).abs(), (expected.decode() - w).abs()
    # Where the end of the grid lies inside the range of a group, even an undecided entry stops there.
    assert (off <= rounded + 2e-5).all()
    assert (off < 2e-5).float().mean() > 0.7
    found = rounding.encode()
    # On a tie either neighbour is nearest; random weights have none.
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.decode(), expected.decode())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_decided_codes_are_what_the_soft_weight_was(scheme: Scheme) -> None:
    rounding = Rounding(weight(), scheme)
    with torch.no_grad():
        rounding.variables.copy_(20 * torch.randn(rounding.variables.shape).sign())
    torch.testing.assert_close(rounding.encode().decode(), rounding.soft().detach())
    assert rounding.penalty(2.0) == 0


def test_it_finds_the_best_of_every_choice() -> None:
    # Inputs that are nearly one: 256 ways to round, and what matters is mostly the sum of what was rounded off.
    draw = torch.Generator().manual_seed(3)
    w = torch.rand(1, 8, generator=draw)
    x = 1 + 0.1 * torch.randn(64, 8, generator=draw)
    scheme = Scheme(Integer(3), scale_dtype="float32")
    rounding = Rounding(w, scheme)

    def error(q: torch.Tensor) -> torch.Tensor:
        return (x @ (q - w).T).square().mean()

    optimizer = torch.optim.Adam([rounding.variables], lr=0.05)
    for step in range(200):
        optimizer.zero_grad()
        value = error(rounding.soft()) + 0.001 * rounding.penalty(annealed_power(step / 200))
        value.backward()
        optimizer.step()
    errors = []
    for choice in itertools.product((0.0, 1.0), repeat=8):
        low = (w / rounding.encode().scale).floor()
        errors.append(
            float(error((low + torch.tensor([choice])).clamp(-4, 3) * rounding.encode().scale))
        )
    found = float(error(rounding.encode().decode()))
    assert found < float(error(nearest(w, scheme).decode())) * 0.6
    assert sum(one < found for one in errors) < 20


def test_power_falls() -> None:
    powers = [annealed_power(share / 10) for share in range(11)]
    assert powers[0] == powers[2] == 20
    assert powers[-1] == 2
    assert powers == sorted(powers, reverse=True)


def test_grids_without_equal_steps_are_refused() -> None:
    with pytest.raises(SettingsError, match="needs an integer grid, got ternary"):
        Rounding(weight(), Scheme(Ternary()))


def test_straight_through_is_the_rounded_value_with_the_gradient_of_the_other() -> None:
    x = weight().requires_grad_()
    rounded = x.detach().round()
    passed = straight_through(x, rounded)
    assert torch.equal(passed, rounded)
    slope = weight(1)
    (passed.pow(2) * slope).sum().backward()
    torch.testing.assert_close(x.grad, 2 * rounded * slope)


@pytest.mark.parametrize("scheme", [*SCHEMES, Scheme(Ternary())], ids=str)
def test_a_weight_trained_straight_through_keeps_its_grid(scheme: Scheme) -> None:
    w = weight()
    grid = scheme.parameters(w, clip_search(w, scheme))
    trained = StraightThrough(w, scheme, grid)
    assert torch.equal(trained.encode().codes, nearest(w, scheme, clip=True).codes)
    with torch.no_grad():
        trained.variables.mul_(1.3)
    found = trained.encode()
    assert torch.equal(found.scale, scheme.encode(w, grid).scale)
    assert torch.equal(trained.soft(), found.decode())


def test_learned_rounding_takes_a_grid_too() -> None:
    w, scheme = weight(), SCHEMES[0]
    grid = scheme.parameters(w, clip_search(w, scheme))
    assert torch.equal(Rounding(w, scheme, grid).encode().scale, scheme.encode(w, grid).scale)
