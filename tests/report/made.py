"""Results and runs that are made up, as the pages of the report are given them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image


def picture(width: int = 320, height: int = 160) -> bytes:
    """A PNG file with something to see."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).save(buffer, "png")
    return buffer.getvalue()


def finished_run(folder: Path, seed: int = 0) -> Path:
    """The directory of a finished run of many stages, as ``postlude run`` leaves it."""
    size, more = 2_557_824 + 1_000 * seed, 1 + seed / 10
    results: dict[str, dict[str, Any]] = {
        "small": {"bytes": size, "bits_per_weight": 4.0556 + seed, "settings": {"weights": 4}},
        "quality": {
            "loss": 5.9875 * more,
            "perplexity": 398.4 * more,
            "reference_perplexity": 367.78,
            "kl": 0.19867 * more,
            "tokens": 3066,
            "bytes": size,
        },
        "quality-of-the-tuned-one": {"perplexity": 101.25, "kl": 0.01 * more, "bytes": size},
        "pictures": {"note": "w" * 79, "seconds": 1.5},
        "judged": {
            "frechet": 8.45 * more,
            "frechet_reference": 5.5,
            "frechet_floor": 3.25,
            "class_accuracy": 0.75 / more,
            "class_accuracy_reference": 0.875,
            "psnr_db": 20.5 / more,
        },
    }
    files = {"pictures": {"samples.png": picture()}, "judged": {"page.html": b"<p>its own page"}}
    for name, result in results.items():
        stage = folder / "stages" / name
        stage.mkdir(parents=True)
        for file, data in files.get(name, {}).items():
            (stage / file).write_bytes(data)
        command = [
            "evaluate",
            "--text",
            "x" * 120,
            str(stage / "output"),
            "--reference",
            "zoo:tiny-lm",
        ]
        record = {
            "key": "k",
            "command": command,
            "seconds": 4.25,
            "result": result,
            "files": dict.fromkeys(files.get(name, {}), "0"),
        }
        (stage / "done.json").write_text(json.dumps(record))
    summary = {
        "name": "A chat model in four bits",
        "about": "Quantize, and see what it costs.",
        "variables": {"model": "zoo:tiny-lm", "text": "/a/long/path/" + "y" * 60 + ".txt"},
        "stages": list(results),
        "states": dict.fromkeys(results, "done"),
    }
    (folder / "run.json").write_text(json.dumps(summary))
    (folder / "recipe.yaml").write_text("stages: {}  # " + "long " * 40)
    return folder


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


def demo_results() -> dict[str, Any]:
    """Everything that the page of a demo can show, small."""
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
