"""An adapter merged into the weights of its model, which is compared with what it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from postlude.errors import SettingsError, VerificationError
from postlude.runs.quiet import quiet_peft
from postlude.tuning.quantized_base import is_quantized, to_branches

__all__ = [
    "Probe",
    "check_mergeable",
    "logits",
    "merge",
    "probes",
    "same_logits",
]

_PROBES, _PROBE_TOKENS = 4, 64

# Tokens [length], or arguments of the model's forward for one row.
Probe = Tensor | Mapping[str, Tensor]

# Largest difference of logits, relative to the largest logit, between a model with its adapter on and the merged one.
# In 16 bits the merged weights are rounded.
MERGE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # fmt: skip


def check_mergeable(model: Any) -> None:
    """Refuse, before training, an adapter that cannot be merged.

    Raises:
        SettingsError: with the reason.
    """
    tuner = model.base_model
    name = next(iter(model.peft_config.values())).peft_type.value.lower()
    try:
        if not hasattr(tuner, "merge_and_unload"):
            raise NotImplementedError("it has no merged form")
        allowed = getattr(tuner, "_check_merge_allowed", None)
        if allowed is not None:
            allowed()
    except (ValueError, NotImplementedError, TypeError) as error:
        raise SettingsError(
            f"the adapter {name} cannot be merged ({error}); leave merging out: the adapter alone is saved."
        ) from error


@torch.no_grad()
def logits(model: Any, probes: Sequence[Probe]) -> list[Tensor]:
    """Logits ``[length, V]`` of each probe, in fp32 on the CPU, without dropout."""
    training = model.training
    model.eval()
    try:
        found = [
            model(**_inputs(model, one), use_cache=False).logits[0].float().cpu() for one in probes
        ]
    finally:
        model.train(training)
    return found


def _inputs(model: Any, probe: Probe) -> dict[str, Any]:
    inputs = {"input_ids": probe[None]} if isinstance(probe, Tensor) else probe
    return {
        name: one.to(model.device, model.dtype if one.is_floating_point() else None)
        for name, one in inputs.items()
    }


def probes(sequences: Sequence[Probe], model: Any) -> list[Probe]:
    """A few short inputs to compare two models on; some tokens in a row where there are none."""
    chosen = [
        one[:_PROBE_TOKENS] if isinstance(one, Tensor) else one for one in sequences[:_PROBES]
    ]
    vocabulary = len(model.get_input_embeddings().weight)
    return chosen or [torch.arange(_PROBE_TOKENS) % vocabulary]


def same_logits(found: list[Tensor], expected: list[Tensor], tolerance: float, what: str) -> float:
    """The largest difference, relative to the largest logit.

    Raises:
        VerificationError: it is above the tolerance, or not a number.
    """
    scale = max(float(one.abs().max()) for one in expected)
    worst = max(
        float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)
    ) / max(scale, 1e-30)  # fmt: skip
    if not worst <= tolerance:
        raise VerificationError(
            f"{what}: logits differ by {worst:.3g} of the largest one; expected at most {tolerance:g}."
        )
    return worst


def merge(model: Any, sequences: Sequence[Probe]) -> tuple[Any, float]:
    """The model with its adapter merged into the weights, and how far its logits are from those with the adapter on.

    Args:
        model: peft's; not to be used afterwards.
        sequences: what to compare on.

    Raises:
        SettingsError: this adapter cannot be merged.
        VerificationError: the merged model is another one.
    """
    name = next(iter(model.peft_config.values())).peft_type.value.lower()
    tried = probes(sequences, model)
    before = logits(model, tried)
    codes = is_quantized(model)
    try:
        with quiet_peft():
            merged = to_branches(model) if codes else model.merge_and_unload(safe_merge=True)
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
        raise SettingsError(
            f"the adapter {name} cannot be merged ({error}); leave merging out: the adapter alone is saved."
        ) from error
    tolerance = MERGE_TOLERANCE.get(merged.dtype, MERGE_TOLERANCE[torch.bfloat16])
    if codes:  # branches are in float16
        tolerance = max(tolerance, MERGE_TOLERANCE[torch.float16])
    after = logits(merged, tried)
    return merged, same_logits(
        after, before, tolerance, f"The adapter {name} merged into the weights is another model"
    )
