"""One self-contained HTML page of the run of a recipe: every stage, what it measured, and how to run it again.

Of a run that is under way, or was stopped, the page says how far it is. With several runs it says what was asked of
them differently, and sets the measures of stages of the same name side by side. It runs no script, loads nothing, and
links to nothing but pages and outputs in the run's own folder; every text is escaped.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from postlude.recipes.commands import shell_line
from postlude.recipes.document import Document
from postlude.recipes.run import Done, State, state
from postlude.report.environment import environment
from postlude.report.figures import Figure
from postlude.report.findings import findings
from postlude.report.plots import Line, bar_plot
from postlude.report.sheet import NONE, folded, shown, style, template
from postlude.runs.atomic import atomic_write

__all__ = ["PAGE", "render", "write"]

PAGE = "report.html"

_LARGEST_PICTURE = 4_000_000
_DIGITS = 5


@dataclasses.dataclass(frozen=True)
class _Measure:
    """A measure that is drawn: its title, its unit, by what it is divided, what to see, and what it is compared with:
    the words for it, and the field of the same result."""

    title: str
    unit: str
    caption: str
    divisor: float = 1.0
    references: Mapping[str, str] = dataclasses.field(default_factory=dict)


_DRAWN = {
    "perplexity": _Measure(
        "Perplexity",
        "perplexity",
        "How surprised the model is by the text; lower is better.",
        references={"reference": "reference_perplexity"},
    ),
    "kl": _Measure("Divergence from the reference", "nats per token", "0 is the reference itself."),
    "frechet": _Measure(
        "Frechet distance",
        "distance in the features of a classifier",
        "From real pictures; lower is better.",
        references={"reference": "frechet_reference", "as many real ones": "frechet_floor"},
    ),
    "class_accuracy": _Measure(
        "Pictures of the asked class",
        "share",
        "As a classifier sees it; 1 is all of them.",
        references={"reference": "class_accuracy_reference", "real ones": "class_accuracy_real"},
    ),
    "psnr_db": _Measure(
        "Distance to the reference's pictures", "PSNR, dB", "On the same noise; higher is closer."
    ),
    "score": _Measure("Pose score", "score", "Position and orientation together; lower is better."),
    "bits_per_weight": _Measure("Bits per weight", "bits", "Codes and scales of quantized layers."),
    "bytes": _Measure("Size", "megabytes", "Of the weights on the disk.", 1e6),
}
_INDEX = "attribute build"
# Not measured but asked for, or said in the sentence of a stage.
_SETTINGS = ("settings", "kept", "method", "output", "seed", "seconds")
# Units of measures that are not drawn.
_UNITS = {
    "loss": "nats per token",
    "reference_loss": "nats per token",
    "top1_agreement": "share of tokens",
    "weight_error": "share of the norm",
    "reload_max_difference": "logits",
    "reload_relative_difference": "share of the largest logit",
    "simulated": "layers",
}


# Two names and a cell for each run.
_Row = tuple[str, str, list[str]]

# What is said of a stage that is not done.
_STATES: Mapping[State, str] = {
    "waiting": "Waiting for those before it.",
    "running": "Begun and not finished: it is under way, or was stopped, and then the command at the end goes on.",
    "failed": "Failed.",
}


class _Run:
    """A run and its folder."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(os.path.realpath(directory))
        self.summary, self.stages = state(self.directory)
        recipe = self.directory / "recipe.yaml"
        self.recipe = recipe.read_text(encoding="utf-8") if recipe.is_file() else ""
        self.name = self.directory.name
        self.states: Mapping[str, State] = self.summary["states"]


def write(
    runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None
) -> Path:
    """Write the page of one run, or of several side by side.

    Args:
        runs: directories of runs.
        out: the file; ``report.html`` of the first run when None.

    Raises:
        RunDirectoryError: not the directory of a run.
    """
    file = Path(os.path.realpath(runs[0])) / PAGE if out is None else Path(out)
    page = render(runs, file.resolve().parent)
    file.resolve().parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return file


