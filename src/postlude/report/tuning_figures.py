"""Which figures a tuning run has, by the columns of its log."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from postlude.zoo.speech_answers import PARTS, SCORES

__all__ = ["Kind", "kinds_of"]

_DIMENSIONS = 6  # lines of a figure
_FEW = 10  # points of lines that would hide each other
_PLACES = 40  # points of a line; more would hide each other
_NOT_DRAWN = ("step", "epoch", "seconds", "tokens")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A figure: which columns of the log, under which names, and what to see in them.

    Points are means over so many steps that no more than ``places`` of them stand beside each other. With a ``top``
    the axis goes from 0 to it, or to the largest value for 0. A log with one of the columns ``without`` does not have
    the figure. Lines that are all the same are drawn as one where they are ``merged``.
    """

    identifier: str
    title: str
    columns: Mapping[str, str]
    y_label: str
    caption: str
    top: float | None = None
    without: str = ""
    places: int = _PLACES
    merged: bool = True


_KINDS = (
    Kind(
        "reward",
        "Reward",
        {"reward": "mean", "reward_std": "standard deviation"},
        "reward",
        "Of the answers of a step. Each step asks other prompts, so a single step says little.",
    ),
    Kind(
        "accuracy",
        "Pairs in the right order",
        {"accuracy": "share"},
        "share of pairs",
        "How often the chosen answer gained more probability over the reference than the rejected one.",
        top=1,
    ),
    Kind(
        "margin",
        "Margin",
        {"margin": "margin", "chosen_reward": "chosen", "rejected_reward": "rejected"},
        "beta x log-ratio to the reference",
        "The chosen answer's gain less that of the rejected one. Where the chosen one falls as well, only the distance "
        "is learned.",
    ),
    Kind(
        "loss",
        "Loss",
        {"loss": "trained", "mean_loss": "unweighted"},
        "nats per token",
        "What is minimised, and the plain loss of the same tokens without weights. Losses of different rules are not "
        "comparable; unweighted ones are. Each step sees other sequences, so a single step says little.",
        without="accuracy reward",
    ),
    Kind(
        "pair-loss",
        "Loss",
        {"loss": "loss"},
        "nats per pair",
        "0.693 is where the model equals the reference.",
        top=0,
        without="mean_loss reward",
    ),
    Kind(
        "policy-loss",
        "Loss",
        {"loss": "loss"},
        "of the policy",
        "Advantages sum to nothing within a group, so this is near 0 before an update whatever is learned: judge by "
        "the reward.",
        without="mean_loss accuracy",
    ),
    Kind(
        "divergence",
        "Divergence from the reference",
        {"kl": "divergence"},
        "nats per token",
        "How far the answers are from what the reference would have written.",
        top=0,
    ),
    Kind(
        "length",
        "Length of answers",
        {"completion_length": "length"},
        "tokens",
        "Of the answers of a step, those that were cut off included.",
        top=0,
    ),
    Kind(
        "groups",
        "What teaches nothing",
        {
            "zero_variance_groups": "groups of equal rewards",
            "zero_variance_dimensions": "the same by dimension",
            "truncated_completions": "answers cut off",
            "unreadable_answers": "answers not readable",
        },
        "share",
        "A group whose answers all got the same reward has no better and no worse one.",
        top=1,
        merged=False,
    ),
    Kind(
        "speed",
        "Speed",
        {"answers_per_second": "answers"},
        "answers per second",
        "Sampled, judged and learned from.",
        top=0,
    ),
    Kind(
        "rate",
        "Learning rate",
        {"learning_rate": "learning rate"},
        "learning rate",
        "It rises in the warm-up and falls by the schedule.",
        top=0,
    ),
    Kind(
        "effective",
        "Effective tokens",
        {"effective_tokens": "effective", "tokens": "response tokens"},
        "tokens per step",
        "(sum of weights)\u00b2 / sum of squared weights: how many equally weighted tokens would average as well. "
        "Where it is far below the response tokens, few tokens decide a step.",
        top=0,
    ),
    Kind(
        "shares",
        "Weights",
        {"kept_share": "share kept", "mean_weight": "mean weight"},
        "0 to 1",
        "The share of response tokens whose weight is not zero, and the mean weight of all of them.",
        top=0,
    ),
    Kind(
        "end",
        "Weight on the end of the text",
        {"eos_share": "share"},
        "share of all weight",
        "The token that ends a text. Where a rule gives it next to none, the model does not learn to stop; --keep-eos "
        "makes it weigh 1.",
        top=0,
    ),
    Kind(
        "gradient",
        "Gradient",
        {"gradient_norm": "norm"},
        "norm before clipping",
        "A gradient above the clipping norm is scaled down to it.",
        top=0,
    ),
)


def kinds_of(log: Sequence[Mapping[str, Any]], columns: set[str]) -> list[Kind]:
    """The figures of a run.

    Args:
        log: one row a step.
        columns: those that hold numbers.

    Returns:
        The figures that are known, then one for every other column under its own name.
    """
    kinds = [
        kind
        for kind in _KINDS
        if next(iter(kind.columns)) in columns and not columns & set(kind.without.split())
    ]
    dimensions = [name for name in _in_order(log) if name.startswith("reward.")]
    kinds[1:1] = _by_dimension([name for name in dimensions if name in columns])
    drawn = {*dimensions} | {name for kind in _KINDS for name in kind.columns} | set(_NOT_DRAWN)
    kinds += [
        Kind(f"column-{at}", name.replace("_", " "), {name: name.replace("_", " ")}, "", "")
        for at, name in enumerate(sorted(columns - drawn))
    ]
    return kinds


def _in_order(log: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in log[:1] for name in row))


def _by_dimension(names: Sequence[str]) -> list[Kind]:
    """The rewards of a run by dimension, a few lines a figure."""
    starts = list(range(0, len(names), _DIMENSIONS))
    if len(starts) > 1 and len(names) - starts[-1] == 1:
        starts.pop()
    ends = [*starts[1:], len(names)]
    return [
        Kind(
            f"dimensions-{at}",
            "Reward by dimension" if at == 0 else "Reward by dimension, continued",
            {name: _dimension(name.partition(".")[2]) for name in names[start:end]},
            "mean reward",
            "What each dimension got. One that stays at 0 or 1 is the same for all answers, and teaches nothing.",
            top=1,
            places=_FEW,
            merged=False,
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
