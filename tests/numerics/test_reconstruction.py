from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.formats import Integer
from postlude.numerics.learned_rounding import Rounding, StraightThrough, annealed_power
from postlude.numerics.reconstruction import mean_squared_error, reconstruct
from postlude.numerics.schemes import Granularity, Scheme


def chance() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def problem() -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Two batches of inputs that live in 4 of 24 dimensions, and what a weight ``[5, 24]`` gives for them."""
    draw = torch.Generator().manual_seed(1)
    mix = torch.randn(4, 24, generator=draw)
    inputs = [torch.randn(rows, 4, generator=draw) @ mix for rows in (20, 30)]
    weight = torch.randn(5, 24, generator=draw)
    return inputs, [x @ weight.T for x in inputs], weight


SCHEME = Scheme(Integer(3), Granularity("channel"), scale_dtype="float32")


@pytest.mark.parametrize("rate", [5e-2, 1e3])
@pytest.mark.parametrize("iterations", [1, 7, 60])
def test_never_worse_than_the_start(rate: float, iterations: int) -> None:
    inputs, targets, weight = problem()
    trained = StraightThrough(weight, SCHEME)

    def output(index: int) -> Tensor:
        return inputs[index] @ trained.soft().T

    found = reconstruct(
        [trained.variables], output, targets, iterations=iterations, learning_rate=rate, generator=chance()
    )  # fmt: skip
    assert found.after <= found.before
    assert mean_squared_error(output, targets) == pytest.approx(found.after)
    assert trained.variables.grad is None
    if rate == 5e-2 and iterations == 60:
        assert found.after < 0.8 * found.before


def test_no_steps_change_nothing() -> None:
    inputs, targets, weight = problem()
    trained = StraightThrough(weight, SCHEME)
    found = reconstruct(
        [trained.variables], lambda i: inputs[i] @ trained.soft().T, targets,
        iterations=0, learning_rate=1.0, generator=chance(),
    )  # fmt: skip
    assert found.before == found.after
    assert torch.equal(trained.variables, weight)
    assert torch.equal(trained.encode().codes, SCHEME.encode(weight).codes)


def test_the_error_is_over_all_entries_of_all_batches() -> None:
    targets = [torch.zeros(2, 3), torch.zeros(4, 3)]
    assert mean_squared_error(lambda i: targets[i] + (1.0, 2.0)[i], targets) == pytest.approx(
        (6 * 1 + 12 * 4) / 18
    )


def test_it_is_adam_with_a_cosine() -> None:
    inputs, targets, weight = problem()
    start = torch.zeros_like(weight)
    variable = start.clone().requires_grad_()
    # Improves at every look, so that the last iterate is what remains.
    reconstruct(
        [variable], lambda i: inputs[i] @ variable.T, targets,
        iterations=30, learning_rate=0.01, generator=chance(), scale=0.5,
    )  # fmt: skip
    slow = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([slow], lr=0.01)
    draw = chance()
    for step in range(30):
        optimizer.param_groups[0]["lr"] = 0.01 * 0.5 * (1 + math.cos(math.pi * step / 30))
        batch = int(torch.randint(2, (1,), generator=draw))
        optimizer.zero_grad()
        (0.5 * (inputs[batch] @ slow.T - targets[batch]).square().mean()).backward()
        optimizer.step()
    assert torch.equal(variable, slow)


def test_learned_rounding_is_judged_by_what_is_stored() -> None:
    inputs, targets, weight = problem()
    trained = Rounding(weight, SCHEME)
    shares: list[float] = []

    def penalty(share: float) -> Tensor:
        shares.append(share)
        return trained.penalty(annealed_power(share))

    def decided(index: int) -> Tensor:
        return inputs[index] @ trained.encode().decode().T

    found = reconstruct(
        [trained.variables], lambda i: inputs[i] @ trained.soft().T, targets,
        iterations=300, learning_rate=0.05, generator=chance(), decided=decided, penalty=penalty,
    )  # fmt: skip
    assert found.after == pytest.approx(mean_squared_error(decided, targets))
    assert found.after < 0.7 * found.before
    assert shares == [step / 300 for step in range(300)]


@pytest.mark.parametrize(("iterations", "rate"), [(-1, 1.0), (1, 0.0), (1, math.inf)])
def test_settings_without_sense_are_refused(iterations: int, rate: float) -> None:
    with pytest.raises(SettingsError, match="0 or more steps at a positive rate"):
        reconstruct(
            [], lambda i: torch.zeros(1), [],
            iterations=iterations, learning_rate=rate, generator=chance(),
        )  # fmt: skip
