"""Small reference models, trained by committed scripts and shipped as package data.

``checkpoint_path("tiny-lm")`` is a Hugging Face directory that ``AutoModelForCausalLM.from_pretrained`` loads,
``checkpoint_path("tiny-dit")`` and ``"tiny-dit-flow"`` are directories of diffusers.
"""

from __future__ import annotations

from pathlib import Path

from postlude.errors import UnknownNameError

__all__ = ["MADE", "MODELS", "checkpoint_path"]

MODELS = ("tiny-lm", "tiny-dit", "tiny-dit-flow")

MADE = {"audio-llm": "python -m postlude.zoo.audio_llm make -o DIR"}
"""Models that do not come with Postlude, and the command that makes them."""


def checkpoint_path(name: str) -> Path:
    """The directory of a packaged checkpoint.

    Raises:
        UnknownNameError: no reference model has this name.
    """
    if name not in MODELS:
        raise UnknownNameError("zoo model", name, MODELS)
    return Path(__file__).resolve().parent / "checkpoints" / name
