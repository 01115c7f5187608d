"""Attribution indices against bergson and kronfluence, in one run on one machine, each job in a process of its own.

    python benchmarks/attribute.py --peer-python .venv-peer/bin/python

The peers want versions of their own, so they live in another environment::

    python3 -m venv .venv-peer && .venv-peer/bin/pip install torch==2.13.0
    echo torch==2.13.0 > constraint.txt
    .venv-peer/bin/pip install -c constraint.txt bergson==2.5.1 kronfluence==1.0.1
    .venv-peer/bin/pip uninstall -y torchvision torchaudio        # they do not fit this torch, and are not needed

Three parts:

- **speed**: a random Llama (4 blocks, width 128) and 2048 sequences of 128 tokens; 10 queries, which are the first ten
  sequences. CPU seconds of the build beyond imports and loading, bytes of what is stored, CPU seconds of 10 queries.
  ``forward-backward`` is what training does: loss and gradients of all weights, no optimizer.
- **streaming**: one query over a synthetic index of the same layers with many rows, which lies in the page cache; bytes
  of the index a second, beside what a large copy and a large sum reach on the same machine. One thread.
- **lds**: scores of the same tools on the model of ``claims/lorif.py``, judged by its bank of retrained models, which
  has to be there (``python claims/lorif.py --part stories260k`` makes it).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SIDE = 16  # bergson's default width of a projection
WORDS = 508


def cpu() -> float:
    """CPU seconds of this process and of those it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


# ------------------------------------------------------------------------------------------------ inputs


