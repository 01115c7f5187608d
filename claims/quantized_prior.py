"""PriFT with a quantized model as its prior: does the reference have to be in floating point?

PriFT (arXiv:2606.09396) weights the tokens of demonstrations by what the frozen pretrained model thinks of them. That
model is a second set of weights, or a pass over the data beforehand. Two cheaper references, both in neither paper:

- a quantized copy of the model, which scores the data in its stead (``postlude tune prior small/``): how far do its
  probabilities and the weights that rules make of them move, and what does the tuned model make of it?
- a quantized backbone that is tuned itself, by LoRA beside its codes (QLoRA, arXiv:2305.14314), and is its own
  reference with the adapter off: does the prior of the float model, which is not in memory any more, do better?

stories260k, taught to tell sums, tuned on problems of which a share of the tokens was replaced, as in ``prift.py``. The
weights of its layers are rounded to nearest, in groups of 32, and nothing else. The seed of a run draws the problems,
their order and the tokens that are replaced. What is finished is kept in ``runs/claims``.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping

import torch
from torch import Tensor

import _models
import postlude as pl
from _claim import Claim, data_directory, share, spread
from postlude.numerics.weighted_likelihood import TokenColumns
from postlude.quantization.rtn import RTN
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.directory import RunDirectory
from postlude.tuning import SFT, PriFTMass, PriFTProb
from postlude.tuning.adapters import Adapter, attach
from postlude.tuning.weighting import TokenWeighting
from prift import MODELS, State, Values, difference, show

PARTS = ("prior", "backbone")
NOISE = 0.4
BITS = (4, 3, 2)
BACKBONES = {
    4: ("prift-mass",),
    3: ("prift-mass",),
}  # bits, and the rules that are measured on them
RULES = {"prift-prob": PriFTProb, "prift-mass": PriFTMass}
LORA = Adapter("lora", rank=8)


def weighting(rule: str) -> TokenWeighting:
    """Reads stored columns; ``sft`` reads nothing."""
    return (
        TokenWeighting(SFT()) if rule == "sft" else TokenWeighting(RULES[rule](), signal="cached")
    )


def quantized(checkpoint: Checkpoint, bits: int) -> Checkpoint:
    """Weights in groups of 32, the rest as it was."""
    settings = RTN(weights=bits, activations=16, kv=16, group=32)
    return pl.quantize(dataclasses.replace(checkpoint, path=None), settings)


class Adapted(_models.Student):
    """A quantized start that LoRA is trained beside."""

    def prepare(self, rate: float) -> None:
        """Put the adapter in; ``rate`` is its learning rate."""
        self.rate = rate
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            attach(dataclasses.replace(self.work, path=None), LORA)
        self._first = {
            name: one.detach().clone()
            for name, one in self.work.model.named_parameters()
            if one.requires_grad
        }

    @torch.no_grad()
    def reset(self) -> None:
        """Take the adapter back to where it starts."""
        for name, one in self.work.model.named_parameters():
            if name in self._first:
                one.copy_(self._first[name])


def base(claim: Claim) -> tuple[_models.Student, RunDirectory] | None:
    """stories260k taught sums, or None where its files are not here."""
    data = data_directory()
    if data is None:
        claim.say("Skipped: the files of stories260k are not here (`POSTLUDE_DATA` says where).")
        return None
    student = _models.stories(data, claim.quick)
    settings = {"batch": student.batch, "steps": student.steps, "rate": student.rate}
    # Both parts start from the same model.
    started = claim.directory(settings, "quantized_prior-start")
    few = {"steps": 10, "texts": 16} if claim.quick else {}
    taught: State = started.unit("taught", lambda: student.taught(**few))
    student.teach({**student.start.model.state_dict(), **taught})
    return student, claim.directory(settings)


def columns(
    reference: _models.Student | Checkpoint, student: _models.Student, seed: int
) -> TokenColumns:
    """What a model says of the places of a lesson."""
    scored = copy.copy(student)
    if isinstance(reference, Checkpoint):
        scored.freeze(reference)
    return scored.lesson(NOISE, seed).columns


# ------------------------------------------------------------------------------------------------------ prior


def agreement(exact: TokenColumns, other: TokenColumns, learned: Tensor) -> dict[str, float]:
    """How far probabilities and weights of the learned tokens moved."""
    q, p = (one.log_probability[learned].double().exp() for one in (exact, other))
    kept, held = (one.mass_above[learned] <= 0.5 for one in (exact, other))
    return {
        "correlation": float(torch.corrcoef(torch.stack([q, p]))[0, 1]),
        "difference": float((q - p).abs().mean()),
        "flipped": float((kept != held).double().mean()),
        "kept": float(held.double().mean()),
    }


def prior(claim: Claim) -> None:
    """A float model, tuned by what quantized copies of it say."""
    found = base(claim)
    if found is None:
        return
    student, kept = found
    models = {f"{bits} bits": quantized(student.start, bits) for bits in BITS}
    sizes = {"float": _bytes(student.start), **{name: _bytes(one) for name, one in models.items()}}
    agreed: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    values: Values = {}
    jobs = [(seed, name) for seed in claim.seeds for name in ("float", *models)]
    for seed, name in claim.progress.iterate(jobs, "priors"):
        lesson = student.lesson(NOISE, seed)
        own = lesson.columns
        if name in models:
            other = columns(models[name], student, seed)
            trained = lesson.rows.trained.bool()
            learned = torch.zeros_like(trained)
            learned[:, :-1] = trained[:, 1:]
            for key, value in agreement(own, other, learned.flatten()).items():
                agreed[name].setdefault(key, []).append(value)
            lesson = dataclasses.replace(lesson, columns=other)
        for rule in (*RULES, *(("sft",) if name == "float" else ())):

            def measure(
                rule: str = rule, lesson: _models.Lesson = lesson, seed: int = seed
            ) -> dict[str, float]:
                student.tune(lesson, weighting(rule), seed)
                return student.measure()

            unit = f"{rule}-{name.replace(' ', '-')}-{seed}"
            row = rule if rule == "sft" else f"{rule}, {name}"
            for key, value in claim.measured(kept, unit, measure).items():
                values.setdefault(row, {}).setdefault(key, []).append(float(value))
    claim.table(
        f"The prior of a quantized model on the learned tokens, {100 * NOISE:.0f} % of them replaced",
        ["prior", "bytes of weights", "correlation of q(y)", "mean difference of q(y)",
         "tokens that prift-mass keeps", "of which the float prior does not, or the reverse"],
        [
            [name, f"{sizes[name]:,}", *(spread(one[key]) for key in ("correlation", "difference", "kept", "flipped"))]
            for name, one in agreed.items()
        ],
    )  # fmt: skip
    claim.say(
        f"The float model has {sizes['float']:,} bytes in fp32; embeddings stay as they are in all of them."
    )
    show(claim, "stories260k after tuning, by prior", values, MODELS)
    changes(
        claim, values, {f"{rule}, {name}": f"{rule}, float" for rule in RULES for name in models}
    )


def _bytes(checkpoint: Checkpoint) -> int:
    from postlude.evaluation.size import size_of

    return int(size_of(dataclasses.replace(checkpoint, path=None))["bytes"])


def changes(claim: Claim, values: Values, pairs: Mapping[str, str]) -> None:
    """Print paired differences."""
    rows = [
        [f"{new} minus {old}", *(difference(values[new][key], values[old][key]) for key in MODELS)]
        for new, old in pairs.items()
    ]
    claim.table("What the prior changes", ["", *MODELS.values()], rows)


# --------------------------------------------------------------------------------------------------- backbone


def backbone(claim: Claim) -> None:
    """Quantized backbones tuned by LoRA, with their own prior and with that of the float model."""
    found = base(claim)
    if found is None:
        return
    student, kept = found
    values: Values = {}
    for bits, rules in BACKBONES.items():
        adapted = Adapted(
            f"{bits} bits", quantized(student.start, bits), student.text, problems=len(student.problems),
            batch=student.batch, steps=student.steps, rate=student.rate,
        )  # fmt: skip
        adapted.prepare(rate=2e-3)
        adapted.reset()
        before = claim.measured(kept, f"{bits}-before", adapted.measure)
        for key, value in before.items():
            values.setdefault(f"{bits} bits, before", {})[key] = [float(value)]
        names = ["sft", *(f"{rule}, {whose}" for rule in rules for whose in ("own", "float"))]
        jobs = [(seed, name) for seed in claim.seeds for name in names]
        for seed, name in claim.progress.iterate(jobs, f"{bits} bits"):
            rule, _, whose = name.partition(", ")

            def measure(
                rule: str = rule, whose: str = whose, seed: int = seed, own: Adapted = adapted
            ) -> dict[str, float]:
                lesson = (student if whose == "float" else own).lesson(NOISE, seed)
                own.tune(lesson, weighting(rule), seed)
                return own.measure()

            row = f"{bits} bits, {name}"
            unit = f"{bits}-{name.replace(', ', '-')}-{seed}"
            for key, value in claim.measured(kept, unit, measure).items():
                values.setdefault(row, {}).setdefault(key, []).append(float(value))
    show(
        claim,
        "Quantized stories260k tuned by LoRA of rank 8; forgetting is against the quantized start",
        values,
        MODELS,
    )
    owns = {
        f"{bits} bits, {rule}, own": f"{bits} bits, {rule}, float"
        for bits, rules in BACKBONES.items()
        for rule in rules
    }
    changes(claim, values, owns)
    memory(claim, student, kept)
    verdict(claim, values)


def verdict(claim: Claim, values: Values) -> None:
    """Print in how many seeds a prior helps, whoever's it is."""
    lines = []
    for bits, rules in BACKBONES.items():
        start = f"{bits} bits"
        for rule in rules:
            for whose in ("own", "float"):
                pairs = zip(
                    values[f"{start}, {rule}, {whose}"]["forgetting"],
                    values[f"{start}, sft"]["forgetting"],
                    strict=True,
                )
                lines.append(f"{start}, {rule}, {whose} prior: {share([a < b for a, b in pairs])}")
    claim.say(f"Less forgetting than sft, in seeds: {'; '.join(lines)}.")


