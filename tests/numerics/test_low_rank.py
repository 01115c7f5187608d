from __future__ import annotations

import pytest
import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.factorize import truncated_svd, weighted_svd
from postlude.numerics.formats import Integer
from postlude.numerics.low_rank import BranchFormat, Corrected, alternating, one_shot, squared_error
from postlude.numerics.low_rank_descent import descend
from postlude.numerics.schemes import Granularity, Scheme

FOUR = Scheme(Integer(4), Granularity("group", 32))
HALF, EIGHT = BranchFormat(), BranchFormat(8, 8)


def gaussian(seed: int = 0, rows: int = 64, columns: int = 64) -> Tensor:
    return 0.03 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def with_outliers(seed: int = 0) -> Tensor:
    weight = gaussian(seed)
    weight[:, [3, 40]] *= 15
    return weight


def error(weight: Tensor, fit: Corrected) -> float:
    return float((weight - fit.decode()).norm() / weight.norm())


def fits(weight: Tensor, rank: int, branch: BranchFormat) -> dict[str, float]:
    plain = float((weight - FOUR.encode(weight).decode()).norm() / weight.norm())
    return {
        "rtn": plain,
        "lqer": error(weight, one_shot(weight, rank, branch, FOUR.encode, of="error")),
        "svd": error(weight, one_shot(weight, rank, branch, FOUR.encode)),
        "alternating": error(weight, alternating(weight, rank, branch, FOUR.encode)),
        "gd": error(weight, descend(weight, rank, branch, FOUR, iterations=80)),
    }


def test_order_of_the_fits_with_outlier_columns() -> None:
    found = fits(with_outliers(), 8, HALF)
    assert found["gd"] < found["alternating"] < found["svd"] < found["lqer"] < found["rtn"]
    assert found["svd"] < 0.5 * found["lqer"]


def test_order_of_the_fits_on_gaussian_weights() -> None:
    found = fits(gaussian(), 8, HALF)
    one = min(found["svd"], found["lqer"])
    assert found["gd"] < found["alternating"] < one < found["rtn"]
    assert found["svd"] == pytest.approx(found["lqer"], rel=0.1)


@pytest.mark.parametrize("make", [gaussian, with_outliers])
def test_more_rank_in_the_same_bytes_is_better_than_more_bits(make: object) -> None:
    weight: Tensor = make()  # type: ignore[operator]
    budget = HALF.stored_bits(*weight.shape, 8)
    rank = EIGHT.rank_within(budget, *weight.shape)
    assert rank > 8
    assert EIGHT.stored_bits(*weight.shape, rank) <= budget
    coarse = error(weight, descend(weight, 8, HALF, FOUR, iterations=80))
    assert error(weight, descend(weight, rank, EIGHT, FOUR, iterations=80)) < 0.95 * coarse


def test_one_shot_of_the_weight_is_eckart_young_then_rounding() -> None:
    weight = gaussian().double()
    u, s, vh = truncated_svd(weight, 5)
    low = (u * s) @ vh
    fit = one_shot(weight, 5, HALF, FOUR.encode)
    torch.testing.assert_close(fit.branch().double(), low, atol=1e-4, rtol=0)  # in float16
    rest = weight - fit.branch().double()
    torch.testing.assert_close(fit.main.decode(), FOUR.encode(rest).decode(), atol=0, rtol=0)


def test_factors_share_a_component_evenly() -> None:
    fit = one_shot(gaussian(), 5, HALF, FOUR.encode)
    assert isinstance(fit.up, Tensor) and isinstance(fit.down, Tensor)
    torch.testing.assert_close(fit.up.float().norm(dim=0), fit.down.float().norm(dim=1), rtol=1e-2, atol=0)  # fmt: skip


# QERA


def test_the_exact_correction_is_where_gradient_descent_ends() -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(400, 12, generator=generator, dtype=torch.float64)
    inputs = inputs @ (torch.eye(12) + 0.1 * torch.randn(12, 12, generator=generator)).double()
    moment = inputs.T @ inputs / len(inputs)
    weight = gaussian(1, 10, 12).double()
    wrong = weight - Scheme(Integer(3)).encode(weight).decode().double()
    # A gap in the spectrum, for descent to converge soon.
    wrong += (
        0.02 * torch.randn(10, 3, generator=generator).double() @ gaussian(2, 3, 12).double() / 0.03
    )

    def loss(up: Tensor, down: Tensor) -> Tensor:
        return squared_error(wrong - up @ down, moment)

    a, b = weighted_svd(wrong.T, 3, moment)
    best = float(loss(b.T, a.T))
    up = torch.randn(10, 3, generator=generator, dtype=torch.float64).mul_(0.2).requires_grad_()
    down = torch.randn(3, 12, generator=generator, dtype=torch.float64).mul_(0.2).requires_grad_()
    optimizer = torch.optim.Adam([up, down], lr=0.04)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        optimizer.zero_grad()
        (loss(up, down) / best).backward()
        optimizer.step()
        schedule.step()
    assert float(loss(up, down).detach()) == pytest.approx(best, rel=1e-6)
    torch.testing.assert_close((up @ down).detach(), b.T @ a.T, atol=1e-5, rtol=1e-3)


