from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from postlude import registry
from postlude.errors import DataError, SettingsError
from postlude.inspection import explosion as paths
from postlude.inspection.empirical import empirical_direction
from postlude.inspection.singular_defects import (
    Found,
    SingularDefects,
    SingularDefectsReport,
    layer_defect,
)
from postlude.numerics.directions import acute_angle, nearest_eigenpair
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import anatomy_of
from postlude.surgery.probes import BlockApproximation, approximate_block, norm_path

from .planted import DECAY, EXPLOSION, SIZE, TRIGGERS, Planted, planted, random_model, tokens

SETTINGS = SingularDefects(samples=3000, random_directions=50)


class Toy(NamedTuple):
    """A SwiGLU block of width 64 with one planted neuron: gate = up = 6 v, down column = 2 d."""

    model: Any
    block: BlockApproximation
    v: Tensor
    d: Tensor


@pytest.fixture(scope="module")
def toy() -> Toy:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3 / math.sqrt(parameter.shape[1]))
        v, d = torch.linalg.qr(torch.randn(64, 2)).Q.T
        mlp = model.model.layers[0].mlp
        mlp.gate_proj.weight[0] = mlp.up_proj.weight[0] = 6 * v
        mlp.down_proj.weight[:, 0] = 2 * d
    anatomy = anatomy_of(model)
    block = approximate_block(model, anatomy, anatomy.blocks[0], 100_000, seed=0)
    return Toy(model, block, v, d)


def test_s1_the_planted_neuron_dominates_the_spectrum(toy: Toy) -> None:
    values = layer_defect(0, toy.block, toy.d).whole.values
    assert 54 < float(values[0]) < 62
    assert 1.0 < float(values[1]) < 1.3


def test_s2_the_leading_direction_is_the_planted_one(toy: Toy) -> None:
    found = layer_defect(0, toy.block, toy.d)
    assert found.angle < 2
    assert float(acute_angle(found.feed_forward.left[:, 0], toy.d)) < 2
    # I + A knows nothing of it.
    assert float(acute_angle(found.attention.left[:, 0], toy.d)) > 30


def test_s3_only_the_leading_right_singular_vector_explodes(toy: Toy) -> None:
    block = anatomy_of(toy.model).blocks[0]
    space = paths.explosion_subspace(toy.model, block, toy.block.feed_forward)
    assert 4200 < space.leading < 5500
    assert float(space.rest.median()) < 5
    assert space.dimension == 1
    assert float(space.direction @ toy.v.double()) > 0.99  # the exploding sign, not only the axis
    assert float(space.outputs[0].min()) < space.leading / 100


def test_s4_a_planted_decay_is_an_eigenvalue(toy: Toy) -> None:
    d = toy.d.double()
    quiet = toy.block.change - torch.outer(d, d @ toy.block.change)
    pair = nearest_eigenpair(quiet - 15 * torch.outer(d, d), d)
    assert pair.value == pytest.approx(-15, abs=0.5)
    assert pair.angle < 1


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def made(request: pytest.FixtureRequest, tiny_tokenizer: Any) -> Planted:
    return planted(request.param, tokenizer=tiny_tokenizer)


@pytest.fixture(scope="module")
def report(made: Planted) -> SingularDefectsReport:
    return SETTINGS.inspect(made.checkpoint, tokens())


def test_the_planted_layers_and_direction_are_found(
    made: Planted, report: SingularDefectsReport
) -> None:
    assert report.explosion == Found(EXPLOSION, "norm")
    assert report.decay == Found(DECAY, "norm")
    assert report.explosion_layers == (EXPLOSION,) and report.decay_layers == (DECAY,)
    for layer in report.layers:
        planted_here = layer.layer in (EXPLOSION, DECAY)
        assert layer.angle < 15 if planted_here else layer.angle > 60
        assert float(layer.whole.values[0]) > 5 or not planted_here
    assert float(acute_angle(report.layers[EXPLOSION].whole.left[:, 0], made.defect)) < 10
    pair = report.eigenpairs[DECAY]
    assert pair.value < -3 and pair.angle < 10
    assert report.layers[DECAY].gain < -3


