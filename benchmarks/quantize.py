"""Wall time and peak memory of quantizing a random Llama, against llm-compressor's GPTQ in the same run.

    python benchmarks/quantize.py --peer-python .venv-peer/bin/python

The peer wants versions of its own, so it lives in another environment::

    python3 -m venv .venv-peer
    .venv-peer/bin/pip install torch==2.13.0 && .venv-peer/bin/pip install llmcompressor==0.14.0.1

Every job is a process of its own on the same checkpoint and the same token ids, with the same number of threads;
jobs take turns, ``--repeat`` times. Time starts when the model is in memory and stops when it is quantized, before
anything is saved; memory is the largest resident size of the process, and in brackets what that is above the
process with the model just loaded. Peer and ``gptq`` do the same thing (GPTQ, 4-bit weights per output channel,
float activations, damping .01, blocks of 128, no activation order, no clip search); ``offq`` does more (rotations,
statistics, clip search, 4-bit activations and KV cache).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = {
    # hidden, intermediate, layers, heads, key/value heads, vocabulary
    "100m": (768, 2048, 12, 12, 4, 16384),
    "10m": (256, 688, 6, 4, 2, 8192),
}


def make(directory: Path, size: str, samples: int, length: int) -> None:
    """A random checkpoint and random token ids, the same for every job."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    hidden, intermediate, layers, heads, shared, vocabulary = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        max_position_embeddings=max(length, 512),
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory / "model")
    # The peer insists on a tokenizer, though it is given token ids.
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory / "model")
    tokens = torch.randint(0, vocabulary, (samples, length))
    save_file({"tokens": tokens}, directory / "tokens.safetensors")
    count = sum(p.numel() for p in model.parameters())
    print(
        f"random Llama, {count / 1e6:.0f} M parameters, {samples} x {length} tokens",
        file=sys.stderr,
    )


def resident() -> int:
    """Largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ours(name: str, directory: Path) -> tuple[float, int]:
    """Seconds of Postlude, and the resident size before."""
    import torch  # noqa: F401
    from safetensors.torch import load_file

    from postlude.quantization import GPTQ, OffQ
    from postlude.quantization.engine import quantize
    from postlude.runs.loading import load

    checkpoint = load(directory / "model", device="cpu")
    tokens = load_file(directory / "tokens.safetensors")["tokens"]
    settings = {"gptq": GPTQ(weights=4, activations=16, kv=16), "offq": OffQ()}[name]
    before, started = resident(), time.perf_counter()
    quantize(checkpoint, settings, tokens)
    return time.perf_counter() - started, before


def peer(name: str, directory: Path) -> tuple[float, int]:
    """Seconds of llm-compressor, and the resident size before."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    tokens = load_file(directory / "tokens.safetensors")["tokens"]
    rows = tokens.tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(r) for r in rows]})
    scheme = {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"},
        }
    }
    recipe = GPTQModifier(
        ignore=["lm_head"], config_groups=scheme, dampening_frac=0.01, block_size=128
    )
    before, started = resident(), time.perf_counter()
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
    )
    return time.perf_counter() - started, before


JOBS = {"gptq": ours, "offq": ours, "llm-compressor gptq": peer}


def run(name: str, python: str, directory: Path, threads: int) -> dict[str, float]:
    """One job in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    command = [python, __file__, "--job", name, "--directory", str(directory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{name} failed:\n{done.stderr[-4000:]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{name}: {result['seconds']:.1f} s, {result['peak'] / 2**20:.0f} MiB", file=sys.stderr)
    return result


def importable(python: str, module: str) -> bool:
    """Whether another interpreter has a module."""
    return (
        subprocess.run(
            [python, "-c", f"import {module}"], capture_output=True, check=False
        ).returncode
        == 0
    )


def main() -> None:
    """Run every job in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--size", choices=SIZES, default="100m")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--peer-python", default=".venv-peer/bin/python", help="interpreter with llmcompressor"
    )
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        seconds, before = JOBS[options.job](options.job, options.directory)
        print(json.dumps({"seconds": seconds, "before": before, "peak": resident()}))
        return

    names = ["gptq", "offq"]
    if Path(options.peer_python).exists() and importable(options.peer_python, "llmcompressor"):
        names.insert(0, "llm-compressor gptq")
    else:
        print(
            f"no llmcompressor at {options.peer_python}: no peer in this run (see the head of this file)"
        )
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        make(directory, options.size, options.samples, options.length)
        results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(options.repeat):
            for name in names:
                python = options.peer_python if JOBS[name] is peer else sys.executable
                results[name].append(run(name, python, directory, options.threads))

    def median(name: str, key: str) -> float:
        return statistics.median(one[key] for one in results[name])

    base = names[0]
    print(f"{options.size}, {options.samples} x {options.length} tokens, {options.threads} threads")
    print(f"| job | seconds | x {base} | peak MiB (above the loaded model) | x {base} |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in names:
        seconds, peak = median(name, "seconds"), median(name, "peak")
        above = (peak - median(name, "before")) / 2**20
        print(
            f"| {name} | {seconds:.1f} | {seconds / median(base, 'seconds'):.2f} | "
            f"{peak / 2**20:.0f} ({above:.0f}) | {peak / median(base, 'peak'):.2f} |"
        )


if __name__ == "__main__":
    main()
