"""LoRIF: does a rank-1 index predict retrained models as well as LoGRA's dense one, at a fraction of its bytes?

LoRIF (arXiv:2601.21929) reports the linear datamodeling score (LDS) of LoGRA (arXiv:2405.13954) at up to 20 times
fewer bytes, on models of 0.1 to 70 billion parameters. Here every method scores the same fine-tuned model and is judged
by the same bank of models, each fine-tuned from the same checkpoint on a random half of the same short documents.

Curvature is exact (the dual form) unless a rank ``r`` is given, so what is compared is what the index keeps. The seeds
of the script draw projections and starts of the factors; halves and orders of the bank are the same throughout. What is
finished is kept in ``runs/claims``; a run that was stopped goes on from there.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import postlude as pl
from _claim import Claim, data_directory, documents, spread
from postlude.attribution.bm25 import BM25
from postlude.attribution.build import build
from postlude.attribution.ekfac import EKFAC
from postlude.attribution.engine import Attributor
from postlude.attribution.examples import Collection
from postlude.attribution.gradcos import GradCos
from postlude.attribution.graddot import GradDot
from postlude.attribution.index import Index
from postlude.attribution.logra import LoGRA
from postlude.attribution.lorif import LoRIF
from postlude.attribution.queries import Queries, record_queries
from postlude.attribution.repsim import RepSim
from postlude.attribution.trak import TRAK
from postlude.evaluation.lds import (
    LDS,
    Retraining,
    bootstrap_mean,
    draw_subsets,
    lds,
    reliability,
    retrain,
    retraining_bank,
    spearman,
)
from postlude.evaluation.perplexity import Sequences, cut, sequence_losses
from postlude.numerics.curvature import GramInverse, trace_damping
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.directory import RunDirectory
from postlude.runs.documents import data_hash, encode
from postlude.runs.progress import Progress
from postlude.surgery.anatomy import anatomy_of
from postlude.zoo import tiny_lm

QUERIES = 60
# Examples of a trial.
FEW = 128
SIDES = (8, 16, 32, 64)
RANKS = (1, 4, 16)
MORE_RANKS = (1, 2, 4, 8)
FORMATS = ("fp32", "bf16", "int8")
DAMPINGS = (0.1, 0.5, 2.0, 10.0)
CURVATURE_RANKS = (8, 32, 128)


@dataclasses.dataclass
class Bench:
    """A checkpoint to train, short documents to learn from and to ask about, and a bank of models.

    Attributes:
        name: of the model.
        checkpoint: where every training starts.
        train, queries: documents.
        settings: of every training.
        subsets, seeds: random halves, and trainings of each.
        factors: of the projection of LoRIF; the first is measured in every format and with every seed.
        dense: factors for which gradients are also kept whole.
        kept: where finished trainings and scores are.
    """

    name: str
    checkpoint: Checkpoint
    train: Sequence[str]
    queries: Sequence[str]
    settings: Retraining
    subsets: int
    seeds: int
    factors: Sequence[int]
    dense: Sequence[int]
    kept: RunDirectory = dataclasses.field(init=False)

    def open(self, claim: Claim) -> None:
        """Find what an earlier run has finished."""
        self.kept = claim.directory(
            {
                "model": self.checkpoint.fingerprint(),
                "train": data_hash(self.train),
                "queries": data_hash(self.queries),
                "settings": dataclasses.asdict(self.settings),
                "subsets": self.subsets,
            }
        )

    def tokens(self, documents: Sequence[str]) -> list[Tensor]:
        """Sequences as the index sees them."""
        found = cut(
            self.checkpoint.tokenizer, documents, self.checkpoint.context, "documents"
        ).tokens
        if len(found) != len(documents):
            raise ValueError(f"{len(documents) - len(found)} documents have less than two tokens")
        return found

    @cached_property
    def masks(self) -> Tensor:
        """``bool [subsets, examples]``."""
        return draw_subsets(len(self.train), self.subsets)

    def bank(self, progress: Progress) -> Tensor:
        """``[subsets, seeds, queries]`` losses."""
        return retraining_bank(
            self.checkpoint,
            self.tokens(self.train),
            self.tokens(self.queries),
            self.masks,
            self.settings,
            seeds=self.seeds,
            unit=self.kept.unit,
            progress=progress,
        )

    @cached_property
    def explained(self) -> Checkpoint:
        """The model to explain: trained on every document, otherwise as those of the bank."""

        def compute() -> dict[str, Tensor]:
            full = retrain(self.checkpoint, self.tokens(self.train), self.settings)
            return dict(full.model.state_dict())

        model = copy.deepcopy(self.checkpoint.model)
        model.load_state_dict(self.kept.unit("trained-on-everything", compute))
        return dataclasses.replace(self.checkpoint, model=model, path=None)


@dataclasses.dataclass(frozen=True)
class Row:
    """Scores of one method, and what they cost.

    Attributes:
        name: of the method and its settings.
        scores: of each multiplier of the damping, or of the method's own only, ``[Q, N]``.
        own: the multiplier that is the method's default.
        bytes: of an example in the index.
        seconds: CPU time of the build.
    """

    name: str
    scores: dict[float, Tensor]
    own: float
    bytes: float
    seconds: float


def asked(claim: Claim, bench: Bench, name: str, method: Attributor, seed: int = 0) -> Row:
    """Build the index of a method, score with its own damping and, where it inverts a curvature, with others."""

    def measure() -> dict[str, Tensor | float]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "train.jsonl"
            lines = [json.dumps({"text": text}) for text in bench.train]
            file.write_text("\n".join(lines), encoding="utf-8")
            started = time.process_time()
            index, report = build(
                bench.explained,
                file,
                method,
                Path(folder) / "index",
                collection=Collection(seed=seed),
            )
            method.prepare(index, bench.explained)
            seconds = time.process_time() - started
            queries = record_queries(index, bench.explained, list(bench.queries))
            found: dict[str, Tensor | float] = {
                "own": method.score(index, queries).total,
                "bytes": report["bytes_per_example"],
                "seconds": seconds,
            }
            if type(method) is GradDot or (
                type(method) in (LoRIF, LoGRA) and method.curvature == "auto"
            ):
                for multiplier, scores in swept(index, queries).items():
                    found[f"damping-{multiplier:g}"] = scores
            return found

    key = re.sub(r"[^A-Za-z0-9.]+", "-", f"{name} seed {seed}")
    found = claim.measured(bench.kept, key, measure)
    own = float(getattr(method, "damping", 0.0) or 0.0)
    scores = {
        float(one.removeprefix("damping-")): tensor
        for one, tensor in found.items()
        if one.startswith("damping-")
    }
    return Row(
        name, {**scores, own: found["own"]}, own, float(found["bytes"]), float(found["seconds"])
    )


def swept(index: Index, queries: Queries) -> dict[float, Tensor]:
    """Scores under every damping, from one set of inner products, in the dual form, which is exact."""
    total: dict[float, Tensor] = {}
    for layer in index.layers:
        rows, given = index.layer(layer.module).rows().flat(), queries.rows(layer).flat()
        gram = (rows @ rows.mT).double()
        products = (given @ rows.mT).double()
        for multiplier in DAMPINGS:
            damping = trace_damping(float(gram.trace()), layer.size, multiplier)
            scores = GramInverse.of(gram, damping).scores(products)
            total[multiplier] = total[multiplier] + scores if multiplier in total else scores
    return {multiplier: scores.float() for multiplier, scores in total.items()}


def lorif_name(factor: int, rank: int, format: str, more: str = "") -> str:
    """As in the tables."""
    return f"lorif f={factor} c={rank} {format}{more}"


def every_method(claim: Claim, bench: Bench) -> dict[str, Row]:
    """Scores of every method, by name."""
    main = bench.factors[0]
    wanted: dict[str, Attributor] = {
        f"logra k={side} {kind}": LoGRA(side=side, format=kind)
        for side in SIDES
        for kind in ("bf16", "int8")
    }
    for factor in bench.factors:
        for rank in RANKS if factor == main else MORE_RANKS:
            for kind in FORMATS if factor == main else ("int8",):
                wanted[lorif_name(factor, rank, kind)] = LoRIF(
                    rank=rank, projection_factor=factor, format=kind
                )
    for rank in CURVATURE_RANKS:
        for tail in ("corrected", "truncated"):
            wanted[lorif_name(main, 1, "bf16", f" r={rank} {tail}")] = LoRIF(
                projection_factor=main, curvature="truncated", curvature_rank=rank, tail=tail
            )
    wanted |= {f"graddot f={one} bf16": GradDot(projection_factor=one) for one in bench.dense}
    wanted |= {
        f"gradcos f={main} bf16": GradCos(projection_factor=main),
        "trak k=64 bf16": TRAK(),
        "ekfac": EKFAC(),
        "repsim": RepSim(),
        "bm25": BM25(),
    }
    if claim.quick:
        wanted = {name: one for name, one in wanted.items() if "fp32" not in name}
    rows: dict[str, Row] = {}
    for name, one in claim.progress.iterate(list(wanted.items()), f"{bench.name}, methods"):
        row = asked(claim, bench, name, one)
        if type(one) is GradDot:
            # The same index, with its exact curvature: LoGRA where both sides are divided by a factor.
            whole = {at: scores for at, scores in row.scores.items() if at != row.own}
            exact = name.replace("graddot", "whole")
            rows[exact] = dataclasses.replace(row, name=exact, scores=whole, own=0.5)
            row = dataclasses.replace(row, scores={row.own: row.scores[row.own]})
        rows[name] = row
    return rows


def interval(found: LDS) -> str:
    """``0.300 [0.280, 0.320]``."""
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


@dataclasses.dataclass(frozen=True)
class Judge:
    """Turns scores into linear datamodeling scores."""

    masks: Tensor
    losses: Tensor

    def own(self, row: Row) -> LDS:
        """With the method's default damping."""
        return lds(row.scores[row.own], self.masks, self.losses)

    def best(self, row: Row) -> tuple[LDS, float]:
        """With the damping of the sweep that serves the method best."""
        found = [(lds(scores, self.masks, self.losses), at) for at, scores in row.scores.items()]
        return max(found, key=lambda one: one[0].value)


