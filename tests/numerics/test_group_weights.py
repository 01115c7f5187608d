"""Learned weights of groups: recovery of what carries signal, invariances, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from postlude.errors import DataError, SettingsError
from postlude.numerics.group_weights import learn_group_weights

SOURCES = 20


def problem(seed: int, queries: int = 20, examples: int = 500) -> tuple[Tensor, Tensor, Tensor]:
    """Contributions of 3 informative, 3 weak and 6 noisy groups of random scales, sources, and the best weights."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(12, queries, examples, generator=generator)
    sources = torch.stack(
        [torch.randperm(examples, generator=generator)[:SOURCES] for _ in range(queries)]
    )
    signal = torch.tensor([3.0] * 3 + [1.0] * 3 + [0.0] * 6)
    found = noise + signal[:, None, None] * torch.zeros(queries, examples).scatter(1, sources, 1.0)
    scales = torch.cat([torch.ones(6), 0.5 + 2 * torch.rand(6, generator=generator)])
    return found * scales[:, None, None], sources, signal / scales


def recall(contributions: Tensor, weights: Tensor, sources: Tensor) -> float:
    scores = torch.einsum("g,gqn->qn", weights.float(), contributions)
    top = scores.topk(SOURCES, dim=1).indices
    hits = [torch.isin(a, b).float().mean() for a, b in zip(top, sources, strict=True)]
    return float(torch.stack(hits).mean())


@pytest.mark.parametrize("seed", range(2))
def test_weights_find_the_groups_that_carry_signal(seed: int) -> None:
    parts, sources, best = problem(seed)
    equal = recall(parts, torch.ones(12), sources)
    learned = {
        (k, regularizer): recall(
            parts, learn_group_weights(parts, k=k, regularizer=regularizer).weights, sources
        )
        for k, regularizer in ((20, 0.01), (50, 0.001), (20, 1.0))
    }
    assert 0.5 < equal < 0.75
    for choice, found in learned.items():
        if choice[1] < 1:
            assert found > 0.96 and found > recall(parts, best, sources) - 0.02
    # A strong pull towards equal weights takes gain away.
    assert learned[20, 1.0] < learned[20, 0.01] - 0.02


def test_the_loss_is_that_of_a_loop_and_falls() -> None:
    parts, _, _ = problem(0, queries=12, examples=100)
    found = learn_group_weights(parts, k=7, regularizer=0.0)
    for weights, loss in ((torch.ones(12), found.losses[0]), (found.weights, found.losses[-1])):
        expected = []
        for q in range(12):
            scores = sum(float(w) * parts[j, q].double() for j, w in enumerate(weights))
            assert isinstance(scores, Tensor)
            expected.append(-scores.sort().values[-7:].mean() / scores.norm())
        assert float(loss) == pytest.approx(float(sum(expected)) / 12, rel=1e-5)
    assert found.losses[-1] < found.losses[0]
    assert float(found.weights.mean()) == pytest.approx(1) and bool((found.weights > 0).all())


def test_the_gradient_is_that_of_autograd_through_everything() -> None:
    parts, _, _ = problem(1, queries=5, examples=60)
    found = learn_group_weights(parts, k=5, regularizer=0.01, steps=1, rate=0.05)
    free = torch.zeros(12, dtype=torch.float64, requires_grad=True)
    weights = 12 * free.softmax(0)
    scores = torch.einsum("g,gqn->qn", weights, parts.double())
    loss = -(scores.topk(5, dim=1).values.mean(1) / scores.norm(dim=1)).mean()
    (loss + 0.01 * (weights / 12).square().sum()).backward()
    assert free.grad is not None
    # The first step of Adam is the sign of the gradient.
    expected = 12 * (-0.05 * free.grad.sign()).softmax(0)
    torch.testing.assert_close(found.weights, expected.detach(), rtol=1e-5, atol=1e-6)


def test_no_steps_leave_exact_ones() -> None:
    for groups in (3, 49, 101):
        weights = learn_group_weights(torch.randn(groups, 2, 20), k=2, steps=0).weights
        assert bool((weights == 1).all())


def test_a_common_scale_changes_nothing_and_a_permutation_permutes() -> None:
    parts, _, _ = problem(2, queries=10, examples=200)
    usual = learn_group_weights(parts, k=10).weights
    for factor in (2.0**-40,):
        assert torch.equal(learn_group_weights(parts * factor, k=10).weights, usual)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    permuted = learn_group_weights(parts[order], k=10).weights
    torch.testing.assert_close(permuted, usual[order], rtol=1e-4, atol=1e-6)


def test_an_added_group_of_noise_gets_next_to_nothing() -> None:
    parts, _, _ = problem(0)
    generator = torch.Generator().manual_seed(9)
    noise = 2 * torch.randn(1, *parts.shape[1:], generator=generator)
    weights = learn_group_weights(torch.cat([parts, noise]), k=20, regularizer=0.0).weights
    assert float(weights[-1]) < 0.03 * float(weights[:3].mean())


def test_centring_takes_away_what_all_examples_share() -> None:
    parts, _, _ = problem(1, queries=10, examples=200)
    shifted = parts + 100 * torch.rand(12, 10, 1, generator=torch.Generator().manual_seed(0))
    usual = learn_group_weights(parts, k=10, center=True).weights
    found = learn_group_weights(shifted, k=10, center=True).weights
    torch.testing.assert_close(found, usual, rtol=0.05, atol=0.02)
    assert float((learn_group_weights(shifted, k=10).weights - usual).abs().max()) > 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k is 0; expected 1 to 20"),
        ({"k": 21}, "k is 21; expected 1 to 20"),
        ({"k": 2, "regularizer": -1.0}, "regularizer is -1.0; expected 0 or more"),
        ({"k": 2, "rate": 0.0}, "rate is 0.0; expected more than 0"),
        ({"k": 2, "steps": -1}, "steps is -1; expected 0 or more"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        learn_group_weights(torch.randn(3, 2, 20), **settings)  # type: ignore[arg-type]


def test_contributions_that_teach_nothing() -> None:
    with pytest.raises(DataError, match="expected \\[groups, queries, examples\\]"):
        learn_group_weights(torch.randn(3, 20), k=2)
    with pytest.raises(DataError, match="not finite"):
        learn_group_weights(torch.full((3, 2, 20), math.nan), k=2)
    with pytest.raises(DataError, match="score of zero for every example"):
        learn_group_weights(torch.zeros(3, 2, 20), k=2)
