"""One self-contained HTML page of a tuning run: loss, learning rate and what the weights did, over its steps.

The page is made from the result and the log of a run, as ``tune.json`` and ``steps.jsonl`` hold them. A column of the
log that is not known here is drawn under its own name, so every objective has a page. The page loads nothing and runs
no script; every text is escaped.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from postlude.report.environment import environment
from postlude.report.figures import Figure
from postlude.report.plots import Line, line_plot
from postlude.report.sheet import finite, shown, style, template
from postlude.report.tuning_figures import Kind, kinds_of

__all__ = ["evaluation", "headline", "render", "write"]

Row = Mapping[str, Any]

# What a run is judged by, in this order.
_JUDGED = {"reward": "The mean reward", "mean_loss": "The unweighted loss", "loss": "The loss"}
PAGE = "report.html"


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
    """The command that tells what was forgotten; of a model that hears, how well it does on ``clips``."""
    output, checkpoint = (
        shlex.quote(str(result[name])) if result.get(name) else other
        for name, other in (("output", "OUTPUT"), ("checkpoint", "CHECKPOINT"))
    )
    if result.get("encoder"):
        # It hears, and what it lost or learned shows in what it says of labelled recordings.
        return f"postlude evaluate speech {output} --data {shlex.quote(result.get('clips') or 'CLIPS')}"
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
    elif "generations" in result and result.get("prompts"):
        lines += _reinforced(result)
    elif "steps" in result:
        lines.append(f"{_count(result['steps'], 'step')}.")
    if result.get("skipped_steps"):
        lines.append(
            f"{_count(result['skipped_steps'], 'step')} had no token of any weight and left the model as it was."
        )
    return lines


def _reinforced(result: Row) -> list[str]:
    """What was asked and how answers were judged; what one answer to everything would get."""
    # Recordings are asked about once each.
    asked = "clip" if result.get("encoder") else "prompt"
    rewards = ", ".join(one["name"] for one in result["reward"])
    words = (
        f"{_count(result['prompts'], asked)}, {result['generations']} answers to each (G), "
        f"{_count(result['steps'], 'step')}; reward {rewards}, beta {shown(result['beta'])}, "
        f"credit by {result['credit']}"
    )
    if result.get("answers_per_second"):
        words += f"; {result['answers_per_second']:.3g} answers per second"
    lines = [f"{words}."]
    if result.get("baseline_reward") is not None:
        lines.append(
            f"Without listening, the commonest answer given to every {asked} gets a reward of "
            f"{result['baseline_reward']:.3g}: {result['baseline_answer']}"
        )
    return lines


def _times(number: float) -> str:
    return {1.0: "once", 2.0: "twice"}.get(number, f"{number:.3g} times")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _verdict(log: Sequence[Row]) -> str | None:
    """Where the loss started and ended."""
    name = next(one for one in _JUDGED if one == "loss" or all(one in row for row in log))
    values = [row[name] for row in log if finite(row.get(name))]
    if len(values) < 4:
        return None
    part = max(1, len(values) // 10)
    start, end = (math.fsum(some) / part for some in (values[:part], values[-part:]))
    what = _JUDGED[name]
    span = "step" if part == 1 else f"{part} steps"
    return f"{what} went from {start:.3g} in the first {span} to {end:.3g} in the last."


def _figures(log: Sequence[Row]) -> list[Figure]:
    columns = {
        name for row in log for name, value in row.items() if finite(value) and name != "step"
    }
    return [_figure(kind, log) for kind in kinds_of(log, columns)]


def _figure(kind: Kind, log: Sequence[Row]) -> Figure:
    groups = _groups(log, kind.places)
    ticks = [str(group[-1]["step"]) for group in groups]
    lines = [
        Line(name, [_mean(group, column) for group in groups])
        for column, name in kind.columns.items()
        if any(finite(row.get(column)) for row in log)
    ]
    if kind.merged and len(lines) > 1 and all(line.values == lines[0].values for line in lines):
        lines = lines[:1]
    size = len(groups[0])
    caption = kind.caption
    if size > 1:
        caption = f"{caption} Each point is the mean of {size} steps.".strip()
    ends = "; ".join(f"{line.name} ends at {shown(line.values[-1])}" for line in lines)
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
        [tick, *(shown(line.values[at]) for line in lines)] for at, tick in enumerate(ticks)
    ]  # fmt: skip
    return Figure(
        kind.identifier, kind.title, caption, plot, "step", [line.name for line in lines], rows
    )


def _groups(log: Sequence[Row], places: int) -> list[Sequence[Row]]:
    """Consecutive steps, so many together that the points fit beside each other."""
    size = math.ceil(len(log) / places)
    return [log[start : start + size] for start in range(0, len(log), size)]


def _mean(rows: Sequence[Row], column: str) -> float | None:
    values = [row[column] for row in rows if finite(row.get(column))]
    return math.fsum(values) / len(values) if values else None


def _samples(result: Row) -> list[tuple[str, str, str]]:
    """Some prompts with an answer and its rewards."""
    return [
        (one["prompt"], one["completion"], ", ".join(map(shown, one["rewards"])))
        for one in result.get("samples") or []
    ]


def _numbers(result: Row) -> list[tuple[str, str]]:
    rows = []
    for name, value in result.items():
        if value is None or name in ("data", "prior", "samples"):
            continue
        if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            # Rewards, by name and weight.
            value = ", ".join(f"{one.get('name')} x {shown(one.get('weight'))}" for one in value)
        if isinstance(value, Mapping):
            kept = [(key, item) for key, item in value.items() if item not in (None, [], ())]
            value = ", ".join(f"{key} {shown(item)}" for key, item in kept)
        if value != "":
            rows.append((name.replace("_", " "), shown(value)))
    return rows
