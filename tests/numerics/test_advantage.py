import math

import pytest
import torch

from postlude.errors import SettingsError
from postlude.numerics.advantage import (
    MEANS,
    clipped,
    credited,
    divergence,
    equal_groups,
    group_advantages,
)


@pytest.mark.parametrize("normalize", [True, False])
def test_group_advantages_against_a_loop(normalize: bool) -> None:
    rewards = torch.rand(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rewards[4:8, 1] = 0.5
    found = group_advantages(rewards, 4, normalize)
    for group in range(3):
        for dimension in range(3):
            values = rewards[4 * group : 4 * group + 4, dimension].tolist()
            mean = sum(values) / 4
            spread = math.sqrt(sum((one - mean) ** 2 for one in values) / 3)
            for at, one in enumerate(values):
                expected = (one - mean) / ((spread + 1e-4) if normalize else 1)
                assert found[4 * group + at, dimension] == pytest.approx(expected)
    assert torch.allclose(found.unflatten(0, (3, 4)).sum(1), torch.zeros(3, 3, dtype=torch.float64))
    assert (group_advantages(rewards[:, 0], 4, normalize) == found[:, 0]).all()
    assert equal_groups(rewards, 4).tolist() == [[False] * 3, [False, True, False], [False] * 3]


@pytest.mark.parametrize("generations", [1, 5])
def test_no_groups(generations: int) -> None:
    with pytest.raises(SettingsError, match="no whole number of groups"):
        group_advantages(torch.zeros(12), generations)


def test_credit_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    advantages = torch.randn(3, 4, generator=generator)
    segments = torch.rand(3, 6, 4, generator=generator) < 0.3
    segments[0, 0] = False
    found = credited(advantages, segments)
    for row in range(3):
        for token in range(6):
            named = [float(advantages[row, d]) for d in range(4) if segments[row, token, d]]
            expected = sum(named) / len(named) if named else 0.0
            assert found[row, token] == pytest.approx(expected, abs=1e-6)


def test_objective_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(2)
    new = -torch.rand(4, 5, generator=generator)
    old = -torch.rand(4, 5, generator=generator)
    held = -torch.rand(4, 5, generator=generator)
    advantages = torch.randn(4, 1, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]])
    values = clipped(new, old, advantages, 0.2) - 0.04 * divergence(new, held)
    answers, every = [], []
    for row in range(4):
        kept = []
        for token in range(int(mask[row].sum())):
            ratio = math.exp(new[row, token] - old[row, token])
            a = float(advantages[row])
            delta = float(held[row, token] - new[row, token])
            k3 = math.exp(delta) - delta - 1
            kept.append(min(ratio * a, min(max(ratio, 0.8), 1.2) * a) - 0.04 * k3)
        answers.append(sum(kept) / len(kept))
        every += kept
    assert MEANS["grpo"](values, mask, 7) == pytest.approx(sum(answers) / 4, abs=1e-6)
    assert MEANS["bnpo"](values, mask, 7) == pytest.approx(sum(every) / len(every), abs=1e-6)
    assert MEANS["dr_grpo"](values, mask, 7) == pytest.approx(sum(every) / 28, abs=1e-6)


def test_divergence_is_never_negative() -> None:
    p, q = torch.log_softmax(torch.randn(2, 1000), 0)
    assert (divergence(p, q) >= 0).all() and (divergence(p, p) == 0).all()
