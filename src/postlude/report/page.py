"""One self-contained HTML page from the results of a run, given as plain JSON values.

``render`` shows what it is given and leaves out what is absent. The keys it knows::

    title, date                  words
    model                        name, architecture, parameters, blocks, hidden_size, context, stored_dtype
    settings                     bits {weights, activations, kv}, activation_group, samples, length, max_length, seed
    methods                      rows: name, baseline, summary, paper, perplexity, loss, tokens, kl, top1_agreement,
                                 bytes, bits_per_weight, bits_per_activation, seconds,
                                 layer_error {median: [one a block]}, continuation, continuation_tokens
    inspections                  reports by name, as their to_dict gives them
    prompt                       what the continuations continue
    command, commands, python    how to do it again
    environment                  names and values
    notes                        sentences for the foot of the page

The page loads nothing and runs no script. Every text from the results is escaped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from postlude.report.figures import error_figure, inside_figures
from postlude.report.findings import findings
from postlude.report.sheet import NONE, finite, folded, style, template

__all__ = ["render"]

Results = Mapping[str, Any]


def render(results: Results) -> str:
    """The page.

    Args:
        results: see the top of this file; as ``results.json`` holds them.

    Returns:
        A whole HTML document.
    """
    inspections = results.get("inspections") or {}
    methods = results.get("methods") or []
    settings = results.get("settings") or {}
    return template("report.html.jinja").render(
        title=results.get("title", "Results"),
        date=(results.get("environment") or {}).get("date"),
        style=style("report.css"),
        introduction=_introduction(results),
        verdict=_verdict(methods),
        table=_table(methods, results.get("model") or {}) if methods else None,
        errors=error_figure(methods, inspections),
        inside=inside_figures(inspections),
        findings=findings(inspections),
        prompt=results.get("prompt"),
        samples=_samples(methods),
        whole=results.get("command"),
        commands=[folded(command) for command in results.get("commands") or []],
        python=results.get("python"),
        environment=_environment(results.get("environment") or {}, settings),
        notes=[*(results.get("notes") or []), *_notes(results)],
    )


def _introduction(results: Results) -> list[str]:
    """What was done, in plain words."""
    model = results.get("model") or {}
    settings = results.get("settings") or {}
    quantized = [row for row in results.get("methods") or [] if not row.get("baseline")]
    lines = []
    if model:
        name = model.get("name", "the model")
        size = f" of {count(model['parameters'])} weights" if "parameters" in model else ""
        shape = (
            f" ({model['blocks']} blocks, hidden states of {model['hidden_size']} numbers)"
            if {"blocks", "hidden_size"} <= set(model)
            else ""
        )
        doing = "looked inside" if results.get("inspections") else "measured"
        lines.append(f"Postlude {doing} {name}, a language model{size}{shape}.")
    bits = settings.get("bits")
    if quantized and bits:
        few = len(quantized)
        lines.append(
            f"Then it rounded the model's weights to {bits['weights']} bits, what its linear layers read to "
            f"{bits['activations']} bits and its memory of earlier tokens (keys and values) to {bits['kv']} bits, "
            f"by {few} method{'s' if few != 1 else ''} with the same calibration text and the same group size, "
            "and measured what each cost on text that none of them had seen. Embeddings and the output layer "
            "stay in floating point."
        )
    return lines


def _verdict(methods: Sequence[Results]) -> str | None:
    """One sentence: which method lost least, and how much."""
    base = next(
        (row for row in methods if row.get("baseline") and finite(row.get("perplexity"))), None
    )
    rows = [row for row in methods if not row.get("baseline") and finite(row.get("perplexity"))]
    if base is None or len(rows) < 2:
        return None
    rows.sort(key=lambda row: row["perplexity"])
    best, worst = rows[0], rows[-1]
    if worst["perplexity"] < 1.01 * base["perplexity"]:
        return (
            f"No method raised the perplexity by more than 1%: {_perplexity(worst['perplexity'])} at most, against "
            f"{_perplexity(base['perplexity'])} of the float model."
        )
    sentence = (
        f"{best['name']} lost least: perplexity {_perplexity(best['perplexity'])} against "
        f"{_perplexity(base['perplexity'])} of the float model; {worst['name']} lost most and ended at "
        f"{_perplexity(worst['perplexity'])}."
    )
    near = [row for row in rows if finite(row.get("kl"))]
    if len(near) > 1:
        closest = min(near, key=lambda row: row["kl"])
        if closest is not best:
            sentence += f" By KL divergence {closest['name']} is closest to the float model."
    return sentence


@dataclasses.dataclass(frozen=True)
class _Column:
    """One column of the table: where it comes from, how it reads, which end is good."""

    key: str
    name: str
    unit: str
    meaning: str
    show: Callable[[float], str]
    best: Callable[..., float] = min


def count(number: float) -> str:
    """A large number in words: 3.5 million."""
    for size, word in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:.0f}"


def _bytes(number: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f} B"


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


_COLUMNS = (
    _Column(
        "perplexity",
        "perplexity",
        "lower is better",
        "How many equally likely tokens the model is, on average, undecided between. The float model's is the best "
        "that a quantized one can hope for.",
        _perplexity,
    ),
    _Column(
        "kl",
        "KL divergence",
        "nats per token",
        "How far the predicted probabilities are from the float model's: 0 is no difference.",
        lambda value: f"{value:.3f}" if value >= 0.01 else f"{value:.5f}",
    ),
    _Column(
        "top1_agreement",
        "same top token",
        "% of tokens",
        "How often the most likely next token is the float model's.",
        lambda value: f"{100 * value:.1f}",
        max,
    ),
    _Column(
        "bytes",
        "size",
        "on disk",
        "The weight files, with everything that stays in floating point.",
        _bytes,
    ),
    _Column(
        "bits_per_weight",
        "bits per weight",
        "with scales",
        "Everything stored for the linear layers of the blocks (codes, scales, zero points, signs) over the number "
        "of their weights.",
        lambda value: f"{value:.2f}",
    ),
    _Column(
        "bits_per_activation",
        "bits per activation",
        "with scales",
        "The same for what those layers read at run time: codes, scales and zero points.",
        lambda value: f"{value:.2f}",
    ),
    _Column(
        "seconds",
        "time",
        "s to quantize",
        "Wall time of quantizing and saving, on the machine named below.",
        lambda value: f"{value:.1f}",
    ),
)


def _table(methods: Sequence[Results], model: Results) -> dict[str, Any]:
    """Columns that some method has a number for, and the rows as text."""
    columns = [column for column in _COLUMNS if any(finite(row.get(column.key)) for row in methods)]
    best = {}
    for column in columns:
        values = [
            row[column.key]
            for row in methods
            if not row.get("baseline") and finite(row.get(column.key))
        ]
        if len(values) > 1:
            best[column.key] = column.show(column.best(values))

    def cell(row: Results, column: _Column) -> dict[str, Any]:
        text = column.show(row[column.key]) if finite(row.get(column.key)) else NONE
        return {"text": text, "best": not row.get("baseline") and text == best.get(column.key)}

    dtype = model.get("stored_dtype")
    return {
        "columns": columns,
        "rows": [
            {
                "name": row["name"],
                "baseline": bool(row.get("baseline")),
                "cells": [cell(row, column) for column in columns],
            }
            for row in methods
        ],
        "note": f"The float model is stored in {dtype}." if dtype else "",
        "descriptions": [
            {"name": row["name"], "summary": row["summary"], "paper": row.get("paper") or ""}
            for row in methods
            if row.get("summary")
        ],
    }


def _samples(methods: Sequence[Results]) -> list[dict[str, str]]:
    """Continuations, and how long each keeps to the float model's."""
    base = next((row for row in methods if row.get("baseline")), {})
    expected = base.get("continuation_tokens") or []
    samples = []
    for row in methods:
        if row.get("continuation") is None:
            continue
        remark = ""
        found = row.get("continuation_tokens") or []
        if not row.get("baseline") and expected and found:
            if found == expected:
                remark = "the same as the float model"
            else:
                pairs = enumerate(zip(found, expected, strict=False))
                same = next((i for i, (a, b) in pairs if a != b), min(len(found), len(expected)))
                tokens = "token" if same == 1 else "tokens"
                remark = (
                    f"as the float model for {same} {tokens}" if same else "another first token"
                )
        samples.append({"name": row["name"], "text": row["continuation"].strip(), "remark": remark})
    return samples


