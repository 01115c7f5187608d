from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from postlude.errors import SettingsError, UnknownNameError
from postlude.runs.directory import RunDirectory
from postlude.signals.training import Training, optimise


class Target(nn.Module):
    """A vector to be moved to noisy ones."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(3))
        self.fixed = nn.Parameter(torch.ones(2), requires_grad=False)

    def loss(self, step: int, draw: torch.Generator) -> Tensor:
        noise = 0.1 * torch.randn(3, generator=draw)
        return (self.value - torch.tensor([1.0, -2.0, 0.5]) - noise).square().mean()


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
def test_against_a_plain_loop(schedule: str) -> None:
    """One chunk of steps or many: the same as Adam written down once, with PyTorch's own plateau."""
    training = Training(steps=260, learning_rate=0.05, schedule=schedule, chunk=260)  # type: ignore[arg-type]
    found = Target()
    losses = optimise(found, found.loss, training)

    from postlude.signals.training import generator

    plain = Target()
    draw = generator(0, "fit 0")
    optimizer = torch.optim.Adam([plain.value], lr=0.05)
    scheduler: object = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=100, min_lr=1e-5
    )
    if schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 259, eta_min=0.001)
    expected = []
    for step in range(260):
        optimizer.zero_grad()
        loss = plain.loss(step, draw)
        loss.backward()
        optimizer.step()
        scheduler.step(*([loss.item()] if schedule == "plateau" else []))  # type: ignore[attr-defined]
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(found.value, plain.value, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.fixed, torch.ones(2))


def test_chunks_do_not_change_what_a_schedule_does() -> None:
    """With a loss that draws nothing, chunks leave no trace."""

    def run(chunk: int) -> Tensor:
        target = Target()
        quiet = lambda step, draw: (target.value - 1).abs().sum()  # noqa: E731
        optimise(target, quiet, Training(230, 0.05, schedule="plateau", chunk=chunk))
        return target.value.detach()

    assert torch.equal(run(230), run(50))


class Killed(Exception):
    pass


def test_killed_it_resumes_with_the_same_bits(tmp_path: Path) -> None:
    training = Training(steps=50, learning_rate=0.05, chunk=8)
    whole = Target()
    losses = optimise(whole, whole.loss, training)
    count = 0

    def dying(unit: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
        def call(name: str, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
            nonlocal count
            count += 1
            if count == 4:
                compute()
                raise Killed
            return unit(name, compute)

        return call

    kept = RunDirectory(tmp_path / "run", {"a": 1})
    with pytest.raises(Killed):
        first = Target()
        optimise(first, first.loss, training, unit=dying(kept.unit))
    assert len(kept.finished()) == 3
    again = Target()
    assert optimise(again, again.loss, training, unit=kept.unit) == losses
    assert torch.equal(again.value, whole.value)


def test_a_loss_that_is_not_finite_is_said() -> None:
    target = Target()
    with pytest.raises(SettingsError, match="the loss is inf at step 1: the learning rate"):
        optimise(target, lambda step, draw: target.value.sum() + torch.inf, Training(3))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"learning_rate": 0.0}, "learning rate is 0"),
        ({"learning_rate": float("nan")}, "learning rate is nan"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
    ],
)
def test_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises((SettingsError, UnknownNameError), match=message):
        Training(**values)  # type: ignore[arg-type]