def report(claim: Claim, bench: Bench) -> None:
    """Measure and print one model."""
    bench.open(claim)
    losses = bench.bank(claim.progress)
    judge = Judge(bench.masks, losses.mean(1))
    ceiling = reliability(losses)
    before, after = (
        sum(sequence_losses(one, Sequences(bench.tokens(bench.queries), "documents")))
        / len(bench.queries)
        for one in (bench.checkpoint, bench.explained)
    )
    claim.say(
        f"{bench.name}: {len(bench.train)} examples, {len(bench.queries)} queries, {bench.subsets} random halves, "
        f"each trained {bench.seeds} times ({bench.settings}). Loss on the queries {before:.3f} before training, "
        f"{after:.3f} after it on everything, {float(losses.mean()):.3f} after it on a half. Rank correlation between "
        f"the losses of two seeds {interval(ceiling)}."
    )
    rows = every_method(claim, bench)
    rival = rows[f"logra k={SIDES[-1]} bf16"]
    reference, _ = judge.best(rival)
    table, best = [], {}
    for name, row in rows.items():
        found, at = judge.best(row)
        best[name] = found
        difference = bootstrap_mean(found.per_query - reference.per_query)
        sweep = len(row.scores) > 1
        table.append(
            [
                name,
                f"{row.bytes:,.0f}",
                f"{rival.bytes / row.bytes:.1f}" if row.bytes else "",
                interval(judge.own(row)),
                interval(found) if sweep else "",
                f"{at:g}" if sweep else "",
                interval(difference),
                f"{row.seconds:.1f}",
            ]
        )
    claim.table(
        f"{bench.name}: LDS with its 95 % interval over queries",
        ["", "bytes an example", "x smaller than logra k=64", "default damping", "best damping", "which",
         "minus logra k=64, both best", "CPU s of build"],
        table,
    )  # fmt: skip
    header = ["", *(f"{one:g}" for one in DAMPINGS)]
    claim.table(
        f"{bench.name}: LDS by multiplier of the damping",
        header,
        [
            [
                name,
                *(
                    f"{lds(row.scores[one], judge.masks, judge.losses).value:.3f}"
                    for one in DAMPINGS
                ),
            ]
            for name, row in rows.items()
            if set(DAMPINGS) <= set(row.scores) and "bf16" in name
        ],
    )
    if not claim.quick:
        formats(claim, bench, rows)
    verdict(claim, bench, rows, judge)
    statements(claim, bench, rows, judge)
    projections(claim, bench, judge)


