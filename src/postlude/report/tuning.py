"""One self-contained HTML page of a tuning run: loss, learning rate and what the weights did, over its steps.

The page is made from the result and the log of a run, as ``tune.json`` and ``steps.jsonl`` hold them. A column of the
log that is not known here is drawn under its own name, so every objective has a page. The page loads nothing and runs
no script; every text is escaped.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from postlude.report.environment import environment
from postlude.report.figures import Figure
from postlude.report.plots import Line, line_plot
from postlude.report.sheet import style, template
from postlude.zoo.speech_answers import PARTS, SCORES

__all__ = ["evaluation", "headline", "render", "write"]

Row = Mapping[str, Any]

_DIMENSIONS = 6  # lines of a figure
_PLACES = 40  # points of a line; more would hide each other
_NOT_DRAWN = ("step", "epoch", "seconds", "tokens")
# What a run is judged by, in this order.
_JUDGED = {"reward": "The mean reward", "mean_loss": "The unweighted loss", "loss": "The loss"}
PAGE = "report.html"


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A figure: which columns of the log, under which names, and what to see in them.

    With a ``top`` the axis goes from 0 to it, or to the largest value for 0. A log with one of the columns ``without``
    does not have the figure.
    """

    identifier: str
    title: str
    columns: Mapping[str, str]
    y_label: str
    caption: str
    top: float | None = None
    without: str = ""


_KINDS = (
    _Kind(
        "reward",
        "Reward",
        {"reward": "mean", "reward_std": "standard deviation"},
        "reward",
        "Of the answers of a step. Each step asks other prompts, so a single step says little.",
    ),
    _Kind(
        "accuracy",
        "Pairs in the right order",
        {"accuracy": "share"},
        "share of pairs",
        "How often the chosen answer gained more probability over the reference than the rejected one.",
        top=1,
    ),
    _Kind(
        "margin",
        "Margin",
        {"margin": "margin", "chosen_reward": "chosen", "rejected_reward": "rejected"},
        "beta x log-ratio to the reference",
        "The chosen answer's gain less that of the rejected one. Where the chosen one falls as well, only the distance "
        "is learned.",
    ),
    _Kind(
        "loss",
        "Loss",
        {"loss": "trained", "mean_loss": "unweighted"},
        "nats per token",
        "What is minimised, and the plain loss of the same tokens without weights. Losses of different rules are not "
        "comparable; unweighted ones are. Each step sees other sequences, so a single step says little.",
        without="accuracy reward",
    ),
    _Kind(
        "pair-loss",
        "Loss",
        {"loss": "loss"},
        "nats per pair",
        "0.693 is where the model equals the reference.",
        top=0,
        without="mean_loss reward",
    ),
    _Kind(
        "policy-loss",
        "Loss",
        {"loss": "loss"},
        "of the policy",
        "Advantages sum to nothing within a group, so this is near 0 before an update whatever is learned: judge by "
        "the reward.",
        without="mean_loss accuracy",
    ),
    _Kind(
        "divergence",
        "Divergence from the reference",
        {"kl": "divergence"},
        "nats per token",
        "How far the answers are from what the reference would have written.",
        top=0,
    ),
    _Kind(
        "length",
        "Length of answers",
        {"completion_length": "length"},
        "tokens",
        "Of the answers of a step, those that were cut off included.",
        top=0,
    ),
    _Kind(
        "groups",
        "What teaches nothing",
        {
            "zero_variance_groups": "groups of equal rewards",
            "zero_variance_dimensions": "the same by dimension",
            "truncated_completions": "answers cut off",
        },
        "share",
        "A group whose answers all got the same reward has no better and no worse one.",
        top=1,
    ),
    _Kind(
        "speed",
        "Speed",
        {"answers_per_second": "answers"},
        "answers per second",
        "Sampled, judged and learned from.",
        top=0,
    ),
    _Kind(
        "rate",
        "Learning rate",
        {"learning_rate": "learning rate"},
        "learning rate",
        "It rises in the warm-up and falls by the schedule.",
        top=0,
    ),
    _Kind(
        "effective",
        "Effective tokens",
        {"effective_tokens": "effective", "tokens": "response tokens"},
        "tokens per step",
        "(sum of weights)\u00b2 / sum of squared weights: how many equally weighted tokens would average as well. "
        "Where it is far below the response tokens, few tokens decide a step.",
        top=0,
    ),
    _Kind(
        "shares",
        "Weights",
        {"kept_share": "share kept", "mean_weight": "mean weight"},
        "0 to 1",
        "The share of response tokens whose weight is not zero, and the mean weight of all of them.",
        top=0,
    ),
    _Kind(
        "end",
        "Weight on the end of the text",
        {"eos_share": "share"},
        "share of all weight",
        "The token that ends a text. Where a rule gives it next to none, the model does not learn to stop; --keep-eos "
        "makes it weigh 1.",
        top=0,
    ),
    _Kind(
        "gradient",
        "Gradient",
        {"gradient_norm": "norm"},
        "norm before clipping",
        "A gradient above the clipping norm is scaled down to it.",
        top=0,
    ),
)


