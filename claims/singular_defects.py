"""Singular defects: do the weights predict the massive activations, do they identify a model, do they explain W8A8?

"Demystifying Singular Defects in Large Language Models" (arXiv:2502.07004) reports that massive activations appear in
one explosion layer and vanish in one decay layer, in the direction of the leading left singular vector of that layer's
linear approximation; that this direction is the same in every model fine-tuned from one, and orthogonal in unrelated
ones; and that most of the loss of per-tensor W8A8 goes away when the down-projections of those layers stay in 16 bit.

The seed of a run draws the calibration crops, the Gaussian inputs, and the crops of fine-tuning.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import postlude as pl
from _claim import Claim, data_directory, documents, share, spread
from postlude.errors import SettingsError
from postlude.evaluation.perplexity import evaluate
from postlude.inspection import SingularDefects, SingularDefectsReport
from postlude.inspection.signature import compare
from postlude.inspection.singular_defects import Found
from postlude.quantization.defect_guard import DefectGuard
from postlude.quantization.engine import FLOAT, Quantizer, quantize
from postlude.quantization.rtn import RTN
from postlude.quantization.smoothquant import SmoothQuant
from postlude.registry import method
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.documents import calibration_windows, encode
from postlude.surgery.anatomy import Block, Site
from postlude.surgery.layers import QuantizedLinear
from postlude.zoo import tiny_lm

LENGTH = 256
PLANTED = tiny_lm.Plant()
BASES: dict[str, type[Quantizer]] = {"rtn": RTN, "smoothquant": SmoothQuant}


@dataclasses.dataclass(frozen=True)
class Bench:
    """A float model, what it is calibrated on, and what its loss is measured on."""

    name: str
    checkpoint: Checkpoint
    calibration: Sequence[str]
    text_name: str
    text: str
    samples: int

    def tokens(self, seed: int) -> Tensor:
        """Calibration crops, ``[samples, LENGTH]``."""
        tokenizer, context = self.checkpoint.tokenizer, self.checkpoint.context
        return calibration_windows(tokenizer, self.calibration, self.samples, LENGTH, seed, context)

    def loss(self, checkpoint: Checkpoint) -> float:
        """Of a model on the text, in nats per token."""
        result = evaluate(checkpoint, [self.text], protocol="windows", max_length=LENGTH)
        return float(result["loss"])


# ---------------------------------------------------------------------------------- layers and directions


def inspect(claim: Claim, bench: Bench) -> list[SingularDefectsReport]:
    """One report a seed."""
    settings = SingularDefects(samples=5_000 if claim.quick else 50_000, paths=False)
    return [
        settings.inspect(bench.checkpoint, bench.tokens(seed), seed)
        for seed in claim.progress.iterate(claim.seeds, f"{bench.name}, singular defects")
    ]


def show_blocks(claim: Claim, bench: Bench, reports: Sequence[SingularDefectsReport]) -> None:
    """Print every block."""
    rows = []
    for layer in range(len(bench.checkpoint.anatomy.blocks)):
        norms = [report.direction.norms[layer + 1] for report in reports]
        rows.append(
            [
                str(layer),
                spread([float(one.max()) for one in norms]),
                spread([float(one.median()) for one in norms]),
                spread([report.layers[layer].angle for report in reports]),
                spread([report.layers[layer].gain for report in reports]),
            ]
        )
    header = [
        "block",
        "largest norm after it",
        "median norm",
        "angle of u0 (degrees)",
        "d . Delta d",
    ]
    claim.table(f"Blocks of {bench.name}, from 0", header, rows)


def show_findings(claim: Claim, reports: Sequence[SingularDefectsReport]) -> None:
    """Print what was found at the explosion and the decay block."""
    at_explosion = [one for one in reports if one.explosion.layer == PLANTED.explosion]
    at_decay = [one for one in reports if one.decay.layer == PLANTED.decay]
    rows = [
        _found("explosion", PLANTED.explosion, [one.explosion for one in reports]),
        _found("decay", PLANTED.decay, [one.decay for one in reports]),
    ]
    measured: dict[str, list[float]] = {
        "angle of u0 to the empirical direction at the explosion (degrees)": [
            one.layers[PLANTED.explosion].angle for one in at_explosion
        ],
        "the same at the decay": [one.layers[PLANTED.decay].angle for one in at_decay],
        "the smallest in any other block": [
            min(
                layer.angle
                for layer in one.layers
                if layer.layer not in (*one.explosion_layers, *one.decay_layers)
            )
            for one in reports
        ],
        "eigenvalue of Delta at the decay": [
            one.eigenpairs[PLANTED.decay].value for one in at_decay
        ],
        "angle of its eigenvector (degrees)": [
            one.eigenpairs[PLANTED.decay].angle for one in at_decay
        ],
        "largest norm before the decay block over that after it": [
            float(
                one.direction.norms[PLANTED.decay].max()
                / one.direction.norms[PLANTED.decay + 1].max()
            )
            for one in reports
        ],
        "mean angle between massive states (degrees)": [one.direction.spread for one in reports],
    }
    rows += [[name, spread(values)] for name, values in measured.items() if values]
    claim.table("What is found", ["", "over seeds"], rows)


def _found(name: str, planted: int, found: Sequence[Found]) -> list[str]:
    """In how many seeds a block was found where it was planted, and what told it."""
    right = [one.layer == planted for one in found]
    rules = sorted({str(one.rule) for one in found if one.layer == planted})
    by = f", by its {' or '.join(rules)}" if rules else ""
    return [f"{name} found in block {planted}, where it was planted{by}", share(right)]


# ---------------------------------------------------------------------------------------------- signature


def signatures(claim: Claim, bench: Bench) -> None:
    """Print angles to fine-tuned copies and to models of other seeds."""
    steps = 4 if claim.quick else 60
    original = bench.checkpoint
    tuning = torch.tensor(encode(original.tokenizer, bench.text))
    training = torch.tensor(encode(original.tokenizer, bench.calibration[0]))
    tokens = bench.tokens(0)
    copies, others = {"tiny-lm": original}, {"tiny-lm": original}
    before, changes = bench.loss(original), []
    delimiters = tuple(
        encode(original.tokenizer, text, add_special_tokens=False)[0] for text in tiny_lm.DELIMITERS
    )
    for seed in claim.progress.iterate(claim.seeds, "signatures: training"):
        tuned = tiny_lm.fine_tune(original.model, tuning, steps, seed=seed)
        copies[f"copy {seed}"] = dataclasses.replace(original, model=tuned)
        changes.append(before - bench.loss(copies[f"copy {seed}"]))
        fresh = tiny_lm.build(1 + seed, vocab_size=len(original.tokenizer), delimiters=delimiters)
        trained = tiny_lm.fine_tune(fresh, training, 2 * steps, seed=seed)
        others[f"seed {1 + seed}"] = dataclasses.replace(original, model=trained)
    near, far = compare(copies, tokens).pairs, compare(others, tokens).pairs
    rows = []
    for name, pairs, known in (
        ("tiny-lm and a fine-tuned copy", near, True),
        ("two fine-tuned copies", near, False),
        ("tiny-lm and another seed", far, True),
        ("two other seeds", far, False),
    ):
        some = [pair for pair in pairs if (pair.first == "tiny-lm") == known]
        angles = [pair.angle for pair in some]
        if not angles:
            continue
        verdicts = sorted({pair.verdict for pair in some})
        rows.append(
            [
                name,
                str(len(some)),
                spread(angles),
                f"{min(angles):.3g}",
                f"{max(angles):.3g}",
                ", ".join(verdicts),
            ]
        )
    header = ["", "pairs", "angle (degrees)", "smallest", "largest", "verdict"]
    claim.table("Signatures", header, rows)
    claim.say(
        f"Fine-tuned copies: {steps} steps of 4 x 128 tokens on the held-out text, whose loss falls by "
        f"{spread(changes)} nats. Other seeds: planted by the same recipe with another seed and trained for "
        f"{2 * steps} such steps on the calibration text."
    )


# ---------------------------------------------------------------------------------------------------- W8A8


@method("quantize", "other down-projections kept", family="control", needs=("calibration",))
@dataclasses.dataclass(frozen=True)
class OthersKept(DefectGuard):
    """The control: in 16 bit are all the down-projections that the guard does not keep."""

    def skips(self, block: Block, site: Site, statistics: Mapping[str, Tensor]) -> bool:
        """The guard's choice, turned around."""
        return site.name == "down_in" and not super().skips(block, site, statistics)


