"""Adapters of the peft library: trained beside a frozen model, saved alone and loaded again.

Every method of peft that changes layers is reached by its name (``lora``, ``loha``, ``vera``, ``oft``, ``shira``, ...)
and the fields of its configuration. Methods that put tokens of their own before the text (prompt tuning and its kin)
are refused: the loss counts on one state a token.

Our choices where peft leaves it open: all linear layers of the blocks are adapted, and LoRA's ``alpha`` is twice the
rank.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from postlude.errors import CheckpointError, SettingsError, UnknownNameError
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.checksums import check_sums, finish_weights
from postlude.runs.loading import load
from postlude.runs.quiet import quiet_peft, quiet_transformers
from postlude.runs.weights import read_header
from postlude.tuning.encoder import restricted
from postlude.tuning.libraries import import_library
from postlude.tuning.quantized_base import (
    check_adaptable,
    is_quantized,
    prepare,
    to_branches,
)

__all__ = [
    "Adapter",
    "adapter_fields",
    "adapter_names",
    "attach",
    "is_adapter",
    "load_adapter",
    "save_adapter",
]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_RANKS = ("r", "rank")
_ALPHAS = ("lora_alpha", "alpha")
_WHAT = "Adapters need peft"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Which adapter, and its size.

    Attributes:
        name: peft's name of the method, in lower case.
        rank: for methods that have one; None for 8.
        alpha: scale of methods that have one; None for twice the rank.
        target: names of the layers to adapt, or ``all-linear``; None for the default of the method.
        settings: other fields of peft's configuration.
    """

    name: str = "lora"
    rank: int | None = None
    alpha: float | None = None
    target: str | tuple[str, ...] | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise SettingsError(f"rank is {self.rank}; expected 1 or more")
        if self.alpha is not None and not self.alpha > 0:
            raise SettingsError(f"alpha is {self.alpha}; expected a number above 0")

    def configuration(self, model: Any) -> Any:
        """peft's configuration for a model.

        Raises:
            UnknownNameError: no such method, or no such setting of it.
            SettingsError: a method that adds tokens, a size that it does not have, or values that peft refuses.
            MissingDependencyError: peft is not installed.
        """
        kind = _kinds().get(self.name)
        if kind is None:
            raise UnknownNameError("adapter", self.name, adapter_names())
        known = adapter_fields(self.name)
        chosen: dict[str, Any] = {"task_type": "CAUSAL_LM"}
        rank = next((name for name in _RANKS if name in known), None)
        alpha = next((name for name in _ALPHAS if name in known), None)
        for option, value, field in (("rank", self.rank, rank), ("alpha", self.alpha, alpha)):
            if value is not None and field is None:
                raise SettingsError(f"the adapter {self.name} has no {option}; leave it out.")
        if rank is not None:
            chosen[rank] = size = self.rank or 8
            if alpha is not None:
                scale = 2 * size if self.alpha is None else self.alpha
                # peft's own type of the field is a whole number for most.
                chosen[alpha] = int(scale) if float(scale).is_integer() else scale
        if self.target is not None and "target_modules" not in known:
            raise SettingsError(f"the adapter {self.name} has no target layers; leave them out.")
        if self.target is not None:
            words = self.target
            chosen["target_modules"] = words if isinstance(words, str) else list(words)
        elif rank is not None and "target_modules" in known:
            chosen["target_modules"] = "all-linear"
        if "fan_in_fan_out" in known:
            chosen["fan_in_fan_out"] = any(
                type(module).__name__ == "Conv1D" for module in model.modules()
            )
        for name in self.settings:
            if name not in known:
                raise UnknownNameError(f"setting of the adapter {self.name}", name, known)
        try:
            return kind(**{**chosen, **self.settings})
        except (ValueError, TypeError) as error:
            raise SettingsError(f"peft refuses this {self.name}: {error}") from error


def adapter_names() -> list[str]:
    """The adapters that can be trained."""
    peft = import_library("peft", _WHAT)
    prompts = peft.PromptLearningConfig
    return sorted(name for name, kind in _kinds().items() if not issubclass(kind, prompts))


