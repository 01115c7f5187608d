"""W4A4KV4: does OffQ beat QuaRot, and QuaRot rounding to nearest, at equal granularity of activations?

OffQ (arXiv:2606.07116) reports WikiText-2 perplexity float < OffQ < QuaRot (arXiv:2404.00456) on models of 1 to 70
billion parameters, with activations of OffQ in groups of 128 channels and those of QuaRot per token. Here every
method has the same granularity, once per token and once per group. Weights have one scale an output channel, keys and
values one a token and head; all other settings are those of each method.

The seed of a run draws the calibration crops and every random rotation.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import postlude as pl
from _claim import Claim, data_directory, documents, share, spread
from _variants import AllTokensOffQ, EqualOffQ, OffsetGPTQ, OffsetQuaRot, RandomRotationOffQ
from postlude.evaluation.perplexity import evaluate
from postlude.quantization.engine import Quantizer
from postlude.quantization.gptq import GPTQ
from postlude.quantization.offq import OffQ
from postlude.quantization.quarot import QuaRot
from postlude.quantization.rtn import RTN
from postlude.quantization.smoothquant import SmoothQuant
from postlude.runs.checkpoint import Checkpoint
from postlude.zoo import tiny_lm

METHODS: dict[str, type[Quantizer]] = {
    "rtn": RTN,
    "smoothquant": SmoothQuant,
    "gptq": GPTQ,
    "quarot": QuaRot,
    "offq": EqualOffQ,
}
PARTS: dict[str, type[Quantizer]] = {
    "PCA over all tokens": AllTokensOffQ,
    "random rotation with a constant first row": RandomRotationOffQ,
    "QuaRot's rotations": OffsetQuaRot,
    "no rotation": OffsetGPTQ,
}
OWN_GROUPS = "offq, o_in per head"
ORDER = ("offq", "quarot", "rtn")
PERPLEXITY, KL = "perplexity", "kl"

# Values over seeds, by method, by text, by quantity.
Values = dict[str, dict[str, dict[str, list[float]]]]


@dataclasses.dataclass(frozen=True)
class Text:
    """What perplexity and KL are measured on."""

    name: str
    documents: Sequence[str]
    protocol: Literal["windows", "documents"]
    length: int = 256

    def measure(
        self, checkpoint: Checkpoint, reference: Checkpoint | None = None
    ) -> dict[str, Any]:
        """Perplexity, and with a reference the KL to it."""
        return evaluate(
            checkpoint,
            list(self.documents),
            protocol=self.protocol,
            max_length=self.length,
            reference=reference,
        )


@dataclasses.dataclass(frozen=True)
class Bench:
    """A float model, what it is calibrated and measured on, and channels of a group."""

    name: str
    checkpoint: Checkpoint
    calibration: Sequence[str]
    samples: int
    group: int
    texts: Sequence[Text]

    @property
    def granularities(self) -> dict[str, str | int]:
        """Both of them, by how the tables call them."""
        return {"per token": "token", f"groups of {self.group}": self.group}

    def measure(self, claim: Claim, methods: Mapping[str, Quantizer], label: str) -> Values:
        """Quantize and measure, for every seed and method."""
        values: Values = {}
        runs = list(_runs(claim, methods))
        for seed, name in claim.progress.iterate(runs, f"{self.name}, {label}"):
            small = pl.quantize(
                self.checkpoint,
                methods[name],
                calibration=self.calibration,
                samples=self.samples,
                length=256,
                seed=seed,
            )
            for text in self.texts:
                result = text.measure(small, self.checkpoint)
                kept = values.setdefault(name, {}).setdefault(text.name, {})
                for quantity in (PERPLEXITY, KL):
                    kept.setdefault(quantity, []).append(result[quantity])
        return values


def _runs(claim: Claim, methods: Mapping[str, Quantizer]) -> Iterator[tuple[int, str]]:
    for seed in claim.seeds:
        for name, method in methods.items():
            # Nothing about rounding alone is random.
            if seed == claim.seeds[0] or not isinstance(method, RTN):
                yield seed, name


def settings(
    kinds: Mapping[str, type[Quantizer]], activation_group: str | int
) -> dict[str, Quantizer]:
    """W4A4KV4, all else as each method has it."""
    return {
        name: kind(weights=4, activations=4, kv=4, activation_group=activation_group)
        for name, kind in kinds.items()
    }


def ordered(values: Values, text: str, reference: float) -> list[bool]:
    """Of every seed: float < offq < quarot < rtn in perplexity."""
    columns = [values[name][text][PERPLEXITY] for name in ORDER]
    count = max(map(len, columns))
    rows = zip(*(column * count if len(column) == 1 else column for column in columns), strict=True)
    return [all(a < b for a, b in itertools.pairwise((reference, *row))) for row in rows]


def compare(claim: Claim, bench: Bench) -> dict[str, Values]:
    """Measure and print every method at both granularities."""
    found: dict[str, Values] = {}
    head = bench.checkpoint.anatomy.blocks[0].heads.size
    for label, group in bench.granularities.items():
        kinds = METHODS if group == head else {**METHODS, OWN_GROUPS: OffQ}
        found[label] = bench.measure(claim, settings(kinds, group), label)
    for text in bench.texts:
        reference = text.measure(bench.checkpoint)
        rows = [["float", *[f"{reference[PERPLEXITY]:.4g}", "0"] * len(found)]]
        for name in (*METHODS, OWN_GROUPS):
            kept = [values.get(name, {}).get(text.name) for values in found.values()]
            cells = [spread(one[key]) if one else "" for one in kept for key in (PERPLEXITY, KL)]
            if any(cells):
                rows.append([name, *cells])
        header = ["", *(f"{what}, {label}" for label in found for what in ("perplexity", "KL"))]
        claim.table(f"{bench.name} on {text.name}, {reference['tokens']} tokens", header, rows)
        verdicts = (
            f"{label}, in {share(ordered(values, text.name, reference[PERPLEXITY]))} seeds"
            for label, values in found.items()
        )
        claim.say(f"float < offq < quarot < rtn in perplexity: {'; '.join(verdicts)}.")
    return found


def take_apart(claim: Claim, bench: Bench, full: Mapping[str, Values]) -> None:
    """Measure and print OffQ with one part replaced, in groups; ``full`` is what :func:`compare` found."""
    label = list(bench.granularities)[-1]
    parts = bench.measure(claim, settings(PARTS, bench.group), "parts of offq")
    values = {
        "offq": full[label]["offq"],
        **{f"offq with {name}" if name in PARTS else name: one for name, one in parts.items()},
        "quarot": full[label]["quarot"],
        "gptq": full[label]["gptq"],
    }
    for text in bench.texts:
        rows = [
            [name, spread(one[text.name][PERPLEXITY]), spread(one[text.name][KL])]
            for name, one in values.items()
        ]
        claim.table(
            f"Parts of OffQ, {bench.name} on {text.name}, {label}", ["", "perplexity", "KL"], rows
        )


def built_in(claim: Claim) -> Bench:
    """tiny-lm, which has massive activations."""
    text = tiny_lm.held_out_text()[: 10_000 if claim.quick else 64_000]
    return Bench(
        "tiny-lm",
        pl.load("zoo:tiny-lm", dtype="float32"),
        [tiny_lm.calibration_text()],
        samples=8 if claim.quick else 32,
        group=64,
        texts=[Text("held-out text", [text], "windows")],
    )


def stories(claim: Claim) -> Bench | None:
    """stories260k, which has none, where its files are."""
    data = data_directory()
    if data is None:
        return None
    text = data / "text"
    excerpt = documents(text / "wikitext2_test.txt", 5_000 if claim.quick else 40_000)
    return Bench(
        "stories260k",
        pl.load(data / "stories260k", dtype="float32"),
        documents(text / "wikitext2_valid.txt"),
        samples=8 if claim.quick else 32,
        group=32,
        texts=[
            Text("five stories", documents(text / "tinystories_sample.jsonl"), "documents"),
            Text("the beginning of WikiText-2 test", excerpt, "windows"),
        ],
    )


def main() -> None:
    """Measure both models."""
    claim = Claim("w4a4kv4", __doc__ or "")
    bench = built_in(claim)
    take_apart(claim, bench, compare(claim, bench))
    bench_of_stories = stories(claim)
    if bench_of_stories is None:
        claim.say("stories260k: skipped, its files are not here (`POSTLUDE_DATA` says where).")
    else:
        compare(claim, bench_of_stories)
    claim.finish()


if __name__ == "__main__":
    main()
