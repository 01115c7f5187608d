"""Denoisers in the layout of diffusers: a pipeline directory, or the directory of its transformer alone.

::

    DIRECTORY/model_index.json                       which part is of which class
    DIRECTORY/transformer/config.json, *.safetensors
    DIRECTORY/scheduler/scheduler_config.json
    DIRECTORY/...                                    parts that are neither (text encoder, vae): copied as they are

The transformer is built from its configuration and filled by name, so that a quantized one, whose configuration
describes its layers, takes the same way. Only classes of diffusers itself are built: no code comes from a directory.
"""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from postlude.errors import CheckpointError, MissingDependencyError
from postlude.runs.checksums import finish_weights
from postlude.runs.quiet import quiet_diffusers
from postlude.runs.weights import check_depth, check_weights, read_json, weight_files
from postlude.surgery.anatomy import check_supported, supported_model_types

__all__ = ["INDEX", "Pipeline", "denoiser_files", "is_denoiser", "load_denoiser", "write_denoiser"]

INDEX = "model_index.json"
TRANSFORMER, SCHEDULER = "transformer", "scheduler"
_WEIGHTS = "diffusion_pytorch_model"
_METHOD = "postlude"


@dataclass(frozen=True)
class Pipeline:
    """The pipeline that a denoiser is a part of.

    Attributes:
        index: what its model_index.json says.
        directory: where its other parts are; None where it has none.
    """

    index: dict[str, Any]
    directory: Path | None = None

    def others(self) -> list[Path]:
        """The directories of its other parts."""
        if self.directory is None:
            return []
        own = (TRANSFORMER, SCHEDULER)
        named = [n for n, value in self.index.items() if isinstance(value, list) and n not in own]
        return [self.directory / name for name in named if (self.directory / name).is_dir()]


def is_denoiser(directory: Path) -> bool:
    """Whether a directory is in the layout of diffusers."""
    file = directory / "config.json"
    return "_class_name" in read_json(file) if file.is_file() else _is_pipeline(directory)


def _is_pipeline(directory: Path) -> bool:
    return (directory / INDEX).is_file() and not (directory / "config.json").is_file()


def denoiser_files(directory: Path) -> list[Path]:
    """The safetensors files of the denoiser of a pipeline, or of a transformer alone."""
    part = directory / TRANSFORMER if _is_pipeline(directory) else directory
    return weight_files(part, _WEIGHTS)


def load_denoiser(directory: Path, dtype: torch.dtype | str) -> tuple[Any, Any, Pipeline | None]:
    """The transformer, its scheduler, and the pipeline they are a part of.

    Args:
        directory: of a pipeline or of a transformer.
        dtype: of floating-point parameters and buffers; ``"auto"`` leaves them as stored.

    Raises:
        CheckpointError: no transformer, code of its own, missing or surplus weights, a damaged file.
        NonFiniteError: a tensor holds NaN or infinity.
        ArchitectureError: no anatomy describes the class.
        MissingDependencyError: diffusers is not installed.
    """
    pipeline: Pipeline | None = None
    scheduler: Any = None
    part = directory
    if _is_pipeline(directory):
        index = read_json(directory / INDEX)
        pipeline = Pipeline(index, directory)
        part = _part_with_weights(directory, index)
    config = read_json(part / "config.json")
    name = config.get("_class_name")
    if not isinstance(name, str):
        raise CheckpointError(
            f'{part / "config.json"} names no "_class_name"; expected the configuration of a model of diffusers.'
        )
    check_supported(name)
    files = weight_files(part, _WEIGHTS)
    check_depth(part / "config.json", config, files)
    check_weights(files)
    if pipeline is not None:
        scheduler = _scheduler(directory, pipeline.index)
    return _model(part, name, config, files, dtype), scheduler, pipeline


def write_denoiser(directory: Path, model: Any, scheduler: Any, pipeline: Pipeline | None) -> None:
    """Write what :func:`load_denoiser` reads; a pipeline where there is a scheduler or a pipeline."""
    with quiet_diffusers():
        if scheduler is None and pipeline is None:
            _write_model(model, directory)
            return
        _write_model(model, directory / TRANSFORMER)
        index: dict[str, Any] = {"_class_name": "DiffusionPipeline"}
        index |= pipeline.index if pipeline else {}
        index[TRANSFORMER] = ["diffusers", type(model).__name__]
        if scheduler is not None:
            scheduler.save_pretrained(directory / SCHEDULER)
            index[SCHEDULER] = ["diffusers", type(scheduler).__name__]
    for other in pipeline.others() if pipeline else []:
        shutil.copytree(other, directory / other.name)
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_model(model: Any, directory: Path) -> None:
    model.save_pretrained(directory)
    finish_weights(directory, "config.json")


def _library(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"{what} needs {name}, which is not installed: pip install 'postlude[diffusion]'"
        ) from error