def make_speed(directory: Path, count: int, length: int, queries: int) -> None:
    """A random model, a tokenizer of one token a word, and random sequences from tables of successors."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", "<pad>", *(f"w{i}" for i in range(WORDS))]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(names),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(directory / "model")
    words = Tokenizer(
        models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(
        tokenizer_object=words, model_max_length=4096, **special
    ).save_pretrained(directory / "model")
    tables = (3 * torch.randn(6, WORDS, WORDS)).softmax(-1)
    rows = torch.randint(WORDS, (count, length))
    kind = torch.arange(count) % 6
    for at in range(1, length):
        rows[:, at] = tables[kind, rows[:, at - 1]].multinomial(1)[:, 0]
    texts = [" ".join(f"w{i}" for i in row) for row in rows.tolist()]
    write(directory, texts, texts[:queries], factor=4, tokens_per_batch=4096)


def make_lds(directory: Path, part: str) -> tuple[Any, Any]:
    """Model, examples and queries of the claim; the halves and the losses of the models trained on them."""
    sys.path.insert(0, str(ROOT / "claims"))
    import lorif
    from _claim import Claim

    arguments, sys.argv = sys.argv, ["lorif.py", "--part", part]
    try:
        claim = Claim("lorif", "", tuple(lorif.PARTS))
    finally:
        sys.argv = arguments
    bench = lorif.PARTS[part](False)
    if bench is None:
        raise FileNotFoundError(f"the files of {part} are not here (POSTLUDE_DATA)")
    bench.open(claim)
    losses = bench.bank(claim.progress).mean(1)
    bench.explained.save(directory / "model")
    write(
        directory,
        bench.train,
        bench.queries,
        factor=bench.factors[0],
        tokens_per_batch=bench.checkpoint.context,
    )
    return bench.masks, losses


def write(directory: Path, train: Any, queries: Any, **settings: Any) -> None:
    """Texts as .jsonl, and what every job must know."""
    for name, texts in (("train", train), ("queries", queries)):
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (directory / "settings.json").write_text(json.dumps(settings))


# ------------------------------------------------------------------------------------------------ our jobs


def forward_backward(directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Loss and gradients of all weights, over the data once, in batches of as many tokens."""
    import torch

    from postlude.attribution.examples import Collection, Records, batches, tokenize
    from postlude.runs.loading import load

    checkpoint = load(directory / "model", dtype="float32")
    records = Records(directory / "train.jsonl")
    examples = tokenize(
        checkpoint.tokenizer, records, 0, len(records), checkpoint.context, Collection()
    )
    model = checkpoint.model.requires_grad_(True)
    started = cpu()
    for batch in batches(examples, 4096):
        labels = batch.ids.masked_fill(~batch.mask, -100)
        logits = model(input_ids=batch.ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(
            logits, labels[:, 1:].flatten(), reduction="sum"
        ).backward()
        model.zero_grad(set_to_none=True)
    return {"build": cpu() - started}


def postlude_job(make: Callable[[int], Any]) -> Callable[..., dict[str, Any]]:
    """Build an index and ask it, twice: what is fitted for the first query is kept for the second."""

    def job(directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
        from postlude.attribution.build import build
        from postlude.attribution.examples import Collection, Records
        from postlude.attribution.forecast import forecast
        from postlude.attribution.plan import HARDWARE
        from postlude.attribution.queries import record_queries
        from postlude.runs.loading import load

        checkpoint = load(directory / "model", dtype="float32")
        method = make(settings["factor"])
        folder = directory / "index"
        started = cpu()
        index, _ = build(checkpoint, directory / "train.jsonl", method, folder, overwrite=True)
        built = cpu() - started
        expected = forecast(
            checkpoint, Records(directory / "train.jsonl"), method, Collection(), HARDWARE["h100"]
        )
        asked = Records(directory / "queries.jsonl")
        started = cpu()
        scores = method.score(index, record_queries(index, checkpoint, asked), keep=True).total
        first = cpu() - started
        started = cpu()
        queries = record_queries(index, checkpoint, asked)
        recorded = cpu()
        scores = method.score(index, queries, keep=True).total
        save(directory, scores)
        on_disk = sum(file.stat().st_size for file in (folder / "shards").iterdir())
        return {
            "build": built,
            "bytes": on_disk,
            "forecast": None if expected is None else expected.bytes,
            "first": first,
            "query": cpu() - started,
            "scoring": cpu() - recorded,
        }

    return job


def lorif(format: str, rank: int = 1, narrower: int = 1) -> Callable[[int], Any]:
    """Settings of LoRIF at the factor of a directory, or at so many times that factor."""

    def make(factor: int) -> Any:
        from postlude.attribution.lorif import LoRIF

        return LoRIF(rank=rank, projection_factor=narrower * factor, format=format)  # type: ignore[arg-type]

    return make


def logra(factor: int) -> Any:
    """Settings of LoGRA at bergson's width."""
    from postlude.attribution.logra import LoGRA

    return LoGRA(side=SIDE, format="fp32")


def streaming(directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """One query over many rows."""
    import torch

    from postlude.attribution.examples import Records
    from postlude.attribution.graddot import GradDot
    from postlude.attribution.index import KIND, Index
    from postlude.attribution.lorif import LoRIF
    from postlude.attribution.queries import record_queries
    from postlude.attribution.ranking import rank
    from postlude.runs.loading import load
    from postlude.runs.store import TensorStore

    # A copy reads and writes every byte; a sum reads them.
    big = torch.ones(1 << 27)
    other = torch.ones_like(big)
    found: dict[str, Any] = {
        "copy": best_of(functools.partial(other.copy_, big), 2 * 4 * big.numel()),
        "read": best_of(big.sum, 4 * big.numel()),
    }
    del big, other
    square = torch.ones(1024, 1024)
    found["products"] = best_of(functools.partial(torch.mm, square, square), 2 * 1024**3)
    checkpoint = load(directory / "model", dtype="float32")
    small = Index(directory / "index")
    shard, shards = 8192, settings["stream_shards"]
    rows = small.store.shards[0]
    picked = torch.arange(shard) % len(rows)
    block = {name: rows.tensor(name)[picked].clone() for name in rows.names()}
    store = TensorStore.create(
        directory / "stream", small.manifest, [shard] * shards, kind=KIND, overwrite=True
    )
    for number in range(shards):
        store.write(number, block)
    store.finish()
    index = Index(directory / "stream")
    queries = record_queries(index, checkpoint, Records(directory / "queries.jsonl"))
    one = type(queries)(
        queries.examples[:1],
        {name: tensor[:1] for name, tensor in queries.tensors.items()},
        queries.representation,
        queries.layers,
        queries.checkpoint,
    )
    kind = {"rank": 1, "projection_factor": settings["factor"], "format": settings["format"]}
    plain = GradDot()
    curved = LoRIF(curvature="truncated", curvature_rank=0, **kind)
    for label, method, asked in (
        ("graddot, 1 query", plain, one),
        ("lorif, 1 query", curved, one),
        ("lorif, 10 queries", curved, queries),
    ):
        rank(method, index, asked, 10, keep=True)
        times = []
        for _ in range(3):
            started = time.perf_counter()
            rank(method, index, asked, 10, keep=True)
            times.append(time.perf_counter() - started)
        operations = 2.0 * len(asked) * len(index) * sum(layer.size for layer in index.layers)
        found[label] = {
            "seconds": min(times),
            "rate": index.bytes / min(times),
            "operations": operations / min(times),
        }
    found["bytes"] = index.bytes
    return found


def best_of(work: Callable[[], Any], amount: float) -> float:
    """Bytes a second, the best of five."""
    work()
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        work()
        best = max(best, amount / (time.perf_counter() - started))
    return best


def save(directory: Path, scores: Any) -> None:
    """Scores ``[Q, N]`` for whoever judges them."""
    from safetensors.torch import save_file

    save_file({"scores": scores.float().contiguous()}, directory / "scores.safetensors")


# ------------------------------------------------------------------------------------------------ jobs of peers


def bergson(directory: Path, *words: str, batch: int) -> float:
    """CPU seconds of a bergson command, beyond those of starting it."""
    command = str(Path(sys.executable).with_name("bergson"))

    def spent(*arguments: str) -> float:
        started = cpu()
        done = subprocess.run(
            [command, *arguments], cwd=directory, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            sys.exit(f"bergson {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
        return cpu() - started

    idle = spent("--help")
    return spent(*words, "--token_batch_size", str(batch)) - idle


def bergson_build(directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Index of projected gradients; queries one at a time, by inner product and by cosine."""
    import torch
    from bergson import Attributor
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = ("build", "runs/train", "--overwrite", "--model", "./model", "--projection_dim")
    data = (str(SIDE), "--dataset", "train.jsonl")
    built = bergson(directory, *words, *data, batch=settings["tokens_per_batch"])
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32).eval()
    with open(directory / "queries.jsonl") as file:
        asked = [tokenizer(json.loads(line)["text"], return_tensors="pt") for line in file]
    found, spent = [], 0.0
    for unit_norm in (False, True):
        attributor = Attributor(directory / "runs/train", unit_norm=unit_norm)
        scores = torch.zeros(len(asked), attributor.N)
        started = cpu()
        for row, one in zip(scores, asked, strict=True):
            with attributor.trace(model.base_model, attributor.N) as result:
                model(input_ids=one["input_ids"], labels=one["input_ids"]).loss.backward()
                model.zero_grad()
            row[result.indices[0]] = result.scores[0].detach()
        spent = spent or cpu() - started
        found.append(scores)
    save(directory, torch.stack(found))
    size = (directory / "runs/train/gradients.bin").stat().st_size
    return {"build": built, "bytes": size, "query": spent}


def bergson_trackstar(directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Its five steps in one command: Hessians, mix, scores."""
    import torch
    from bergson.data import load_scores

    words = (
        "trackstar",
        "runs/trackstar",
        "--overwrite",
        "--model",
        "./model",
        "--projection_dim",
        str(SIDE),
    )
    data = ("--data.dataset", "train.jsonl", "--query.dataset", "queries.jsonl")
    spent = bergson(directory, *words, *data, batch=settings["tokens_per_batch"])
    scores = load_scores(directory / "runs/trackstar/scores")
    save(directory, torch.from_numpy(scores[:]).T)
    return {"build": spent}


def kronfluence(directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """EK-FAC factors, then all pairs; there is no index, every query is a pass over the data."""
    import torch
    import torch.nn.functional as F
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch import nn
    from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator

    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32).eval()

    def rows(name: str) -> list[dict[str, Any]]:
        with open(directory / f"{name}.jsonl") as file:
            tokens = [tokenizer(json.loads(line)["text"])["input_ids"] for line in file]
        longest = max(map(len, tokens))
        return [
            {
                "input_ids": one + [0] * (longest - len(one)),
                "attention_mask": [1] * len(one) + [0] * (longest - len(one)),
                "labels": one + [-100] * (longest - len(one)),
            }
            for one in tokens
        ]

    class Loss(Task):
        """Cross-entropy summed over tokens."""

        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Any:
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            logits = logits[:, :-1].flatten(0, 1).float()
            labels = batch["labels"][:, 1:].flatten()
            if sample:
                with torch.no_grad():
                    drawn = torch.multinomial(logits.softmax(-1), 1)[:, 0]
                    drawn[labels == -100] = -100
                labels = drawn
            return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Any:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return [
                name
                for name, one in model.named_modules()
                if isinstance(one, nn.Linear) and "lm_head" not in name
            ]

        def get_attention_mask(self, batch: Any) -> Any:
            return batch["attention_mask"]

    train, asked = rows("train"), rows("queries")
    task = Loss()
    analyzer = Analyzer(
        "benchmark",
        prepare_model(model, task),
        task,
        cpu=True,
        disable_tqdm=True,
        output_dir=str(directory / "runs/kronfluence"),
        log_level=40,
    )
    from kronfluence.utils.dataset import DataLoaderKwargs

    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=default_data_collator))
    batch = 32
    started = cpu()
    analyzer.fit_all_factors(
        "ekfac",
        train,
        per_device_batch_size=batch,
        factor_args=FactorArguments(strategy="ekfac"),
        overwrite_output_dir=True,
    )
    fitted = cpu() - started
    started = cpu()
    analyzer.compute_pairwise_scores(
        "pairs", "ekfac", query_dataset=asked, train_dataset=train, per_device_query_batch_size=len(asked),
        per_device_train_batch_size=batch, score_args=ScoreArguments(damping_factor=None), overwrite_output_dir=True,
    )  # fmt: skip
    spent = cpu() - started
    save(directory, analyzer.load_pairwise_scores("pairs")["all_modules"])
    size = sum(
        file.stat().st_size for file in (directory / "runs/kronfluence").rglob("*.safetensors")
        if "factors" in str(file)
    )  # fmt: skip
    return {"build": fitted, "bytes": size, "query": spent}


PEERS: dict[str, Callable[..., dict[str, Any]]] = {
    "bergson build": bergson_build,
    "bergson trackstar": bergson_trackstar,
    "kronfluence ekfac": kronfluence,
}
OURS: dict[str, Callable[..., dict[str, Any]]] = {
    "postlude logra": postlude_job(logra),
    "postlude lorif bf16": postlude_job(lorif("bf16")),
    "postlude lorif int8": postlude_job(lorif("int8")),
    "postlude lorif int8, rank 4 at half the widths": postlude_job(lorif("int8", 4, 2)),
}
JOBS = {"forward-backward": forward_backward, "streaming": streaming, **PEERS, **OURS}


# ------------------------------------------------------------------------------------------------ running


class Runner:
    """Runs jobs in processes of their own."""

    def __init__(self, peer_python: str) -> None:
        self.peer_python = peer_python
        self.missing = ""
        for module in ("bergson", "kronfluence"):
            done = None
            if Path(peer_python).exists():
                done = subprocess.run(
                    [peer_python, "-c", f"import {module}"], capture_output=True, check=False
                )
            if done is None or done.returncode != 0:
                self.missing = f"no {module} at {peer_python} (see the head of this file)"

    def __call__(self, name: str, directory: Path, **more: Any) -> dict[str, Any] | None:
        """What a job measured; None where it cannot run here."""
        if name in PEERS and self.missing:
            print(f"{name}: skipped, {self.missing}")
            return None
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        python = sys.executable
        if name in PEERS:
            python = self.peer_python
            environment.pop("PYTHONPATH", None)
        settings = {**json.loads((directory / "settings.json").read_text()), **more}
        words = ["--job", name, "--directory", str(directory), "--settings", json.dumps(settings)]
        started = time.perf_counter()
        done = subprocess.run(
            # Without -P, files of this directory would stand for libraries of the same name.
            [python, "-P", os.path.abspath(__file__), *words],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            print(f"{name}: FAILED\n{done.stderr[-2000:]}")
            return None
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"{name}: {time.perf_counter() - started:.0f} s in all", file=sys.stderr)
        return found


def speed(run: Runner, count: int, length: int, shards: int) -> None:
    """Print the speed and the streaming tables."""
    header = (
        "job", "build, CPU s", "x forward-backward", "bytes an example", "x smaller than bergson",
        "forecast / bytes", "10 queries, CPU s", "of it scoring", "self top-1",
    )  # fmt: skip
    streams = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        make_speed(directory, count, length, 10)
        print(f"\n**{count} sequences of {length} tokens, 10 queries, 1 thread**\n")
        print("| " + " | ".join(header) + " |")
        print("| --- |" + " ---: |" * (len(header) - 1))
        base, rival = 0.0, 28 * SIDE**2 * 4.0
        for name in ("forward-backward", *PEERS, *OURS):
            found = run(name, directory)
            if found is None:
                continue
            base = base or found["build"]
            stored = found.get("bytes", 0)
            cells = [name, f"{found['build']:.1f}", f"{found['build'] / base:.2f}"]
            cells += (
                [f"{stored / count:,.0f}", f"{rival * count / stored:.1f}"] if stored else ["", ""]
            )
            cells.append(f"{found['forecast'] / stored:.3f}" if found.get("forecast") else "")
            cells.append(f"{found['query']:.2f}" if "query" in found else "")
            cells.append(f"{found['scoring']:.3f}" if "scoring" in found else "")
            cells.append(own(directory) if "query" in found else "")
            print("| " + " | ".join(cells) + " |", flush=True)
            if name in ("postlude lorif bf16", "postlude lorif int8") and shards:
                kind = name.split()[-1]
                streams.append(
                    (kind, run("streaming", directory, stream_shards=shards, format=kind))
                )
    for kind, found in streams:
        show_streaming(kind, found)


def show_streaming(format: str, found: dict[str, Any] | None) -> None:
    """Print one streaming measurement."""
    if found is None:
        return
    print(
        f"\n**Streaming, {format}: {found['bytes'] / 1e6:.0f} MB; a copy moves {found['copy'] / 1e9:.1f} GB/s, "
        f"a sum reads {found['read'] / 1e9:.1f} GB/s, products reach {found['products'] / 1e9:.0f} GFLOP/s**\n"
    )
    print(
        "| | seconds | GB/s | of the copy | of the products |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for label, one in found.items():
        if isinstance(one, dict):
            print(
                f"| {label} | {one['seconds']:.3f} | {one['rate'] / 1e9:.2f} | {one['rate'] / found['copy']:.2f} | "
                f"{one['operations'] / found['products']:.2f} |"
            )
    print(flush=True)


def own(directory: Path) -> str:
    """How many of the queries, which are the first sequences, find themselves."""
    from safetensors.torch import load_file

    scores = load_file(directory / "scores.safetensors")["scores"]
    scores = scores if scores.ndim == 3 else scores[None]
    count = scores.shape[1]
    return ", ".join(
        f"{int((one.argmax(1).cpu() == _range(count)).sum())} of {count}" for one in scores
    )


def _range(count: int) -> Any:
    import torch

    return torch.arange(count)


def judged(run: Runner, part: str) -> None:
    """Print the LDS table."""
    from safetensors.torch import load_file

    from postlude.evaluation.lds import lds

    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        try:
            masks, losses = make_lds(directory, part)
        except FileNotFoundError as error:
            print(f"lds: skipped, {error}")
            return
        count = masks.shape[1]
        print(
            f"\n**LDS on {part}: {count} examples, {losses.shape[1]} queries, {len(masks)} halves**\n"
        )
        print("| job | LDS [95 %] | bytes an example |")
        print("| --- | ---: | ---: |")
        for name in (*PEERS, *OURS):
            found = run(name, directory)
            if found is None:
                continue
            scores = load_file(directory / "scores.safetensors")["scores"]
            several = scores if scores.ndim == 3 else scores[None]
            labels = [f"{name}, dot", f"{name}, cosine"] if len(several) == 2 else [name]
            for label, one in zip(labels, several, strict=True):
                value = lds(one, masks, losses)
                bytes_ = found.get("bytes", 0) / count if "ekfac" not in name else 0
                print(
                    f"| {label} | {value.value:.3f} [{value.low:.3f}, {value.high:.3f}] | "
                    f"{f'{bytes_:,.0f}' if bytes_ else ''} |",
                    flush=True,
                )


def main() -> None:
    """Run every part and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sequences", type=int, default=2048)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument(
        "--stream-shards", type=int, default=16, help="of 8192 rows; 0 leaves the part out"
    )
    parser.add_argument(
        "--lds", default="stories260k", help="part of claims/lorif.py; empty leaves it out"
    )
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--peer-python", default=".venv-peer/bin/python")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        import torch

        torch.set_num_threads(1)
        print(json.dumps(JOBS[options.job](options.directory, options.settings)))
        return
    run = Runner(options.peer_python)
    if not options.no_speed:
        speed(run, options.sequences, options.length, options.stream_shards)
    if options.lds:
        judged(run, options.lds)


if __name__ == "__main__":
    main()