def per_tensor(name: str) -> dict[str, Quantizer]:
    """W8A8 with one scale a tensor, by what the table calls it."""
    bits: dict[str, Any] = {
        "weights": 8,
        "activations": 8,
        "kv": FLOAT,
        "group": "tensor",
        "activation_group": "tensor",
    }
    return {
        name: BASES[name](**bits),
        f"{name}, guarded": DefectGuard(base=name, **bits),
        f"{name}, other down-projections kept": OthersKept(base=name, **bits),
    }


def guard(claim: Claim, bench: Bench) -> None:
    """Print the loss of per-tensor W8A8 with and without guard."""
    float_loss = bench.loss(bench.checkpoint)
    rows = [["float", f"{float_loss:.4f}", f"{math.exp(float_loss):.4g}", "", ""]]
    losses: dict[str, list[float]] = {}
    kept: dict[str, set[str]] = {}
    refusals: dict[str, int] = {}
    runs = [(seed, name) for seed in claim.seeds for name in BASES]
    for seed, name in claim.progress.iterate(runs, f"{bench.name}, W8A8"):
        tokens = bench.tokens(seed)
        for label, settings in per_tensor(name).items():
            model = copy.deepcopy(bench.checkpoint.model)
            work = dataclasses.replace(bench.checkpoint, model=model)
            try:
                small = quantize(work, settings, tokens, seed=seed)
            except SettingsError as error:
                refusals[f"{label}: {error}"] = refusals.get(f"{label}: {error}", 0) + 1
                break
            losses.setdefault(label, []).append(bench.loss(small))
            kept.setdefault(label, set()).add(_kept(small))
    for name in BASES:
        for label in per_tensor(name):
            if label not in losses:
                continue
            values = losses[label]
            back = [
                100 * (before - after) / (before - float_loss)
                for before, after in zip(losses[name], values, strict=True)
            ]
            rows.append(
                [
                    label,
                    spread(values, 5),
                    spread([math.exp(loss) for loss in values], 4),
                    "" if label == name else spread(back),
                    "; ".join(sorted(kept[label])),
                ]
            )
    header = ["", "loss", "perplexity", "added loss recovered (%)", "down-projections kept, from 0"]
    claim.table(f"W8A8 per tensor, {bench.name} on {bench.text_name}", header, rows)
    for message, count in refusals.items():
        claim.say(f"Refused in {count} of {len(claim.seeds)} seeds: {message}.")


