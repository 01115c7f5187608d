from __future__ import annotations

from pathlib import Path

import pytest

import postlude as pl
from postlude import registry
from postlude.errors import ArchitectureError
from postlude.registry import MethodInfo
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import anatomy_of
from postlude.zoo.tiny_dit import build


@pytest.mark.parametrize("info", registry.available("export"), ids=lambda info: info.name)
def test_a_denoiser_has_no_place_in_these_formats(info: MethodInfo, tmp_path: Path) -> None:
    model = build(width=32, layers=1, heads=2)
    with pytest.raises(ArchitectureError, match=r"is a diffusion model \(dit\)"):
        pl.export(Checkpoint(model, None, anatomy_of(model)), info.settings(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
