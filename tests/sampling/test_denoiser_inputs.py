"""What a denoiser is calibrated on: inputs that it really meets, one from each path, spread as asked."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from postlude.errors import SettingsError, UnknownNameError
from postlude.runs.checkpoint import Checkpoint
from postlude.sampling.denoiser_inputs import SPREADS, denoiser_inputs
from postlude.sampling.sample import sample
from postlude.surgery.anatomy import anatomy_of
from postlude.surgery.batches import joined
from postlude.zoo.tiny_dit import build

# diffusers makes arrays of tensors in a way that numpy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.*copy keyword:DeprecationWarning")


def checkpoint(scheduler: Any = None) -> Checkpoint:
    model = build(width=32, layers=2, heads=2)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    scheduler = diffusers.EulerDiscreteScheduler() if scheduler is None else scheduler
    return Checkpoint(model, None, anatomy_of(model), scheduler=scheduler)


def test_each_input_is_one_of_the_calls_of_its_path() -> None:
    one = checkpoint()
    met: list[Any] = []
    handle = one.model.register_forward_pre_hook(
        lambda _, args, kwargs: met.append(
            (args[0].clone(), kwargs["timestep"], kwargs["class_labels"])
        ),
        with_kwargs=True,
    )
    sample(one, count=7, steps=5, seed=3, batch_size=4)
    handle.remove()
    inputs = denoiser_inputs(one, 7, steps=5, seed=3, batch_size=4)
    assert [len(batch["timestep"]) for batch in inputs] == [4, 3]
    whole = joined(inputs)
    assert sorted(whole) == ["class_labels", "hidden_states", "timestep"]
    assert whole["class_labels"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    timesteps = torch.stack([call[1][0] for call in met[:5]])
    for row in range(7):
        step = int((timesteps == whole["timestep"][row]).nonzero())
        call = met[step + 5 * (row // 4)]
        assert torch.equal(whole["hidden_states"][row], call[0][row % 4])
    # Every step once, two of them twice.
    assert sorted(whole["timestep"].unique(return_counts=True)[1].tolist()) == [1, 1, 1, 2, 2]


def test_seeds() -> None:
    one = checkpoint()
    first, again, other = (
        joined(denoiser_inputs(one, 6, steps=3, seed=seed)) for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["hidden_states"], other["hidden_states"])


@pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_schedulers_of_other_kinds(scheduler: str) -> None:
    """One that gives times in [0, 1000] as floats, one that calls the model twice a step."""
    one = checkpoint(getattr(diffusers, scheduler)())
    assert len(joined(denoiser_inputs(one, 5, steps=3))["timestep"]) == 5


def test_spreads() -> None:
    timesteps = torch.arange(1000, -1, -50)
    generator = torch.Generator().manual_seed(0)
    uniform = timesteps[SPREADS["uniform"](21 * 40, timesteps, 1000.0, generator)]
    assert (uniform.unique(return_counts=True)[1] == 40).all()
    skewed = timesteps[SPREADS["skewed"](20_000, timesteps, 1000.0, generator)].double()
    # N(400, 500^2) clipped to [0, 1000]: mean 436, and P(t < 25) = P(z < -0.75) = 0.227.
    assert abs(skewed.mean() - 436) < 10
    assert abs((skewed == 0).double().mean() - 0.227) < 0.01
    assert (skewed < 500).double().mean() > 0.55


def test_what_is_refused() -> None:
    one = checkpoint()
    with pytest.raises(UnknownNameError, match="Did you mean 'skewed'"):
        denoiser_inputs(one, spread="skew")
    with pytest.raises(SettingsError, match="count is 0"):
        denoiser_inputs(one, 0)
