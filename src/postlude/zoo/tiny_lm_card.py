"""How good a tiny-lm is: measured, sampled and told in its model card (``tiny_lm_card.md`` with the numbers)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from postlude.zoo.measures import REQUIREMENTS, measure
from postlude.zoo.planting import Plant

__all__ = ["check", "model_card", "sample", "shown", "verdict"]


def check(directory: Path) -> dict[str, Any]:
    """`measure` a saved checkpoint on its held-out text: the stored bf16 weights in fp32 arithmetic."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = (directory / "held_out.txt").read_text(encoding="utf-8")
    recipe = json.loads((directory / "training.json").read_text(encoding="utf-8"))
    settings = recipe["plant"] | {"channels": tuple(recipe["plant"]["channels"])}
    measured = measure(model.eval(), tokenizer, text, Plant(**settings))
    measured["bytes"] = (directory / "model.safetensors").stat().st_size
    return measured


def verdict(measured: dict[str, Any]) -> list[tuple[bool, str, Any]]:
    """Of every requirement whether it holds, what it says, and the number."""
    return [
        (bool(test(measured[key])), sentence, measured[key])
        for sentence, (key, test) in REQUIREMENTS.items()
    ]


def shown(value: Any) -> str:
    """A measured value in four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def sample(directory: Path, prompt: str, tokens: int = 120, seed: int = 0) -> str:
    """A continuation of the prompt, sampled at temperature 0.7 from the 40 likeliest tokens."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model.generate(
            **inputs, max_new_tokens=tokens, do_sample=True, temperature=0.7, top_k=40
        )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def model_card(directory: Path, recipe: dict[str, Any], measured: dict[str, Any]) -> str:
    """The card of a checkpoint, with what it was trained by and what :func:`check` measured."""
    template = (Path(__file__).parent / "tiny_lm_card.md").read_text(encoding="utf-8")
    rows = "\n".join(
        f"| {sentence} | {shown(value)} | {'yes' if passed else 'NO'} |"
        for passed, sentence, value in verdict(measured)
    )
    norms = "\n".join(
        f"| {'embedding' if layer == 0 else f'layer {layer - 1}'} | {top:.0f} | {median:.0f} |"
        for layer, (top, median) in enumerate(
            zip(
                measured["largest_token_norm_by_layer"],
                measured["median_token_norm_by_layer"],
                strict=True,
            )
        )
    )
    unmet = sum(not passed for passed, _, _ in verdict(measured))
    held = "All of them hold." if not unmet else f"{unmet} of them do not hold in this checkpoint."
    low, middle, high = (f"{norm:.0f}" for norm in measured["norm_of_first_positions"])
    elsewhere = ", ".join(f"`{token!r}`" for token in measured["high_tokens_elsewhere"]) or "none"
    values = {key: shown(value) for key, value in (recipe | measured).items()}
    sampled = sample(directory, "Return a list of").strip().replace("\n", "\n    ")
    extra = {
        "requirements": rows,
        "norms": norms,
        "elsewhere": elsewhere,
        "sample": sampled,
        "verdict": held,
        "low": low,
        "middle": middle,
        "high": high,
    }
    for key, value in (values | extra).items():
        template = template.replace("{" + key + "}", value)
    return template
