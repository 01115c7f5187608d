"""What is refused where accelerate is asked to shard; tests/runs/test_ranks.py shows on two ranks that it works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from postlude.errors import SettingsError
from postlude.tuning.objective import TuneRun
from postlude.tuning.run import tune
from postlude.tuning.sharded import check_cut, is_sharded, local, trained_on
from postlude.tuning.supervised import objective_of


@pytest.mark.parametrize(
    ("rule", "settings", "message"),
    [("asft", {}, "postlude tune prior"), ("sft", {"adapter": "lora"}, "an adapter is trained")],
)
def test_refused_before_anything_is_trained(
    tiny: Callable[..., Any],
    demonstrations: Path,
    monkeypatch: pytest.MonkeyPatch,
    rule: str,
    settings: dict[str, Any],
    message: str,
) -> None:
    from postlude.tuning.adapters import Adapter

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    adapter = Adapter(settings["adapter"]) if settings else None
    with pytest.raises(SettingsError, match=message):
        tune(tiny(), demonstrations, objective_of(rule), TuneRun(steps=1), adapter=adapter)


def test_a_model_in_one_piece(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny().model
    parameter = next(model.parameters())
    assert local(parameter) is parameter
    assert not is_sharded(model)
    assert trained_on(model) == "cpu"
    check_cut(model)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SettingsError, match="has not: it does so with FSDP version 2"):
        check_cut(model)
