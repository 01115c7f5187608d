"""Drawing from the packaged diffusion transformers."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from postlude.errors import (
    ArchitectureError,
    CheckpointError,
    DataError,
    SettingsError,
    UnknownNameError,
)
from postlude.runs.loading import load
from postlude.sampling.sample import GuidedDenoiser, first_noise, generators, sample
from postlude.sampling.samplers import (
    DIFFUSION,
    FLOW,
    SAMPLERS,
    build_scheduler,
    process_of,
    sampler_of,
)

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:.*copy keyword:DeprecationWarning")

NAMES = {DIFFUSION: "zoo:tiny-dit", FLOW: "zoo:tiny-dit-flow"}
EVERY = [(process, name) for name, one in SAMPLERS.items() for process in one.schedulers]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {process: load(name, device="cpu") for process, name in NAMES.items()}


@pytest.fixture(scope="module")
def model(models: dict[str, Any]) -> Any:
    return models[DIFFUSION]


def draw(checkpoint: Any, **settings: Any) -> Tensor:
    return sample(checkpoint, **({"count": 4, "steps": 3} | settings)).images


@pytest.mark.parametrize(("process", "name"), EVERY)
def test_same_seed_same_images(models: dict[str, Any], process: str, name: str) -> None:
    first = sample(models[process], sampler=name, count=4, steps=3, seed=7)
    assert first.sampler == name
    assert first.images.shape == (4, 1, 8, 8) and first.images.dtype == torch.float32
    assert torch.equal(first.images, draw(models[process], sampler=name, seed=7))
    assert not torch.allclose(first.images, draw(models[process], sampler=name, seed=8), atol=0.1)


@pytest.mark.parametrize("name", ["euler", "euler-a", "dpm++", "heun"])
def test_neither_the_batch_nor_the_number_of_samples_matters(model: Any, name: str) -> None:
    whole = draw(model, sampler=name, count=5, steps=6)
    parts = draw(model, sampler=name, count=5, steps=6, batch_size=2)
    assert torch.allclose(whole, parts, atol=1e-3)
    assert torch.allclose(whole[:3], draw(model, sampler=name, count=3, steps=6), atol=1e-3)


def test_the_plain_loop_of_diffusers(model: Any) -> None:
    labels = torch.tensor([3, 8, 3])
    scheduler = diffusers.EulerDiscreteScheduler.from_config(model.scheduler.config)
    scheduler.set_timesteps(4)
    image = first_noise((1, 8, 8), generators(5, 3)) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(image, timestep)
        with torch.no_grad():
            output = model.model(seen, timestep=timestep.expand(3), class_labels=labels).sample
        image = scheduler.step(output, timestep, image).prev_sample
    found = sample(model, count=3, steps=4, labels=[3, 8], seed=5)
    assert found.labels is not None and found.labels.tolist() == labels.tolist()
    assert torch.equal(found.images, image)


def test_the_samples_show_digits(model: Any) -> None:
    from postlude.zoo.digits_classifier import judge

    drawn = sample(model, sampler="dpm++", steps=10, count=40)
    classes = judge().look(drawn.images)[1]
    assert drawn.labels is not None and drawn.labels[:12].tolist() == [*range(10), 0, 1]
    assert float((classes == drawn.labels).double().mean()) > 0.8


def test_noise_of_a_sample_depends_on_seed_and_index() -> None:
    noise = first_noise((40,), generators(0, 50))
    assert torch.equal(noise[:7], first_noise((40,), generators(0, 7)))
    correlation = noise @ noise.T / 40
    assert float(correlation.fill_diagonal_(0).abs().max()) < 0.7
    # Another seed is not the same stream moved on by one.
    assert not torch.allclose(first_noise((40,), generators(1, 50))[:49], noise[1:], atol=0.1)


def test_guidance(model: Any) -> None:
    labels = torch.tensor([2, 9])
    noisy, timestep = torch.randn(2, 1, 8, 8), torch.tensor(400.0)
    plain, guided, blind = (
        GuidedDenoiser(model, labels=one, guidance=weight)(noisy, timestep, slice(None))
        for one, weight in ((labels, 1.0), (labels, 3.0), (torch.tensor([10, 10]), 1.0))
    )
    assert torch.allclose(guided, blind + 3.0 * (plain - blind), atol=1e-5)
    assert not torch.allclose(plain, blind, atol=1e-2)


def test_conditions_are_cut_into_batches_and_learned_variance_is_left_out() -> None:
    class Conditioned(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")
        config: ClassVar[dict[str, Any]] = {}

        def forward(
            self, hidden_states: Any, timestep: Any, encoder_hidden_states: Any, return_dict: bool
        ) -> Any:
            told = encoder_hidden_states.sum(1)[:, None, None, None]
            return (torch.cat([hidden_states * 0 + told, hidden_states], 1),)

    checkpoint: Any = SimpleNamespace(model=Conditioned())
    told = torch.arange(6.0).reshape(3, 2)
    with pytest.raises(ArchitectureError, match="draws what an encoded text describes"):
        GuidedDenoiser(checkpoint)
    with pytest.raises(SettingsError, match="takes no pooled; it takes hidden_states"):
        GuidedDenoiser(checkpoint, conditions={"encoder_hidden_states": told, "pooled": told})
    with pytest.raises(SettingsError, match="guidance is 2, and nothing says"):
        GuidedDenoiser(checkpoint, conditions={"encoder_hidden_states": told}, guidance=2.0)
    given = {"encoder_hidden_states": told, "negative_encoder_hidden_states": torch.zeros(3, 2)}
    found = GuidedDenoiser(checkpoint, conditions=given, guidance=2.0)(
        torch.ones(2, 4, 2, 2), torch.tensor(1.0), slice(1, 3)
    )
    assert found.shape == (2, 4, 2, 2)
    assert found[:, 0, 0, 0].tolist() == [10.0, 18.0]


def test_a_model_of_encoded_text() -> None:
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=4,
        cross_attention_dim=16, caption_channels=6, norm_num_groups=1,
    )  # fmt: skip
    checkpoint: Any = SimpleNamespace(
        model=transformer.eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        kind="diffusion",
    )
    told = torch.randn(3, 5, 6)
    given = {"encoder_hidden_states": told, "negative_encoder_hidden_states": torch.zeros(1, 5, 6)}
    drawn = sample(checkpoint, count=3, steps=2, conditions=given, guidance=2.0)
    assert drawn.images.shape == (3, 4, 4, 4) and drawn.labels is None and drawn.sampler == "dpm++"
    parts = sample(checkpoint, count=3, steps=2, conditions=given, guidance=2.0, batch_size=2)
    assert torch.allclose(drawn.images, parts.images, rtol=1e-3, atol=1e-3)
    with pytest.raises(
        SettingsError, match="encoder_hidden_states has 3 rows for 2 samples; expected one for each"
    ):
        sample(checkpoint, count=2, conditions=given)
    with pytest.raises(
        SettingsError, match="labels are given, and PixArtTransformer2DModel knows no classes"
    ):
        sample(checkpoint, count=3, conditions=given, labels=[1])


def test_a_wrapped_scheduler_is_used(model: Any) -> None:
    seen = []

    def wrap(scheduler: Any) -> Any:
        seen.append(type(scheduler).__name__)
        step = scheduler.step

        def halfway(
            output: Tensor, timestep: Tensor, image: Tensor, generator: Any = None, **rest: Any
        ) -> Any:
            return step(0.5 * output, timestep, image, **rest)

        scheduler.step = halfway
        return scheduler

    assert not torch.allclose(draw(model), draw(model, wrap=wrap), atol=0.1)
    assert seen == ["EulerDiscreteScheduler"]


def test_the_model_computes_in_its_own_type(model: Any) -> None:
    import copy

    half = replace(model, model=copy.deepcopy(model.model).to(torch.bfloat16))
    images = draw(half, steps=6)
    assert images.dtype == torch.float32
    assert 0.0 < float((images - draw(model, steps=6)).abs().mean()) < 0.1


@pytest.mark.parametrize(("process", "name"), EVERY)
def test_a_sampler_keeps_the_noise_schedule(
    models: dict[str, Any], process: str, name: str
) -> None:
    base = models[process].scheduler
    before = dict(base.config)
    made = build_scheduler(base, name)
    assert sampler_of(made) == name and process_of(made) == process
    assert made is not base and dict(base.config) == before
    shared = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")
    assert all(made.config[key] == base.config[key] for key in shared if key in base.config)
    made.set_timesteps(5)
    assert float(made.timesteps.max()) <= 1000.0


def test_the_shift_of_a_flow_goes_with_it(models: dict[str, Any]) -> None:
    shifted = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert build_scheduler(shifted, "dpm++").config.flow_shift == 3.0
    assert build_scheduler(build_scheduler(shifted, "dpm++"), "fm-euler").config.shift == 3.0
    # A scheduler that has no name here is taken as it is.
    own = diffusers.LMSDiscreteScheduler(beta_end=0.013)
    assert sampler_of(own) is None
    assert build_scheduler(own).config.beta_end == 0.013


def test_bad_input(models: dict[str, Any], model: Any) -> None:
    with pytest.raises(UnknownNameError, match=r"No sampler named 'eular'. Did you mean 'euler'"):
        draw(model, sampler="eular")
    with pytest.raises(
        UnknownNameError, match=r"Known: ddim, dpm\+\+, dpm\+\+1, euler, euler-a, fm-euler, heun"
    ):
        draw(model, sampler="zzz")
    with pytest.raises(
        SettingsError,
        match=r"euler is not for this model, which predicts the velocity .* fm-euler, dpm\+\+",
    ):
        draw(models[FLOW], sampler="euler")
    for name in ("steps", "count", "batch_size"):
        with pytest.raises(SettingsError, match=f"{name} is 0; expected 1 or more"):
            draw(model, **{name: 0})
    with pytest.raises(
        SettingsError,
        match="steps is 1001; expected at most 1000, the timesteps that the model knows",
    ):
        draw(model, steps=1001)
    shifting = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(SettingsError, match="shifts its noise levels by the size of the image"):
        draw(replace(models[FLOW], scheduler=shifting))
    with pytest.raises(SettingsError, match=r"labels are \[3, 10\]; expected classes from 0 to 9"):
        draw(model, labels=[3, 10])
    with pytest.raises(SettingsError, match=r"labels are \[\]"):
        draw(model, labels=[])
    with pytest.raises(
        CheckpointError, match="without a scheduler; sampling needs a diffusion model"
    ):
        draw(replace(model, scheduler=None))


def test_a_model_that_overflows_is_refused(model: Any) -> None:
    import copy

    broken = replace(model, model=copy.deepcopy(model.model))
    with torch.no_grad():
        broken.model.proj_out_2.bias.fill_(math.inf)
    with pytest.raises(DataError, match=r"4 of 4 images hold NaN or infinity: the model overflows"):
        draw(broken)