def formats(claim: Claim, bench: Bench, rows: Mapping[str, Row]) -> None:
    """Print how close the scores of smaller numbers are to those of fp32."""
    table = []
    for rank in RANKS:
        full = rows[lorif_name(bench.factors[0], rank, "fp32")]
        cells = []
        for kind in ("bf16", "int8"):
            row = rows[lorif_name(bench.factors[0], rank, kind)]
            cells.append(
                f"{float(spearman(row.scores[row.own].T, full.scores[full.own].T).min()):.5f}"
            )
        table.append([f"c={rank}", *cells])
    claim.table(
        f"{bench.name}: rank correlation of scores with those of fp32 factors, the worst query",
        ["", "bf16", "int8"],
        table,
    )


def verdict(claim: Claim, bench: Bench, rows: Mapping[str, Row], judge: Judge) -> None:
    """Print, for every index of LoGRA, the smallest one of LoRIF that is not measurably worse."""
    table = []
    for name, rival in rows.items():
        if not name.startswith("logra"):
            continue
        reference, _ = judge.best(rival)
        equal = []
        for other, row in rows.items():
            if other.startswith("lorif") and " r=" not in other:
                difference = bootstrap_mean(judge.best(row)[0].per_query - reference.per_query)
                if difference.high >= 0:
                    equal.append((row.bytes, other, difference))
        cells = ["none", "", ""]
        if equal:
            bytes_, other, difference = min(equal, key=lambda one: one[0])
            cells = [other, f"{rival.bytes / bytes_:.1f}", interval(difference)]
        table.append([name, f"{rival.bytes:,.0f}", interval(reference), *cells])
    claim.table(
        f"{bench.name}: the smallest index of lorif that is not measurably worse, each at its best damping",
        ["", "bytes an example", "LDS", "lorif", "x smaller", "difference"],
        table,
    )