def adapter_fields(name: str) -> list[str]:
    """The settings of an adapter.

    Raises:
        UnknownNameError: no such adapter.
        SettingsError: one that puts tokens before the text.
    """
    kind = _kinds().get(name)
    if kind is None:
        raise UnknownNameError("adapter", name, adapter_names())
    if issubclass(kind, import_library("peft", _WHAT).PromptLearningConfig):
        raise SettingsError(
            f"the adapter {name} puts tokens of its own before the text, which is not supported; choose one of "
            f"{', '.join(adapter_names())}."
        )
    own = {"peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision"}
    return [field.name for field in dataclasses.fields(kind) if field.name not in own]


def attach(checkpoint: Checkpoint, adapter: Adapter, encoder: str | None = None) -> Any:
    """peft's model around the one of a checkpoint, whose linear layers are replaced in place.

    Random starts come from the global generator. ``encoder``: of an audio language model, see
    :mod:`postlude.tuning.encoder`.

    Raises:
        SettingsError: layers that there are not, or that this adapter cannot adapt; nothing to train.
    """
    configuration = restricted(checkpoint, adapter.configuration(checkpoint.model), encoder)
    peft = import_library("peft", _WHAT)
    if is_quantized(checkpoint.model):
        check_adaptable(checkpoint.model, adapter.name)
        configuration = prepare(configuration, checkpoint.model)
    try:
        with quiet_peft():
            model = peft.get_peft_model(checkpoint.model, configuration)
    except (
        ValueError,
        TypeError,
        NotImplementedError,
        KeyError,
        AttributeError,
        AssertionError,
    ) as error:
        raise SettingsError(
            f"peft cannot put the adapter {adapter.name} on this {type(checkpoint.model).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SettingsError(
            f"the adapter {adapter.name} leaves nothing to train with these settings."
        )
    path = None if checkpoint.path is None else str(checkpoint.path)
    for one in model.peft_config.values():
        one.base_model_name_or_path = path
    return model


def save_adapter(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write an adapter, as peft loads it, and the tokenizer into a directory that is there."""
    with quiet_transformers(), quiet_peft():
        model.save_pretrained(directory, safe_serialization=True, save_embedding_layers=False)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    finish_weights(directory, _CONFIG)


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a directory holds an adapter and no whole model."""
    directory = Path(path)
    return (directory / _CONFIG).is_file() and not (directory / "config.json").is_file()


def load_adapter(
    path: str | os.PathLike[str],
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    merged: bool = True,
) -> Checkpoint:
    """The model that an adapter was trained for, with the adapter merged into it.

    Args:
        path: directory of the adapter; its configuration names that of the model.
        dtype: as for :func:`postlude.runs.loading.load`, but ``auto`` is fp32: an update is often smaller than what 16
            bits of a weight can tell apart.
        device: likewise.
        merged: False leaves peft's layers in. On a quantized model the adapter becomes branches of its layers.

    Raises:
        CheckpointError: a damaged adapter, or its model is not where the configuration says.
    """
    directory = Path(path)
    try:
        configuration = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
        base = configuration["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{directory / _CONFIG} is damaged: {error}") from error
    if not (directory / _WEIGHTS).is_file():
        raise CheckpointError(
            f"{directory} holds an adapter without {_WEIGHTS}; expected safetensors. Save it again with a current peft."
        )
    read_header(directory / _WEIGHTS)
    check_sums([directory / _WEIGHTS])
    if not isinstance(base, str) or not Path(base).is_dir():
        raise CheckpointError(
            f"{directory} holds an adapter for the model {base!r}, and there is no such directory. Put the model "
            f'there, or its path into "base_model_name_or_path" of {directory / _CONFIG}.'
        )
    chosen = "float32" if str(dtype) == "auto" else dtype
    checkpoint = load(base, dtype=chosen, device=device)
    peft = import_library("peft", _WHAT)
    try:
        with quiet_transformers(), quiet_peft():
            adapter = peft.PeftConfig.from_pretrained(str(directory))
            codes = is_quantized(checkpoint.model)
            if codes:
                adapter = prepare(adapter, checkpoint.model)
            model = peft.PeftModel.from_pretrained(checkpoint.model, str(directory), config=adapter)
            if not merged:
                inner = model.get_base_model()
            else:
                inner = to_branches(model) if codes else model.merge_and_unload(safe_merge=True)
    except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError(f"peft cannot load the adapter in {directory}: {error}") from error
    inner.eval()
    return dataclasses.replace(checkpoint, model=inner, path=None)


def _kinds() -> dict[str, Any]:
    mapping = import_library("peft", _WHAT).mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    return {kind.value.lower(): configuration for kind, configuration in mapping.items()}
