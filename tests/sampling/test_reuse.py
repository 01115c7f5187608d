"""Feature reuse: what the blocks added is added again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import postlude as pl
from postlude.errors import SettingsError
from postlude.sampling.calibrate import calibrate
from postlude.sampling.sample import GuidedDenoiser, sample

# diffusers 0.42 against numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def digits() -> Any:
    return pl.load("zoo:tiny-dit", device="cpu")


class _Adding(nn.Module):
    """In place of all blocks."""

    def __init__(self, first: nn.Module, added: Tensor) -> None:
        super().__init__()
        self.norm1, self.added = first.norm1, added

    def forward(self, tokens: Tensor, *_: Any, **__: Any) -> Tensor:
        return tokens + self.added


def test_in_between_the_blocks_add_what_they_added_last(digits: Any) -> None:
    noisy = torch.randn(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 7])
    plain = GuidedDenoiser(digits, labels=labels)
    reused = GuidedDenoiser(digits, labels=labels, reuse=2)
    times = torch.tensor([800]), torch.tensor([700])
    ends: list[Tensor] = []
    blocks = digits.model.transformer_blocks
    handles = [
        blocks[0].register_forward_pre_hook(lambda _, args: ends.append(args[0])),
        blocks[-1].register_forward_hook(lambda _, __, output: ends.append(output)),
    ]
    first = plain(noisy[0], times[0], slice(None))
    for handle in handles:
        handle.remove()
    assert torch.equal(reused(noisy[0], times[0], slice(None)), first)

    other = copy.copy(digits)
    other.model = copy.deepcopy(digits.model)
    added = _Adding(other.model.transformer_blocks[0], ends[1] - ends[0])
    other.model.transformer_blocks = nn.ModuleList([added])
    expected = GuidedDenoiser(other, labels=labels)(noisy[1], times[1], slice(None))
    assert torch.equal(reused(noisy[1], times[1], slice(None)), expected)
    # The model is as it was.
    assert torch.equal(plain(noisy[0], times[0], slice(None)), first)


def test_blocks_run_at_every_nth_step_of_every_path(digits: Any) -> None:
    """Batches, and the two passes of guidance, are kept apart."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    handle = digits.model.transformer_blocks[1].attn1.register_forward_hook(count)
    settings = {"count": 4, "steps": 5, "sampler": "euler", "guidance": 2.0, "reuse": 3}
    try:
        whole = sample(digits, **settings).images
        assert calls[0] == 2 * 2  # steps 0 and 3, two passes each
        parts = sample(digits, batch_size=3, **settings).images
    finally:
        handle.remove()
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    every = sample(digits, **{**settings, "reuse": 1}).images
    assert not torch.allclose(every, whole, atol=1e-2)


def test_one_model_is_reference_and_approximation(digits: Any, tmp_path: Any) -> None:
    found = calibrate(digits, digits, runs=1, batch=8, steps=4, sampler="euler", reuse=2)
    errors = found.covariance[:, 1, 1, 0]
    assert errors[[0, 2]].abs().max() < 1e-12
    assert errors[[1, 3]].min() > 1e-5
    file = found.save(tmp_path / "drift.safetensors")
    pl.sample(digits, count=2, drift=file, reuse=2)
    with pytest.raises(SettingsError, match="made with reuse = 2, and now it is 1"):
        pl.sample(digits, count=2, drift=file)
    with pytest.raises(SettingsError, match="reuse is 0; expected 1"):
        pl.sample(digits, count=2, reuse=0)
