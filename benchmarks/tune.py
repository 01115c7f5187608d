"""Speed and memory of tuning a random Llama under several token rules, against TRL's SFTTrainer in the same run.

    python benchmarks/tune.py --repeat 3

Every job is a process of its own on the same checkpoint (25 million parameters, fp32) and the same demonstrations, with
the same batch, number of threads, optimizer (fused AdamW) and clipping; jobs take turns, ``--repeat`` times. Speed is
tokens a second, prompt and padding included, from the end of the warm-up steps to the end of the last; the moments at
which steps end are taken where the optimizer has moved, alike for all jobs. Memory is the largest resident size of the
process. Ratios are within a turn, so that what else the machine does in it strikes all jobs alike; the table has their
mean and standard deviation over the turns.

TRL recomputes activations by default; that is off here, as in Postlude. Everything else is left as TRL has it, its
metrics of every step (entropy, accuracy) included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HIDDEN, INTERMEDIATE, LAYERS, HEADS, SHARED, VOCABULARY = 384, 1024, 8, 6, 2, 32000
PROMPT, LENGTH = 64, 256
BASE, PLAIN = "TRL SFTTrainer, nll", "sft"
RATE = 1e-4


def make(directory: Path, rows: int) -> None:
    """A random checkpoint, a tokenizer of one word a token, and random demonstrations that all have the same length."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=SHARED,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    model.save_pretrained(directory / "model")
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(directory / "model")
    source = random.Random(0)

    def text(count: int) -> str:
        return " ".join(f"w{source.randrange(3, VOCABULARY)}" for _ in range(count))

    with open(directory / "data.jsonl", "w", encoding="utf-8") as file:
        for _ in range(rows):
            row = {"prompt": text(PROMPT), "completion": " " + text(LENGTH - PROMPT - 1)}
            file.write(json.dumps(row) + "\n")
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"random Llama, {count / 1e6:.1f} M parameters, rows of {LENGTH} tokens", file=sys.stderr)


def resident() -> int:
    """Largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def clock() -> Iterator[list[float]]:
    """The moments at which an optimizer moved."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    moments: list[float] = []
    handle = register_optimizer_step_post_hook(lambda *_: moments.append(time.perf_counter()))
    try:
        yield moments
    finally:
        handle.remove()


def ours(name: str, directory: Path, batch: int, steps: int) -> list[float]:
    """Moments of the steps of Postlude."""
    import postlude as pl
    from postlude.tuning.objective import TuneRun

    rule, _, signal = name.partition(", ")
    run = TuneRun(
        steps=steps, batch_size=batch, learning_rate=RATE, schedule="constant", warmup=0.0
    )
    with clock() as moments:
        pl.tune(
            directory / "model",
            directory / "data.jsonl",
            rule,
            run,
            prior=directory / "prior" if signal == "cached" else None,
            signal="reference" if signal == "reference" else None,
            dtype="float32",
        )
    return moments


def peer(name: str, directory: Path, batch: int, steps: int) -> list[float]:
    """Moments of the steps of TRL."""
    import datasets
    import torch
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    datasets.disable_progress_bar()
    path = directory / "model"
    lines = (directory / "data.jsonl").read_text(encoding="utf-8").splitlines()
    data = datasets.Dataset.from_list([json.loads(line) for line in lines])
    arguments = trl.SFTConfig(
        output_dir=str(directory / "peer"),
        loss_type="nll",
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        max_length=LENGTH,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        args=arguments,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(path),
    )
    with clock() as moments:
        trainer.train()
    return moments


JOBS = {
    BASE: peer,
    PLAIN: ours,
    "dft, online": ours,
    "prift-mass, cached": ours,
    "prift-mass, reference": ours,
}


def job(name: str, directory: Path, batch: int, steps: int, warm: int) -> dict[str, float]:
    """One job in this process: tokens a second after the warm-up, and bytes."""
    moments = JOBS[name](name, directory, batch, steps)
    if len(moments) != steps:
        sys.exit(f"{name} made {len(moments)} steps instead of {steps}")
    seconds = moments[-1] - moments[warm - 1]
    return {"speed": (steps - warm) * batch * LENGTH / seconds, "peak": resident()}


def run(name: str, directory: Path, options: argparse.Namespace) -> dict[str, float]:
    """One job in a process of its own."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(options.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    command = [sys.executable, __file__, "--job", name, "--directory", str(directory)]
    for option in ("batch", "steps", "warm"):
        command += [f"--{option}", str(getattr(options, option))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{name} failed:\n{done.stderr[-4000:]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    print(
        f"{name}: {result['speed']:.0f} tokens/s, {result['peak'] / 2**20:.0f} MiB", file=sys.stderr
    )
    return result


def ratio(values: list[float]) -> str:
    """Mean and standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def main() -> None:
    """Run every job in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm", type=int, default=2, help="steps before the clock starts")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not 0 < options.warm < options.steps:
        parser.error(
            f"--warm {options.warm} of --steps {options.steps}: expected fewer, at least 1"
        )
    if options.job:
        found = job(options.job, options.directory, options.batch, options.steps, options.warm)
        print(json.dumps(found))
        return

    from postlude._front_door import tune_prior

    results: dict[str, list[dict[str, float]]] = {name: [] for name in JOBS}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        make(directory, options.batch * options.steps)
        tune_prior(directory / "model", directory / "data.jsonl", directory / "prior")
        for _ in range(options.repeat):
            for name in JOBS:
                results[name].append(run(name, directory, options))

    def against(name: str, base: str, key: str) -> str:
        pairs = zip(results[name], results[base], strict=True)
        return ratio([one[key] / other[key] for one, other in pairs])

    print(
        f"{options.batch} x {LENGTH} tokens a step, {options.steps - options.warm} steps timed, "
        f"{options.repeat} turns, {options.threads} threads\n"
    )
    print("| job | tokens/s | speed x TRL | speed x sft | peak MiB | peak x TRL |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, found in results.items():
        speed = statistics.median(one["speed"] for one in found)
        peak = statistics.median(one["peak"] for one in found) / 2**20
        print(
            f"| {name} | {speed:.0f} | {against(name, BASE, 'speed')} | {against(name, PLAIN, 'speed')} | "
            f"{peak:.0f} | {against(name, BASE, 'peak')} |"
        )


if __name__ == "__main__":
    main()
