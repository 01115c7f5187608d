"""What every registered quantizer must do with a denoiser and a vision model, or refuse to do."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import postlude as pl
from postlude import registry
from postlude.errors import SettingsError
from postlude.evaluation.size import size_of
from postlude.quantization.engine import FLOAT
from postlude.registry import MethodInfo
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.directory import RunDirectory
from postlude.surgery.anatomy import anatomy_of
from postlude.surgery.layers import quantized_linears

from ..surgery.other_models import build_other
from .bench import marked

MODELS = {"dit": "diffusion", "vit": "vision"}
METHODS = registry.available("quantize")
# A branch of a rank far below the width of 32, and few steps to fit it.
QUICK = {"rank": 3, "iterations": 6}
FOUR = {"weights": 4, "activations": 4}
EIGHT = {"weights": 8, "activations": 8}


def able(info: MethodInfo, name: str) -> bool:
    return MODELS[name] in info.settings.kinds  # type: ignore[attr-defined]


each_pair = pytest.mark.parametrize(
    ("info", "name"),
    [
        pytest.param(info, name, id=f"{info.name}-{name}", marks=marked(info))
        for info in METHODS
        for name in MODELS
        if able(info, name)
    ],
)


@functools.cache
def float_model(name: str) -> Checkpoint:
    model = build_other(name)
    return Checkpoint(model=model, tokenizer=None, anatomy=anatomy_of(model))


@functools.cache
def calibration(name: str) -> list[dict[str, Any]]:
    return [float_model(name).anatomy.example(rows=8, seed=seed) for seed in (1, 2)]


def outputs(checkpoint: Checkpoint) -> Tensor:
    with torch.no_grad():
        return checkpoint.model(**checkpoint.anatomy.example(rows=4))[0]


def error(name: str, checkpoint: Checkpoint) -> float:
    exact = outputs(float_model(name))
    return float((outputs(checkpoint) - exact).norm() / exact.norm())


def quantized(info: MethodInfo, name: str, **changes: Any) -> Checkpoint:
    return _quantized(info, name, tuple(sorted(changes.items())))


@functools.cache
def _quantized(info: MethodInfo, name: str, changes: tuple[tuple[str, Any], ...]) -> Checkpoint:
    return afresh(info, name, **dict(changes))


def afresh(info: MethodInfo, name: str, *, out: Path | None = None, **changes: Any) -> Checkpoint:
    quick = {key: value for key, value in QUICK.items() if key in info.options}
    settings = info.settings(**quick, **changes)
    return pl.quantize(float_model(name), settings, calibration=calibration(name), out=out)


def states_equal(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )


@each_pair
def test_rewrites_alone_change_nothing(info: MethodInfo, name: str) -> None:
    original = float_model(name)
    checkpoint = dataclasses.replace(original, model=copy.deepcopy(original.model))
    settings = info.settings()
    settings.fold(checkpoint)
    settings.rewrite(checkpoint, settings.statistics(checkpoint, calibration(name), 0), 0)
    torch.testing.assert_close(outputs(checkpoint), outputs(original), atol=1e-4, rtol=1e-4)


@each_pair
def test_more_bits_are_closer(info: MethodInfo, name: str) -> None:
    four, eight = (quantized(info, name, **bits) for bits in (FOUR, EIGHT))
    # Neighbours on a grid of powers of 2 or its root keep their ratio, however many codes there are.
    coarse = info.name in ("repq-vit", "repquant", "iands-vit", "mptq-greedy")
    # Ranges that calibration fixed cut off what it did not show.
    fixed = info.settings.kinds == ("vision",)  # type: ignore[attr-defined]
    assert error(name, eight) < error(name, four) / (1 if coarse else 3 if fixed else 4)
    assert error(name, eight) < (0.1 if coarse else 0.05)
    assert eight.made_by()["weight_error"] < four.made_by()["weight_error"]


@each_pair
def test_every_linear_is_rounded_or_reported(info: MethodInfo, name: str) -> None:
    made = quantized(info, name, **FOUR)
    made_by = made.made_by()
    assert made_by["method"] == info.name
    assert made_by["settings"]["kv"] == FLOAT
    rounded = {path for path, layer in quantized_linears(made.model) if layer.weight_scheme}
    named = {*made.anatomy.linears(), *made.anatomy.kept()}
    assert sorted(named - rounded) == made_by["kept"]
    assert set(made.anatomy.kept()) <= set(made_by["kept"])
    assert rounded


@each_pair
def test_stopped_and_resumed_saved_and_loaded(
    info: MethodInfo, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the second block; the same files as undisturbed, which hold the model bit for bit."""
    made = quantized(info, name, **FOUR)
    whole, out = tmp_path / "whole", tmp_path / "out"
    dataclasses.replace(made).save(whole)
    unit = RunDirectory.unit
    computed: list[str] = []

    class Stopped(Exception):
        pass

    def stopping(
        self: RunDirectory, unit_name: str, compute: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        if unit_name == "block-0001":
            raise Stopped
        return unit(self, unit_name, compute)

    def counting(
        self: RunDirectory, unit_name: str, compute: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        def noted() -> Mapping[str, Tensor]:
            computed.append(unit_name)
            return compute()

        return unit(self, unit_name, noted)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "unit", stopping)
        with pytest.raises(Stopped):
            afresh(info, name, out=out, **FOUR)
    assert not out.exists()
    monkeypatch.setattr(RunDirectory, "unit", counting)
    afresh(info, name, out=out, **FOUR)
    assert computed == ["block-0001"]
    files = sorted(file.relative_to(whole) for file in whole.rglob("*"))
    assert sorted(file.relative_to(out) for file in out.rglob("*")) == files
    assert all((out / file).read_bytes() == (whole / file).read_bytes() for file in files)

    again = pl.load(out)
    assert states_equal(again.model, made.model)
    assert torch.equal(outputs(again), outputs(made))
    assert size_of(again)["bytes"] == sum(file.stat().st_size for file in again.files())
    held = sum(t.numel() * t.element_size() for t in again.model.state_dict().values())
    stored = [t for file in again.files() for t in load_file(file).values()]
    assert held == sum(t.numel() * t.element_size() for t in stored)
    with pytest.raises(SettingsError, match="already quantized"):
        pl.quantize(again, info.settings(), calibration=calibration(name))


@pytest.mark.parametrize(
    ("info", "name"),
    [(info, name) for info in METHODS for name in MODELS if not able(info, name)],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_methods_for_other_models_say_so(info: MethodInfo, name: str) -> None:
    said = rf"{info.name} quantizes .* models, and this is a {MODELS[name]} model \({name}\)\. Methods .* rtn"
    with pytest.raises(SettingsError, match=said):
        pl.quantize(float_model(name), info.settings(), calibration=calibration(name))
