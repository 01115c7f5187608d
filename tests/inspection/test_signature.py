from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from postlude import registry
from postlude.errors import DataError, SettingsError
from postlude.inspection import empirical
from postlude.inspection.empirical import empirical_direction
from postlude.inspection.signature import Signature, compare, compare_signatures
from postlude.numerics.directions import acute_angle
from postlude.runs.checkpoint import Checkpoint

from .planted import EXPLOSION, TRIGGERS, Planted, planted, random_model, tokens


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def made(request: pytest.FixtureRequest, tiny_tokenizer: Any) -> Planted:
    return planted(request.param, tokenizer=tiny_tokenizer)


def fine_tuned(model: Any, ids: Tensor) -> Any:
    """A copy after a few steps on other text, without the begin of every sequence."""
    copied = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(copied.parameters(), lr=2e-3)
    for step in range(5):
        batch = torch.randint(0, 259, ids.shape, generator=torch.Generator().manual_seed(step))
        loss = copied(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return copied.eval()


def test_the_planted_direction_is_found(made: Planted) -> None:
    report = Signature().inspect(made.checkpoint, tokens())
    direction = report.direction
    assert report.massive and direction.automatic
    assert float(acute_angle(direction.vector, made.defect)) < 4
    assert direction.layers == (1, 2)
    assert direction.spread < 2
    assert TRIGGERS[0] in [token.token_id for token in direction.tokens if token.later]
    as_json = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert as_json["massive"] is True
    assert len(as_json["vector"]) == as_json["hidden_size"] == 64
    assert "massive hidden states" in report.summary()


def test_the_direction_is_the_mean_of_states_above_the_threshold(made: Planted) -> None:
    """Against transformers' own hidden states, in one plain loop."""
    ids = tokens()
    with torch.no_grad():
        states = made.checkpoint.model(ids, output_hidden_states=True).hidden_states[:-1]
    threshold = 300.0
    rows = torch.cat([layer[layer.norm(dim=-1) > threshold] for layer in states]).double()
    found = empirical_direction(made.checkpoint, ids, threshold)
    assert found.states == len(rows) and not found.automatic
    torch.testing.assert_close(found.vector, rows.mean(0), rtol=1e-5, atol=1e-4)
    angles = [float(acute_angle(rows[i], rows[j])) for i in range(len(rows)) for j in range(i)]
    assert found.spread == pytest.approx(sum(angles) / len(angles), abs=1e-3)
    at_start = sum(int((layer[:, 0].norm(dim=-1) > threshold).sum()) for layer in states)
    assert found.initial_share == pytest.approx(at_start / len(rows))


def test_many_states_are_sampled_for_the_spread(
    made: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = empirical_direction(made.checkpoint, tokens())
    monkeypatch.setattr(empirical, "MOST_STATES", 3)
    some = empirical_direction(made.checkpoint, tokens())
    torch.testing.assert_close(some.vector, whole.vector)
    assert some.states == whole.states
    assert some.spread == pytest.approx(whole.spread, abs=2)


def test_a_fine_tuned_copy_is_related_and_another_seed_is_not(made: Planted) -> None:
    model = made.checkpoint.model
    kind = model.config.model_type
    tuned = dataclasses.replace(made.checkpoint, model=fine_tuned(model, tokens()))
    result = compare(
        {"base": made.checkpoint, "tuned": tuned, "other": planted(kind, seed=1).checkpoint},
        tokens(),
    )
    pairs = {(pair.first, pair.second): pair for pair in result.pairs}
    assert pairs["base", "tuned"].angle < 10
    assert pairs["base", "tuned"].verdict == "related"
    assert pairs["base", "other"].angle > 65
    assert pairs["base", "other"].verdict == pairs["tuned", "other"].verdict == "unrelated"
    torch.testing.assert_close(result.angles, result.angles.T)
    assert float(result.angles.diagonal().abs().max()) < 1e-6
    as_json = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert as_json["pairs"][0]["angle_degrees"] < 10
    assert [model["name"] for model in as_json["models"]] == ["base", "tuned", "other"]
    assert "related" in result.summary()


def test_a_model_without_massive_activations_says_so(made: Planted) -> None:
    kind = made.checkpoint.model.config.model_type
    plain = Checkpoint(random_model(kind, 5), None, made.checkpoint.anatomy)
    report = Signature().inspect(plain, tokens())
    assert not report.massive and report.to_dict()["massive"] is False
    assert report.direction.states == 1  # a hundredth of 96 tokens
    assert "No massive activations" in report.summary()
    both = compare([report, Signature().inspect(made.checkpoint, tokens())])
    assert both.pairs[0].verdict == "no verdict"
    assert "says nothing certain" in both.summary()
    with pytest.raises(DataError, match="Lower the threshold"):
        Signature(threshold=1e6).inspect(plain, tokens())


def test_different_widths_are_refused_with_a_reason(made: Planted, make_model: Any) -> None:
    from postlude.surgery.anatomy import anatomy_of

    model = make_model("llama")
    narrow = Signature().inspect(Checkpoint(model, None, anatomy_of(model)), tokens())
    wide = Signature().inspect(made.checkpoint, tokens())
    with pytest.raises(SettingsError, match="wide has 64, narrow has 32"):
        compare_signatures({"wide": wide, "narrow": narrow})
    with pytest.raises(SettingsError, match="two or more"):
        compare_signatures({"wide": wide})
    with pytest.raises(SettingsError, match="one for each"):
        compare([wide, wide, wide], [tokens(), tokens()])
    with pytest.raises(DataError, match="Pass a text"):
        compare([made.checkpoint, wide])


def test_bad_settings_are_refused(made: Planted) -> None:
    with pytest.raises(SettingsError, match="positive"):
        Signature(threshold=-1)
    with pytest.raises(DataError, match="takes 2 to 64"):
        Signature().inspect(made.checkpoint, tokens(length=8)[:, :1])
    assert registry.find("inspect", "signature").settings is Signature


def test_the_planted_layers_are_where_the_norm_jumps(made: Planted) -> None:
    norms = empirical_direction(made.checkpoint, tokens()).norms.flatten(1).amax(1)
    assert float(norms[EXPLOSION + 1] / norms[EXPLOSION]) > 20


def test_stories260k_has_none(stories_dir: Path) -> None:
    from postlude.runs.loading import load

    checkpoint = load(stories_dir)
    ids = torch.randint(3, 512, (4, 64), generator=torch.Generator().manual_seed(0))
    assert not Signature().inspect(checkpoint, ids).massive