def test_a_better_output_comes_with_a_worse_weight() -> None:
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(300, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    moment = (inputs.T @ inputs / len(inputs)).double()
    weight = gaussian(2, 64, 64)
    scheme = Scheme(Integer(3))
    found = {}
    for name, metric in (("lorc", None), ("approx", moment.diagonal()), ("exact", moment)):
        fit = one_shot(weight, 8, HALF, scheme.encode, of="error", metric=metric)
        wrong = (weight - fit.decode()).double()
        found[name] = (float(squared_error(wrong, moment)), float(squared_error(wrong)))
    assert found["exact"][0] < found["approx"][0] < found["lorc"][0]
    assert found["exact"][1] > found["lorc"][1]


@pytest.mark.parametrize("diagonal", [True, False])
def test_the_error_is_that_of_the_output(diagonal: bool) -> None:
    inputs = torch.randn(50, 6, dtype=torch.float64)
    moment = inputs.T @ inputs / 50
    wrong = torch.randn(4, 6, dtype=torch.float64)
    if diagonal:
        moment = moment.diagonal()
        expected = (wrong.square() * inputs.square().mean(0)).sum()
    else:
        expected = (inputs @ wrong.T).square().sum() / 50
    torch.testing.assert_close(squared_error(wrong, moment), expected)


def test_the_branch_also_protects_the_activations_it_reads() -> None:
    """``Q(W-P) x_q + P x = [Q(W-P) + P] x_q + P (x - x_q)``."""
    weight = gaussian().double()
    fit = one_shot(weight, 8, HALF, FOUR.encode)
    main, low = fit.main.decode().double(), fit.branch().double()
    x = torch.randn(64, 7, dtype=torch.float64)
    rounded = Scheme(Integer(4)).round_trip(x.T).T
    left = main @ rounded + low @ x
    torch.testing.assert_close(left, (main + low) @ rounded + low @ (x - rounded), rtol=1e-12, atol=1e-12)  # fmt: skip


def test_equal_ranks() -> None:
    formats = [BranchFormat(8), BranchFormat(6), BranchFormat(4)]
    assert [one.equal_rank(32, HALF, scales=False) for one in formats] == [64, 85, 128]
    assert [one.equal_rank(32, HALF) for one in formats] == [60, 78, 113]


@pytest.mark.parametrize("bits", [4, 5, 6, 8, 16])
@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (172, 96), (1024, 4096)])
def test_ranks_within_a_budget(bits: int, shape: tuple[int, int]) -> None:
    """Against trying every rank; counted as stored, with ragged groups and rows padded to bytes."""
    branch = BranchFormat(bits)
    for budget_rank in (1, 8, 31):
        budget = HALF.stored_bits(*shape, budget_rank)
        fitting = [r for r in range(min(shape) + 1) if branch.stored_bits(*shape, r) <= budget]
        assert branch.rank_within(budget, *shape) == max(fitting)
    assert branch.rank_within(0, *shape) == 0


@pytest.mark.parametrize("text", ["16", "w8a8", "w6a6", "w4a8", "w4a8g64"])
def test_branch_formats_have_names(text: str) -> None:
    assert str(BranchFormat.parse(text)) == text


def test_what_is_stored_is_counted() -> None:
    branch = BranchFormat(6, 6)
    fit = one_shot(gaussian(1, 40, 50), 7, branch, FOUR.encode)
    assert not isinstance(fit.up, Tensor) and not isinstance(fit.down, Tensor)
    scales = 16 * (fit.up.scale.numel() + fit.down.scale.numel())
    codes = 40 * 8 * -(-7 * 6 // 8) + 7 * 8 * -(-50 * 6 // 8)
    assert branch.stored_bits(40, 50, 7) == codes + scales


@pytest.mark.parametrize("text", ["", "w8a", "eight", "w1a8", "w8a9", "w8a8g0", "-8", "w12"])
def test_bad_formats_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"branch"):
        BranchFormat.parse(text)