def render(runs: Sequence[str | os.PathLike[str]], folder: Path | None = None) -> str:
    """The page.

    Args:
        runs: directories of runs.
        folder: where the page will be, for links to what the runs wrote.

    Returns:
        A whole HTML document.
    """
    opened = [_Run(run) for run in runs]
    _tell_apart(opened)
    found = environment()
    several = len(opened) > 1
    first = opened[0]
    title = "Runs side by side" if several else str(first.summary["name"])
    introduction = [] if several else [text for text in (first.summary.get("about"),) if text]
    if not several:
        seconds = sum(one.seconds for one in first.stages)
        count = len(first.states)
        introduction.append(
            (
                f"{count} stages, {seconds:.0f} s of work in all"
                if len(first.stages) == count
                else f"{len(first.stages)} of {count} stages are done, {seconds:.0f} s of work so far"
            )
            + "".join(f"; {name}: {value}" for name, value in first.summary["variables"].items())
            + "."
        )
    return template("chain.html.jinja").render(
        title=title,
        date=found.pop("date", None),
        style=style("report.css"),
        introduction=introduction,
        figures=_figures(opened),
        asked=_asked(opened) if several else [],
        comparison=_comparison(opened) if several else [],
        runs=[run.name for run in opened],
        stages=[
            stage
            for number, run in enumerate(opened)
            for stage in _sections(run, folder, f"{number}-" if several else "")
        ],
        again=[folded(_again(run)) for run in opened],
        recipes=[(run.name, run.recipe) for run in opened if run.recipe],
        environment=list(found.items()),
    )


def _tell_apart(runs: Sequence[_Run]) -> None:
    """Runs whose folders have the same name get that of the folder above with it."""
    if len({run.name for run in runs}) == len(runs):
        return
    above = Path(os.path.commonpath([run.directory.parent for run in runs]))
    for run in runs:
        run.name = run.directory.relative_to(above).as_posix()


def _again(run: _Run) -> str:
    chosen = [
        f"--set {name}={shlex.quote(str(value))}"
        for name, value in run.summary["variables"].items()
    ]
    if run.summary.get("seed"):
        chosen.append(f"--seed {run.summary['seed']}")
    recipe, output = (
        shlex.quote(str(one)) for one in (run.directory / "recipe.yaml", run.directory)
    )
    return " ".join(["postlude run", recipe, f"--output {output}", *chosen])


def _sections(run: _Run, folder: Path | None, prefix: str) -> Iterator[dict[str, Any]]:
    finished = {done.stage: done for done in run.stages}
    for stage in run.summary["stages"]:
        heading = {
            "identifier": f"stage-{prefix}{stage}",
            "run": run.name,
            "name": stage,
            "title": f"{run.name}: {stage}" if prefix else stage,
        }
        done = finished.get(stage)
        if done is None:
            state = run.states[stage]
            error = run.summary["error"] if state == "failed" else ""
            sentence = " ".join([_STATES[state], error]).strip()
            yield {
                **heading, "sentence": sentence, "links": [], "findings": [], "pictures": [], "rows": []
            }  # fmt: skip
            continue
        inside = run.directory / "stages" / stage
        links = []
        if folder is not None:
            pages = [name for name in done.files if name.endswith(".html")]
            links = [
                ("Its own page", Path(os.path.relpath(inside / name, folder)).as_posix())
                for name in pages
            ]
        yield {
            **heading,
            "sentence": f"postlude {_verb(done)}, {done.seconds:.1f} s.",
            "links": links,
            "findings": _findings(done),
            "pictures": list(_pictures(inside, done)),
            "rows": [
                (_words(measure), shown(value, _DIGITS)) for measure, value in _measures(done)
            ],
            "command": folded(shell_line(done.command)),
        }


def _verb(done: Done) -> str:
    return " ".join(word for word in done.command[:2] if word.isalpha())


def _findings(done: Done) -> list[str]:
    """What an inspection found: most of it stands in lists, which the table of measures leaves out."""
    if _verb(done) != "inspect":
        return []
    return findings(done.result, kept=f"stages/{done.stage}/done.json")


def _pictures(inside: Path, done: Done) -> Iterator[dict[str, str]]:
    for name in done.files:
        file = inside / name
        if name.endswith(".png") and file.is_file() and file.stat().st_size <= _LARGEST_PICTURE:
            data = base64.b64encode(file.read_bytes()).decode("ascii")
            yield {"source": f"data:image/png;base64,{data}", "alt": f"{done.stage}: {name}"}


