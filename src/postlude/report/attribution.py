"""One self-contained HTML page from the answer to an attribution query, given as plain JSON values.

``render`` shows what it is given and leaves out what is absent. The keys it knows::

    title                        words
    method                       name, summary, paper, unit (of a score), meaning (of a score, sentences),
                                 settings {name: value}, curvature (words)
    index                        path, model, examples, bytes, curvature_bytes, layers, seconds (to build),
                                 keeps {name: value}
    queries                      list of: text, count (tokens), truncated (tokens cut off), examples, mean,
                                 deviation (of the scores of all examples), tokens [{text, score}], picture (an address
                                 that holds the image), results
      results                    list of: id, score, text, count, truncated, tokens [{text, score}],
                                 query_tokens [{text, score}], layers {name: score}, picture
    weights                      of layers {name: what its part is multiplied by}
    seconds                      of the query
    command, python              how to do it again
    environment                  names and values
    notes                        sentences for the foot of the page

The page loads nothing and runs no script. Every text from the results is escaped. Contributions are told apart
without colour: those that support are underlined by a solid line, those that oppose by a dotted one.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from postlude import registry
from postlude.attribution.answers import Answer
from postlude.attribution.engine import Attributor
from postlude.attribution.forecast import readable_bytes
from postlude.attribution.index import Index
from postlude.report.environment import environment
from postlude.report.sheet import NONE, finite, folded, short, style, template

__all__ = ["page_of", "render"]

Results = Mapping[str, Any]

_LEVELS = 6  # shades of each sign; as many classes in attribution.css
_EXCERPT = 160  # tokens of a passage that are shown at once
# Settings that say what an index keeps.
_KEPT = ("rank", "projection_factor", "side", "format", "factor_iterations")
_MARKED = ("passage", "whole", "query_tokens")  # parts of a result that have marks
_CONTROL = (
    "These scores know nothing of how the model learned: a control to hold other methods against."
)
_MINUS = "\u2212"


def page_of(
    index: Index,
    answers: Sequence[Answer],
    method: Attributor,
    command: str = "",
    weights: Mapping[str, float] | None = None,
) -> str:
    """The page of answers of an index.

    Args:
        index: that was asked.
        answers: see :func:`postlude.attribution.query.query`.
        method: the settings that it was asked with.
        command: that makes this page again.
        weights: of layers, that it was asked with.

    Returns:
        A whole HTML document.
    """
    pictures = index.data_kind == "images"
    controls = (
        "Compare with other methods"
        if pictures
        else "Compare with `--method bm25` and `repsim`, which see tokens and likeness only,"
    )
    info = registry.info_of(method)
    model = index.manifest["model"]["path"]
    return render(
        {
            "method": {
                "name": info.name,
                "summary": info.summary,
                "paper": info.paper,
                "unit": method.unit,
                "meaning": _CONTROL
                if info.family == "control"
                else method.meaning("image" if pictures else "text"),
                "settings": {
                    name: value
                    for name, value in dataclasses.asdict(method).items()
                    if name not in _KEPT
                },
                "curvature": answers[0].curvature if answers else None,
            },
            "index": {
                "path": str(index.path),
                "model": Path(model).name if model else None,
                "examples": len(index),
                "bytes": index.bytes,
                "curvature_bytes": index.curvature_bytes,
                "layers": len(index.layers),
                # Of the index, which another method than the one it was built for may have been asked with.
                "keeps": index.representation.to_dict(),
            },
            "title": "What taught the model to draw this?" if pictures else None,
            "queries": [
                {
                    **answer.to_dict(),
                    "tokens": [dataclasses.asdict(one) for one in answer.tokens],
                    "picture": _picture(answer.image),
                    "results": [
                        {**hit.to_dict(), "picture": _picture(hit.image)} for hit in answer.results
                    ],
                }
                for answer in answers
            ],
            "weights": weights,
            "seconds": answers[0].seconds if answers else None,
            "command": command,
            "environment": environment(),
            "notes": []
            if info.family == "control"
            else [
                "A score is an estimate from gradients of the finished model, not a measurement: to see what an "
                f"example does, train without it. {controls} before believing more."
            ],
        }
    )


def render(results: Results) -> str:
    """The page.

    Args:
        results: see the top of this file.

    Returns:
        A whole HTML document.
    """
    method = results.get("method") or {}
    index = results.get("index") or {}
    queries = [_query(number, one) for number, one in enumerate(results.get("queries") or [], 1)]
    # Scores of words only ever support: a legend of two signs would promise what is not there.
    opposing = any(
        token["mark"].startswith("n")
        for one in queries
        for tokens in (one["tokens"], *(h[k] for h in one["hits"] for k in _MARKED))
        for token in tokens
    )
    return template("attribution.html.jinja", trim_blocks=True).render(
        title=results.get("title") or "What taught the model to say this?",
        date=(results.get("environment") or {}).get("date"),
        style="".join(style(name) for name in ("report.css", "attribution.css")),
        introduction=_introduction(method, index, queries),
        unit=method.get("unit") or "score",
        levels=range(1, _LEVELS + 1),
        opposing=opposing,
        sign="\u00b1" if opposing else "",
        weights=_layers(results.get("weights") or {}),
        coloured=any(
            one["tokens"] or any(hit["passage"] for hit in one["hits"]) for one in queries
        ),
        queries=queries,
        facts=_facts(method, index, results),
        whole=folded(results["command"]) if results.get("command") else None,
        python=results.get("python"),
        environment=list((results.get("environment") or {}).items()),
        notes=results.get("notes") or [],
    )


def _introduction(method: Results, index: Results, queries: Sequence[Results]) -> list[str]:
    """What was asked, and what a score says, in plain words."""
    noun = "image" if any(one["picture"] for one in queries) else "text"
    what = f"the {noun} below" if len(queries) == 1 else f"each of {len(queries)} {noun}s"
    count = f"{index['examples']:,.0f} " if index.get("examples") else ""
    lines = [f"Of the {count}training examples in this index, these support {what} most."]
    if index.get("examples") == 1:
        lines = [f"This index holds one training example; how much it supports {what}."]
    if index.get("model"):
        lines[0] += f" The model is {index['model']}."
    return [*lines, method["meaning"]] if method.get("meaning") else lines


def _query(number: int, query: Results) -> dict[str, Any]:
    hits = query.get("results") or []
    largest = max((abs(hit["score"]) for hit in hits if finite(hit.get("score"))), default=0.0)
    tokens, full = _coloured(query.get("tokens") or [])
    return {
        "number": number,
        "picture": query.get("picture"),
        "text": query.get("text") or "",
        "tokens": tokens,
        "full": full,
        "remark": _cut_remark(query, "query"),
        "verdict": _verdict(query, hits),
        "hits": [_hit(rank, hit, query, largest) for rank, hit in enumerate(hits, 1)],
    }


def _verdict(query: Results, hits: Sequence[Results]) -> str | None:
    """How far the best example stands above the rest."""
    if not hits or not query.get("deviation") or not finite(query.get("mean")):
        return None
    above = (hits[0]["score"] - query["mean"]) / query["deviation"]
    sentence = (
        f"The first example, {hits[0]['id']}, is {above:.1f} standard deviations above the mean score of all "
        f"{query.get('examples') or len(hits):,.0f} examples"
    )
    if len(hits) > 1:
        last = (hits[-1]["score"] - query["mean"]) / query["deviation"]
        sentence += f", number {len(hits)} still {last:.1f}"
    if above < 4:
        noun = "image" if query.get("picture") else "text"
        return (
            sentence
            + f". None stands out: this {noun} may owe something to very many examples, or to none."
        )
    return sentence + "."


def _hit(rank: int, hit: Results, query: Results, largest: float) -> dict[str, Any]:
    tokens, full = _coloured(hit.get("tokens") or [])
    asked, asked_full = _coloured(hit.get("query_tokens") or [])
    excerpt = _excerpt(tokens)
    above = None
    if query.get("deviation") and finite(query.get("mean")):
        above = f"{(hit['score'] - query['mean']) / query['deviation']:+.1f}".replace("-", _MINUS)
    return {
        "rank": rank,
        "picture": hit.get("picture"),
        "id": str(hit["id"]),
        "score": _number(hit["score"]),
        "above": above,
        "share": round(100 * abs(hit["score"]) / largest, 1) if largest else 0,
        "negative": hit["score"] < 0,
        "text": hit.get("text") or "",
        "passage": excerpt["tokens"],
        "before": excerpt["before"],
        "after": excerpt["after"],
        "whole": tokens if excerpt["before"] or excerpt["after"] else [],
        "count": 0 if hit.get("picture") else hit.get("count") or len(hit.get("tokens") or []),
        "full": full,
        "query_tokens": asked,
        "query_full": asked_full,
        "layers": _layers(hit.get("layers") or {}),
        "remark": _cut_remark(hit, "example"),
    }


def _cut_remark(part: Results, name: str) -> str | None:
    cut = part.get("truncated") or 0
    if not cut:
        return None
    return f"The last {cut:,.0f} tokens of this {name} lie beyond the model's context and count for nothing."


def _coloured(tokens: Sequence[Results]) -> tuple[list[dict[str, str]], str]:
    """Tokens with the class of their shade, and what full shade stands for."""
    top = max((abs(token["score"]) for token in tokens), default=0.0)
    shown = []
    for token in tokens:
        level = round(_LEVELS * abs(token["score"]) / top) if top else 0
        sign = "p" if token["score"] > 0 else "n"
        word = token["text"].lstrip()
        space = token["text"][: len(token["text"]) - len(word)]
        if level and not word and space:
            # A break or a space that carries weight has to be seen to be marked.
            word, space = ("\u21b5" + space, "") if "\n" in space else ("\u2423", "")
        shown.append(
            {
                "space": space,
                "text": word,
                "mark": f"{sign}{level}" if level and word else "",
                "value": _number(token["score"], signed=True),
            }
        )
    return shown, _number(top)


def _excerpt(tokens: list[dict[str, str]]) -> dict[str, Any]:
    """The stretch of a long passage that holds most of what is marked."""
    if len(tokens) <= _EXCERPT + _EXCERPT // 4:
        return {"tokens": tokens, "before": 0, "after": 0}
    weights = [int(token["mark"][1:] or 0) for token in tokens]
    best = most = sum(weights[:_EXCERPT])
    start = 0
    for first in range(1, len(tokens) - _EXCERPT + 1):
        best += weights[first + _EXCERPT - 1] - weights[first - 1]
        if best > most:
            most, start = best, first
    after = len(tokens) - start - _EXCERPT
    return {"tokens": tokens[start : start + _EXCERPT], "before": start, "after": after}


def _layers(layers: Mapping[str, float]) -> dict[str, Any] | None:
    """Bars in the order of the model, grouped by block; heights in percent of the drawing."""
    values = {name: value for name, value in layers.items() if finite(value)}
    if not values:
        return None
    high, low = max(0.0, *values.values()), min(0.0, *values.values())
    spread = (high - low) or 1.0
    blocks: list[dict[str, Any]] = []
    for name, value in values.items():
        found = re.search(r"\.(\d+)\.", name)
        block = found[1] if found else ""
        if not blocks or blocks[-1]["name"] != block:
            blocks.append({"name": block, "bars": []})
        blocks[-1]["bars"].append(
            {
                "name": name,
                "value": _number(value, signed=True),
                "negative": value < 0,
                "height": round(100 * abs(value) / spread, 1),
                # From the bottom of the drawing to the lower end of the bar.
                "bottom": round(100 * (min(value, 0.0) - low) / spread, 1),
            }
        )
    strongest = max(values, key=lambda name: abs(values[name]))
    total = sum(values.values())
    share = f", {100 * values[strongest] / total:.0f} % of the score" if total else ""
    # Where there are many blocks, a number under every one of them would not fit.
    step = max(1, -(-len(blocks) // 16))
    for number, one in enumerate(blocks):
        one["shown"] = one["name"] if number % step == 0 else ""
    return {
        "blocks": blocks,
        "zero": round(100 * -low / spread, 1),
        "strongest": f"strongest: {strongest}{share}",
    }


def _facts(method: Results, index: Results, results: Results) -> list[tuple[str, str]]:
    rows = []
    if method.get("name"):
        paper = f" ({method['paper']})" if method.get("paper") else ""
        rows.append(("method", f"{method['name']}{paper}: {method.get('summary') or ''}"))
    if method.get("curvature"):
        rows.append(("curvature", str(method["curvature"])))
    settings = method.get("settings") or {}
    if settings:
        rows.append(("settings", ", ".join(f"{name} {value}" for name, value in settings.items())))
    if index.get("path"):
        rows.append(("index", str(index["path"])))
    if index.get("keeps"):
        words = (
            f"{name} {value}" for name, value in index["keeps"].items() if value not in ("", 0)
        )
        rows.append(("kept of an example", ", ".join(words).removeprefix("kind ")))
    if index.get("bytes"):
        each = (
            f", {readable_bytes(index['bytes'] / index['examples'])} an example"
            if index.get("examples")
            else ""
        )
        rows.append(("size", f"{readable_bytes(index['bytes'])}{each}"))
    if index.get("curvature_bytes"):
        rows.append(("kept curvature", readable_bytes(index["curvature_bytes"])))
    if index.get("layers"):
        rows.append(("layers", f"{index['layers']} linear layers"))
    if finite(index.get("seconds")):
        rows.append(("building took", f"{index['seconds']:.3g} s"))
    if finite(results.get("seconds")):
        rows.append(("this query took", f"{results['seconds']:.3g} s"))
    return rows


def _picture(image: Tensor | None) -> str | None:
    """An address that holds a PNG of ``[channels, height, width]`` in [-1, 1]."""
    if image is None:
        return None
    from PIL import Image

    codes = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    array = codes[0].numpy() if len(codes) == 1 else codes.permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _number(value: float, signed: bool = False) -> str:
    """Three digits, with a real minus; powers of ten where a plain number would be long."""
    if not finite(value):
        return NONE
    sign = _MINUS if value < 0 else "+" if signed and value > 0 else ""
    size = abs(value)
    if size and not 1e-3 <= size < 1e5:
        exponent = math.floor(math.log10(size))
        power = str(exponent).replace("-", _MINUS)
        return f"{sign}{size / 10**exponent:.2f} \u00d7 10^{power}"
    return f"{sign}{short(size)}"