def _kept(checkpoint: Checkpoint) -> str:
    """Blocks whose down-projection is no quantized layer."""
    blocks = [
        str(block.index)
        for block in checkpoint.anatomy.blocks
        if not isinstance(
            checkpoint.model.get_submodule(block.site("down_in").modules[0]), QuantizedLinear
        )
    ]
    return ", ".join(blocks) or "none"


# -------------------------------------------------------------------------------------------------- models


def built_in(claim: Claim) -> Bench:
    """tiny-lm, whose massive activations were planted before training."""
    text = tiny_lm.held_out_text()[: 10_000 if claim.quick else 64_000]
    return Bench(
        "tiny-lm",
        pl.load("zoo:tiny-lm", dtype="float32"),
        [tiny_lm.calibration_text()],
        "held-out text",
        text,
        samples=8 if claim.quick else 32,
    )


def stories(claim: Claim) -> Bench | None:
    """stories260k, which has no massive activations, where its files are."""
    data = data_directory()
    if data is None:
        return None
    text = data / "text"
    return Bench(
        "stories260k",
        pl.load(data / "stories260k", dtype="float32"),
        documents(text / "wikitext2_valid.txt"),
        "the beginning of WikiText-2 test",
        documents(text / "wikitext2_test.txt", 5_000 if claim.quick else 40_000)[0],
        samples=8 if claim.quick else 32,
    )


def main() -> None:
    """Measure both models."""
    claim = Claim("singular_defects", __doc__ or "")
    bench = built_in(claim)
    reports = inspect(claim, bench)
    show_blocks(claim, bench, reports)
    show_findings(claim, reports)
    signatures(claim, bench)
    guard(claim, bench)
    bench_of_stories = stories(claim)
    if bench_of_stories is None:
        claim.say("stories260k: skipped, its files are not here (`POSTLUDE_DATA` says where).")
    else:
        reports = inspect(claim, bench_of_stories)
        massive = share([report.direction.massive for report in reports])
        found = share([bool(report.explosion_layers) for report in reports])
        claim.say(f"stories260k: massive activations in {massive} seeds, an explosion in {found}.")
        guard(claim, bench_of_stories)
    claim.finish()


if __name__ == "__main__":
    main()