def test_the_explosion_path_is_found(made: Planted, report: SingularDefectsReport) -> None:
    path = report.path
    assert path is not None
    assert path.subspace.dimension == 1
    assert float(path.subspace.direction @ made.trigger.double()) > 0.98
    alone = (path.alone.norms > report.direction.threshold).nonzero().flatten()
    assert alone.tolist() == list(TRIGGERS)
    assert sorted(token.token_id for token in path.largest[:2]) == list(TRIGGERS)
    for token in path.largest:
        exploded = token.token_id in TRIGGERS
        assert token.prompt_norm is not None
        assert (token.prompt_norm > SIZE / 2) == exploded == (token.norm > SIZE / 2)
    # Position 0 of GPT-2 is planted itself: there every token explodes, and every random embedding.
    everywhere = made.checkpoint.anatomy.family == "gpt2"
    share = (path.initial.norms > report.direction.threshold).double().mean()
    assert float(share) == (1 if everywhere else pytest.approx(2 / 259))
    share = (path.random.norms > report.direction.threshold).double().mean()
    assert float(share) == 1 if everywhere else float(share) < 0.3
    assert float((path.second.norms > report.direction.threshold).double().mean()) < 0.02
    assert bool((path.initial.coefficients[list(TRIGGERS)] > 10).all())
    assert float(path.second.coefficients.abs().median()) < 3


def test_scans_agree_with_one_sequence_after_another(
    made: Planted, report: SingularDefectsReport
) -> None:
    path, anatomy, model = report.path, made.checkpoint.anatomy, made.checkpoint.model
    assert path is not None
    norm = model.get_submodule(norm_path(anatomy.blocks[EXPLOSION], "ug_in"))
    seen: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for token in (3, 13, 77, 258):
        with torch.no_grad():
            states = model(torch.tensor([[token]]), output_hidden_states=True).hidden_states
        assert float(path.initial.norms[token]) == pytest.approx(
            float(states[EXPLOSION + 1].norm()), rel=1e-4
        )
        assert float(path.initial.coefficients[token]) == pytest.approx(
            float(seen[-1][0, 0].double() @ path.subspace.direction), abs=1e-4
        )
    handle.remove()


def test_the_ablation_is_the_loss_with_the_direction_taken_out(
    made: Planted, report: SingularDefectsReport
) -> None:
    model, anatomy = made.checkpoint.model, made.checkpoint.anatomy
    assert report.path is not None
    v, found = report.path.subspace.direction.float(), report.path.ablation
    norm = model.get_submodule(norm_path(anatomy.blocks[EXPLOSION], "ug_in"))
    with torch.no_grad():
        loss = float(model(tokens(), labels=tokens()).loss)
        handle = norm.register_forward_pre_hook(
            lambda _, args: (args[0] - (args[0] @ v)[..., None] * v,)
        )
        without = float(model(tokens(), labels=tokens()).loss)
        handle.remove()
    assert found.loss == pytest.approx(loss, rel=1e-4)
    assert found.loss_without == pytest.approx(without, rel=1e-4)
    assert found.max_norm == pytest.approx(float(report.direction.norms.max()), rel=1e-4)
    assert found.max_norm_without < found.max_norm / 4


def test_untrained_tokens_are_masked(made: Planted) -> None:
    model, anatomy = made.checkpoint.model, made.checkpoint.anatomy
    table = model.get_submodule(anatomy.embeddings[0]).weight
    kept = table.detach().clone()
    try:
        table.data[5] *= 1e-3
        trained = paths.trained_tokens(model, anatomy)
        assert trained.sum() == 258 and not trained[5]
    finally:
        table.data.copy_(kept)


def test_the_report_is_plain_json_and_readable(report: SingularDefectsReport) -> None:
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["explosion"]["layer"] == EXPLOSION
    assert values["decay"]["eigenvalue"] < 0
    assert [row["layer"] for row in values["norms"]] == [-1, 0, 1, 2, 3, 4]
    path = values["explosion_path"]
    lengths = {len(column) for column in path["coefficients"].values()}
    assert lengths == {259}
    assert path["ablation"]["change"] == pytest.approx(
        path["ablation"]["loss_without"] - path["ablation"]["loss"], abs=1e-4
    )
    text = report.summary()
    assert f"Explosion in block {EXPLOSION}" in text and f"Decay in block {DECAY}" in text


