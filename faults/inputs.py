"""What the commands of the suite are given: tiny, and the same for a seed."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

from faults.suite import Work

__all__ = ["RECIPE", "make", "warm"]

RECIPE = """\
name: Everything once
variables: {model: null, data: null, text: null}
stages:
  small: {quantize: "${model}", method: gptq, bits: w4a8, calibration: "${text}", samples: 4, length: 24, check: false}
  tuned: {tune: ["${model}", "${data}"], max-length: 48, batch-size: 4, learning-rate: 0.001}
  index: {"attribute build": ["${tuned}", "${data}"], max-length: 32}
  quality: {evaluate: "${small}", text: "${text}", reference: "${model}"}
"""


def make(work: Work) -> None:
    """Write the inputs: two checkpoints, a text, examples, pictures and a recipe."""
    from postlude.runs.loading import resolve
    from postlude.runs.quiet import quiet_transformers

    zoo = resolve("zoo:tiny-lm")
    text = (zoo / "calibration.txt").read_text(encoding="utf-8")
    (work.inputs / "text.txt").write_text(text[:5000], encoding="utf-8")
    rows = [
        {"prompt": text[i : i + 30], "completion": text[i + 30 : i + 90]}
        for i in range(0, 2160, 90)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (work.inputs / "train.jsonl").write_text(lines, encoding="utf-8")
    (work.inputs / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    with quiet_transformers():
        _language(zoo, work.inputs / "model", work.seed)
        _vision(work.inputs / "vit", work.seed)
    _pictures(work.inputs, work.seed)


def _language(zoo: Path, out: Path, seed: int) -> None:
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(zoo, local_files_only=True)
    sizes: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "intermediate_size": 44, "max_position_embeddings": 64, "dtype": "float32",
    }  # fmt: skip
    config.update(sizes)
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(zoo / name, out)


def _vision(out: Path, seed: int) -> None:
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16,
        patch_size=8, num_channels=3, num_labels=4,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(out)


def _pictures(folder: Path, seed: int) -> None:
    import numpy
    from PIL import Image

    draw = numpy.random.default_rng(seed)
    (folder / "images").mkdir()
    for number in range(4):
        pixels = draw.integers(0, 256, (16, 16, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    shutil.copy(folder / "images" / "0.png", folder / "picture.png")


def warm(everything: bool = True) -> None:
    """Import what the commands import, so that children of this process need not; for a few of them if not all."""
    import importlib

    import torch

    torch.set_num_threads(1)
    from postlude import _front_door, registry

    names = ["postlude.cli", "transformers.models.llama", "postlude.surgery.huggingface"]
    if everything:
        registry.available()
        for name in _front_door.__all__:
            getattr(_front_door, name)
        names += ["accelerate", "peft", "diffusers", "transformers.trainer", "PIL.Image"]
    else:
        registry.available("quantize")
        for name in ("quantize", "evaluate", "run", "load"):
            getattr(_front_door, name)
    for name in names:
        importlib.import_module(name)
    # A forecast measures the machine for a second; once is enough for all children.
    plan: Any = importlib.import_module("postlude.attribution.plan")
    plan.this_machine = functools.cache(plan.this_machine)
    if everything:
        plan.this_machine()
