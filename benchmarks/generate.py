"""Speed and memory of generating with a random Llama of 0.36 billion parameters, against torchao and llama.cpp.

    python benchmarks/generate.py --work /tmp/generate --turns 3 \\
        --torchao-python .venv-torchao/bin/python --llama-python .venv-llama/bin/python

The peers live in environments of their own: one with torch==2.13.0, transformers and torchao, one with xllamacpp
(llama.cpp). A peer whose interpreter is not given is left out.

The model has the shape of SmolLM2-360M (32 layers of 960, tied embeddings of 49,152 tokens) and random weights. All
subjects read the same weights: W4A16 is stored in groups of 32, and llama.cpp gets those very codes as Q4_0 from
``postlude export --to gguf``. Every measurement is a process of its own: it loads the model, reads a prompt of 512
tokens twice (the second time counts) and continues it by 32 tokens one by one. Subjects take turns, ``--turns`` times.

Speed is tokens a second of *processor* time (user and system, one thread), so a process that has to wait for its
turn on a shared machine is not slower for it; what others do to the caches and the memory remains. Ratios are to
``bf16`` in the same turn. ``bf16`` and ``fp32`` are plain transformers; ``bf16, generate`` is the same model
as ``postlude generate`` runs it. Memory is the largest resident size, and in brackets what it is above that of
the process with its libraries and no model.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HIDDEN, INTERMEDIATE, LAYERS, HEADS, SHARED, VOCABULARY = 960, 2560, 32, 15, 5, 49152
PROMPT, TOKENS, CONTEXT = 512, 32, 1024
BASE = "bf16"

# Quantized checkpoints: method, bits, group.
MADE = {
    "w4a16": ("rtn", "w4a16kv16", "32"),
    "w8a8": ("rtn", "w8a8kv16", "channel"),
    "w4a4kv4": ("quarot", "w4a4kv4", "channel"),
    "w8a16": ("rtn", "w8a16kv16", "32"),
}
# Name in the table: kind of process, checkpoint or file, further arguments.
SUBJECTS: dict[str, tuple[str, str, str]] = {
    "fp32": ("plain", "float", "float32"),
    BASE: ("plain", "float", "bfloat16"),
    "bf16, generate": ("postlude", "float", "bfloat16"),
    "W8A8": ("postlude", "w8a8", "bfloat16"),
    "W4A16": ("postlude", "w4a16", "bfloat16"),
    "W4A4KV4 (quarot)": ("postlude", "w4a4kv4", "bfloat16"),
    "torchao int4": ("torchao", "float", "int4"),
    "torchao int8": ("torchao", "float", "int8"),
    "torchao W8A8": ("torchao", "float", "w8a8"),
    "llama.cpp Q4_0": ("llama", "w4a16.gguf", ""),
    "llama.cpp Q8_0": ("llama", "w8a16.gguf", ""),
}


def run(*command: str) -> None:
    """One step of the preparation, its output kept for when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")


def prepare(work: Path) -> None:
    """The checkpoint, its quantized versions and the files for llama.cpp, where they are not there yet."""
    model = work / "float"
    if not (model / "config.json").is_file():
        _make(model)
    postlude = (sys.executable, "-m", "postlude")
    for name, (method, bits, group) in MADE.items():
        if not (work / name).is_dir():
            print(f"quantizing {name}", file=sys.stderr, flush=True)
            command = [*postlude, "quantize", str(model), "--method", method, "--bits", bits]
            if method == "quarot":
                # Its rounding is of no interest in random weights.
                text = work / "text.txt"
                text.write_text("Once upon a time there was a river. " * 400, encoding="utf-8")
                command += ["--calibration", str(text), "--samples", "2", "--length", "64"]
                command += ["--set", "rounding=nearest"]
            run(*command, "--group", group, "--no-check", "-o", str(work / name))
    for name in ("w4a16", "w8a16"):
        if not (work / f"{name}.gguf").is_file():
            print(f"exporting {name}", file=sys.stderr, flush=True)
            command = [*postlude, "export", str(work / name), "--to", "gguf", "--no-check"]
            run(*command, "-o", str(work / f"{name}.gguf"))


def _make(directory: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import postlude as pl

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=SHARED,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    # Any tokenizer that GGUF can hold: only token ids are read here.
    pl.load("zoo:tiny-lm").tokenizer.save_pretrained(directory)


# What a process measures


def peak() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(kind: str, path: str, argument: str) -> None:
    """Measure one subject and print it as JSON."""
    measure = {"plain": _plain, "postlude": _postlude, "torchao": _torchao, "llama": _llama}[kind]
    print(json.dumps(measure(path, argument)), flush=True)


def _prompt() -> list[int]:
    return [(7919 * place + 13) % 2048 for place in range(PROMPT)]


def _transformers(load: Any, generate: Any = None) -> dict[str, float]:
    """Time the passes of ``load()``, within ``generate(model)`` if given."""
    import contextlib

    import torch
    from transformers import DynamicCache
    from transformers.models.llama import modeling_llama  # noqa: F401 - not a part of loading

    torch.set_num_threads(1)
    before = peak()
    start = time.process_time()
    model = load()
    loaded = time.process_time() - start
    tokens = torch.tensor([_prompt()])

    def step(ids: torch.Tensor, cache: Any) -> float:
        started = time.process_time()
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return time.process_time() - started

    with contextlib.ExitStack() as stack:
        start = time.process_time()
        if generate is not None:
            for context in generate(model):
                stack.enter_context(context)
        prepared = time.process_time() - start
        stack.enter_context(torch.inference_mode())
        step(tokens, DynamicCache(config=model.config))
        cache = DynamicCache(config=model.config)
        prefill = step(tokens, cache)
        step(tokens[:, :1], cache)
        decode = [step(tokens[:, :1], cache) for _ in range(TOKENS)]
    return {
        "load": loaded,
        "prepare": prepared,
        "prefill": PROMPT / prefill,
        "decode": TOKENS / sum(decode),
        "peak": peak(),
        "above": peak() - before,
    }


def _plain(path: str, argument: str) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, argument)
    return _transformers(lambda: AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval())