def statements(claim: Claim, bench: Bench, rows: Mapping[str, Row], judge: Judge) -> None:
    """Print what should hold of methods on any model, and whether it does."""
    best = {name: judge.best(row)[0] for name, row in rows.items()}
    main, (smallest, *_) = bench.factors[0], sorted(bench.dense)

    def compared(name: str, other: str) -> str:
        difference = bootstrap_mean(best[name].per_query - best[other].per_query)
        verdict = "yes" if difference.low > 0 else "no" if difference.high < 0 else "level"
        return f"{verdict}, {interval(difference)}"

    pairs = [("ekfac", f"graddot f={smallest} bf16"), ("ekfac", "bm25")]
    pairs += [(f"whole f={one} bf16", f"graddot f={one} bf16") for one in bench.dense]
    pairs += [(f"whole f={main} bf16", lorif_name(main, 1, "bf16"))]
    pairs += [
        (lorif_name(main, b, "bf16"), lorif_name(main, a, "bf16"))
        for a, b in itertools.pairwise(RANKS)
    ]
    for a, b in itertools.pairwise(sorted(bench.dense)):
        pairs += [(f"{name} f={a} bf16", f"{name} f={b} bf16") for name in ("graddot", "whole")]
    claim.table(
        f"{bench.name}: is the first better than the second? Each at its best damping",
        ["", "than", "difference"],
        [[a, b, compared(a, b)] for a, b in pairs],
    )


def projections(claim: Claim, bench: Bench, judge: Judge) -> None:
    """Print the spread over projections and starts."""
    methods: dict[str, Attributor] = {
        lorif_name(bench.factors[0], rank, "bf16"): LoRIF(
            rank=rank, projection_factor=bench.factors[0]
        )
        for rank in RANKS
    }
    methods[f"logra k={SIDES[-1]} bf16"] = LoGRA(side=SIDES[-1])
    work = list(itertools.product(methods.items(), claim.seeds))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for (name, method), seed in claim.progress.iterate(work, f"{bench.name}, projections"):
        row = asked(claim, bench, name, method, seed)
        found[name].append((judge.own(row).value, judge.best(row)[0].value))
    claim.table(
        f"{bench.name}: LDS over {len(claim.seeds)} seeds of the projections",
        ["", "default damping", "best damping"],
        [
            [name, spread([a for a, _ in each]), spread([b for _, b in each])]
            for name, each in found.items()
        ],
    )