def _part_with_weights(directory: Path, index: dict[str, Any]) -> Path:
    found = index.get(TRANSFORMER)
    if not (isinstance(found, list) and len(found) == 2 and all(found)):
        parts = sorted(n for n, value in index.items() if isinstance(value, list) and any(value))
        raise CheckpointError(
            f"{directory} is a diffusers pipeline without a transformer: its {INDEX} names "
            f"{', '.join(parts) or 'nothing'}. "
            f"Expected a part {TRANSFORMER!r} of one of the classes "
            f"{', '.join(supported_model_types('diffusion'))}."
        )
    library, name = found
    if library != "diffusers":
        raise CheckpointError(
            f"{directory} takes its transformer {name} from {library!r}; expected a class of diffusers. Code that "
            "comes with a checkpoint is not run."
        )
    check_supported(str(name))
    part = directory / TRANSFORMER
    if not (part / "config.json").is_file():
        raise CheckpointError(
            f"{directory} lacks {TRANSFORMER}/config.json, which its {INDEX} names. Copy or download it again."
        )
    return part


def _scheduler(directory: Path, index: dict[str, Any]) -> Any:
    found = index.get(SCHEDULER)
    if not (isinstance(found, list) and len(found) == 2 and all(found)):
        return None
    library, name = found
    diffusers = _library("diffusers", f"{directory}")
    built: Any = getattr(diffusers, str(name), None) if library == "diffusers" else None
    if not (isinstance(built, type) and issubclass(built, diffusers.SchedulerMixin)):
        raise CheckpointError(
            f"{directory} names the scheduler {name} of {library!r}; expected a scheduler class of diffusers "
            f"{diffusers.__version__}."
        )
    file = directory / SCHEDULER / "scheduler_config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{directory} lacks {SCHEDULER}/{file.name}, which its {INDEX} names. Copy or download it again."
        )
    with quiet_diffusers():
        try:
            return built.from_config(read_json(file))  # type: ignore[attr-defined]
        except (ValueError, TypeError, KeyError, NotImplementedError) as error:
            raise CheckpointError(
                f"diffusers {diffusers.__version__} cannot build a {name} from {file}: {error}"
            ) from error


def _model(
    part: Path,
    name: str,
    config: dict[str, Any],
    files: list[Path],
    dtype: torch.dtype | str,
) -> Any:
    diffusers = _library("diffusers", f"{part}")
    accelerate = _library("accelerate", f"{part}")
    settings = dict(config)
    quantization = _quantization(part, settings.pop("quantization_config", None))
    with quiet_diffusers():
        try:
            # Buffers are computed, not stored; parameters are in the files and need no memory before.
            with accelerate.init_empty_weights(include_buffers=False):
                model = getattr(diffusers, name).from_config(settings)
        except (ValueError, TypeError, KeyError, NotImplementedError, AttributeError) as error:
            raise CheckpointError(
                f"diffusers {diffusers.__version__} cannot build a {name} from {part / 'config.json'}: {error}"
            ) from error
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(load_file(file))
    if quantization is not None:
        huggingface = importlib.import_module("postlude.surgery.huggingface")
        stored = next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
        huggingface.restore(model, quantization, stored)
    _fill(model, state, part, quantized=quantization is not None)
    if isinstance(dtype, torch.dtype):
        model.to(dtype)
    else:
        _cast_computed_buffers(model)
    return model


def _cast_computed_buffers(model: Any) -> None:
    """Positions that are computed, not stored, in the type of the parameters: what ``model.to(dtype)`` does."""
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(model.dtype)


def _quantization(part: Path, found: Any) -> dict[str, Any] | None:
    if found is None:
        return None
    scheme = found.get("quant_method") if isinstance(found, dict) else None
    if scheme != _METHOD:
        raise CheckpointError(
            f"{part} is already quantized by {scheme!r}; expected float weights or a checkpoint that Postlude "
            "quantized. Start from the float model it was made from."
        )
    return dict(found)


def _fill(model: nn.Module, state: dict[str, Tensor], part: Path, *, quantized: bool) -> None:
    """Give a model its tensors, every one of them and no others."""
    expected = model.state_dict()
    missing = sorted(expected.keys() - state.keys())
    if missing:
        raise CheckpointError(
            f"{part} lacks {len(missing)} weights of a {type(model).__name__}: {_listing(missing)}. Expected all "
            "of them. Copy or download it again."
        )
    unexpected = sorted(state.keys() - expected.keys())
    if unexpected:
        raise CheckpointError(
            f"{part} holds {len(unexpected)} tensors that a {'quantized ' if quantized else ''}"
            f"{type(model).__name__} of its configuration has no place for: {_listing(unexpected)}. Without them "
            "the model would be another one: load it with the version of Postlude and diffusers that wrote it."
        )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{part}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)} by the "
                "configuration. Weights and configuration are not of the same model."
            )
    model.load_state_dict(state, assign=True)


def _listing(names: list[str]) -> str:
    return f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
