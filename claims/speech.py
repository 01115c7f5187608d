"""Explaining what is wrong with a recording: does calibration first help, does a reward for each dimension?

arXiv:2603.10175 calibrates an audio language model to scores, encoder and all, and then reinforces it with a reward for
each dimension; it reports a mean correlation of 0.71 on QualiSpeech, and that one undifferentiated reward does not mend
what long answers alone forget. Here a model of one million parameters in the shape of Audio Flamingo 3, of random
weights, hears clips with known damage (docs/speech.md) in voices and sentences that it was not trained on.

    calibration             answers are the scores and nothing else; the encoder trained, or frozen as it was drawn
    long answers            scores, artifacts and times, after calibration, or from the random model, for as many steps
                            as both together or for the same number
    GRPO, one reward        after both: every token is credited with the whole answer
    GRPO, by dimension      the same number of answers: a token is credited with the dimension it speaks of

Part ``arms`` has 300 steps of each; part ``longer`` asks of GRPO again, from a model that hears better: 1000 steps of
calibration, then 1000 of long answers.

Both kinds of GRPO use the reward ``speech-verifiable``, the mean over dimensions, and clips that were not learned
before. The seed draws weights, order and answers; the clips are the same. Calibration asks for all scores at once: with
a question for each, as ``calibration.jsonl`` has them, a random model needs several times as long for the same
correlation.

Data, models and measurements are kept in ``runs/claims/speech``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import postlude as pl
from _claim import Claim, share, spread
from postlude.evaluation.speech import ask, evaluate_speech
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.clips import Clip, read_clips
from postlude.runs.directory import RunDirectory
from postlude.tuning.objective import TuneRun
from postlude.tuning.reinforcement import GRPO
from postlude.zoo import audio_llm
from postlude.zoo.degraded_speech.__main__ import make_sets, speakers
from postlude.zoo.degraded_speech.voices import Toy
from postlude.zoo.speech_answers import PARTS, SCORES

CALIBRATION = TuneRun(steps=300, batch_size=16, learning_rate=1e-3)
LONGER = dataclasses.replace(CALIBRATION, steps=1000)
LONG = TuneRun(steps=300, batch_size=16, learning_rate=1e-3)
LONG_LONGER = dataclasses.replace(LONG, steps=1000)
GROUPS = TuneRun(steps=150, batch_size=16, learning_rate=1e-4)
REINFORCED = GRPO(reward=("speech-verifiable",), generations=4, max_new_tokens=60, beta=0.04)  # type: ignore[arg-type]

ARMS = {
    "calibrated": "calibration alone",
    "frozen": "calibration alone, encoder frozen",
    "calibrated-longer": "calibration alone, longer",
    "frozen-longer": "calibration alone, longer, encoder frozen",
    "half": "long answers alone, half as many steps",
    "alone": "long answers alone",
    "alone-dimension": "long answers alone, GRPO by dimension",
    "long": "calibration, long answers",
    "answer": "calibration, long answers, GRPO with one reward",
    "dimension": "calibration, long answers, GRPO by dimension",
    "long-longer": "calibration, long answers, both longer",
    "answer-longer": "both longer, GRPO with one reward",
    "dimension-longer": "both longer, GRPO by dimension",
}
# Those that others rest on come first.
PARTS_OF_CLAIM: dict[str, tuple[str, ...]] = {
    "arms": (
        "calibrated", "alone", "long", "answer", "dimension",
        "frozen", "half", "alone-dimension", "calibrated-longer", "frozen-longer",
    ),
    "longer": ("calibrated-longer", "long-longer", "answer-longer", "dimension-longer"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Bench:
    """What the arms share.

    Attributes:
        data: folder of the two sets that are learned and tested on.
        more: folder of other clips, to be reinforced on.
        models: folder of every model that was trained.
        quick: do as little as shows that the script runs.
        claim: for its display.
    """

    data: Path
    more: Path
    models: Path
    quick: bool
    claim: Claim

    def tuned(
        self,
        name: str,
        seed: int,
        start: Path,
        file: Path,
        goal: Any,
        run: TuneRun,
        **settings: Any,
    ) -> Path:
        """A model trained from ``start``, or the one of an earlier run of this script."""
        out = self.models / f"{name}-{seed}"
        if not (out / "config.json").is_file():
            if self.quick:
                run = dataclasses.replace(run, steps=2, batch_size=8)
            self.claim.progress.log(f"seed {seed}: {name}, {run.steps} steps")
            pl.tune(
                start,
                file,
                goal,
                dataclasses.replace(run, seed=seed),
                out=out,
                progress=self.claim.progress,
                **settings,
            )
        return out

    def model(self, arm: str, seed: int) -> Path:
        """The directory of an arm's model, with all that it is made from."""
        scores, long_answers = (self.data / "train" / f"{n}.jsonl" for n in ("scores", "answers"))
        start = self.models / f"random-{seed}"
        if not (start / "config.json").is_file():
            audio_llm.make(start, seed)
        if arm == "frozen":
            return self.tuned(arm, seed, start, scores, "sft", CALIBRATION, encoder="frozen")
        if arm == "calibrated-longer":
            return self.tuned(arm, seed, start, scores, "sft", LONGER)
        if arm == "frozen-longer":
            return self.tuned(arm, seed, start, scores, "sft", LONGER, encoder="frozen")
        new = self.more / "train" / "reinforce.jsonl"
        if arm == "half":
            return self.tuned(arm, seed, start, long_answers, "sft", LONG)
        if arm.startswith("alone"):
            whole = dataclasses.replace(LONG, steps=(CALIBRATION.steps or 0) + (LONG.steps or 0))
            alone = self.tuned("alone", seed, start, long_answers, "sft", whole)
            by_dimension = dataclasses.replace(REINFORCED, credit="dimension")
            return (
                alone if arm == "alone" else self.tuned(arm, seed, alone, new, by_dimension, GROUPS)
            )
        if arm.endswith("-longer"):
            calibrated = self.tuned("calibrated-longer", seed, start, scores, "sft", LONGER)
            long = self.tuned("long-longer", seed, calibrated, long_answers, "sft", LONG_LONGER)
        else:
            calibrated = self.tuned("calibrated", seed, start, scores, "sft", CALIBRATION)
            if arm == "calibrated":
                return calibrated
            long = self.tuned("long", seed, calibrated, long_answers, "sft", LONG)
        if arm.startswith("long"):
            return long
        goal = dataclasses.replace(REINFORCED, credit=arm.removesuffix("-longer"))
        return self.tuned(arm, seed, long, new, goal, GROUPS)

    def _reward(self, model: Checkpoint, clips: Sequence[Clip]) -> float:
        """What GRPO reinforces, of the most probable answers."""
        heard = ask(model, [clip.read() for clip in clips], batch_size=120)
        columns = {name: [clip.columns[name] for clip in clips] for name in clips[0].columns}
        (reward,) = REINFORCED.rewards()
        return statistics.fmean(reward([one.texts[0] for one in heard], columns))

    def measure(self, arm: str, seed: int) -> Mapping[str, float]:
        """Numbers of an arm on the clips for testing."""
        torch.set_flush_denormal(True)
        model = pl.load(self.model(arm, seed))
        clips = read_clips(self.data / "test", 4 if self.quick else None)
        found = evaluate_speech(model, clips, batch_size=120, progress=self.claim.progress)
        numbers = {f"pcc.{row['key']}": row["pcc"] for row in found["dimensions"]}
        numbers |= {f"mae.{row['key']}": row["mean_error"] for row in found["dimensions"]}
        for row in found["artifacts"]:
            for name in ("f1", "iou", "always_f1", "always_iou"):
                numbers[f"{name}.{row['key']}"] = row[name]
        numbers |= {name: found[name] for name in ("mean_pcc_zero", "mean_f1", "mean_iou")}
        # Scores that could not be read; what calibration alone does not speak of is missing anyway.
        unread = sum(row["skipped"] for row in found["dimensions"])
        numbers["reward"] = self._reward(model, clips)
        return numbers | {"skipped": unread / (len(found["dimensions"]) * found["clips"])}


