"""What inspections found, as sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from postlude.report.sheet import short

__all__ = ["findings"]

Report = Mapping[str, Any]


def findings(inspections: Mapping[str, Report], kept: str = "results.json") -> list[str]:
    """Sentences for the reports that are there.

    Args:
        inspections: reports by name, as their ``to_dict`` gives them.
        kept: the file that holds them whole.
    """
    lines = []
    if inspections.get("outliers"):
        lines += _outliers(inspections["outliers"])
    if inspections.get("singular-defects"):
        lines += _defects(inspections["singular-defects"])
    if inspections.get("signature"):
        lines += _signature(inspections["signature"], kept)
    return lines


def _outliers(report: Report) -> list[str]:
    lines = []
    if report.get("layers"):
        worst = max(report["layers"], key=lambda layer: layer.get("ratio") or 0.0)
        lines.append(
            f"Outliers: after {_after(worst['layer'])} the largest entry of a hidden state is "
            f"{_number(worst['absmax'])}, {_number(worst['ratio'])} times the median entry."
        )
    if report.get("sites"):
        site = max(report["sites"], key=lambda site: site.get("ratio") or 0.0)
        top = (site.get("top_tokens") or [None])[0]
        blame = f" (channel {top['channel']}, at {_token(top)})" if top else ""
        lines.append(
            f"Of everything that linear layers read, {site['site']} of block {site['block']} is hardest to round: "
            f"its largest entry{blame} is {_number(site['ratio'])} times the median, its kurtosis "
            f"{_number(site['kurtosis'])} (3 for a bell curve)."
        )
    return lines


def _defects(report: Report) -> list[str]:
    if not report.get("massive", True):
        return [
            "Singular defects: none. No token's hidden state is ten times as long as usual, so there is no explosion "
            "and no decay to find; angles are to the longest hidden states there are."
        ]
    lines = []
    for word, deed in (("explosion", "appear"), ("decay", "vanish")):
        found = report.get(word) or {}
        if found.get("layer") is None:
            lines.append(f"No {word} block was found.")
            continue
        sentence = f"{word.capitalize()}: massive hidden states {deed} in block {found['layer']}."
        if found.get("angle_degrees") is not None:
            sentence += (
                f" The direction predicted from that block's weights is {found['angle_degrees']:.1f} degrees from the "
                "one measured on text"
            )
            if word == "decay" and found.get("eigenvalue") is not None:
                value, angle = found["eigenvalue"], found["eigenvector_angle_degrees"]
                sentence += (
                    f"; the nearest eigenvector of what the block adds is {angle:.1f} degrees from it, with "
                    f"eigenvalue {_number(value)}"
                )
                if word == "decay" and value < 0:
                    sentence += ", negative: it takes the vector out"
            sentence += "."
        lines.append(sentence)
    direction = report.get("direction") or {}
    if direction.get("states"):
        lines.append(
            f"Direction: {direction['states']:,} massive hidden states (longer than "
            f"{_number(direction['threshold'])}) point the same way to within "
            f"{_number(direction['mean_pairwise_angle_degrees'])} degrees; "
            f"{100 * direction['initial_share']:.0f}% of them stand at the start of a sequence."
        )
    if direction.get("tokens"):
        initial = sum(token["initial"] for token in direction["tokens"])
        later = [token for token in direction["tokens"] if token["later"]]
        share = ((report.get("explosion_path") or {}).get("initial") or {}).get("exploding_share")
        whole = "" if share is None else f" ({100 * share:.0f}% of the vocabulary)"
        first = f"tokens that stand first{whole}" if initial else ""
        named = ", ".join(f"{_token(token)} ({_times(token['later'])})" for token in later[:6])
        both = " and, elsewhere, " if first and named else ""
        lines.append(f"Defect tokens: {first}{both}{named}.")
    lines += _path(report.get("explosion_path") or {})
    return lines


def _path(path: Report) -> list[str]:
    lines = []
    space = path.get("subspace")
    if space:
        lines.append(
            "Cause: of all directions in which the feed-forward layer can be pushed, one gives an output of length "
            f"{_number(space['leading_output_norm'])}; the largest of any other is "
            f"{_number(space['largest_other_output_norm'])}."
        )
    change = path.get("ablation")
    if change:
        lines.append(
            f"Use: with that direction hidden from the layer, the largest hidden state shrinks from "
            f"{_number(change['max_norm'])} to {_number(change['max_norm_without'])} and the loss goes from "
            f"{change['loss']:.3f} to {change['loss_without']:.3f} nats per token"
            + (
                ": the model relies on it."
                if change["loss_without"] > change["loss"] + 0.1
                else "."
            )
        )
    return lines


def _signature(report: Report, kept: str) -> list[str]:
    if not report.get("massive", True):
        return [
            "Signature: the model has no massive hidden states, so no direction that would tell its relatives is known "
            "to be stable."
        ]
    return [
        f"Signature: that direction, of {report['hidden_size']} numbers, is kept in {kept}. Fine-tuned copies "
        "of this model keep it; \u201cpostlude inspect compare\u201d measures the angle between two models."
    ]


def _token(token: Report) -> str:
    text = token.get("text")
    return repr(text) if text is not None else f"token {token['token_id']}"


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number:,} times"


def _after(layer: int) -> str:
    return "the embeddings" if layer < 0 else f"block {layer}"


def _number(value: float | None) -> str:
    return "unboundedly many" if value is None else short(value)
