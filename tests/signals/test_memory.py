from __future__ import annotations

import pytest

from postlude.errors import SettingsError
from postlude.signals import memory
from postlude.signals.memory import available_memory, check_memory, predicted_memory
from postlude.zoo.smn.networks import settings_for


def test_it_grows_with_what_matters() -> None:
    siren = settings_for("siren", {"width": 64})
    small = predicted_memory(siren, 256, 256, 16_384)
    # What a layer keeps is at least its output: four of 64 numbers a point.
    assert small > 4 * 64 * 4 * 16_384
    assert predicted_memory(siren, 256, 256, 65_536) > 3 * small
    # A step is never larger than the picture.
    whole = predicted_memory(siren, 256, 256, 65_536)
    assert predicted_memory(siren, 256, 256, 10**9) == whole
    assert predicted_memory(siren, 30_000, 30_000, 1024) > 3 * 9e8 * 2
    wide = settings_for("siren", {"width": 256})
    assert predicted_memory(wide, 256, 256, 16_384) > 3 * small


def test_refused_with_what_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for("smn", {"width": 64})
    assert check_memory(settings, 64, 64, 1024) < available_memory()
    monkeypatch.setattr(memory, "available_memory", lambda: 2**20)
    with pytest.raises(SettingsError, match=r"takes about .* GiB and 0.0 GiB are free.*--batch"):
        check_memory(settings, 64, 64, 1024)
