"""Tiny audio language models of both classes, with their processors, and recordings for them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from postlude.runs.audio import Recording, write_wav
from postlude.zoo.audio_llm import build, build_processor

KINDS = ("audioflamingo3", "qwen2_audio")
_QWEN = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|im_start|>", "<|im_end|>")


def make(kind: str = "audioflamingo3", seed: int = 0) -> tuple[Any, Any]:
    """A model in float32, with every weight away from its initial value, and its processor; windows are one second."""
    processor = build_processor(window=1, mel_bands=16)
    if kind == "audioflamingo3":
        model = build(seed, processor=processor, width=32, encoder_layers=1, heads=2, context=256)
    else:
        model, processor = _qwen(processor, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval(), processor


def _qwen(processor: Any, seed: int) -> tuple[Any, Any]:
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioEncoderConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        Qwen2Config,
    )

    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens({"extra_special_tokens": list(_QWEN)})
    tokenizer.eos_token = "<|im_end|>"
    made = Qwen2AudioProcessor(processor.feature_extractor, tokenizer)
    encoder = Qwen2AudioEncoderConfig(
        num_mel_bins=16,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=48,
        d_model=24,
        max_source_positions=25,
    )
    decoder = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    config = Qwen2AudioConfig(
        audio_config=encoder, text_config=decoder, audio_token_index=made.audio_token_id
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen2AudioForConditionalGeneration(config), made


def write(directory: Path, kind: str = "audioflamingo3", seed: int = 0) -> Path:
    """The directory of such a model."""
    model, processor = make(kind, seed)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def recording(seconds: float, seed: int = 0) -> Recording:
    """Noise under a slow envelope."""
    draw = np.random.default_rng(seed)
    count = round(16_000 * seconds)
    envelope = 0.3 + 0.2 * np.sin(np.arange(count) / 900.0 + seed)
    return Recording((0.3 * envelope * draw.standard_normal(count).clip(-2, 2)).astype(np.float32))


def write_data(folder: Path, rows: Iterable[tuple[int, str, str]]) -> Path:
    """A .jsonl file of (number of the recording, prompt, completion), and recordings of unequal length."""
    (folder / "wav").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, prompt, completion in rows:
        file = folder / "wav" / f"{number}.wav"
        if not file.exists():
            write_wav(file, recording(0.4 + 0.1 * number, number).samples)
        lines.append({"audio": f"wav/{number}.wav", "prompt": prompt, "completion": completion})
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return data
