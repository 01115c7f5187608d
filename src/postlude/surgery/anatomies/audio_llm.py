"""Audio language models: a Whisper-like encoder of log-mel features, a projector, and a decoder of Llama's shape.

Qwen2-Audio (arXiv:2407.10759) and Audio Flamingo 3 (arXiv:2507.08128) hold these three under the same names and have a
Qwen2 as decoder. What the encoder gives takes the place of the embeddings of a token that stands for audio.
"""

from __future__ import annotations

from typing import Any

from postlude.errors import ArchitectureError
from postlude.surgery.anatomies.llama import decoder_parts
from postlude.surgery.anatomy import AudioAnatomy, describes

__all__ = ["audio_llm"]

_PROJECTOR = "model.multi_modal_projector"
_DECODERS = ("llama", "mistral", "qwen2", "qwen3")


@describes("qwen2_audio", "audioflamingo3", kind="audio")
def audio_llm(model: Any) -> AudioAnatomy:
    """Anatomy of a ``Qwen2AudioForConditionalGeneration`` or an ``AudioFlamingo3ForConditionalGeneration``.

    Raises:
        ArchitectureError: a decoder of another shape.
    """
    config = model.config
    last = list(model.get_submodule(_PROJECTOR)._modules)[-1]
    found = config.text_config.model_type
    if found not in _DECODERS:
        raise ArchitectureError(
            f"this {type(model).__name__} has a language model of type {found!r}; expected one of "
            f"{', '.join(_DECODERS)}. docs/add-an-architecture.md shows how to add one."
        )
    return AudioAnatomy(
        family="audio_llm",
        head="lm_head",
        encoder="model.audio_tower",
        positions="embed_positions.weight",
        projector=_PROJECTOR,
        projection=f"{_PROJECTOR}.{last}",
        audio_token=config.audio_token_id,
        **decoder_parts(config.text_config, "model.language_model"),
    )
