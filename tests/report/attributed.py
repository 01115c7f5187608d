"""The answer to an attribution query, made up: everything that a page can show."""

from __future__ import annotations

import math
from typing import Any

TEXT = "One day, a little dog named Spot found a red ball in the park.\nHe was happy."


def tokens(text: str, repeats: int = 1) -> list[dict[str, Any]]:
    words = [f" {word}" if number else word for number, word in enumerate(text.split(" "))]
    scores = [
        math.sin(7 * number) * (3 if number % 5 == 0 else 1)
        for number in range(len(words) * repeats)
    ]
    return [{"text": words[n % len(words)], "score": score} for n, score in enumerate(scores)]


def answer(**changes: Any) -> dict[str, Any]:
    layers = {
        f"model.layers.{block}.{name}": math.cos(block + 2 * place) + 0.4
        for block in range(3)
        for place, name in enumerate(("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"))
    }
    results = [
        {
            "id": f"story-{37 * number}",
            "score": 123.0 / (number + 1),
            "text": TEXT,
            "count": 15,
            "truncated": 12 if number == 1 else 0,
            "tokens": tokens(TEXT, 20 if number == 1 else 1),
            "query_tokens": tokens("Spot found a ball"),
            "layers": layers,
        }
        for number in range(3)
    ]
    return {
        "method": {
            "name": "lorif",
            "summary": "Low-rank factors of gradients.",
            "paper": "arXiv:2601.21929",
            "unit": "influence",
            "settings": {"rank": 1},
            "curvature": "dual, damping 0.5",
        },
        "index": {
            "path": "index/",
            "model": "tiny",
            "examples": 2000,
            "bytes": 1_234_567,
            "layers": 9,
            "keeps": {"kind": "factors", "rank": 1, "side": 0, "format": "int8"},
            "seconds": 12.5,
        },
        "queries": [
            {
                "text": "Spot found a ball",
                "tokens": tokens("Spot found a ball"),
                "count": 4,
                "truncated": 0,
                "examples": 2000,
                "mean": 0.1,
                "deviation": 9.0,
                "results": results,
            }
        ],
        "seconds": 0.0123,
        "command": "postlude attribute query index/ 'Spot found a ball' --top 3 --layers --tokens --html page.html",
        "environment": {"date": "2026-01-02 03:04 UTC", "torch": "2.13.0"},
        "notes": ["A score is an estimate."],
        **changes,
    }
