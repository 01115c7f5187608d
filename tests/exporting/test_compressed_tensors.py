"""Exports to compressed-tensors, read by the library itself through transformers, and by Postlude again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import postlude as pl
from postlude.errors import CheckpointError, SettingsError, VerificationError
from postlude.exporting.compressed_tensors import CompressedTensors
from postlude.exporting.engine import export
from postlude.numerics.float8 import float8_e4m3fn
from postlude.numerics.formats import Integer, Minifloat
from postlude.numerics.schemes import Granularity, Scheme
from postlude.quantization.engine import quantize
from postlude.quantization.quarot import QuaRot
from postlude.quantization.rtn import RTN
from postlude.runs import selfcheck
from postlude.runs.loading import load
from postlude.runs.selfcheck import in_float32
from postlude.surgery.layers import QuantizedLinear

from .models import checkpoint, logits, rounded, unrounded

TOKEN = Granularity("token")
ASYMMETRIC = Integer(4, symmetric=False, range="zero")
MINI = Minifloat(4, 3, reserve_top=True)


def by_transformers(directory: Path, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype="float32", **settings).eval()


@pytest.mark.parametrize(
    ("scheme", "format"),
    [
        (Scheme(Integer(4)), "pack-quantized"),
        (Scheme(Integer(4), Granularity("group", 16)), "pack-quantized"),
        (Scheme(Integer(4), Granularity("tensor")), "pack-quantized"),
        (Scheme(Integer(8), Granularity("group", 32)), "pack-quantized"),
        (Scheme(ASYMMETRIC, Granularity("group", 8)), "pack-quantized"),
        (Scheme(ASYMMETRIC, Granularity("tensor")), "pack-quantized"),
        (Scheme(Integer(8, symmetric=False)), "pack-quantized"),
        (Scheme(MINI), "naive-quantized"),
        (Scheme(float8_e4m3fn(), scale_dtype="float32"), "naive-quantized"),
    ],
    ids=str,
)
def test_weights_are_read_by_the_library_and_by_us(
    make_model: Callable[..., Any], tmp_path: Path, scheme: Scheme, format: str
) -> None:
    from transformers import CompressedTensorsConfig

    small = rounded(checkpoint(make_model, "qwen2"), scheme)
    report = export(small, CompressedTensors(), tmp_path / "out", check=False)
    assert report["formats"] == [format]
    assert (report["dtype"], report["layers"]) == ("float32", 14)
    expected = logits(small.model)
    settings = {}
    if scheme.format.zero_point_bits:
        # Its other way of loading has no room for packed zero points.
        settings["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed `quantization_config`", UserWarning)
        theirs = by_transformers(tmp_path / "out", **settings)
    torch.testing.assert_close(logits(theirs), expected, atol=1e-5, rtol=0)
    again = load(tmp_path / "out")
    torch.testing.assert_close(logits(again.model), expected, atol=1e-5, rtol=0)
    if isinstance(scheme.format, Integer) and scheme.granularity.kind != "tensor":
        path = "model.layers.1.mlp.down_proj"
        ours, theirs = small.model.get_submodule(path), again.model.get_submodule(path)
        assert torch.equal(ours.codes, theirs.codes)
        assert torch.equal(ours.dense_weight(), theirs.dense_weight())


@pytest.mark.parametrize(
    ("weight", "input", "format"),
    [
        (Scheme(Integer(8)), Scheme(Integer(8), TOKEN), "int-quantized"),
        (
            Scheme(float8_e4m3fn()),
            Scheme(float8_e4m3fn(), TOKEN, scale_dtype="float32"),
            "float-quantized",
        ),
    ],
    ids=["int", "float"],
)
def test_rounded_activations(
    make_model: Callable[..., Any], tmp_path: Path, weight: Scheme, input: Scheme, format: str
) -> None:
    small = rounded(checkpoint(make_model), weight, input)
    report = export(small, CompressedTensors(), tmp_path / "out", check=False)
    assert report["formats"] == [format]
    theirs, again = by_transformers(tmp_path / "out"), load(tmp_path / "out")
    expected = logits(small.model)
    # The library divides by 127.5, so the values differ by their rounding; weights alone do not.
    close = (logits(theirs) - expected).norm() / expected.norm()
    assert close < 0.05
    assert (logits(again.model) - expected).norm() / expected.norm() < 0.02
    for module in theirs.modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_enabled = False
    with unrounded(small.model):
        torch.testing.assert_close(logits(theirs), logits(small.model), atol=1e-5, rtol=0)


def test_layers_left_in_float(make_model: Callable[..., Any], tmp_path: Path) -> None:
    small = rounded(checkpoint(make_model), Scheme(Integer(4)), leave=("down_proj", "k_proj"))
    export(small, CompressedTensors(), tmp_path / "out", check=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert set(config["ignore"]) == {
        "lm_head",
        *(f"model.layers.{i}.mlp.down_proj" for i in (0, 1)),
        *(f"model.layers.{i}.self_attn.k_proj" for i in (0, 1)),
    }
    expected = logits(small.model)
    for reader in (by_transformers, lambda path: load(path).model):
        torch.testing.assert_close(logits(reader(tmp_path / "out")), expected, atol=1e-5, rtol=0)


def test_two_kinds_of_layers(make_model: Callable[..., Any], tmp_path: Path) -> None:
    small = rounded(checkpoint(make_model), Scheme(Integer(4)), leave=("down_proj",))
    model = small.model
    for block in model.model.layers:
        layer = QuantizedLinear.like(block.mlp.down_proj, weight=Scheme(Integer(8)))
        layer.store(Scheme(Integer(8)).encode(block.mlp.down_proj.weight.data))
        block.mlp.down_proj = layer
    export(small, CompressedTensors(), tmp_path / "out", check=False)
    expected = logits(model)
    for reader in (by_transformers, lambda path: load(path).model):
        torch.testing.assert_close(logits(reader(tmp_path / "out")), expected, atol=1e-5, rtol=0)


def test_norms_without_weights_get_them_back(
    make_model: Callable[..., Any], tmp_path: Path
) -> None:
    # What QuaRot folds and rotates, without what it does online.
    from postlude.surgery.rewrite import fold_norms, untie_head

    original = checkpoint(make_model, tie_word_embeddings=True)
    before = logits(original.model)
    untie_head(original.model, original.anatomy)
    fold_norms(original.model, original.anatomy)
    small = rounded(original, Scheme(Integer(8)))
    export(small, CompressedTensors(), tmp_path / "out", check=False)
    theirs = logits(by_transformers(tmp_path / "out"))
    torch.testing.assert_close(theirs, logits(small.model), atol=1e-5, rtol=1e-5)
    assert (theirs - before).norm() / before.norm() < 0.1


@pytest.mark.parametrize(
    ("weight", "input", "reason"),
    [
        (Scheme(Integer(3)), None, r"3-bit weights; readers take 4 and 8.*Quantize again"),
        (Scheme(Integer(4), Granularity("group", 24)), None, r"inputs, which groups of 24 do not divide"),
        (Scheme(Integer(4, symmetric=False, range="free")), None, r"zero points outside its codes"),
        (Scheme(Minifloat(2, 1), Granularity("group", 16)), None, r"float8 weights in groups"),
        (Scheme(Minifloat(4, 3)), None, r"minifloat codes that float8_e4m3fn does not hold"),
        (Scheme(Integer(4)), Scheme(Integer(4), TOKEN), r"4-bit weights per channel with rounded activ.*w8a8kv16"),
        (Scheme(Integer(8)), Scheme(Integer(8), TOKEN, clip=0.9), r"clipped at 0\.9; readers take symmetric 8 bits"),
        (Scheme(Integer(8)), Scheme(Integer(8), Granularity("tensor")), r"per tensor.*per token"),
        (Scheme(Integer(8)), Scheme(Integer(8, symmetric=False), TOKEN), r"readers take symmetric 8 bits"),
        (None, Scheme(Integer(8), TOKEN), r"keeps its weight in floating point"),
    ],
)  # fmt: skip
def test_what_it_cannot_hold_is_refused(
    make_model: Callable[..., Any], tmp_path: Path, weight: Scheme, input: Scheme, reason: str
) -> None:
    small = rounded(checkpoint(make_model), weight, input)
    with pytest.raises(SettingsError, match=r"compressed-tensors cannot hold.*" + reason):
        export(small, CompressedTensors(), tmp_path / "out", check=False)
    assert list(tmp_path.iterdir()) == []


def test_rotations_cache_and_norms_are_refused(
    make_model: Callable[..., Any], tmp_path: Path
) -> None:
    tokens = torch.zeros(2, 8, dtype=torch.long)
    rotated = quantize(
        checkpoint(make_model), QuaRot(activations=16, kv=16, rounding="nearest"), tokens
    )
    with pytest.raises(SettingsError, match=r"online \(BlockHadamard\).*Export a checkpoint made"):
        export(rotated, CompressedTensors(), tmp_path / "out")
    cached = quantize(checkpoint(make_model), RTN(activations=16), None)
    with pytest.raises(SettingsError, match=r"keys and values are quantized.*kv16"):
        export(cached, CompressedTensors(), tmp_path / "out")
    gpt2 = rounded(checkpoint(make_model, "gpt2"), Scheme(Integer(4)))
    with pytest.raises(SettingsError, match=r"Conv1D"):
        export(gpt2, CompressedTensors(), tmp_path / "out")


def test_scales_must_fit_the_type_of_the_model(
    make_model: Callable[..., Any], tmp_path: Path
) -> None:
    original = checkpoint(make_model)
    original.model.to(torch.bfloat16)
    small = rounded(original, Scheme(Integer(4)))
    report = export(small, CompressedTensors(), tmp_path / "out", check=False)
    assert report["dtype"] == "float16"
    with in_float32(small.model):
        expected = logits(small.model)
    theirs = logits(by_transformers(tmp_path / "out"))
    torch.testing.assert_close(theirs, expected, atol=5e-3, rtol=0)
    with pytest.raises(SettingsError, match=r"do not fit bfloat16 exactly; use dtype=auto"):
        export(small, CompressedTensors(dtype="bfloat16"), tmp_path / "other", check=False)
    with pytest.raises(SettingsError, match=r"dtype is 'int8'; expected auto, float16"):
        CompressedTensors(dtype="int8")  # type: ignore[arg-type]


def test_float_model_is_written_as_it_is(make_model: Callable[..., Any], tmp_path: Path) -> None:
    original = checkpoint(make_model)
    export(original, CompressedTensors(), tmp_path / "out", check=False)
    assert torch.equal(logits(by_transformers(tmp_path / "out")), logits(original.model))
    with open(tmp_path / "out" / "model.safetensors", "r+b") as file:
        file.seek(-3, 2)
        file.write(b"?")
    with pytest.raises(CheckpointError, match="is damaged: its SHA-256"):
        pl.load(tmp_path / "out")


@pytest.mark.slow
def test_a_fresh_process_reads_it(make_model: Callable[..., Any], tmp_path: Path) -> None:
    small = rounded(checkpoint(make_model), Scheme(ASYMMETRIC))
    report = pl.export(small, "compressed-tensors", tmp_path / "out")
    assert report["reload_max_difference"] < 1e-5
    assert report["bytes"] == sum(f.stat().st_size for f in (tmp_path / "out").iterdir())


def test_another_model_leaves_nothing(
    make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = rounded(checkpoint(make_model), Scheme(Integer(4)))
    monkeypatch.setattr(selfcheck, "fresh_logits", lambda *args: logits(small.model, args[2]) + 1)
    with pytest.raises(VerificationError, match=r"is another model: its outputs are .* away"):
        export(small, CompressedTensors(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_transformers_reads_no_transforms(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """Why rotations are refused: transformers drops what it is told of them. Once it reads them, this fails."""
    file = tmp_path / "out" / "config.json"
    quantized = rounded(checkpoint(make_model), Scheme(Integer(4), Granularity("group", 16)))
    export(quantized, CompressedTensors(), tmp_path / "out", check=False)
    without = logits(by_transformers(tmp_path / "out"))
    config = json.loads(file.read_text())
    # Of the input and not of the weight: it changes every logit where it is read.
    apply = [{"targets": ["Linear"], "location": "input", "ignore": ["lm_head"]}]
    config["quantization_config"]["transform_config"] = {
        "config_groups": {"u": {"type": "hadamard", "apply": apply, "head_dim": 4}}
    }
    file.write_text(json.dumps(config))
    model = by_transformers(tmp_path / "out")
    assert torch.equal(logits(model), without)
    # The library itself does read it.
    from compressed_tensors.transform import TransformConfig, apply_transform_config

    told = TransformConfig.model_validate(config["quantization_config"]["transform_config"])
    apply_transform_config(model, told)
    assert (logits(model) - without).abs().max() > 0.1
