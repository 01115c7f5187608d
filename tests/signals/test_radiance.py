from __future__ import annotations

import pytest

from postlude.signals.radiance import evaluate_field, fit_field, view
from postlude.signals.training import Training
from postlude.zoo.smn.networks import build, settings_for
from postlude.zoo.smn.radiance import Field, cameras


@pytest.mark.parametrize("name", ["smn", "siren"])
def test_a_field_is_fitted(name: str) -> None:
    views = cameras(3, 8)
    values = {"smn": {"variant": "field"}, "siren": {"omega": 5.0}}[name]
    sizes = {"width": 12, "in_features": Field.in_features(), "out_features": 5}
    field = Field(build(settings_for(name, {**sizes, **values}), 0))
    before = evaluate_field(field, views, samples=8)
    training = Training(steps=25, learning_rate=3e-3, batch=512)
    losses = fit_field(field, views, training, samples=8)
    assert len(losses) == 25
    assert evaluate_field(field, views, samples=8) > before + 0.2
    assert view(field, views[0], samples=8).shape == (8, 8, 3)