def test_same_seed_same_report(made: Planted, report: SingularDefectsReport) -> None:
    assert SETTINGS.inspect(made.checkpoint, tokens()).to_dict() == report.to_dict()


def test_half_precision_finds_the_same_layers() -> None:
    made = planted("llama")
    made.checkpoint.model.to(torch.bfloat16)
    report = SETTINGS.inspect(made.checkpoint, tokens())
    assert report.explosion == Found(EXPLOSION, "norm") and report.decay_layers == (DECAY,)
    assert report.layers[EXPLOSION].angle < 15
    assert report.path is not None and report.path.subspace.dimension == 1
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3"])
def test_every_family_can_be_inspected(
    model_type: str, make_model: Any, tiny_tokenizer: Any
) -> None:
    """Random models have no explosion block; given one, everything is measured."""
    model = make_model(model_type)
    checkpoint = Checkpoint(model, tiny_tokenizer, anatomy_of(model))
    report = SingularDefects(samples=200, explosion=1).inspect(checkpoint, tokens())
    assert report.path is not None and not report.direction.massive
    json.dumps(report.to_dict(), allow_nan=False)


def test_given_layers_are_used(made: Planted) -> None:
    settings = SingularDefects(samples=200, explosion=0, decay=4, paths=False)
    report = settings.inspect(made.checkpoint, tokens())
    assert report.explosion == Found(0, "given") and report.decay == Found(4, "given")
    assert report.path is None and sorted(report.eigenpairs) == [0, 4]
    assert report.to_dict()["explosion_path"] is None


def test_angles_find_the_layers_where_norms_change_slowly(made: Planted) -> None:
    """A threshold in reach and norms without jumps: only the directions tell."""
    report = SETTINGS.inspect(made.checkpoint, tokens())
    direction = report.direction
    slow = direction.norms.clone()
    slow[:] = torch.linspace(1, 2, len(slow))[:, None, None]
    changed = dataclasses.replace(direction, norms=slow)
    assert SETTINGS._explosion(changed, report.layers) == Found(EXPLOSION, "angle")
    assert SETTINGS._decay(changed, report.layers, Found(EXPLOSION, "angle")) == Found(
        DECAY, "angle"
    )


def test_a_model_without_defects_says_so(made: Planted) -> None:
    kind = made.checkpoint.model.config.model_type
    plain = Checkpoint(random_model(kind, 3), None, made.checkpoint.anatomy)
    report = SETTINGS.inspect(plain, tokens())
    assert report.explosion == report.decay == Found(None, None)
    assert report.explosion_layers == report.decay_layers == ()
    assert report.path is None and not report.eigenpairs
    assert report.to_dict()["massive"] is False
    assert report.to_dict()["explosion"] == {"layer": None, "rule": None}
    assert "No massive activations" in report.summary()


def test_without_tokenizer_the_prompt_check_is_left_out(made: Planted) -> None:
    bare = dataclasses.replace(made.checkpoint, tokenizer=None)
    report = SETTINGS.inspect(bare, tokens())
    assert report.path is not None
    assert all(token.prompt_norm is None and token.text is None for token in report.path.largest)


def test_bad_settings_are_refused(made: Planted) -> None:
    with pytest.raises(SettingsError, match="samples=0"):
        SingularDefects(samples=0)
    with pytest.raises(SettingsError, match="positive"):
        SingularDefects(threshold=0)
    with pytest.raises(SettingsError, match="blocks 0 to 4"):
        SingularDefects(explosion=5).inspect(made.checkpoint, tokens())
    with pytest.raises(SettingsError, match="at least 64"):
        SingularDefects(samples=10).inspect(made.checkpoint, tokens())
    with pytest.raises(DataError, match="Pass a text"):
        SETTINGS.inspect(made.checkpoint, None)
    info = registry.find("inspect", "singular-defects")
    assert info.paper == "arXiv:2502.07004" and info.needs == ("text",)


def test_stories260k_has_none(stories_dir: Path) -> None:
    from postlude.runs.loading import load

    checkpoint = load(stories_dir)
    ids = torch.randint(3, 512, (4, 64), generator=torch.Generator().manual_seed(0))
    report = SETTINGS.inspect(checkpoint, ids)
    assert not report.direction.massive and report.explosion.layer is None
    assert not empirical_direction(checkpoint, ids).massive
