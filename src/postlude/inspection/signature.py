"""Signature: the one direction of a model's massive activations, and what it tells about its ancestry.

Hidden states of very large norm point the same way whatever the text, the token and the layer. That direction settles
during pretraining and survives fine-tuning, so the acute angle between the directions of two models of equal width is
near 0 degrees when one was made from the other and near 90 when they were trained apart (arXiv:2502.07004).

The signature is the empirical direction of :mod:`postlude.inspection.empirical`. A model without massive
activations gets the direction of its largest hidden states and ``massive: false``: such a direction is not known to
be stable, and no verdict is given on it.

Cost: two forward passes over the text. Memory: the norms of all hidden states and up to 2048 states. Needs: text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.inspection.empirical import EmpiricalDirection, empirical_direction
from postlude.inspection.report import Inspection, place, rounded, table
from postlude.numerics.directions import acute_angle
from postlude.registry import method

if TYPE_CHECKING:
    from postlude.runs.checkpoint import Checkpoint
    from postlude.runs.progress import Progress

__all__ = [
    "Pair",
    "Signature",
    "SignatureComparison",
    "SignatureReport",
    "compare",
    "compare_signatures",
]

# Angles, in degrees, below and above which two models are called related and unrelated.
RELATED, UNRELATED = 20.0, 60.0


@dataclasses.dataclass(frozen=True)
class SignatureReport(Inspection):
    """What :class:`Signature` found.

    Attributes:
        hidden_size: width of the residual stream.
        direction: the signature.
    """

    method: ClassVar[str] = "signature"
    hidden_size: int
    direction: EmpiricalDirection

    @property
    def massive(self) -> bool:
        """Whether the model has massive activations, without which a signature is not known to be stable."""
        return self.direction.massive

    def to_dict(self) -> dict[str, Any]:
        """See :meth:`Inspection.to_dict`."""
        return {
            "method": self.method,
            "hidden_size": self.hidden_size,
            **self.direction.to_dict(),
        }

    def summary(self) -> str:
        """See :meth:`Inspection.summary`."""
        direction = self.direction
        largest = float(direction.norms.max())
        if direction.massive:
            after = [place(layer) for layer in direction.layers]
            between = after[0] if len(after) == 1 else f"{after[0]} to {after[-1]}"
            first = (
                f"Signature from {direction.states} massive hidden states (norm above {direction.threshold:.4g}, "
                f"largest {largest:.4g}) after {between}; {direction.initial_share:.0%} of them at position 0."
            )
        else:
            first = (
                f"No massive activations: the direction is that of the {direction.states} largest hidden states "
                f"(largest norm {largest:.4g}) and is not known to be stable."
            )
        rows = [
            (
                token.token_id,
                repr(token.text) if token.text is not None else None,
                token.initial,
                token.later,
            )
            for token in direction.tokens
        ]
        return "\n".join(
            [
                first,
                f"Mean angle between two of them: {direction.spread:.2f} degrees.",
                "",
                table(("token id", "text", "at position 0", "elsewhere"), rows),
            ]
        )


@method(
    "inspect", "signature", family="singular defects", paper="arXiv:2502.07004", needs=("text",)
)
@dataclasses.dataclass(frozen=True)
class Signature:
    """The direction of a model's massive activations, which fine-tuning leaves as it is.

    Attributes:
        threshold: norm above which a hidden state is massive; None finds one.
    """

    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None and not self.threshold > 0:
            raise SettingsError(
                f"threshold={self.threshold}: give a positive norm, or none to have one found."
            )

    def inspect(
        self,
        checkpoint: Checkpoint,
        tokens: Tensor | None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> SignatureReport:
        """Take the signature of a model on ``tokens`` ``[samples, length]``.

        Raises:
            DataError: no tokens, or some that the model cannot read, or none above the threshold.
        """
        direction = empirical_direction(checkpoint, tokens, self.threshold, seed, progress)
        return SignatureReport(checkpoint.anatomy.hidden_size, direction)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two models side by side.

    Attributes:
        first, second: their names.
        angle: acute angle between their signatures in degrees.
        verdict: ``related``, ``unrelated``, ``unclear``, or ``no verdict`` where one has no massive activations.
    """

    first: str
    second: str
    angle: float
    verdict: str


