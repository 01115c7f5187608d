"""Which parts of an audio language model are trained.

``trained``: the encoder and the projector whole, beside the language model or the adapters on it (arXiv:2603.10175
trains LoRA on the language model and the encoder end to end). ``frozen``: the encoder stays as it is; the projector is
trained in any case, since it fits the one to the other (our choice). Fixed positions of the encoder stay fixed.

Adapters are put on the linears of the language model only. peft keeps the parts that are trained whole beside them
(``modules_to_save``), so an adapter that is saved alone carries them, and switching it off gives the model from before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from postlude.errors import SettingsError
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import AudioAnatomy

__all__ = ["ENCODERS", "check_encoder", "hold_fixed", "language_layers", "parts_trained_whole"]

ENCODERS = ("trained", "frozen")


def check_encoder(checkpoint: Checkpoint, encoder: str | None) -> str | None:
    """What becomes of the encoder: ``trained`` where nothing is said; None for a model that has none.

    Raises:
        SettingsError: another word, or a model without an encoder.
    """
    if encoder is not None and encoder not in ENCODERS:
        raise SettingsError(f"encoder is {encoder!r}; expected {' or '.join(ENCODERS)}")
    if isinstance(checkpoint.anatomy, AudioAnatomy):
        return encoder or ENCODERS[0]
    if encoder is not None:
        raise SettingsError(
            f"{checkpoint.path or 'this checkpoint'} is a {checkpoint.kind} model without an audio encoder: leave "
            "--encoder out."
        )
    return None


def parts_trained_whole(checkpoint: Checkpoint, encoder: str | None) -> list[str]:
    """Paths of the modules that are trained whole beside adapters."""
    anatomy = checkpoint.anatomy
    if not isinstance(anatomy, AudioAnatomy):
        return []
    return [anatomy.projector] if encoder == "frozen" else [anatomy.encoder, anatomy.projector]


def language_layers(checkpoint: Checkpoint, target: Any) -> list[str]:
    """Paths of the linears of the language model that peft's ``target_modules`` stands for.

    Raises:
        SettingsError: none of them.
    """
    linears = list(checkpoint.anatomy.linears())
    if target in (None, "all-linear"):
        return linears
    if isinstance(target, str):
        chosen = [path for path in linears if re.fullmatch(target, path)]
    else:
        chosen = [
            path
            for path in linears
            if any(path == one or path.endswith(f".{one}") for one in target)
        ]
    if not chosen:
        raise SettingsError(
            f"no linear of the language model is called {target!r}; its names are "
            f"{', '.join(sorted({path.rpartition('.')[2] for path in linears}))}"
        )
    return chosen


def restricted(checkpoint: Checkpoint, configuration: Any, encoder: str | None) -> Any:
    """peft's configuration, for the language model of an audio language model; others pass."""
    whole = parts_trained_whole(checkpoint, encoder)
    if not whole:
        return configuration
    if hasattr(configuration, "target_modules"):
        configuration.target_modules = language_layers(checkpoint, configuration.target_modules)
    if not hasattr(configuration, "modules_to_save"):
        raise SettingsError(
            f"the adapter {type(configuration).__name__} trains nothing whole beside it, as an encoder has to be: "
            "choose lora."
        )
    configuration.modules_to_save = [*(configuration.modules_to_save or []), *whole]
    return configuration


def hold_fixed(checkpoint: Checkpoint, encoder: str | None, *, adapters: bool) -> None:
    """Take what stays as it is out of training."""
    anatomy = checkpoint.anatomy
    if not isinstance(anatomy, AudioAnatomy):
        return
    module = checkpoint.model.get_submodule(anatomy.encoder)
    named: Mapping[str, Any] = dict(module.named_parameters())
    for name, parameter in named.items():
        if name.endswith(anatomy.positions) or (encoder == "frozen" and not adapters):
            parameter.requires_grad_(False)
