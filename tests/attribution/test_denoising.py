"""Denoisers: what is differentiated against autograd one draw at a time, and the methods made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from postlude._front_door import evaluate_lds, evaluate_retrieval
from postlude.attribution import BM25, DAS, DTRAK, EKFAC, TRAK, GradDot, JourneyTRAK, LoGRA
from postlude.attribution.build import build
from postlude.attribution.das import StepRepresentation, residuals
from postlude.attribution.denoising import denoised, noise, process_of, timesteps
from postlude.attribution.engine import Attributor
from postlude.attribution.examples import Collection
from postlude.attribution.images import Images
from postlude.attribution.index import Index
from postlude.attribution.queries import record_queries
from postlude.attribution.representation import DenseRepresentation
from postlude.errors import ArchitectureError, CheckpointError, SettingsError
from postlude.runs.checkpoint import Checkpoint
from postlude.zoo.noising import noising_of

from .small import checkpoint, collection, denoiser, pictures

SETTINGS = collection(timesteps=3, noises=2, seed=4)
WHOLE = {"factor": 1, "format": "fp32"}


@pytest.fixture(scope="module")
def given() -> Checkpoint:
    return denoiser()


def gradients(
    given: Checkpoint, image: Tensor, label: int, output: Callable[[Tensor, Tensor], Tensor]
) -> list[dict[str, Tensor]]:
    """Weight gradients ``[in, out]`` of an output of one image, for every timestep and draw of noise."""
    process = process_of(given, SETTINGS)
    found = []
    for timestep, level in zip(process.timesteps.tolist(), process.levels, strict=True):
        for draw in range(SETTINGS.noises):
            eps = noise(SETTINGS, timestep, draw, tuple(image.shape))
            if process.noising.name == "flow":
                inputs, target = (1 - level) * image + level * eps, eps - image
            else:
                inputs, target = (image + level * eps) / (1 + level**2).sqrt(), eps
            given.model.requires_grad_(True)
            given.model.zero_grad()
            predicted = given.model(
                inputs[None],
                timestep=torch.tensor([timestep]),
                class_labels=torch.tensor([label]),
            ).sample[0]
            output(predicted, target).backward()
            found.append(
                {
                    path: given.model.get_submodule(path).weight.grad.T.clone()
                    for path in given.anatomy.linears()
                }
            )
    return found


OUTPUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "loss": lambda predicted, target: (predicted - target).square().mean(),
    "output-norm": lambda predicted, target: predicted.square().mean(),
    "output-mean": lambda predicted, target: predicted.mean(),
}


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_gradients_are_means_over_timesteps_and_noise(prediction: str, output: str) -> None:
    given = denoiser(prediction)
    images, labels = pictures(2)
    examples = Images((images, labels)).examples(given, SETTINGS)
    with DenseRepresentation(output=output, **WHOLE).recorder(given, SETTINGS) as record:
        rows = record(examples[0].batched(examples, 10**6)[0])
    for at in range(2):
        draws = gradients(given, images[at], int(labels[at]), OUTPUTS[output])
        for path in given.anatomy.linears():
            mean = torch.stack([one[path] for one in draws]).mean(0)
            torch.testing.assert_close(rows[f"{path}/g"][at], mean, rtol=2e-4, atol=1e-6)
    assert rows["loss"].shape == (2,)


def test_steps_of_das_have_unit_length_before_they_are_averaged(given: Checkpoint) -> None:
    images, labels = pictures(2)
    examples = Images((images, labels)).examples(given, SETTINGS)
    representation = StepRepresentation(side=64, format="fp32")
    with representation.recorder(given, SETTINGS) as record:
        rows = record(examples[0].batched(examples, 10**6)[0])
    draws = gradients(given, images[1], int(labels[1]), OUTPUTS["output-mean"])
    lengths = [sum(float(g.square().sum()) for g in one.values()) ** 0.5 for one in draws]
    for path in given.anatomy.linears():
        mean = sum(one[path] / length for one, length in zip(draws, lengths, strict=True)) / 6
        torch.testing.assert_close(rows[f"{path}/g"][1], mean, rtol=2e-4, atol=1e-6)
    assert rows["errors"].shape == (2, SETTINGS.timesteps)


def test_noise_is_of_the_seed_timestep_and_draw() -> None:
    same = Collection(seed=1, timesteps=7)
    first = noise(same, 100, 0, (1, 8, 8))
    assert torch.equal(first, noise(Collection(seed=1), 100, 0, (1, 8, 8)))
    for other in (noise(same, 200, 0, (1, 8, 8)), noise(same, 100, 1, (1, 8, 8))):
        assert not torch.equal(first, other)
    assert not torch.equal(first, noise(Collection(seed=2), 100, 0, (1, 8, 8)))


def test_timesteps_are_evenly_spaced_and_levels_those_of_the_scheduler(given: Checkpoint) -> None:
    assert timesteps(10, 1000) == [0, 100, 200, 300, 400, 500, 600, 700, 800, 900]
    with pytest.raises(SettingsError, match="timesteps is 2000; expected 1 to 1000"):
        timesteps(2000, 1000)
    process = process_of(given, Collection(timesteps=4))
    kept = given.scheduler.alphas_cumprod[process.timesteps]
    expected = ((1 - kept) / kept).sqrt().float()
    torch.testing.assert_close(process.levels, expected, rtol=1e-4, atol=1e-6)
    told = noising_of("epsilon").timesteps(process.levels)
    torch.testing.assert_close(told, process.timesteps.float(), rtol=1e-3, atol=1e-2)


def test_models_that_cannot_be_noised(given: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="has no scheduler"):
        process_of(dataclasses.replace(given, scheduler=None), SETTINGS)
    from diffusers import DDIMScheduler

    other = dataclasses.replace(given, scheduler=DDIMScheduler(prediction_type="v_prediction"))
    with pytest.raises(CheckpointError, match="predicts 'v_prediction'; expected epsilon"):
        process_of(other, SETTINGS)


def test_models_of_texts_are_refused(given: Checkpoint) -> None:
    class OfTexts(torch.nn.Linear):
        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            return hidden_states

    other = dataclasses.replace(given, model=OfTexts(2, 2))
    with pytest.raises(ArchitectureError, match="OfTexts draws what an encoded text describes"):
        denoised(other, SETTINGS)


@pytest.fixture(scope="module")
def das(given: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Index:
    path = tmp_path_factory.mktemp("das") / "index"
    return build(given, pictures(20), DAS(side=4, format="fp32"), path, collection=SETTINGS)[0]


@pytest.mark.parametrize("curvature", ["dual", "exact"])
def test_das_is_the_formula_by_a_dense_solve(given: Checkpoint, das: Index, curvature: Any) -> None:
    method = DAS(side=4, format="fp32", damping=0.3, curvature=curvature)
    queries = record_queries(das, given, pictures(3, seed=5))
    found = method.score(das, queries, per_layer=True).layers
    assert found is not None
    weights = residuals(das)
    errors = das.tensor("errors").double()
    expected = torch.stack([errors[:, t] / errors[:, t].mean() for t in range(3)]).mean(0)
    torch.testing.assert_close(weights, expected)
    for layer in das.layers:
        phi = das.layer(layer.module).rows().flat().double()
        asked = queries.rows(layer).flat().double()
        h = phi.T @ phi
        kernel = torch.linalg.inv(
            h + 0.3 * h.trace() / len(h) * torch.eye(len(h), dtype=torch.float64)
        )
        leverage = torch.stack([one @ kernel @ one for one in phi])
        assert float(leverage.min()) > 0 and float(leverage.max()) < 1
        dense = weights * (asked @ kernel @ phi.T) / (1 - leverage)
        torch.testing.assert_close(found[layer.module].double(), dense, rtol=1e-3, atol=1e-4)
    without = dataclasses.replace(method, leverage=False)
    assert not torch.allclose(without.score(das, queries).total, method.score(das, queries).total)


def test_journeys_start_at_the_image_and_follow_the_sampler(
    given: Checkpoint, tmp_path: Path
) -> None:
    index, _ = build(
        given, pictures(12), JourneyTRAK(side=4), tmp_path / "index", collection=SETTINGS
    )
    queries = record_queries(index, given, pictures(2, seed=3))
    assert queries.representation.output == "journey"  # type: ignore[attr-defined]
    again = record_queries(index, given, (pictures(2, seed=3)[0][1:], pictures(2, seed=3)[1][1:]))
    for name, tensor in queries.tensors.items():
        torch.testing.assert_close(again.tensors[name][0], tensor[1], rtol=1e-3, atol=1e-5)
    # The loss one pass at a time: Euler steps upwards, then the loss against what led there.
    (image, label) = (pictures(2, seed=3)[0][0], pictures(2, seed=3)[1][:1])
    process = process_of(given, SETTINGS)

    def predict(place: Tensor, level: Tensor, told: Tensor) -> Tensor:
        inputs = (place / (1 + level**2).sqrt())[None]
        result: Tensor = given.model(inputs, timestep=told[None], class_labels=label).sample[0]
        return result

    place, level, told = image, torch.zeros(()), process.timesteps[0]
    total = 0.0
    for timestep, sigma in zip(process.timesteps, process.levels, strict=True):
        with torch.no_grad():
            place = place + (sigma - level) * predict(place, level, told)
            level, told = sigma, timestep
            target = (place - image) / sigma
            total += float((predict(place, level, told) - target).square().mean()) / 3
    assert float(queries.tensors["loss"][0]) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("method", [TRAK(side=4), JourneyTRAK(side=4)], ids=lambda one: one.name)
def test_flows_too(method: Attributor, tmp_path: Path) -> None:
    given = denoiser("flow")
    index, _ = build(given, pictures(12), method, tmp_path / "index", collection=SETTINGS)
    scores = index.scores(pictures(2), checkpoint=given)
    assert bool(scores.isfinite().all()) and float(scores.abs().max()) > 0


def test_trak_of_a_denoiser_is_influence_by_the_loss(given: Checkpoint, tmp_path: Path) -> None:
    found = []
    for method in (TRAK(side=4, format="fp32"), LoGRA(side=4, format="fp32")):
        index, _ = build(given, pictures(12), method, tmp_path / method.name, collection=SETTINGS)
        found.append(index.scores(pictures(2, seed=1), checkpoint=given))
    torch.testing.assert_close(12 * found[0], found[1], rtol=1e-4, atol=1e-5)


def test_methods_of_the_other_kind_are_refused(given: Checkpoint, tmp_path: Path) -> None:
    for method in (BM25(), EKFAC()):
        with pytest.raises(SettingsError, match=r"is a diffusion model; methods for it: .*d-trak"):
            build(given, pictures(4), method, tmp_path / "index")
    for method in (DTRAK(), DAS(), JourneyTRAK()):
        with pytest.raises(SettingsError, match=r"is a language model; methods for it: .*lorif"):
            build(checkpoint(), ["a bird"], method, tmp_path / "index")
    recorder = DenseRepresentation(output="output-norm").recorder(checkpoint(), SETTINGS)
    with pytest.raises(SettingsError, match="the output 'output-norm' is of diffusion models"):
        recorder.__enter__()


def test_judges_that_train_on_text_refuse_a_denoiser(given: Checkpoint) -> None:
    for judge in (evaluate_lds, evaluate_retrieval):
        with pytest.raises(
            ArchitectureError, match="is a diffusion model, and attribution is judged"
        ):
            judge(given, ["a bird", "a boat"], ["lorif"])


def test_an_image_with_copies_is_found_by_both(given: Checkpoint, tmp_path: Path) -> None:
    images, labels = pictures(16)
    images[9], labels[9] = images[2], labels[2]
    index, _ = build(given, (images, labels), DTRAK(), tmp_path / "index", collection=SETTINGS)
    (answer,) = index.query(
        (images[2:3], labels[2:3]), top=2, checkpoint=given, data=(images, labels)
    )
    assert sorted(hit.number for hit in answer.results) == [2, 9]
    plain = index.query(
        (images[2:3], labels[2:3]),
        top=2,
        method=dataclasses.replace(DTRAK(), damping=2.0),
        checkpoint=given,
        data=(images, labels),
    )
    assert plain[0].results[0].score != answer.results[0].score
    with pytest.raises(SettingsError, match="was built for d-trak and can answer"):
        index.query((images[2:3], labels[2:3]), method=GradDot(), checkpoint=given)