def _measures(done: Done) -> Iterator[tuple[str, float | int | str]]:
    """Single numbers and words of its result, by path, but for words that its command line says."""
    for name, value in _values_of(done.result):
        # What an index takes is not the size of a checkpoint.
        path = "bytes of the index" if name == "bytes" and _verb(done) == _INDEX else name
        if value not in done.command:
            yield path, value


def _values_of(result: Any, prefix: str = "") -> Iterator[tuple[str, float | int | str]]:
    if not isinstance(result, Mapping):
        return
    for name, value in result.items():
        if name == "method" or (not prefix and name in _SETTINGS):
            continue
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            if prefix.count(".") < 1:
                yield from _values_of(value, f"{path}.")
        elif isinstance(value, bool):
            yield path, "yes" if value else "no"
        elif isinstance(value, int | float) or (isinstance(value, str) and len(value) <= 80):
            yield path, value


def _words(path: str) -> str:
    """A measure for a person, with its unit where the number does not say it."""
    words = path.replace("_", " ").replace(".", ": ")
    drawn = _DRAWN.get(path)
    unit = drawn.unit if drawn and drawn.divisor == 1.0 else _UNITS.get(path, "")
    return f"{words} ({unit})" if unit and unit not in words else words


def _numbers(done: Done) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in _measures(done)
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _figures(runs: Sequence[_Run]) -> list[Figure]:
    """A plot of every known measure that there are at least two values of."""
    made = []
    for name, measure in _DRAWN.items():
        values = [_values(run, name, measure) for run in runs]
        # A later stage repeats what it was told of its checkpoint.
        ticks = list(dict.fromkeys(stage for one in values for stage in one))
        if len({(stage, value) for one in values for stage, value in one.items()}) < 2:
            continue
        bars = [
            Line(run.name, [one.get(stage) for stage in ticks])
            for run, one in zip(runs, values, strict=True)
        ]
        identifier = f"glance-{name}"
        plot = bar_plot(
            identifier, bars, ticks, x_label=measure.unit, alt=f"{measure.title}. {measure.caption}"
        )
        rows = [
            (tick, *(shown(bar.values[i], _DIGITS) for bar in bars)) for i, tick in enumerate(ticks)
        ]
        names = [f"{bar.name} ({measure.unit})" for bar in bars]
        made.append(Figure(identifier, measure.title, measure.caption, plot, "stage", names, rows))
    return made


def _values(run: _Run, name: str, measure: _Measure) -> dict[str, float]:
    """The measure of every stage that has it and whose checkpoint no earlier stage had it of."""
    found: dict[str, float] = {}
    for done in run.stages:
        numbers = _numbers(done)
        for words, field in measure.references.items():
            if name in numbers and field in numbers:
                found.setdefault(words, numbers[field] / measure.divisor)
        if name in numbers:
            value = numbers[name] / measure.divisor
            if name not in ("bytes", "bits_per_weight") or value not in found.values():
                found[done.stage] = value
    return found


def _asked(runs: Sequence[_Run]) -> list[_Row]:
    """Variables, and lines of stages as the recipe has them, that are not the same in all runs."""
    found: dict[tuple[str, str], list[str]] = {}
    for number, run in enumerate(runs):
        for place, name, value in _lines(run):
            found.setdefault((place, name), [NONE] * len(runs))[number] = value
    return [(place, name, cells) for (place, name), cells in found.items() if len(set(cells)) > 1]


def _lines(run: _Run) -> Iterator[tuple[str, str, str]]:
    for name, value in run.summary["variables"].items():
        yield "variables", name, str(value)
    yield "all stages", "seed", str(run.summary.get("seed", 0))
    content = Document(run.directory / "recipe.yaml", run.recipe).content if run.recipe else {}
    for stage, lines in content.get("stages", {}).items():
        for key, value in lines.items():
            yield stage, key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _comparison(runs: Sequence[_Run]) -> list[_Row]:
    """Measures of stages that several runs have and that are not the same in all."""
    found: dict[tuple[str, str], list[str]] = {}
    for number, run in enumerate(runs):
        for done in run.stages:
            for name, value in _measures(done):
                cells = found.setdefault((done.stage, name), [NONE] * len(runs))
                cells[number] = shown(value, _DIGITS)
    return [
        (stage, _words(measure), cells)
        for (stage, measure), cells in found.items()
        if len(set(cells)) > 1
    ]
