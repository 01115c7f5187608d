from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from postlude.errors import CheckpointError, OutputExistsError, SettingsError
from postlude.sampling.drift import DriftStatistics
from postlude.sampling.paired_runs import PairedRun, collect

from .beds import EULER, SOLVER, set_to, statistics_of

pytestmark = pytest.mark.filterwarnings("ignore:.*copy keyword:DeprecationWarning")


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    noise = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    found = collect(
        lambda x, t: 0.5 * x + 0.001 * t,
        lambda x, t: 0.5 * x + 0.001 * t + 0.1 * torch.sin(7 * x),
        SOLVER(lambda_min_clipped=-5.1, trained_betas=[0.01] * 1000),
        [PairedRun(noise)],
        steps=6,
        channelwise=True,
        fingerprints=("aa", "bb"),
        conditions={"guidance": 1.5},
    )
    file = found.save(tmp_path / "new" / "drift.safetensors")
    again = DriftStatistics.load(file)
    for name, value in vars(found).items():
        if isinstance(value, Tensor):
            assert torch.equal(getattr(again, name), value)
            assert getattr(again, name).dtype == value.dtype
        else:
            assert getattr(again, name) == value
    again.check_scheduler(SOLVER(lambda_min_clipped=-5.1, trained_betas=[0.01] * 1000))
    assert file.stat().st_size < 20_000


def test_files_that_cannot_be(tmp_path: Path) -> None:
    statistics = statistics_of(set_to(EULER()), 0.1)
    file = statistics.save(tmp_path / "drift.safetensors")
    with pytest.raises(OutputExistsError, match=r"drift\.safetensors already exists"):
        statistics.save(file)
    statistics.save(file, overwrite=True)
    with pytest.raises(OutputExistsError, match="is a directory, and the output is a file"):
        statistics.save(tmp_path, overwrite=True)
    with pytest.raises(CheckpointError, match=r"There is no file .*postlude sample calibrate"):
        DriftStatistics.load(tmp_path / "none.safetensors")
    other = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(2)}, other)
    with pytest.raises(CheckpointError, match="holds no drift statistics"):
        DriftStatistics.load(other)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"broken\.safetensors is damaged|truncated"):
        DriftStatistics.load(broken)


# ---------------------------------------------------------------- what the statistics hold for


def test_models_and_conditions_are_checked() -> None:
    statistics = replace(
        statistics_of(set_to(EULER()), 0.1),
        reference="a" * 64,
        approximate="b" * 64,
        conditions={"guidance": 1.5},
    )
    statistics.check_models(reference="a" * 64, approximate="b" * 64)
    statistics.check_models(approximate="")
    with pytest.raises(
        SettingsError, match="of another approximate model: its fingerprint is bbbb"
    ):
        statistics.check_models(approximate="c" * 64)
    with pytest.raises(SettingsError, match="of another reference model"):
        statistics.check_models(reference="c" * 64)
    statistics.check_conditions(guidance=1.5, unknown=3)
    with pytest.raises(SettingsError, match=r"made with guidance = 1\.5, and now it is 4\.0"):
        statistics.check_conditions(guidance=4.0)
