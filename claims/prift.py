"""PriFT: what do weights of a frozen model do for fine-tuning, and do they help the rules that read the online model?

"PriFT" (arXiv:2606.09396) reports that weights which follow the model in training (DFT, arXiv:2508.05629, and others)
reinforce their own drift; that reading the same weights from the frozen pretrained model improves several existing
rules; and that a model tuned so is a better start for reinforcement learning. Three parts:

- ``toy``: a bigram model that learns a second habit, every rule.
- ``models``: tiny-lm and stories260k on arithmetic told in words, every rule with both signals.
- ``rl``: GRPO from what SFT, DFT and PriFT left behind.

The seed of a run draws the problems, their order and the tokens that are replaced; of ``toy`` also the world.
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from scipy.stats import t as student_t
from torch import Tensor

import _models
import _toy
import postlude as pl
from _arithmetic import Example, make
from _claim import Claim, data_directory, share, spread
from _weightings import PAIRS, variants
from postlude.runs.directory import RunDirectory
from postlude.tuning import GRPO
from postlude.tuning.objective import TuneRun

# Values over seeds, by variant and quantity.
Values = dict[str, dict[str, list[float]]]
State = dict[str, Tensor]

PARTS = ("toy", "models", "rl")
NOISES = (0.0, 0.4)


def percent(noise: float) -> str:
    """``40 %``."""
    return f"{100 * noise:.0f} %"


def identifier(name: str) -> str:
    """The name of a variant, fit for a file."""
    return name.replace(", ", "-")


def difference(new: Sequence[float], old: Sequence[float]) -> str:
    """Mean of the paired differences and half of its 95 % interval (Student's t); bold where it excludes 0."""
    deltas = [a - b for a, b in zip(new, old, strict=True)]
    mean = statistics.fmean(deltas)
    if len(deltas) < 2:
        return f"{mean:+.3f}"
    half = (
        float(student_t.ppf(0.975, len(deltas) - 1)) * statistics.stdev(deltas) / len(deltas) ** 0.5
    )
    shown = f"{mean:+.3f} ± {half:.3f}"
    return f"**{shown}**" if abs(mean) > half else shown


def pairs(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Rules of which both signals were measured: the name, the variant that is online and the one that is frozen."""
    found = {}
    for name in names:
        rule = name.removesuffix(", online")
        frozen = PAIRS.get(name, f"{rule}, reference")
        if frozen in names and frozen != name:
            found[f"{rule} -> {frozen}" if name in PAIRS else rule] = (name, frozen)
    return found


def show_pairs(claim: Claim, title: str, values: Values, columns: Mapping[str, str]) -> None:
    """Print what the frozen signal changes, rule by rule."""
    rows = [
        [rule, *(difference(values[frozen][key], values[online][key]) for key in columns)]
        for rule, (online, frozen) in pairs(list(values)).items()
    ]
    claim.table(title, ["frozen signal minus online", *columns.values()], rows)


def show(claim: Claim, title: str, values: Values, columns: Mapping[str, str]) -> None:
    """Print a row a variant."""
    rows = [[name, *(spread(one[key]) for key in columns)] for name, one in values.items()]
    claim.table(title, ["", *columns.values()], rows)


# --------------------------------------------------------------------------------------------------------- toy

TOY = {
    "skill": "skill (top word right)",
    "target_kl": "KL(target, model) where taught",
    "forgetting": "KL(chain, model) elsewhere",
}


def toy(claim: Claim) -> None:
    """Every rule on the toy."""
    settings = {"steps": 30 if claim.quick else 600, "rate": 2e-3, "rows": 8}
    kept = claim.directory(settings)
    world = functools.cache(_toy.pretrained)
    found: dict[float, Values] = {noise: {} for noise in NOISES}
    weightings = variants()
    jobs = [(seed, noise, name) for seed in claim.seeds for noise in NOISES for name in weightings]
    base: dict[str, list[float]] = {}
    outside: list[float] = []
    for seed in claim.seeds:
        start = claim.measured(
            kept,
            f"seed-{seed}.base",
            lambda seed=seed: {
                **world(seed).measure(world(seed).base),
                "outside": world(seed).outside,
            },
        )
        outside.append(float(start.pop("outside")))
        for key, value in start.items():
            base.setdefault(key, []).append(float(value))
    for seed, noise, name in claim.progress.iterate(jobs, "toy"):

        def measure(seed: int = seed, noise: float = noise, name: str = name) -> dict[str, float]:
            model = _toy.tuned(world(seed), weightings[name], noise, seed, **settings)
            return world(seed).measure(model)

        result = claim.measured(kept, f"seed-{seed}.noise-{noise}.{identifier(name)}", measure)
        for key, value in result.items():
            found[noise].setdefault(name, {}).setdefault(key, []).append(float(value))
    for noise, values in found.items():
        title = f"Toy, {percent(noise)} of the labels replaced"
        show(claim, title, {"before tuning": base, **values}, TOY)
    for noise, values in found.items():
        title = f"Toy, {percent(noise)} of the labels replaced, what the frozen signal changes"
        show_pairs(claim, title, values, TOY)
    worst = found[NOISES[-1]]
    ratios = {
        key: [a / b for a, b in zip(worst["prift-prob"][key], worst["sft"][key], strict=True)]
        for key in ("forgetting", "target_kl")
    }
    claim.say(
        f"prift-prob over sft at {percent(NOISES[-1])}: forgetting {spread(ratios['forgetting'])}, KL to the target "
        f"{spread(ratios['target_kl'])}. Less of both than sft: "
        f"{share([a < 1 and b < 1 for a, b in zip(*ratios.values(), strict=True)])} seeds. Share of the taught "
        f"contexts whose new top word lies outside of the base model's upper half of mass: {spread(outside)}."
    )


# ------------------------------------------------------------------------------------------------------ models

MODELS = {
    "accuracy": "accuracy",
    "clean_loss": "loss on clean solutions",
    "forgetting": "added loss on own text",
    "kl": "KL on own text",
}
MAIN = (
    "sft",
    "dft",
    "prift-prob",
    "nucleus",
    "prift-mass",
    "eaft, online",
    "eaft, reference",
    "asft, online",
)
"""What is measured also where all rules would take too long."""


def plan(names: Sequence[str]) -> list[tuple[str, str, float, Sequence[str]]]:
    """Model, start, noise and variants of each table."""
    few = ("sft", "dft", "prift-prob", "prift-mass")
    return [
        ("stories260k", "taught", 0.4, names),
        ("stories260k", "taught", 0.2, few),
        ("stories260k", "taught", 0.0, MAIN),
        ("stories260k", "untaught", 0.4, few),
        ("stories260k", "untaught", 0.0, few),
        ("tiny-lm", "taught", 0.4, MAIN),
        ("tiny-lm", "taught", 0.0, few),
    ]


def models(claim: Claim) -> None:
    """Every rule with every signal on two language models."""
    data = data_directory()
    students = {"tiny-lm": _models.built_in(claim.quick)}
    if data is None:
        claim.say("stories260k: skipped, its files are not here (`POSTLUDE_DATA` says where).")
    else:
        students["stories260k"] = _models.stories(data, claim.quick)
    settings = {
        name: {"batch": one.batch, "steps": one.steps, "rate": one.rate}
        for name, one in students.items()
    }
    kept = claim.directory(settings)
    starts: dict[str, dict[str, State]] = {}
    for name, student in students.items():
        came = student.start.model.state_dict()
        untaught = {key: value.clone() for key, value in came.items()}
        taught = kept.unit(
            f"{name}.taught", lambda one=student: one.taught(*([10] if claim.quick else []))
        )
        starts[name] = {"untaught": untaught, "taught": {**untaught, **taught}}
        show_starts(claim, student, starts[name])
    for name, start, noise, names in plan(list(variants("cached"))):
        if name not in students:
            continue
        students[name].teach(starts[name][start])
        values = measure_models(claim, kept, students[name], start, noise, names)
        title = f"{name}, {start} start, {percent(noise)} of the tokens replaced"
        show(claim, title, values, MODELS)
        show_pairs(claim, f"{title}, what the frozen signal changes", values, MODELS)
    claim.say(
        "Bold: the 95 % interval over seeds excludes 0; with this many comparisons one in twenty does so by chance."
    )


def show_starts(claim: Claim, student: _models.Student, starts: Mapping[str, State]) -> None:
    """Print what the models that tuning starts from can do; forgetting is against the model as it came."""
    rows = []
    for name, state in starts.items():
        student.work.model.load_state_dict(state)
        found = student.measure()
        rows.append([name, *(f"{found[key]:.3f}" for key in MODELS)])
    claim.table(f"{student.name} before tuning", ["start", *MODELS.values()], rows)


def measure_models(
    claim: Claim,
    kept: RunDirectory,
    student: _models.Student,
    start: str,
    noise: float,
    names: Sequence[str],
) -> Values:
    """Tune and measure, for every seed and variant."""
    weightings = variants("cached")
    lesson = functools.cache(lambda seed: student.lesson(noise, seed))
    values: Values = {}
    jobs = [(seed, name) for seed in claim.seeds for name in names]
    for seed, name in claim.progress.iterate(jobs, f"{student.name}, {start}, {percent(noise)}"):

        def measure(seed: int = seed, name: str = name) -> dict[str, float]:
            student.tune(lesson(seed), weightings[name], seed)
            return student.measure()

        unit = f"{student.name}.{start}.noise-{noise}.seed-{seed}.{identifier(name)}"
        for key, value in claim.measured(kept, unit, measure).items():
            values.setdefault(name, {}).setdefault(key, []).append(float(value))
    return values


# ---------------------------------------------------------------------------------------------------------- rl

STARTS = ("sft", "dft", "prift-prob", "prift-mass")
ANSWERS = 8  # to each prompt
PROMPTS = 4  # of a step
RATE = 3e-5


def reinforce(
    student: _models.Student, problems: Sequence[Example], steps: int, seed: int
) -> dict[str, Tensor | float]:
    """GRPO on the tuned copy: accuracy before and after, and the mean reward of each step."""
    before = student.measure()
    longest = max(len(student.work.tokenizer(one.completion).input_ids) for one in problems) + 2
    run = TuneRun(
        steps=steps,
        batch_size=ANSWERS * PROMPTS,
        learning_rate=RATE,
        schedule="constant",
        weight_decay=0.0,
        seed=seed,
    )
    goal = GRPO(reward=(correct,), generations=ANSWERS, max_new_tokens=longest)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "prompts.jsonl")
        rows = [{"prompt": one.prompt, "answer": one.answer} for one in problems]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        tuned = pl.tune(student.work, data, goal, run, inplace=True, dtype="float32")
    after = student.measure()
    return {
        "reward": torch.tensor([row["reward"] for row in tuned.log]),
        "idle": torch.tensor([row["zero_variance_groups"] for row in tuned.log]),
        **{f"{key} before": value for key, value in before.items()},
        **{f"{key} after": value for key, value in after.items()},
    }


def correct(completions: list[str], answer: list[str]) -> list[float]:
    """Reward 1 where the last number written is the answer."""
    pairs_ = zip(completions, answer, strict=True)
    return [float(_models.solved(text, expected)) for text, expected in pairs_]


def rl(claim: Claim) -> None:
    """GRPO with the same budget from several starts."""
    data = data_directory()
    if data is None:
        claim.say("Skipped: the files of stories260k are not here (`POSTLUDE_DATA` says where).")
        return
    student = _models.stories(data, claim.quick)
    weightings = variants("cached")
    steps = 2 if claim.quick else 30
    settings = {"batch": student.batch, "steps": student.steps, "rate": student.rate}
    kept = claim.directory({"tune": settings, "grpo": {"steps": steps, "rate": RATE}})
    taught = kept.unit("taught", lambda: student.taught(*([10] if claim.quick else [])))
    student.teach({**student.start.model.state_dict(), **taught})
    starts = ["not tuned", *STARTS]
    for noise in NOISES:
        values: Values = {}
        curves: dict[str, list[Tensor]] = {}
        jobs = [(seed, name) for seed in claim.seeds for name in starts]
        for seed, name in claim.progress.iterate(jobs, f"grpo, {percent(noise)}"):

            def measure(
                seed: int = seed, name: str = name, noise: float = noise
            ) -> dict[str, Tensor | float]:
                if name in weightings:
                    student.tune(student.lesson(noise, seed), weightings[name], seed)
                else:
                    student.reset()
                return reinforce(student, make(200, _models.PROMPTS + seed), steps, seed)

            # A model that was not tuned has seen no noise.
            unit = f"seed-{seed}." + (
                f"noise-{noise}.{name}" if name in weightings else "not-tuned"
            )
            found = claim.measured(kept, unit, measure)
            curves.setdefault(name, []).append(found.pop("reward"))
            idle = found.pop("idle")
            one = values.setdefault(name, {})
            one.setdefault("idle", []).append(float(idle.mean()))
            for key, value in found.items():
                one.setdefault(key, []).append(float(value))
        title = f"GRPO on stories260k, started after tuning with {percent(noise)} of the tokens replaced"
        show_curves(claim, f"{title}: mean reward", curves)
        columns = {
            "accuracy before": "accuracy before",
            "accuracy after": "after",
            "forgetting before": "added loss on own text before",
            "forgetting after": "after",
            "idle": "share of groups without a difference",
        }
        show(claim, title, values, columns)


def show_curves(
    claim: Claim, title: str, curves: Mapping[str, Sequence[Tensor]], parts: int = 5
) -> None:
    """Print mean rewards of a few stretches of the run."""
    steps = len(next(iter(curves.values()))[0])
    parts = min(parts, steps)
    edges = [steps * part // parts for part in range(parts + 1)]
    stretches = list(itertools.pairwise(edges))
    rows = [
        [name, *(spread([float(one[a:b].mean()) for one in found]) for a, b in stretches)]
        for name, found in curves.items()
    ]
    claim.table(title, ["start", *(f"steps {a + 1} to {b}" for a, b in stretches)], rows)


def main() -> None:
    """Measure one part."""
    claim = Claim("prift", __doc__ or "", PARTS)
    {"toy": toy, "models": models, "rl": rl}[claim.part](claim)
    claim.finish()


if __name__ == "__main__":
    main()
