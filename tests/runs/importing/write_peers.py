"""Run by an interpreter that has llm-compressor and auto-round: checkpoints in their own hand.

    python write_peers.py FLOAT_MODEL OUT

For every checkpoint also ``logits.safetensors``: what the library's own environment computes from the files.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)

PRESETS = {
    "w4a16": "W4A16",
    "w4a16_asym": "W4A16_ASYM",
    "w8a16": "W8A16",
    "w8a8": "W8A8",
    "fp8": "FP8_DYNAMIC",
}
GROUP = 32


def llmcompressor(source: str, out: Path, preset: str) -> None:
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    scheme = preset_name_to_scheme(preset, ["Linear"])
    if scheme.weights.group_size:
        scheme.weights.group_size = GROUP
    recipe = QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    oneshot(model=source, recipe=recipe, output_dir=str(out))


def autoround(source: str, out: Path, format: str, sym: bool) -> None:
    from auto_round import AutoRound

    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    rounder = AutoRound(
        model,
        tokenizer,
        bits=4,
        group_size=GROUP,
        sym=sym,
        iters=0,
        disable_opt_rtn=True,
        device_map="cpu",
    )
    rounder.quantize_and_save(str(out), format=format)


def main() -> None:
    source, out = sys.argv[1], Path(sys.argv[2])
    for name, preset in PRESETS.items():
        if (out / name).exists():
            continue
        llmcompressor(source, out / name, preset)
    for name, format, sym in (
        ("gptq_sym", "auto_gptq", True),
        ("gptq_asym", "auto_gptq", False),
        ("awq", "auto_awq", False),
    ):
        try:
            autoround(source, out / name, format, sym)
        except (Exception, SystemExit) as error:  # noqa: BLE001
            print(f"{name}: {type(error).__name__}: {error}")
    tokens = torch.arange(2, 26).reshape(2, 12)
    for directory in sorted(out.iterdir()):
        if not (directory / "config.json").exists():
            continue
        try:
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
            with torch.no_grad():
                logits = model(input_ids=tokens, use_cache=False).logits.float().contiguous()
            save_file({"logits": logits}, directory / "logits.safetensors")
        except Exception as error:  # noqa: BLE001
            print(f"{directory.name}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
