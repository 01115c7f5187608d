"""Open a checkpoint."""

from __future__ import annotations

import os

import torch

from postlude.runs.checkpoint import Checkpoint
from postlude.runs.loading import load as _load
from postlude.tuning.adapters import is_adapter, load_adapter
from postlude.tuning.sharded import asked as sharding_asked

__all__ = ["Path_", "load", "open_checkpoint"]

Path_ = str | os.PathLike[str]


def load(
    path: Path_,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
) -> Checkpoint:
    """Load a language model, an audio language model, a vision transformer or a denoiser from its directory.

    Nothing comes from the network.

    Args:
        path: a Hugging Face directory, one in the layout of diffusers (a pipeline, or its transformer alone), or
            ``zoo:NAME`` for a model that comes with Postlude. An adapter of peft is merged into the
            model that its configuration names, in fp32 where ``dtype`` is ``"auto"``.
        dtype: ``"auto"`` for the checkpoint's own, or float64, float32, float16, bfloat16.
        device: where to put the model; None for the accelerator if there is one (under torchrun that of the rank),
            else the CPU.

    Raises:
        CheckpointError: not a checkpoint, a damaged one, or one in a refused format.
        NonFiniteError: a tensor holds NaN or infinity.
        ArchitectureError: no anatomy describes the model.
        SettingsError: an unknown dtype or device.
    """
    rank = os.environ.get("LOCAL_RANK")
    if device is None and sharding_asked():
        # It is cut before it goes to an accelerator, which need not have room for all of it.
        device = "cpu"
    if device is None and rank is not None and torch.cuda.is_available():
        device = f"cuda:{rank}"
    if is_adapter(path):
        return load_adapter(path, dtype, device)
    return _load(path, dtype, device)


def open_checkpoint(checkpoint: Path_ | Checkpoint) -> Checkpoint:
    return checkpoint if isinstance(checkpoint, Checkpoint) else load(checkpoint)
