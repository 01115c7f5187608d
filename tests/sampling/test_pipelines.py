"""Pipelines of diffusers, untouched, with a corrected scheduler."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from postlude.errors import DataError
from postlude.sampling.paired_runs import PairedRun, collect
from postlude.sampling.pipelines import collect_from_pipelines
from postlude.sampling.q_drift import QDrift, correct

from .beds import EULER, FLOW, SOLVER, set_to, statistics_of

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:.*copy keyword:DeprecationWarning")

LABELS = [3, 1]


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def digits() -> Any:
    """Images of latents by a random transformer and a random decoder; its output has a learned variance."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_num_groups=1,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
    )
    with torch.no_grad():  # adaLN starts at zero, and then noise decides nothing
        for parameter in transformer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return quiet(diffusers.DiTPipeline(transformer.eval(), vae.eval(), SOLVER()))


@pytest.fixture(scope="module")
def tokens() -> Any:
    """A flow on latents packed into tokens, without text encoders or decoder; its timesteps are shifted by size."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FLOW(use_dynamic_shifting=True, shift=3.0)
    return quiet(diffusers.FluxPipeline(scheduler, transformer=transformer.eval(), **none))


def prompts(count: int = 2) -> dict[str, Any]:
    source = torch.Generator().manual_seed(7)
    return {
        "prompt_embeds": torch.randn(count, 3, 8, generator=source),
        "pooled_prompt_embeds": torch.randn(count, 8, generator=source),
        "height": 32,
        "width": 32,
        "num_inference_steps": 4,
        "output_type": "latent",
    }


def worse(pipeline: Any, scheduler: Any = None, scale: float = 0.2) -> Any:
    """The pipeline with an approximate transformer, everything else shared."""
    transformer = copy.deepcopy(pipeline.transformer)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in transformer.parameters():
            noise = torch.randn(parameter.shape, generator=source)
            parameter.mul_(1 + scale * noise)
    other = quiet(type(pipeline).from_pipe(pipeline, transformer=transformer))
    if scheduler is not None:
        other.scheduler = scheduler
    return other


def draw(pipeline: Any, **settings: Any) -> Tensor:
    call = {"class_labels": LABELS, "num_inference_steps": 4, "output_type": "pt", **settings}
    found: Tensor = pipeline(**call, generator=torch.Generator().manual_seed(0)).images
    return found


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("make", [SOLVER, EULER, lambda: SOLVER(solver_order=1)])
def test_dit_pipeline(digits: Any, make: Any, guidance: float) -> None:
    pipeline = worse(digits, make())
    plain = draw(pipeline, guidance_scale=guidance)
    pipeline.scheduler = correct(make(), statistics_of(set_to(make(), 4), 0.0))
    assert torch.equal(draw(pipeline, guidance_scale=guidance), plain)
    for mode in ("corrected", "paper"):
        pipeline.scheduler = correct(
            make(), statistics_of(set_to(make(), 4), 0.3), QDrift(mode=mode, bias_scale=0.5)
        )
        found = draw(pipeline, guidance_scale=guidance)
        assert found.shape == plain.shape == (2, 3, 16, 16)
        assert bool(torch.isfinite(found).all()) and not torch.equal(found, plain)


def test_statistics_of_two_pipelines(digits: Any) -> None:
    small = worse(digits)
    before = digits.scheduler
    calls = [
        {
            "class_labels": LABELS,
            "num_inference_steps": 4,
            "guidance_scale": 4.0,
            "output_type": "pt",
        }
    ] * 2
    found = collect_from_pipelines(digits, small, calls, seed=5, conditions={"guidance": 4.0})
    assert digits.scheduler is before and small.scheduler is before
    assert found.runs == 2 and found.steps == 4 and found.scheduler == SOLVER.__name__

    def guided(transformer: Any) -> Any:
        def denoise(latents: Tensor, timestep: Tensor) -> Tensor:
            def of(labels: list[int]) -> Tensor:
                steps = timestep.expand(len(labels))
                found = transformer(latents, timestep=steps, class_labels=torch.tensor(labels))
                output: Tensor = found.sample[:, :4]
                return output

            with torch.no_grad():
                blind = of([1000, 1000])
                return blind + 4.0 * (of(LABELS) - blind)

        return denoise

    # The same by hand. The pipeline gives its scheduler every guided sample twice.
    pairs = []
    for seed in (5, 6):
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        pairs.append(PairedRun(noise))
    expected = collect(
        guided(digits.transformer), guided(small.transformer), SOLVER(), pairs, steps=4
    )
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.covariance, expected.covariance, rtol=0.01, atol=1e-6)
    assert bool((found.variance() > 0).all())

    small.scheduler = correct(small.scheduler, found)
    corrected = draw(small, guidance_scale=4.0)
    small.scheduler = before
    assert not torch.equal(corrected, draw(small, guidance_scale=4.0))


def test_flux_pipeline(tokens: Any) -> None:
    small = worse(tokens)
    statistics = collect_from_pipelines(
        tokens, small, [prompts()] * 2, channelwise=True, channel_axis=2
    )
    assert statistics.mean.shape == (4, 2, 4)

    def run() -> Tensor:
        found: Tensor = small(**prompts(), generator=torch.Generator().manual_seed(0)).images
        return found

    plain, before = run(), small.scheduler
    small.scheduler = correct(before, statistics, QDrift(qdrift_scale=0.0))
    assert torch.equal(run(), plain)
    small.scheduler = correct(before, statistics)
    corrected = run()
    assert corrected.shape == plain.shape and not torch.equal(corrected, plain)


def test_pipelines_that_differ_in_more_than_the_denoiser(digits: Any) -> None:
    class Other(type(digits)):  # type: ignore[misc]
        def __call__(self, class_labels: list[int], **call: Any) -> Any:
            call["generator"].manual_seed(99)
            return super().__call__(class_labels, **call)

    other = quiet(Other(**digits.components))
    call = {"class_labels": LABELS, "num_inference_steps": 2, "output_type": "pt"}
    with pytest.raises(DataError, match="At step 0 the two pipelines do not have the same sample"):
        collect_from_pipelines(digits, other, [call])
    with pytest.raises(DataError, match="No calls were given"):
        collect_from_pipelines(digits, other, [])


def test_a_saved_pipeline_is_a_plain_one(digits: Any, tmp_path: Path) -> None:
    pipeline = worse(digits, SOLVER())
    plain = draw(pipeline)
    pipeline.scheduler = correct(SOLVER(), statistics_of(set_to(SOLVER(), 4), 0.3))
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DPMSolverMultistepScheduler"]
    again = quiet(diffusers.DiTPipeline.from_pretrained(tmp_path))
    assert type(again.scheduler) is SOLVER
    assert torch.equal(draw(again), plain)