def write(directory: Path, result: Row, log: Sequence[Row]) -> None:
    """Write the page of a run into its directory."""
    (directory / PAGE).write_text(render(result, log), encoding="utf-8")


def render(result: Row, log: Sequence[Row]) -> str:
    """The page.

    Args:
        result: of the run.
        log: one row a step, with ``step`` among its columns.

    Returns:
        A whole HTML document.
    """
    found = environment()
    return template("tuning.html.jinja").render(
        title=_title(result),
        date=found.pop("date", None),
        style=style("report.css"),
        introduction=_introduction(result),
        verdict=_verdict(log),
        figures=_figures(log),
        samples=_samples(result),
        numbers=_numbers(result),
        environment=list(found.items()),
        notes=[
            "Losses and rewards are of the training data. Whether something was forgotten, or learned, is told by data "
            "that was not trained on: " + evaluation(result)
        ],
    )


def headline(result: Row, log: Sequence[Row]) -> list[str]:
    """What was done and what came of it, in a few sentences."""
    verdict = _verdict(log)
    return [f"{_title(result)}.", *_introduction(result), *([] if verdict is None else [verdict])]


def evaluation(result: Row) -> str:
    """The command that tells what was forgotten; of a model that hears, how well it does."""
    output, checkpoint = (
        shlex.quote(str(result[name])) if result.get(name) else other
        for name, other in (("output", "OUTPUT"), ("checkpoint", "CHECKPOINT"))
    )
    if result.get("encoder"):
        # It hears, and what it lost or learned shows in what it says of labelled recordings.
        return f"postlude evaluate speech {output} --data CLIPS"
    return f"postlude evaluate {output} --text other.txt --reference {checkpoint}"


def _title(result: Row) -> str:
    name = result.get("rule") or result.get("objective") or "a run"
    what = f"{name} with {result['adapter']}" if result.get("adapter") else str(name)
    return f"Tuning by {what}"


def _introduction(result: Row) -> list[str]:
    data = result.get("data") or {}
    lines = []
    if data:
        words = (
            f"{data['sequences']:,} sequences of {data['tokens']:,} tokens, {data['response_tokens']:,} of them "
            f"responses, were seen {_times(result.get('epochs', 1))} in {_count(result['steps'], 'step')}."
        )
        if data.get("truncated"):
            words += (
                f" {data['truncated']:,} sequences were cut at {result['max_length']:,} tokens and lost "
                f"{data['lost_tokens']:,} tokens at their end."
            )
        lines.append(words)
    elif "steps" in result:
        lines.append(f"{_count(result['steps'], 'step')}.")
    if result.get("skipped_steps"):
        lines.append(
            f"{_count(result['skipped_steps'], 'step')} had no token of any weight and left the model as it was."
        )
    return lines


def _times(number: float) -> str:
    return {1.0: "once", 2.0: "twice"}.get(number, f"{number:.3g} times")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _verdict(log: Sequence[Row]) -> str | None:
    """Where the loss started and ended."""
    name = next(one for one in _JUDGED if one == "loss" or all(one in row for row in log))
    values = [row[name] for row in log if _finite(row.get(name))]
    if len(values) < 4:
        return None
    part = max(1, len(values) // 10)
    start, end = (math.fsum(some) / part for some in (values[:part], values[-part:]))
    what = _JUDGED[name]
    span = "step" if part == 1 else f"{part} steps"
    return f"{what} went from {start:.3g} in the first {span} to {end:.3g} in the last."


def _figures(log: Sequence[Row]) -> list[Figure]:
    columns = {
        name for row in log for name, value in row.items() if _finite(value) and name != "step"
    }
    kinds = [
        kind
        for kind in _KINDS
        if next(iter(kind.columns)) in columns and not columns & set(kind.without.split())
    ]
    dimensions = [name for name in _in_order(log) if name.startswith("reward.")]
    kinds[1:1] = _by_dimension([name for name in dimensions if name in columns])
    drawn = {*dimensions} | {name for kind in _KINDS for name in kind.columns} | set(_NOT_DRAWN)
    kinds += [
        _Kind(f"column-{at}", name.replace("_", " "), {name: name.replace("_", " ")}, "", "")
        for at, name in enumerate(sorted(columns - drawn))
    ]
    return [_figure(kind, log) for kind in kinds]


def _in_order(log: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in log[:1] for name in row))


