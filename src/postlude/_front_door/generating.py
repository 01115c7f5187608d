"""Continue a prompt."""

from __future__ import annotations

from collections.abc import Callable

from postlude._front_door.opening import Path_, open_checkpoint
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.generation import Generation
from postlude.runs.generation import generate as _generate
from postlude.surgery.kernels import AUTO

__all__ = ["generate"]


def generate(
    checkpoint: Path_ | Checkpoint,
    prompt: str,
    *,
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    kernel: str = AUTO,
    kv_recent: int = 0,
    seed: int = 0,
    stream: Callable[[str], object] | None = None,
) -> Generation:
    """Continue a prompt; quantized layers run packed, and keys and values are kept packed.

    Args:
        checkpoint: loaded, or a path; float or quantized.
        prompt: the text to continue.
        max_new_tokens: where to stop if the model does not end the text.
        temperature: 0 takes the most probable token; 1 samples from the model's distribution.
        kernel: what computes quantized layers: ``"auto"``, ``"simulate"`` (the reference) or one by name.
        kv_recent: tokens at the end of a quantized cache that stay in floating point.
        seed: of sampling.
        stream: called with every new piece of text.

    Returns:
        The text, and what it took: see :class:`postlude.runs.generation.Generation`.

    Raises:
        DataError: no tokenizer, or a prompt that gives no tokens.
        SettingsError: a number out of range, or more tokens than the model's context holds.
        UnknownNameError: no kernel of that name.
    """
    return _generate(
        open_checkpoint(checkpoint),
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        kernel=kernel,
        kv_recent=kv_recent,
        seed=seed,
        stream=stream,
    )