def pieces(tokenizer: Any, text: str, count: int, length: int) -> list[str]:
    """Consecutive passages of a text, of about ``length`` tokens each."""
    ids = encode(tokenizer, text, add_special_tokens=False)
    if len(ids) < count * length:
        raise ValueError(f"the text has {len(ids)} tokens; expected {count * length}")
    windows = [ids[i * length : (i + 1) * length] for i in range(count)]
    return [tokenizer.decode(window, skip_special_tokens=True) for window in windows]


def split(found: Sequence[str], quick: bool, queries: int = QUERIES) -> tuple[list[str], list[str]]:
    """Passages to learn from, and others from among them to ask about; few of both for a trial."""
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    learned, asked = [found[i] for i in order[queries:]], [found[i] for i in order[:queries]]
    return (learned[:FEW], asked[: FEW // 8]) if quick else (learned, asked)


def built_in(quick: bool) -> Bench:
    """tiny-lm on the text that was held out from its training."""
    checkpoint = pl.load("zoo:tiny-lm", dtype="float32")
    found = pieces(checkpoint.tokenizer, tiny_lm.held_out_text(), 480 + QUERIES, 48)
    train, queries = split(found, quick)
    return Bench(
        "tiny-lm",
        checkpoint,
        train,
        queries,
        Retraining(epochs=2, rate=5e-4),
        subsets=4 if quick else 50,
        seeds=2,
        factors=(4, 8, 16),
        dense=(4,),
    )


def stories(quick: bool) -> Bench | None:
    """stories260k on WikiText-2, where its files are."""
    data = data_directory()
    if data is None:
        return None
    checkpoint = pl.load(data / "stories260k", dtype="float32")
    text = documents(data / "text" / "wikitext2_valid.txt", 200_000)[0]
    train, queries = split(pieces(checkpoint.tokenizer, text, 600 + QUERIES, 64), quick)
    return Bench(
        "stories260k",
        checkpoint,
        train,
        queries,
        Retraining(epochs=3, rate=1e-3),
        subsets=4 if quick else 100,
        seeds=2,
        factors=(2, 1, 4, 8),
        dense=(2,),
    )


def bigrams(quick: bool) -> Bench:
    """A model of two blocks, trained from nothing on sequences from six random tables of successors."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words, length, count = 32, 32, FEW if quick else 600
    generator = torch.Generator().manual_seed(0)
    tables = (3 * torch.randn(6, words, words, generator=generator)).softmax(-1)
    kind = torch.randint(6, (count + QUERIES,), generator=generator)
    rows = torch.randint(words, (count + QUERIES, length), generator=generator)
    for at in range(1, length):
        chances = tables[kind, rows[:, at - 1]]
        rows[:, at] = chances.multinomial(1, generator=generator)[:, 0]
    texts = [" ".join(f"w{i}" for i in row) for row in rows.tolist()]
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=length,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    return Bench(
        "bigrams",
        Checkpoint(model, tokenizer, anatomy_of(model)),
        texts[:count],
        texts[count:],
        Retraining(epochs=8, rate=3e-3, batch=32),
        subsets=4 if quick else 50,
        seeds=2,
        factors=(2, 1),
        dense=(1, 2, 4),
    )


PARTS: dict[str, Callable[[bool], Bench | None]] = {
    "tiny-lm": built_in,
    "stories260k": stories,
    "bigrams": bigrams,
}


def main() -> None:
    """Measure one model."""
    claim = Claim("lorif", __doc__ or "", tuple(PARTS))
    bench = PARTS[claim.part](claim.quick)
    if bench is None:
        claim.say(f"{claim.part}: skipped, its files are not here (`POSTLUDE_DATA` says where).")
    else:
        report(claim, bench)
    claim.finish()


if __name__ == "__main__":
    main()
