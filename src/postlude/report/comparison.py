"""One self-contained HTML page of a comparison: how checkpoints are related, and what tuning changed where.

Made from the plain values of ``postlude inspect compare --json``. The page loads nothing and runs no script; every
text is escaped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from postlude.report.environment import environment
from postlude.report.figures import Figure, line_figure
from postlude.report.plots import Line
from postlude.report.sheet import NONE, shown, style, template

__all__ = ["render", "update_figures"]

Values = Mapping[str, Any]

# Tolerances whose shares are drawn.
_DRAWN = (0.0, 1e-6, 1e-5, 1e-4, 1e-3)
_RANKS = {
    "effective_rank": "effective",
    "stable_rank": "stable",
    "rank_90": "90% of energy",
    "rank_99": "99% of energy",
    "above_rounding": "above rounding",
}


def render(comparison: Values, command: str = "") -> str:
    """The page.

    Args:
        comparison: see :meth:`postlude.inspection.comparison.Comparison.to_dict`.
        command: that makes the page again.

    Returns:
        A whole HTML document.
    """
    found = environment()
    return template("comparison.html.jinja").render(
        title="Comparison of checkpoints",
        date=found.pop("date", None),
        style=style("report.css"),
        pairs=[
            {**pair, "angle_degrees": shown(pair["angle_degrees"])} for pair in comparison["pairs"]
        ],
        updates=[
            {
                "title": f"From {update['base']} to {update['tuned']}",
                "absent": update["absent"],
                "sentences": [] if update["absent"] else _sentences(update),
                "figures": [] if update["absent"] else update_figures(update, f"update-{number}"),
            }
            for number, update in enumerate(comparison["updates"])
        ],
        command=command,
        environment=list(found.items()),
    )


def update_figures(update: Values, identifier: str = "update") -> list[Figure]:
    """What tuning changed, block by block: size, unchanged entries, ranks, intruders.

    Args:
        update: see :meth:`postlude.inspection.update_report.UpdateReport.to_dict`; one that is not absent.
        identifier: unique in the page.
    """
    blocks = [row["block"] for row in update["blocks"] if row["block"] is not None]
    made = (
        _size(update, blocks, identifier),
        _unchanged(update, blocks, identifier),
        _ranks(update, identifier),
        _intruders(update, identifier),
    )
    return [figure for figure in made if figure is not None]


def _sentences(update: Values) -> list[str]:
    tolerances = dict(zip(update["tolerances"], update["unchanged"], strict=True))
    words = [
        f"|dW| / |W| is {shown(update['relative_norm'])} over {update['entries']:,} entries; "
        f"{tolerances[0.0]:.2%} of them are equal and {tolerances[1e-5]:.2%} within 1e-5."
    ]
    if update["matrices"]:
        words.append(
            f"Of the first {update['intruder_top']} left singular vectors of each tuned matrix, "
            f"{update['intruders']} of {update['intruder_candidates']} have a cosine below "
            f"{update['intruder_threshold']:g} with every one of the base matrix: intruder dimensions "
            "(arXiv:2410.21228)."
        )
    coarse = sorted({t["dtype"] for t in update["tensors"] if t["norm"]} & {"bfloat16", "float16"})
    if coarse:
        words.append(
            f"Weights are stored in {' and '.join(coarse)}: changes below half the distance of neighbouring values "
            "show as none, and rounding adds a change of full rank."
        )
    if update["left_out"]:
        names = "; ".join(f"{name}: {why}" for name, why in update["left_out"].items())
        words.append(f"Not compared: {names}.")
    return words


def _size(update: Values, blocks: Sequence[int], identifier: str) -> Figure | None:
    kinds: dict[str, dict[int, tuple[float, float]]] = {"all": {}}
    for tensor in update["tensors"]:
        if tensor["block"] is None:
            continue
        name = "attention" if "attn" in tensor["name"] else "feed-forward"
        if len(tensor["shape"]) < 2:
            name = "norms and biases"
        for kind in (name, "all"):
            change, size = kinds.setdefault(kind, {}).get(tensor["block"], (0.0, 0.0))
            kinds[kind][tensor["block"]] = (
                change + (tensor["norm"] or 0.0) ** 2,
                size + (tensor["base_norm"] or 0.0) ** 2,
            )
    lines = [
        Line(
            kind,
            [
                (found[block][0] / found[block][1]) ** 0.5
                if block in found and found[block][1]
                else None
                for block in blocks
            ],
        )
        for kind, found in kinds.items()
    ]
    return _lines(
        f"{identifier}-size",
        "Size of the change",
        "|dW| / |W| (Frobenius norms) of the weights of a block. Where it is larger, tuning moved more.",
        lines,
        [str(block) for block in blocks],
        "|dW| / |W|",
    )


def _unchanged(update: Values, blocks: Sequence[int], identifier: str) -> Figure | None:
    shares: dict[float, list[float | None]] = {}
    for tolerance in _DRAWN:
        index = update["tolerances"].index(tolerance)
        shares[tolerance] = []
        for block in blocks:
            tensors = [t for t in update["tensors"] if t["block"] == block]
            sizes = [math.prod(t["shape"]) for t in tensors]
            total = sum(n * t["unchanged"][index] for n, t in zip(sizes, tensors, strict=True))
            shares[tolerance].append(total / sum(sizes) if sizes else None)
    return _lines(
        f"{identifier}-unchanged",
        "Entries that tuning left alone",
        "The share of a block's weights whose change is at most the number at the line. Reinforcement learning was "
        "found to change few entries by more than 1e-5 (arXiv:2505.11711).",
        [
            Line("equal" if tolerance == 0 else f"{tolerance:g}", values)
            for tolerance, values in shares.items()
        ],
        [str(block) for block in blocks],
        "share of entries",
        limits=(0.0, 1.0),
    )


def _ranks(update: Values, identifier: str) -> Figure | None:
    rows = [row for row in update["blocks"] if row["effective_rank"] is not None]
    full = [min(matrix["shape"]) for matrix in update["matrices"]]
    if not rows:
        return None
    largest = max(row[name] for row in rows for name in _RANKS)
    return _lines(
        f"{identifier}-ranks",
        "Rank of the change",
        "Means over the changed linear layers of a block. Effective: exp of the entropy of the singular values; "
        "stable: squared Frobenius norm over the largest squared singular value; energy: how many singular values "
        "hold that share; above rounding: how many exceed what rounding to the stored type gives. Full rank is "
        f"{min(full)} to {max(full)}.",
        [Line(word, [row[name] for row in rows]) for name, word in _RANKS.items()],
        [str(row["block"]) for row in rows],
        "rank (number of directions)",
        limits=(0.0, 1.1 * largest),
    )


def _intruders(update: Values, identifier: str) -> Figure | None:
    if not update["intruders"]:
        return None
    roles = list(dict.fromkeys(matrix["role"] for matrix in update["matrices"]))
    blocks = sorted({matrix["block"] for matrix in update["matrices"]})
    found = {(one["role"], one["block"]): one["intruders"] for one in update["matrices"]}
    sums = [sum(found.get((role, block), 0) for role in roles) for block in blocks]
    caption = (
        f"How many of the first {update['intruder_top']} left singular vectors of the tuned matrices of a block are "
        "unlike every one of the base matrix: strong directions that the base model did not have. The numbers are by "
        "linear layer."
    )
    figure = _lines(
        f"{identifier}-intruders",
        "Intruder dimensions",
        caption,
        [Line("intruders", [float(one) for one in sums])],
        [str(block) for block in blocks],
        "intruders of a block",
        limits=(0.0, 1.1 * max(sums)),
    )
    rows = [
        (str(block), *(str(found.get((role, block), NONE)) for role in roles)) for block in blocks
    ]
    return figure and dataclasses.replace(figure, names=roles, rows=rows)


def _lines(
    identifier: str,
    title: str,
    caption: str,
    lines: Sequence[Line],
    ticks: Sequence[str],
    y_label: str,
    limits: tuple[float, float] | None = None,
) -> Figure | None:
    if not ticks:
        return None
    return line_figure(
        identifier,
        title,
        caption,
        lines,
        ticks,
        x_label="block",
        y_label=y_label,
        limits=limits,
        show=shown,
    )