def _environment(environment: Results, settings: Results) -> list[tuple[str, str]]:
    rows = [(str(name), str(value)) for name, value in environment.items()]
    words = {
        "seed": "seed",
        "activation_group": "activation group",
        "samples": "calibration sequences",
        "length": "tokens of each",
        "max_length": "tokens of a held-out window",
    }
    return rows + [
        (word, str(settings[key])) for key, word in words.items() if settings.get(key) is not None
    ]


def _notes(results: Results) -> list[str]:
    """What must not be concluded."""
    model, methods = results.get("model") or {}, results.get("methods") or []
    notes = []
    tokens = next((row["tokens"] for row in methods if row.get("tokens")), None)
    if methods:
        size = model.get("parameters", 0)
        small = f"A model of {count(size)} weights" if 0 < size < 1e9 else "One model"
        measured = f" measured once on {tokens:,} tokens" if tokens else ""
        notes.append(
            f"{small}{measured} shows how the methods work and that they run here. It neither supports nor refutes "
            "the benchmark numbers of any paper, which were measured on models a thousand times this size; "
            "differences between methods vary with the seed and the text."
            if 0 < size < 1e8
            else f"{small}{measured} neither supports nor refutes the benchmark numbers of any paper; differences "
            "between methods vary with the model, the seed and the text."
        )
    return notes
