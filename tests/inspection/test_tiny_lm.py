"""The built-in model, whose massive activations were planted before training and lived through it."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from postlude._front_door import built_in_text, calibration_tokens
from postlude.inspection import Outliers, Signature, SingularDefects, SingularDefectsReport
from postlude.inspection.signature import compare
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.loading import load
from postlude.zoo.tiny_lm import Plant, build


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return load("zoo:tiny-lm", dtype="float32")


@pytest.fixture(scope="module")
def ids(checkpoint: Checkpoint) -> Tensor:
    return calibration_tokens(checkpoint, built_in_text(), samples=8, length=128, seed=0)


@pytest.fixture(scope="module")
def report(checkpoint: Checkpoint, ids: Tensor) -> SingularDefectsReport:
    return SingularDefects(samples=20_000).inspect(checkpoint, ids)


def test_the_planted_layers_are_found(report: SingularDefectsReport) -> None:
    assert report.explosion_layers == (Plant().explosion,)
    assert report.decay_layers == (Plant().decay,)


def test_the_weights_predict_the_empirical_direction(report: SingularDefectsReport) -> None:
    angles = {layer.layer: layer.angle for layer in report.layers}
    planted = {Plant().explosion, Plant().decay}
    assert angles[Plant().explosion] < 15
    pair = report.eigenpairs[Plant().decay]
    assert pair.value < 0 and pair.angle < 15
    # The block before the decay has learned to work along the direction too, but less exactly.
    assert max(angles[layer] for layer in planted) < 0.5 * min(
        angle for layer, angle in angles.items() if layer not in planted
    )


def test_the_first_position_explodes_and_matters(report: SingularDefectsReport) -> None:
    assert report.path is not None
    threshold = report.direction.threshold
    assert float((report.path.initial.norms > threshold).double().mean()) > 0.9
    # Without attention, which tells it that it stands first, hardly any other token comes near the first one's norm.
    alone = report.path.alone.norms
    assert float(alone.median()) < 0.5 * float(alone[0]) and int(alone.argmax()) == 0
    assert report.path.ablation.loss_without > report.path.ablation.loss + 0.05


def test_activations_are_massive(checkpoint: Checkpoint, ids: Tensor) -> None:
    found = Outliers().inspect(checkpoint, ids)
    assert found.layers[Plant().explosion + 1].ratio > 200


def test_signatures_tell_a_fine_tuned_copy_from_another_seed(
    checkpoint: Checkpoint, ids: Tensor
) -> None:
    tuned = copy.deepcopy(checkpoint.model)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=3e-4)
    for step in range(8):
        batch = ids[step : step + 1]
        loss = tuned(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    other = build(7, vocab_size=checkpoint.model.config.vocab_size)
    models = [checkpoint.model, tuned.eval(), other]
    reports = [
        Signature().inspect(dataclasses.replace(checkpoint, model=model), ids) for model in models
    ]
    angles = compare(reports).angles
    assert float(angles[0, 1]) < 10
    assert float(angles[0, 2]) > 75
