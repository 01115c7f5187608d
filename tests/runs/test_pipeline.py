"""Denoisers in the layout of diffusers, and vision models: loaded, refused, saved."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from postlude.errors import (
    ArchitectureError,
    CheckpointError,
    MissingDependencyError,
    NonFiniteError,
    OutputExistsError,
)
from postlude.runs.loading import load

from ..surgery.other_models import DENOISERS, VISION_MODELS, build_other

INDEX = {
    "_class_name": "SomePipeline",
    "_diffusers_version": "0.42.0",
    "transformer": ["diffusers", "DiTTransformer2DModel"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "safety_checker": [None, None],
}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with a part that is neither denoiser nor scheduler."""
    directory = tmp_path_factory.mktemp("pipelines") / "whole"
    build_other("dit").save_pretrained(directory / "transformer")
    diffusers.EulerDiscreteScheduler(num_train_timesteps=500).save_pretrained(
        directory / "scheduler"
    )
    (directory / "text_encoder").mkdir()
    (directory / "text_encoder" / "config.json").write_text('{"of": "something else"}')
    (directory / "model_index.json").write_text(json.dumps(INDEX))
    return directory


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def same_output(one: Any, other: Any) -> bool:
    batch = one.anatomy.example()
    with torch.no_grad():
        return torch.equal(one.model(**batch)[0], other.model(**batch)[0])