def _postlude(path: str, argument: str) -> dict[str, float]:
    import contextlib

    import postlude.surgery.huggingface  # noqa: F401 - not a part of loading
    from postlude.runs.loading import load
    from postlude.surgery import kernels
    from postlude.surgery.key_values import fast_attention

    def generate(model: Any) -> Any:
        kernels.use(model)
        yield fast_attention(model)
        yield contextlib.nullcontext()

    return _transformers(lambda: load(path, dtype=argument).model, generate)


def _torchao(path: str, argument: str) -> dict[str, float]:
    import torch
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )
    from transformers import AutoModelForCausalLM

    made = {
        "int4": lambda: PrototypeInt4WeightOnlyConfig(group_size=32),
        "int8": Int8WeightOnlyConfig,
        "w8a8": Int8DynamicActivationInt8WeightConfig,
    }[argument]()

    def load() -> Any:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        # Not the head: it is the embedding too, and stays in bf16 for everyone here.
        linear = torch.nn.Linear
        quantize_(
            model, made, filter_fn=lambda m, name: isinstance(m, linear) and "lm_head" not in name
        )
        return model

    return _transformers(load)


def _llama(path: str, argument: str) -> dict[str, float]:
    import xllamacpp

    before = peak()
    start = time.process_time()
    settings = xllamacpp.CommonParams()
    settings.model.path = path
    settings.n_ctx, settings.n_parallel, settings.warmup = CONTEXT, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(settings)
    loaded = time.process_time() - start

    def ask(tokens: list[int], count: int) -> float:
        started = time.process_time()
        answer = server.handle_completions(
            {
                "prompt": tokens,
                "n_predict": count,
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": True,
            }
        )
        assert "choices" in answer, answer
        return time.process_time() - started

    first = _prompt()
    ask([token + 1 for token in first], 1)
    prefill = ask(first, 1)
    # One token of the prompt is read again, then come the new ones.
    decode = ask(first, TOKENS + 1) - ask(first, 1)
    return {
        "load": loaded,
        "prepare": 0.0,
        "prefill": PROMPT / prefill,
        "decode": TOKENS / decode,
        "peak": peak(),
        "above": peak() - before,
    }


# The table


def measure(name: str, work: Path, pythons: dict[str, str]) -> dict[str, float]:
    """One process."""
    kind, path, argument = SUBJECTS[name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [pythons[kind], __file__, "--child", kind, str(work / path), argument],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def show(results: dict[str, list[dict[str, float]]]) -> None:
    """Medians over the turns, ratios within a turn."""

    def middle(name: str, key: str) -> float:
        return statistics.median(one[key] for one in results[name])

    def ratio(name: str, key: str) -> float:
        pairs = zip(results[name], results[BASE], strict=False)
        return statistics.median(one[key] / base[key] for one, base in pairs)

    print(
        "| | decode tok/s | x bf16 | prefill tok/s | x bf16 | peak MiB (above) | x bf16 | load s |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in results:
        if not results[name]:
            continue
        load, kernels = middle(name, "load"), middle(name, "prepare")
        print(
            f"| {name} | {middle(name, 'decode'):.1f} | {ratio(name, 'decode'):.2f} "
            f"| {middle(name, 'prefill'):.0f} | {ratio(name, 'prefill'):.2f} "
            f"| {middle(name, 'peak') / 2**20:.0f} ({middle(name, 'above') / 2**20:.0f}) "
            f"| {ratio(name, 'peak'):.2f} ({ratio(name, 'above'):.2f}) "
            f"| {load:.2f}{f' + {kernels:.2f}' if kernels > 0.005 else ''} |",
            flush=True,
        )


def main() -> None:
    """Prepare, take turns, print the table after every turn."""
    if len(sys.argv) > 1 and sys.argv[1] == "--child":
        child(*sys.argv[2:5])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--work", type=Path, required=True, help="kept for the next time")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--torchao-python")
    parser.add_argument("--llama-python")
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, help="beside bf16")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    prepare(args.work)
    pythons = {"plain": sys.executable, "postlude": sys.executable}
    pythons |= {"torchao": args.torchao_python, "llama": args.llama_python}
    names = [
        name
        for name, (kind, _, _) in SUBJECTS.items()
        if pythons[kind] and (not args.only or name in args.only or name == BASE)
    ]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(args.turns):
        for name in names:
            results[name].append(measure(name, args.work, pythons))
            print(f"turn {turn + 1}: {name} {results[name][-1]}", file=sys.stderr, flush=True)
        print(f"\nafter {turn + 1} of {args.turns} turns\n")
        show(results)


if __name__ == "__main__":
    main()