def memory(claim: Claim, student: _models.Student, kept: RunDirectory) -> None:
    """Print what a reference holds, and what it costs to ask."""
    small = quantized(student.start, 4)
    lesson = student.lesson(NOISE, 0)
    tokens = int(lesson.rows.trained.sum())

    def timed(checkpoint: Checkpoint) -> float:
        one = copy.copy(student)
        one.freeze(checkpoint)
        started = time.process_time()
        one.lesson(NOISE, 0)
        return time.process_time() - started

    seconds = claim.measured(
        kept, "seconds", lambda: {"float": timed(student.start), "small": timed(small)}
    )
    rows = [
        [
            "float model beside the one in training",
            f"{_bytes(student.start):,}",
            f"{float(seconds['float']):.2f}",
        ],
        ["4-bit copy beside it", f"{_bytes(small):,}", f"{float(seconds['small']):.2f}"],
        ["stored columns (six numbers a learned token)", f"{24 * tokens:,}", "0"],
        ["the backbone itself, adapter off", "0", f"{float(seconds['small']):.2f}"],
    ]
    claim.table(
        f"What a reference holds, and CPU seconds to score {tokens} tokens once",
        ["reference", "bytes", "CPU s"],
        rows,
    )


def main() -> None:
    """One part."""
    claim = Claim("quantized_prior", __doc__ or "", PARTS, seeds=3)
    torch.set_num_threads(1)
    {"prior": prior, "backbone": backbone}[claim.part](claim)
    claim.finish()


if __name__ == "__main__":
    main()