@dataclasses.dataclass(frozen=True)
class SignatureComparison(Inspection):
    """Signatures of two or more models of equal hidden size.

    Attributes:
        reports: by name of the model.
        angles: ``[models, models]`` acute angles in degrees.
    """

    method: ClassVar[str] = "signature"
    reports: Mapping[str, SignatureReport]
    angles: Tensor

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Every two models, in the order given."""
        names = list(self.reports)
        return tuple(
            Pair(names[i], names[j], float(self.angles[i, j]), self._verdict(i, j))
            for i in range(len(names))
            for j in range(i + 1, len(names))
        )

    def _verdict(self, first: int, second: int) -> str:
        reports, angle = list(self.reports.values()), float(self.angles[first, second])
        if not (reports[first].massive and reports[second].massive):
            return "no verdict"
        return "related" if angle < RELATED else "unrelated" if angle > UNRELATED else "unclear"

    def to_dict(self) -> dict[str, Any]:
        """See :meth:`Inspection.to_dict`."""
        models = []
        for name, report in self.reports.items():
            values = report.to_dict()
            names = ("hidden_size", "massive", "states", "threshold", "mean_pairwise_angle_degrees")
            models.append({"name": name, **{key: values[key] for key in names}})
        return rounded(
            {
                "method": self.method,
                "models": models,
                "angles_degrees": self.angles,
                "pairs": [
                    {
                        "first": pair.first,
                        "second": pair.second,
                        "angle_degrees": pair.angle,
                        "verdict": pair.verdict,
                    }
                    for pair in self.pairs
                ],
            }
        )

    def summary(self) -> str:
        """See :meth:`Inspection.summary`."""
        lines = [
            table(
                ("first", "second", "angle (degrees)", "verdict"),
                ((pair.first, pair.second, pair.angle, pair.verdict) for pair in self.pairs),
            )
        ]
        without = [name for name, report in self.reports.items() if not report.massive]
        if without:
            lines += [
                "",
                f"No massive activations in {', '.join(without)}: the angle is between their largest hidden states "
                "and says nothing certain about ancestry.",
            ]
        return "\n".join(lines)


def compare_signatures(reports: Mapping[str, SignatureReport]) -> SignatureComparison:
    """Angles between signatures.

    Args:
        reports: by name of the model.

    Raises:
        SettingsError: fewer than two, or models of different hidden size.
    """
    if len(reports) < 2:
        raise SettingsError(f"A comparison takes two or more models, got {len(reports)}.")
    sizes = {name: report.hidden_size for name, report in reports.items()}
    if len(set(sizes.values())) > 1:
        listing = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise SettingsError(
            f"Signatures are directions of the residual stream, comparable at equal hidden size only: {listing}. "
            "Fine-tuning does not change the width, so these are not related by it; compare within each width."
        )
    vectors = torch.stack([report.direction.vector for report in reports.values()])
    return SignatureComparison(dict(reports), acute_angle(vectors[:, None], vectors[None]))


def compare(
    models: Sequence[SignatureReport | Checkpoint] | Mapping[str, SignatureReport | Checkpoint],
    tokens: Tensor | Sequence[Tensor] | None = None,
    seed: int = 0,
    settings: Signature | None = None,
) -> SignatureComparison:
    """Compare reports or checkpoints, taking the signature of every checkpoint first.

    Args:
        models: by name, or in order and then named by their path.
        tokens: ids for the checkpoints, shared or one tensor for each model.
        seed: see :func:`empirical_direction`.
        settings: how to take signatures.

    Raises:
        SettingsError: fewer than two models, models of different hidden size, or as many token tensors as do not fit.
        DataError: a checkpoint without tokens to run.
    """
    named = models if isinstance(models, Mapping) else _named(models)
    if tokens is None or isinstance(tokens, Tensor):
        texts: list[Tensor | None] = [tokens] * len(named)
    elif len(tokens) == len(named):
        texts = list(tokens)
    else:
        raise SettingsError(
            f"{len(tokens)} token tensors for {len(named)} models: give one, or one for each."
        )
    signature = Signature() if settings is None else settings
    return compare_signatures(
        {
            name: model
            if isinstance(model, SignatureReport)
            else signature.inspect(model, ids, seed)
            for (name, model), ids in zip(named.items(), texts, strict=True)
        }
    )


def _named(
    models: Sequence[SignatureReport | Checkpoint],
) -> dict[str, SignatureReport | Checkpoint]:
    named: dict[str, SignatureReport | Checkpoint] = {}
    for index, model in enumerate(models):
        name = str(getattr(model, "path", None) or f"model {index}")
        named[name if name not in named else f"{name} ({index})"] = model
    return named
