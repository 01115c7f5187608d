"""Attribution of compression damage: are the training examples behind it the ones to heal a quantized model with?

A quantized model loses some texts more than others. LoRIF (arXiv:2601.21929) tells which training examples stand behind
a text, and what is asked about may be the damage itself, the divergence from the float model. Recovery data chosen by
what a compressed model lost is PASER's idea (arXiv:2502.12594), with clusters of texts in place of gradients.

tiny-lm, its weights rounded to 3 bits. Of held-out texts one half finds the damage (the quarter that lost most is asked
about), the other is measured on. From pieces of the training text a few are chosen, LoRA of rank 8 is trained on them
beside the codes for equally many steps, and becomes a branch of the quantized model. Chosen by:

- ``damage``: gradients of the divergence on the lost texts (``attribute select --reference``);
- ``loss``: gradients of the loss on the lost texts (``attribute select``);
- ``bm25``: words in common with them;
- ``most damaged``, ``highest loss``: of the pieces themselves (``attribute damage --by kl``, ``--by loss``);
- ``random``.

The seed of a run splits the held-out texts, and draws projections, random pieces and the order of tuning. What is
finished is kept in ``runs/claims``; a run that was stopped goes on from there.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

import postlude as pl
from _claim import Claim, share, spread
from postlude.attribution import BM25, LoRIF
from postlude.attribution.build import build
from postlude.attribution.damage import damage, divergence
from postlude.attribution.examples import Collection, Records
from postlude.attribution.query import scores
from postlude.attribution.select import strength
from postlude.evaluation.perplexity import evaluate
from postlude.quantization.rtn import RTN
from postlude.runs.checkpoint import Checkpoint
from postlude.tuning.adapters import Adapter
from postlude.tuning.objective import TuneRun
from postlude.zoo import tiny_lm
from prift import difference

LENGTH = 300  # characters of a piece
METHOD = RTN(weights=3, activations=16, kv=16)
LORA = Adapter("lora", rank=8)
WAYS = ("damage", "loss", "bm25", "most damaged", "highest loss", "random")
MEASURES = {
    "perplexity": "perplexity",
    "kl": "KL to the float model",
    "lost": "perplexity of the texts that lost most",
}


@dataclasses.dataclass(frozen=True)
class Size:
    """How much there is of everything."""

    pool: int
    held_out: int
    chosen: int
    steps: int
    batch: int = 4
    rate: float = 1e-3


def pieces(text: str, count: int) -> list[str]:
    """``count`` pieces, evenly over the text."""
    starts = [number * (len(text) - LENGTH) // (count - 1) for number in range(count)]
    return [text[start : start + LENGTH].strip() for start in starts]


def ranked(
    small: Checkpoint,
    exact: Checkpoint,
    pool: list[str],
    probes: list[str],
    seed: int,
    folder: Path,
) -> dict[str, Tensor]:
    """Strength of every piece, by way; and the texts that lost most."""
    lost = damage(small, exact, Records.open(probes)).kl.argsort(descending=True)
    worst = lost[: len(probes) // 4]
    queries = [probes[number] for number in worst.tolist()]
    of_pool = damage(small, exact, Records.open(pool))
    found: dict[str, Tensor] = {
        "most damaged": of_pool.kl,
        "highest loss": of_pool.loss,
        "random": torch.rand(len(pool), generator=torch.Generator().manual_seed(seed)),
        "worst": worst,
    }
    for name, method in (("gradients", LoRIF()), ("bm25", BM25())):
        index, _ = build(small, pool, method, folder / name, collection=Collection(seed=seed))
        asked = (
            {"loss": None, "damage": divergence(exact)} if name == "gradients" else {"bm25": None}
        )
        for way, output in asked.items():
            values = scores(index, queries, checkpoint=small, output=output)
            found[way] = strength(values)
    return found


def healed(
    small: Checkpoint,
    exact: Checkpoint,
    texts: list[str],
    test: list[str],
    lost: list[str],
    size: Size,
    seed: int,
) -> dict[str, float]:
    """The quantized model after tuning on some texts, or as it is without any."""
    model = small
    if texts:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder, "recovery.jsonl")
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            data.write_text(lines, encoding="utf-8")
            run = TuneRun(
                steps=size.steps, batch_size=size.batch, learning_rate=size.rate, seed=seed
            )
            model = pl.tune(small, data, "sft", run, adapter=LORA, merge=True).checkpoint
    found = evaluate(model, test, protocol="documents", reference=exact)
    of_lost = evaluate(model, lost, protocol="documents")
    return {"perplexity": found["perplexity"], "kl": found["kl"], "lost": of_lost["perplexity"]}


def overlap(first: Tensor, second: Tensor, count: int) -> float:
    """Share of the chosen pieces that both ways choose."""
    chosen = [set(one.argsort(descending=True)[:count].tolist()) for one in (first, second)]
    return len(chosen[0] & chosen[1]) / count


def main() -> None:
    """Measure every way of choosing."""
    claim = Claim("compression_damage", __doc__ or "", seeds=3)
    torch.set_num_threads(1)
    size = Size(24, 20, 6, 2) if claim.quick else Size(256, 120, 32, 16)
    exact = pl.load("zoo:tiny-lm", dtype="float32")
    small = pl.quantize(dataclasses.replace(exact, model=copy.deepcopy(exact.model)), METHOD)
    kept = claim.directory({"size": dataclasses.asdict(size), "model": small.fingerprint()})
    pool = pieces(tiny_lm.calibration_text(), size.pool)
    held_out = pieces(tiny_lm.held_out_text(), size.held_out)
    values: dict[str, dict[str, list[float]]] = {}
    overlaps: dict[str, list[float]] = {}
    for seed in claim.progress.iterate(list(claim.seeds), "seeds"):
        order = torch.randperm(
            len(held_out), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        half = len(order) // 2
        probes, test = ([held_out[n] for n in part] for part in (order[:half], order[half:]))
        strengths = kept.unit(
            f"ranked-{seed}",
            lambda probes=probes, seed=seed: _ranked(small, exact, pool, probes, seed),
        )
        lost = [probes[n] for n in strengths["worst"].tolist()]
        for way in WAYS[1:]:
            both = overlap(strengths["damage"], strengths[way], size.chosen)
            overlaps.setdefault(way, []).append(both)
        exactly = (
            evaluate(exact, test, protocol="documents"),
            evaluate(exact, lost, protocol="documents"),
        )
        numbers = {
            "perplexity": exactly[0]["perplexity"],
            "kl": 0.0,
            "lost": exactly[1]["perplexity"],
        }
        _keep(values, "float", numbers)
        for way in ("not healed", *WAYS):
            texts: list[str] = []
            if way in strengths:
                chosen = strengths[way].argsort(descending=True, stable=True)[: size.chosen]
                texts = [pool[n] for n in chosen.tolist()]

            def measure(texts: list[str] = texts, test: list[str] = test, lost: list[str] = lost,
                        seed: int = seed) -> dict[str, float]:  # fmt: skip
                return healed(small, exact, texts, test, lost, size, seed)

            found = claim.measured(kept, f"{way.replace(' ', '-')}-{seed}", measure)
            _keep(values, way, {name: float(value) for name, value in found.items()})
    report(claim, values, overlaps, size)


def _ranked(
    small: Checkpoint, exact: Checkpoint, pool: list[str], probes: list[str], seed: int
) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        return ranked(small, exact, pool, probes, seed, Path(folder))


def _keep(values: dict[str, dict[str, list[float]]], name: str, found: Mapping[str, float]) -> None:
    for key, value in found.items():
        values.setdefault(name, {}).setdefault(key, []).append(value)


def report(
    claim: Claim,
    values: Mapping[str, Mapping[str, list[float]]],
    overlaps: Mapping[str, list[float]],
    size: Size,
) -> None:
    """Print what was measured, what each way recovers, and how alike the choices are."""
    claim.table(
        f"tiny-lm in 3 bits, healed on {size.chosen} of {size.pool} pieces in {size.steps} steps",
        ["chosen by", *MEASURES.values(), "of the lost perplexity recovered"],
        [
            [name, *(spread(found[key]) for key in MEASURES), _recovered(values, name)]
            for name, found in values.items()
        ],
    )
    claim.table(
        "Minus random, the same seeds",
        ["chosen by", *MEASURES.values(), "lower perplexity", "pieces shared with damage"],
        [
            [
                way,
                *(difference(values[way][key], values["random"][key]) for key in MEASURES),
                share([a < b for a, b in zip(values[way]["perplexity"], values["random"]["perplexity"], strict=True)]),
                spread(overlaps[way]) if way in overlaps else "",
            ]
            for way in WAYS[:-1]
        ],
    )  # fmt: skip
    claim.finish()


def _recovered(values: Mapping[str, Mapping[str, list[float]]], name: str) -> str:
    if name in ("float", "not healed"):
        return ""
    parts = zip(*(values[one]["perplexity"] for one in ("not healed", name, "float")), strict=True)
    return (
        spread([100 * (before - after) / (before - best) for before, after, best in parts]) + " %"
    )


if __name__ == "__main__":
    main()