def main() -> None:
    """Measure."""
    claim = Claim("speech", __doc__ or "", tuple(PARTS_OF_CLAIM), seeds=3)
    arms = PARTS_OF_CLAIM[claim.part]
    sources = [Toy()] if claim.quick else speakers("auto")
    clips = 20 if claim.quick else 1200
    settings = {
        "clips": clips,
        "sources": [source.name for source in sources],
        "runs": [dataclasses.asdict(run) for run in (CALIBRATION, LONG, LONG_LONGER, GROUPS)],
        "grpo": dataclasses.asdict(REINFORCED),
    }
    kept = claim.directory(settings)
    folders = (kept.path.with_name(f"{kept.path.name}-{n}") for n in ("data", "new", "models"))
    bench = Bench(*folders, claim.quick, claim)
    with claim.progress:
        for seed, folder in enumerate((bench.data, bench.more)):
            make_sets(folder, clips, seed, sources, progress=claim.progress)
        found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS if arm in arms}
        for seed, arm in itertools.product(claim.seeds, arms):
            found[arm].append(_measured(claim, kept, bench, arm, seed))
    stages = (
        f"Calibration {CALIBRATION.steps} steps, longer {LONGER.steps}; long answers {LONG.steps}, alone "
        f"{(CALIBRATION.steps or 0) + (LONG.steps or 0)}"
        if claim.part == "arms"
        else f"Calibration {LONGER.steps} steps, long answers {LONG_LONGER.steps}"
    )
    claim.say(
        f"{clips - clips // 5} clips of {' and '.join(settings['sources'])} for training, {clips // 5} with other "
        f"voices and sentences for testing. {stages}; GRPO {GROUPS.steps} steps of {GROUPS.batch_size} answers, "
        f"{REINFORCED.generations} to a clip, on as many other clips as were learned."
    )
    _tables(claim, found)
    _sampled(claim, bench, found)
    _verdicts(claim, found)
    claim.finish()


