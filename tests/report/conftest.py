from __future__ import annotations

from typing import Any

import pytest


def row(name: str, perplexity: float, **values: Any) -> dict[str, Any]:
    return {
        "name": name,
        "baseline": False,
        "summary": f"What {name} does.",
        "paper": "arXiv:0000.00000",
        "perplexity": perplexity,
        "tokens": 1200,
        "kl": perplexity / 10,
        "top1_agreement": 1 / perplexity,
        "bytes": 2_560_000,
        "bits_per_weight": 4.0625,
        "bits_per_activation": 4.25,
        "seconds": 1.5,
        "layer_error": {"median": [0.1 * perplexity, 0.2 * perplexity, None]},
        "continuation": f"of things that {name} says",
        "continuation_tokens": [1, 2, 3],
        **values,
    }


@pytest.fixture
def results() -> dict[str, Any]:
    """Everything that a page can show, small and made up."""
    token = {
        "sample": 0,
        "position": 0,
        "token_id": 0,
        "text": "<s>",
        "channel": 3,
        "value": -900.0,
    }
    layer = {"absmax": 900.0, "median": 1.0, "ratio": 900.0}
    return {
        "title": "tiny in W4A4KV4",
        "model": {
            "name": "tiny",
            "parameters": 3_500_000,
            "blocks": 3,
            "hidden_size": 256,
            "stored_dtype": "bfloat16",
        },
        "settings": {
            "bits": {"weights": 4, "activations": 4, "kv": 4},
            "activation_group": 64,
            "samples": 8,
            "length": 32,
            "max_length": 64,
            "seed": 7,
        },
        "methods": [
            {
                "name": "float",
                "baseline": True,
                "summary": "The model as it was trained.",
                "perplexity": 3.0,
                "tokens": 1200,
                "bytes": 7_000_000,
                "bits_per_weight": 16.0,
                "continuation": "of things that are",
                "continuation_tokens": [1, 2, 4],
            },
            row("rtn", 9.0),
            row("offq", 4.5, continuation_tokens=[1, 2, 4], seconds=12.0),
        ],
        "inspections": {
            "outliers": {
                "layers": [
                    {"layer": -1, "max_norm": 3.0, "median_norm": 2.0, **layer},
                    {"layer": 0, "max_norm": 4.0, "median_norm": 2.0, **layer},
                    {"layer": 1, "max_norm": 1000.0, "median_norm": 3.0, **layer},
                    {"layer": 2, "max_norm": 20.0, "median_norm": 4.0, **layer},
                ],
                "sites": [
                    {
                        "block": 2,
                        "site": "down_in",
                        "kurtosis": 200.0,
                        "top_tokens": [token],
                        **layer,
                    }
                ],
                "traced": {
                    "tokens": ["<s>", " the", "\n\n", "$x$ é"],
                    "norms": [[3.0, 1, 1, 1], [4.0, 1, 1, 1], [1000.0, 2, 2, 2], [20.0, 3, 3, 3]],
                },
            },
            "singular-defects": {
                "massive": True,
                "explosion": {
                    "layer": 1,
                    "rule": "norm",
                    "angle_degrees": 4.6,
                    "eigenvalue": 0.9,
                    "eigenvector_angle_degrees": 8.0,
                },
                "decay": {
                    "layer": 2,
                    "rule": "norm",
                    "angle_degrees": 0.5,
                    "eigenvalue": -35.1,
                    "eigenvector_angle_degrees": 1.0,
                },
                "layers": [
                    {"layer": index, "angle_degrees": angle}
                    for index, angle in enumerate((88.0, 4.6, 0.5))
                ],
                "direction": {
                    "states": 153,
                    "threshold": 348.0,
                    "mean_pairwise_angle_degrees": 0.2,
                    "initial_share": 0.31,
                    "tokens": [
                        {"token_id": 1, "text": "\n\n", "initial": 0, "later": 35},
                        {"token_id": 0, "text": "<s>", "initial": 16, "later": 0},
                    ],
                },
                "explosion_path": {
                    "subspace": {
                        "dimension": 1,
                        "leading_output_norm": 5492.0,
                        "largest_other_output_norm": 25.6,
                    },
                    "initial": {"exploding_share": 0.97},
                    "ablation": {
                        "loss": 2.5,
                        "loss_without": 3.75,
                        "max_norm": 3480.0,
                        "max_norm_without": 123.0,
                    },
                },
            },
            "signature": {"massive": True, "hidden_size": 256},
        },
        "prompt": "Return a list of",
        "command": "postlude demo --seed 7 -o demo",
        "commands": [
            "postlude quantize tiny --method offq --bits w4a4kv4 --activation-group 64 "
            "--calibration text/calibration.txt -o again/offq"
        ],
        "python": "import postlude as pl\n",
        "environment": {"date": "2026-01-02 03:04 UTC", "torch": "2.13.0", "threads": "2 of 2"},
    }