def _by_dimension(names: Sequence[str]) -> list[_Kind]:
    """The rewards of a run by dimension, a few lines a figure."""
    starts = list(range(0, len(names), _DIMENSIONS))
    if len(starts) > 1 and len(names) - starts[-1] == 1:
        starts.pop()
    ends = [*starts[1:], len(names)]
    return [
        _Kind(
            f"dimensions-{at}",
            "Reward by dimension" if at == 0 else "Reward by dimension, continued",
            {name: _dimension(name.partition(".")[2]) for name in names[start:end]},
            "mean reward",
            "What each dimension got. One that stays at 0 or 1 is the same for all answers, and teaches nothing.",
            top=1,
        )
        for at, (start, end) in enumerate(zip(starts, ends, strict=False))
    ]


def _dimension(name: str) -> str:
    """The words for a dimension: those of answers about speech have short keys."""
    for one in SCORES:
        if name == one.key:
            return one.words
    for part in PARTS:
        if name == part.key:
            return f"{part.key}: what"
        if name == f"{part.key}_times":
            return f"{part.key}: when"
    return name.replace("_", " ")


def _figure(kind: _Kind, log: Sequence[Row]) -> Figure:
    groups = _groups(log)
    ticks = [str(group[-1]["step"]) for group in groups]
    lines = [
        Line(name, [_mean(group, column) for group in groups])
        for column, name in kind.columns.items()
        if any(_finite(row.get(column)) for row in log)
    ]
    if len(lines) > 1 and all(line.values == lines[0].values for line in lines):
        lines = lines[:1]
    size = len(groups[0])
    caption = kind.caption
    if size > 1:
        caption = f"{caption} Each point is the mean of {size} steps.".strip()
    ends = "; ".join(f"{line.name} ends at {_text(line.values[-1])}" for line in lines)
    largest = max(
        (value for line in lines for value in line.values if value is not None), default=0
    )
    limits = None if kind.top is None else (0.0, 1.08 * max(kind.top, largest) or 1.0)
    plot = line_plot(
        f"tuning-{kind.identifier}",
        lines,
        ticks,
        x_label="step",
        y_label=kind.y_label,
        alt=f"{kind.title} over {len(log)} steps: {ends}.",
        limits=limits,
    )
    rows = [
        [tick, *(_text(line.values[at]) for line in lines)] for at, tick in enumerate(ticks)
    ]  # fmt: skip
    return Figure(
        kind.identifier, kind.title, caption, plot, "step", [line.name for line in lines], rows
    )


def _groups(log: Sequence[Row]) -> list[Sequence[Row]]:
    """Consecutive steps, so many together that the points fit beside each other."""
    size = math.ceil(len(log) / _PLACES)
    return [log[start : start + size] for start in range(0, len(log), size)]


def _mean(rows: Sequence[Row], column: str) -> float | None:
    values = [row[column] for row in rows if _finite(row.get(column))]
    return math.fsum(values) / len(values) if values else None


def _samples(result: Row) -> list[tuple[str, str, str]]:
    """Some prompts with an answer and its rewards."""
    return [
        (one["prompt"], one["completion"], ", ".join(map(_text, one["rewards"])))
        for one in result.get("samples") or []
    ]


def _numbers(result: Row) -> list[tuple[str, str]]:
    rows = []
    for name, value in result.items():
        if value is None or name in ("data", "prior", "samples"):
            continue
        if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            # Rewards, by name and weight.
            value = ", ".join(f"{one.get('name')} x {_text(one.get('weight'))}" for one in value)
        if isinstance(value, Mapping):
            kept = [(key, item) for key, item in value.items() if item not in (None, [], ())]
            value = ", ".join(f"{key} {_text(item)}" for key, item in kept)
        if value != "":
            rows.append((name.replace("_", " "), _text(value)))
    return rows


def _text(value: Any) -> str:
    if value is None:
        return "\u2013"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
