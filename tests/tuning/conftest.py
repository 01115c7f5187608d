from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORDS = (
    "a sum",
    "the boat",
    "night",
    "it was calm",
    "one bird",
    "no",
    "reeds and water",
    "so it went",
)


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven prompts with completions of unequal length."""
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [
        {"prompt": f"{WORDS[i % 8]}? ", "completion": f"{WORDS[(3 * i + 1) % 8]}, {i}"}
        for i in range(11)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def tiny(make_model: Callable[..., Any], tiny_tokenizer: Any) -> Callable[..., Any]:
    """A checkpoint in memory: ``tiny("gpt2", seed=1)``."""
    from postlude.runs.checkpoint import Checkpoint
    from postlude.surgery.anatomy import anatomy_of

    def make(model_type: str = "llama", seed: int = 0, **settings: Any) -> Checkpoint:
        model = make_model(model_type, seed, **settings)
        return Checkpoint(model, tiny_tokenizer, anatomy_of(model))

    return make
