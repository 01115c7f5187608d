"""A tiny checkpoint with a byte tokenizer and texts, a tiny denoiser and images, gradients one pass at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from postlude.attribution.examples import Collection
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import anatomy_of

from ..conftest import make_tokenizer, tiny_model
from ..surgery.models import _norms_in_fp64

SENTENCE = "the old boat lay on the shore and a bird called over grey water while nobody spoke"
WORDS = SENTENCE.split()


def texts(count: int = 20, seed: int = 0) -> list[dict[str, Any]]:
    """Records of about 15 to 60 tokens of the tiny tokenizer, each with an id, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        length = int(torch.randint(4, 12, (1,), generator=generator))
        words = torch.randint(0, len(WORDS), (length,), generator=generator).tolist()
        found.append({"id": f"text-{number}", "text": " ".join(WORDS[word] for word in words)})
    return found


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def checkpoint(
    model_type: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any
) -> Checkpoint:
    model = tiny_model(model_type, **settings).to(dtype)
    if dtype == torch.float64:
        _norms_in_fp64(model)
    return Checkpoint(model, make_tokenizer(), anatomy_of(model))


def collection(**settings: Any) -> Collection:
    return Collection(**{"shard_examples": 8, "tokens_per_batch": 200, **settings})


def gradients(given: Checkpoint, record: dict[str, Any]) -> dict[str, Tensor]:
    """Weight gradients ``[in, out]`` of the loss summed over the tokens of one text."""
    model = given.model
    ids = torch.tensor([given.tokenizer(record["text"])["input_ids"][: given.context]])
    model.zero_grad()
    logits = model(ids, use_cache=False).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
    found = {}
    for path in dict.fromkeys(given.anatomy.linears()):
        module = model.get_submodule(path)
        gradient = module.weight.grad.clone()
        found[path] = gradient if type(module).__name__ == "Conv1D" else gradient.T
    model.zero_grad()
    return found


def denoiser(prediction: str = "epsilon", channels: int = 1, **settings: Any) -> Checkpoint:
    """A random diffusion transformer of two blocks for 8 x 8 images, with nothing left at zero."""
    pytest.importorskip("diffusers")
    from postlude.zoo.noising import noising_of
    from postlude.zoo.tiny_dit import build

    model = build(0, **{"width": 16, "layers": 2, "channels": channels, **settings})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    scheduler = noising_of(prediction).scheduler()
    return Checkpoint(model, None, anatomy_of(model), scheduler=scheduler)


def pictures(count: int = 24, seed: int = 0, channels: int = 1) -> tuple[Tensor, Tensor]:
    """Images ``[count, channels, 8, 8]`` in [-1, 1] and classes."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, channels, 8, 8, generator=generator) * 2 - 1
    return images, torch.randint(10, (count,), generator=generator)
