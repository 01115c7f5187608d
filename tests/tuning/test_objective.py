from __future__ import annotations

from typing import Any

import pytest

from postlude.errors import SettingsError
from postlude.tuning.objective import TuneRun


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1"),
        ({"warmup": 1.0}, "warmup is 1"),
        ({"schedule": "cosin"}, "schedule is 'cosin'"),
        ({"weight_decay": -1.0}, "weight_decay is -1"),
        ({"clip": 0.0}, "clip is 0"),
        ({"max_length": 1}, "max_length is 1"),
    ],
)
def test_settings_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        TuneRun(**values)