def test_a_pipeline_is_loaded_and_saved_with_all_its_parts(whole: Path, tmp_path: Path) -> None:
    checkpoint = load(whole)
    assert (checkpoint.kind, checkpoint.anatomy.family, checkpoint.path) == (
        "diffusion",
        "dit",
        whole,
    )
    assert checkpoint.scheduler.config.num_train_timesteps == 500
    assert checkpoint.tokenizer is None
    assert not checkpoint.model.training
    assert all(parameter.requires_grad for parameter in checkpoint.model.parameters())
    out = checkpoint.save(tmp_path / "out")
    again = load(out)
    assert same_output(checkpoint, again)
    assert checkpoint.fingerprint() == again.fingerprint()
    assert again.scheduler.config == checkpoint.scheduler.config
    assert (out / "text_encoder" / "config.json").read_text() == '{"of": "something else"}'
    assert json.loads((out / "model_index.json").read_text()) == INDEX
    # diffusers reads both.
    other = diffusers.DiTTransformer2DModel.from_pretrained(out / "transformer")
    assert torch.equal(other.proj_out_1.weight, checkpoint.model.proj_out_1.weight)
    with pytest.raises(OutputExistsError):
        checkpoint.save(out)
    checkpoint.save(out, overwrite=True)
    assert [file.name for file in checkpoint.files()] == ["diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("name", DENOISERS)
def test_a_transformer_alone(name: str, tmp_path: Path) -> None:
    model = build_other(name)
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    checkpoint = load(tmp_path / "model")
    assert checkpoint.scheduler is None
    assert checkpoint.pipeline is None
    batch = checkpoint.anatomy.example()
    with torch.no_grad():
        assert torch.equal(checkpoint.model(**batch)[0], model(**batch)[0])
    checkpoint.save(tmp_path / "out")
    assert not (tmp_path / "out" / "model_index.json").exists()
    assert same_output(load(tmp_path / "out"), checkpoint)


def test_types(whole: Path, tmp_path: Path) -> None:
    half = load(whole, dtype="bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    half.save(tmp_path / "half")
    assert load(tmp_path / "half").model.dtype == torch.bfloat16
    assert load(tmp_path / "half", dtype="float32").model.dtype == torch.float32


@pytest.mark.parametrize("name", VISION_MODELS)
def test_vision_models(name: str, tmp_path: Path) -> None:
    model = build_other(name)
    model.save_pretrained(tmp_path / "model")
    checkpoint = load(tmp_path / "model")
    assert checkpoint.kind == "vision"
    assert type(checkpoint.model) is type(model)
    batch = checkpoint.anatomy.example()
    with torch.no_grad():
        assert torch.equal(checkpoint.model(**batch)[0], model(**batch)[0])
    checkpoint.save(tmp_path / "out")
    assert same_output(load(tmp_path / "out"), checkpoint)


def test_an_image_processor_goes_along(tmp_path: Path) -> None:
    build_other("vit").save_pretrained(tmp_path / "model")
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    processor.save_pretrained(tmp_path / "model")
    checkpoint = load(tmp_path / "model")
    assert checkpoint.processor.size["height"] == 8
    checkpoint.save(tmp_path / "out")
    assert load(tmp_path / "out").processor.size["height"] == 8


# What is refused


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_pipelines_that_cannot_be_loaded(copy: Path) -> None:
    index = copy / "model_index.json"
    for change, error, said in [
        (
            lambda i: i.pop("transformer"),
            CheckpointError,
            r"pipeline without a transformer: .*names scheduler, text_e",
        ),
        (
            lambda i: i.update(transformer=[None, None]),
            CheckpointError,
            "without a transformer.*SanaTransformer",
        ),
        (
            lambda i: i.update(transformer=["diffusers", "UNet2DModel"]),
            ArchitectureError,
            "'UNet2DModel'. Known",
        ),
        (
            lambda i: i.update(transformer=["my_code", "DiT"]),
            CheckpointError,
            "DiT from 'my_code'.*not run",
        ),
        (
            lambda i: i.update(scheduler=["diffusers", "DiTPipeline"]),
            CheckpointError,
            "the scheduler DiTPipeline",
        ),
        (
            lambda i: i.update(scheduler=["os", "system"]),
            CheckpointError,
            "the scheduler system of 'os'",
        ),
    ]:
        index.write_text(json.dumps(INDEX))
        edit(index, change)
        with pytest.raises(error, match=said):
            load(copy)
    index.write_text(json.dumps(INDEX))
    (copy / "scheduler" / "scheduler_config.json").rename(copy / "gone")
    with pytest.raises(CheckpointError, match="lacks scheduler/scheduler_config"):
        load(copy)
    (copy / "gone").write_text("{")
    (copy / "gone").rename(copy / "scheduler" / "scheduler_config.json")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load(copy)
    shutil.rmtree(copy / "transformer")
    with pytest.raises(CheckpointError, match="lacks transformer/config"):
        load(copy)


def test_configurations_that_cannot_be_built(copy: Path) -> None:
    file = copy / "transformer" / "config.json"
    good = file.read_text()
    for change, error, said in [
        (lambda c: c.pop("_class_name"), CheckpointError, "names no"),
        (lambda c: c.update(_class_name="UNet2DModel"), ArchitectureError, "UNet2DModel"),
        (
            lambda c: c.update(norm_type="else"),
            CheckpointError,
            "cannot build a DiTTransformer2DModel",
        ),
        (
            lambda c: c.update(num_layers=3),
            CheckpointError,
            r"lacks \d+ weights of a DiT.*transformer_blocks.2",
        ),
        (
            lambda c: c.update(num_layers=1),
            CheckpointError,
            r"holds \d+ tensors that a DiT.* no place for",
        ),
        (
            lambda c: c.update(in_channels=3),
            CheckpointError,
            r"pos_embed.proj.weight has shape \(32, 2, 2, 2\)",
        ),
        (
            lambda c: c.update(quantization_config={"quant_method": "gguf"}),
            CheckpointError,
            "quantized by 'gguf'",
        ),
    ]:
        file.write_text(good)
        edit(file, change)
        with pytest.raises(error, match=said):
            load(copy)


def test_weights_that_cannot_be_used(copy: Path) -> None:
    tensors = load_file(copy / WEIGHTS)
    broken = {name: tensor.clone() for name, tensor in tensors.items()}
    broken["proj_out_1.bias"][3] = torch.nan
    save_file(broken, copy / WEIGHTS)
    with pytest.raises(NonFiniteError, match=r"proj_out_1\.bias"):
        load(copy)
    save_file({name: t for name, t in tensors.items() if name != "proj_out_1.bias"}, copy / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"lacks 1 weights.*proj_out_1\.bias"):
        load(copy)
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        load(copy)
    (copy / WEIGHTS).rename((copy / WEIGHTS).with_suffix(".bin"))
    with pytest.raises(
        CheckpointError, match=r"only as pickle.*expected diffusion_pytorch_model\.safetensors"
    ):
        load(copy)


@pytest.mark.parametrize("library", ["diffusers", "accelerate"])
def test_without_a_library(library: str, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    present = importlib.import_module

    def absent(name: str, package: str | None = None) -> Any:
        if name == library:
            raise ImportError(name)
        return present(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    said = rf"needs {library}, .* pip install 'postlude\[diffusion\]'"
    with pytest.raises(MissingDependencyError, match=said):
        load(whole)


def test_vision_models_of_other_classes(tmp_path: Path) -> None:
    build_other("vit").save_pretrained(tmp_path)
    edit(tmp_path / "config.json", lambda c: c.update(architectures=["ViTForMaskedImageModeling"]))
    with pytest.raises(
        CheckpointError, match="expected one of ViTModel, ViTForImageClassification"
    ):
        load(tmp_path)


def test_what_works_on_language_models_only(whole: Path) -> None:
    with pytest.raises(
        ArchitectureError,
        match=r"whole is a diffusion model \(dit\); this works on language models",
    ):
        _ = load(whole).context