def _measured(
    claim: Claim, kept: RunDirectory, bench: Bench, arm: str, seed: int
) -> dict[str, float]:
    found = claim.measured(kept, f"{arm}-{seed}", lambda: bench.measure(arm, seed))
    numbers = {name: float(value) for name, value in found.items()}
    shown = {n: round(numbers[n], 3) for n in ("mean_pcc_zero", "mean_f1", "mean_iou", "reward")}
    claim.progress.log(f"seed {seed}, {ARMS[arm]}: {shown}")
    return numbers


def _tables(claim: Claim, found: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    keys = [dimension.key for dimension in SCORES]
    claim.table(
        "Correlation with the true scores (undefined counts as 0 in the mean)",
        ["", "mean", *keys, "unread %"],
        [
            [
                name,
                _over(found[arm], "mean_pcc_zero"),
                *(_over(found[arm], f"pcc.{key}") for key in keys),
                _over([{"%": 100 * one["skipped"]} for one in found[arm]], "%"),
            ]
            for arm, name in ARMS.items()
            if arm in found
        ],
    )
    parts = [part.key for part in PARTS]
    columns = [f"{name}.{part}" for name in ("f1", "iou") for part in parts]
    rows = [
        [ARMS[arm], *(_over(found[arm], column) for column in [*columns, "reward"])]
        for arm in found
        if not arm.startswith(("calibrated", "frozen"))
    ]
    always = [_over(list(found.values())[-1], f"always_{column}") for column in columns]
    claim.table(
        "Artifacts: F1 of presence and IoU of times; the reward",
        ["", *(f"{name} {part}" for name in ("F1", "IoU") for part in parts), "reward"],
        [["an artifact in every clip, from beginning to end", *always, ""], *rows],
    )


def _sampled(claim: Claim, bench: Bench, found: Mapping[str, Any]) -> None:
    """What GRPO's own answers got while it learned, from the logs of its runs."""
    rows = []
    for arm in found:
        if not {"answer", "dimension"} & set(arm.split("-")):
            continue
        first, last, undecided = [], [], []
        for seed in claim.seeds:
            file = bench.models / f"{arm}-{seed}" / "steps.jsonl"
            steps = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            part = max(1, len(steps) // 5)
            first.append(statistics.fmean(step["reward"] for step in steps[:part]))
            last.append(statistics.fmean(step["reward"] for step in steps[-part:]))
            before, after = (
                statistics.fmean(step["entropy"] for step in some)
                for some in (steps[:part], steps[-part:])
            )
            undecided.append(after / before)
        gains = [b - a for a, b in zip(first, last, strict=True)]
        rose = share([gain > 0 for gain in gains])
        rows.append(
            [
                ARMS[arm],
                spread(first),
                spread(last),
                f"{spread(gains, 2)} ({rose})",
                spread(undecided, 2),
            ]
        )
    claim.table(
        "Reward of the answers that are sampled, first and last fifth of the steps",
        ["", "first", "last", "gain", "entropy, last over first"],
        rows,
    )


def _over(rows: Sequence[Mapping[str, float]], name: str) -> str:
    """Mean and spread over the seeds in which a number is defined, with how many those are."""
    values = [row[name] for row in rows if not math.isnan(row[name])]
    if not values:
        return "undefined"
    return spread(values) + ("" if len(values) == len(rows) else f" ({len(values)} of {len(rows)})")


def _verdicts(claim: Claim, found: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    pairs = (
        ("half the steps on calibration against all on long answers", "long", "alone"),
        ("calibration before the same long answers", "long", "half"),
        ("GRPO with one reward against none", "answer", "long"),
        ("GRPO by dimension against none", "dimension", "long"),
        ("GRPO by dimension against one reward", "dimension", "answer"),
        ("GRPO with one reward against none, both longer", "answer-longer", "long-longer"),
        ("GRPO by dimension against none, both longer", "dimension-longer", "long-longer"),
        ("GRPO by dimension against one reward, both longer", "dimension-longer", "answer-longer"),
        ("GRPO by dimension without calibration against none", "alone-dimension", "alone"),
        ("a trained encoder against a frozen one", "calibrated", "frozen"),
        ("the same, longer", "calibrated-longer", "frozen-longer"),
    )
    rows = []
    for name, better, worse in pairs:
        if not {better, worse} <= set(found):
            continue
        row = [name]
        for number in ("mean_pcc_zero", "mean_f1", "mean_iou", "reward"):
            gains = [
                a[number] - b[number] for a, b in zip(found[better], found[worse], strict=True)
            ]
            # What speaks of no artifact cannot be rewarded for them.
            silent = number == "reward" and better.startswith("calibrated")
            if silent or any(math.isnan(gain) for gain in gains):
                row.append("")
                continue
            row.append(f"{spread(gains, 2)} ({share([gain > 0 for gain in gains])})")
        rows.append(row)
    claim.table(
        "Gain, seed by seed, and in how many seeds it is above 0",
        ["", "mean PCC", "mean F1", "mean IoU", "reward"],
        rows,
    )


if __name__ == "__main__":
    main()
