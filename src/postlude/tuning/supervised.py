"""Supervised tuning on demonstrations: the likelihood of response tokens, weighted by a rule.

The objective behind ``--objective sft``, which is the default; the rule (``--weights``) is any registered token rule,
``sft`` among them. Where the rule reads a frozen reference, that is one of three: stored columns (a prior, no cost in
training), a second model, or the model in training with its adapters off.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from postlude import registry
from postlude.errors import DataError, SettingsError
from postlude.runs.ranks import ranks
from postlude.runs.vocabulary import check_vocabulary
from postlude.surgery.head import LanguageHead
from postlude.tuning.batches import make_plan
from postlude.tuning.examples import Examples, check_tokens, read_examples
from postlude.tuning.objective import Job, Objective, Outcome
from postlude.tuning.prior import Prior, identity
from postlude.tuning.recordings import recordings_for
from postlude.tuning.reference import Reference
from postlude.tuning.states import seeded
from postlude.tuning.token_loss import Batches, TokenLoss
from postlude.tuning.trainer import arguments, joined, only
from postlude.tuning.weighting import TokenRule, TokenWeighting

__all__ = ["Goal", "WeightedLikelihood", "length_of", "objective_of"]

Goal = str | TokenRule | TokenWeighting | Objective

_DEFAULT_LENGTH = 2048
_LAST_STEPS = 10
_NO_WEIGHT = 1e-6  # share of all weight


@dataclasses.dataclass(frozen=True)
class WeightedLikelihood(Objective):
    """Fit demonstrations, each token by its weight.

    Attributes:
        weighting: rule, signal, bounds, denominator. A signal ``reference`` reads the prior where there is one.
        prior: directory that ``postlude tune prior`` wrote.
        keep_eos: the token that ends a text weighs 1 whatever the rule says of it.
        save_every: steps from one kept state to the next; None for twenty a run, at most one a minute.
    """

    hears: ClassVar[bool] = True

    weighting: TokenWeighting
    prior: Path | None = None
    keep_eos: bool = False
    save_every: int | None = None

    def __post_init__(self) -> None:
        weighting = self.weighting
        if self.prior is None:
            if weighting.signal == "cached":
                raise SettingsError(
                    "The signal 'cached' is that of a stored prior: pass its directory (--prior), which `postlude tune "
                    "prior` writes, or choose the signal 'reference'."
                )
            return
        if weighting.needs_reference_model and weighting.rule.divergence > 0:
            raise SettingsError(
                f"{weighting.rule.name} needs the reference's whole distribution, which a stored prior does not hold: "
                "leave --prior out."
            )
        if weighting.signal == "online":
            raise SettingsError(
                f"{weighting.rule.name} reads nothing of a reference here, so a prior has no use: leave --prior out, "
                "or choose the signal 'reference' if the rule reads a probability."
            )
        object.__setattr__(self, "weighting", dataclasses.replace(weighting, signal="cached"))

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen model has to be run."""
        return self.weighting.needs_reference_model

    def describe(self) -> dict[str, Any]:
        """See :meth:`Objective.describe`."""
        prior = None if self.prior is None else Prior.load(self.prior).manifest
        return {
            "objective": "sft",
            "rule": self.weighting.rule.name,
            "settings": dataclasses.asdict(self.weighting.rule),
            "weighting": {
                field.name: getattr(self.weighting, field.name)
                for field in dataclasses.fields(self.weighting)
                if field.name != "rule"
            },
            "keep_eos": self.keep_eos,
            "prior": None if prior is None else prior["identity"],
        }

    def check(self, job: Job) -> None:
        """See :meth:`Objective.check`."""
        if job.reference is not None:
            check_vocabulary(job.checkpoint, job.reference)
        LanguageHead(job.checkpoint.model, job.checkpoint.language)

    def train(self, job: Job) -> Outcome:
        """See :meth:`Objective.train`."""
        from transformers import Trainer

        checkpoint, run = job.checkpoint, job.run
        length = length_of(run.max_length, checkpoint.context)
        examples = read_examples(
            job.data, checkpoint.tokenizer, length, job.progress, recordings_for(checkpoint)
        )
        _say_converted(job, examples)
        head = LanguageHead(checkpoint.model, checkpoint.language)
        check_tokens(examples, checkpoint.model)
        head.check(examples.ids(0))
        prior = self._prior(job, examples)
        weighting = self._weighting(checkpoint.tokenizer)
        columns = None
        if prior is not None:
            columns = {name: prior.columns[name] for name in weighting.reference_columns}
        plan = make_plan(examples, run, length, ranks=ranks())
        with seeded(run.seed):
            trainer = joined(TokenLoss, Trainer)(
                model=job.model,
                args=arguments(run, job.directory, job.model, plan.steps),
                train_dataset=Batches(examples, plan, columns),
                data_collator=only,
            )
            trainer.prepare(job.directory, job.progress, self.save_every)
            trainer.weigh(weighting, plan, head, self._reference(job, head), prior)
            trainer.run()
        numbers = _numbers(trainer.rows, plan.tokens)
        if job.progress is not None and _ends_unlearned(numbers, examples, weighting.eos_ids):
            job.progress.log(
                f"end-of-text tokens weigh next to nothing under {weighting.rule.name}, so the model will not learn to "
                "stop: --keep-eos keeps them"
            )
        read = examples.counts()
        return Outcome(
            {
                **numbers,
                "skipped_steps": trainer.skipped,
                "epochs": plan.epochs[-1],
                "padding": plan.padding,
                "max_length": length,
                "data": read,
            },
            trainer.rows,
        )

    def _weighting(self, tokenizer: Any) -> TokenWeighting:
        end = tokenizer.eos_token_id
        if end is None:
            if self.keep_eos:
                raise DataError(
                    "The tokenizer has no token that ends a text, so it cannot be kept."
                )
            return self.weighting
        kept = self.weighting.always_keep_ids
        return dataclasses.replace(
            self.weighting,
            eos_ids=self.weighting.eos_ids or (end,),
            always_keep_ids=(*kept, end) if self.keep_eos else kept,
        )

    def _prior(self, job: Job, examples: Examples) -> Prior | None:
        if self.prior is None:
            return None
        prior = Prior.load(self.prior)
        expected = job.reference_fingerprint or job.fingerprint
        prior.check(identity(expected, job.checkpoint.tokenizer, examples))
        return prior

    def _reference(self, job: Job, head: LanguageHead) -> Reference | None:
        if not self.weighting.needs_reference_model:
            return None
        if job.reference is None:
            return Reference(job.model, head)
        frozen = job.reference.model
        return Reference(frozen, LanguageHead(frozen, job.reference.language))


def objective_of(
    goal: Goal,
    signal: str | None = None,
    prior: str | os.PathLike[str] | None = None,
    keep_eos: bool = False,
    save_every: int | None = None,
) -> Objective:
    """The objective that a name or settings stand for.

    Args:
        goal: a token rule or an objective, by name for its defaults, or settings; a whole weighting.
        signal: of the rule, see :class:`TokenWeighting`.
        prior, keep_eos, save_every: of supervised tuning, see :class:`WeightedLikelihood`.

    Raises:
        UnknownNameError: no such rule or objective.
        SettingsError: options that the objective does not have, or a signal that the rule cannot read.
    """
    if isinstance(goal, str):
        goal = registry.find("tune", goal).settings()
    if isinstance(goal, TokenRule):
        goal, signal = TokenWeighting(goal, signal), None
    options = {
        "signal": signal,
        "prior": prior,
        "keep_eos": keep_eos or None,
        "save_every": save_every,
    }
    given = [name for name, value in options.items() if value is not None]
    if isinstance(goal, TokenWeighting):
        if signal is not None:
            raise SettingsError("The weighting has a signal of its own: set it there.")
        place = None if prior is None else Path(prior)
        return WeightedLikelihood(goal, place, keep_eos, save_every)
    if not isinstance(goal, Objective):
        raise SettingsError(
            f"tune takes the name or the settings of a token rule or an objective, got {type(goal).__name__}"
        )
    if given:
        raise SettingsError(
            f"{', '.join(given)} belong to supervised tuning by a token rule, not to this objective: leave them out."
        )
    return goal


def length_of(max_length: int | None, context: int) -> int:
    """The longest sequence of a run, in tokens.

    Raises:
        SettingsError: beyond the model's context.
    """
    if max_length is None:
        return min(_DEFAULT_LENGTH, context)
    if max_length > context:
        raise SettingsError(
            f"max_length is {max_length}, but the model takes at most {context} tokens: choose a shorter one"
        )
    return max_length


def _say_converted(job: Job, examples: Examples) -> None:
    if examples.recordings is None or job.progress is None:
        return
    for what, count in examples.counts()["converted"].items():
        job.progress.log(f"{count} recordings converted: {what}")


def _ends_unlearned(numbers: Mapping[str, Any], examples: Examples, eos_ids: Sequence[int]) -> bool:
    """Whether texts end in a token that the rule has as good as left out, of weights that are not all zero."""
    if not numbers["mean_weight"] > 0:
        return False
    learned = torch.cat([examples.ids(at)[examples.targets(at)] for at in range(len(examples))])
    ends = torch.isin(learned, torch.tensor(list(eos_ids), dtype=learned.dtype))
    # In very long texts ends are rare: few of them are no reason to warn.
    usual = float(ends.double().mean())
    return bool(numbers["eos_share"] < min(_NO_WEIGHT, usual / 100))


def _numbers(rows: Sequence[Mapping[str, Any]], tokens: Sequence[int]) -> dict[str, Any]:
    """The run in numbers: means over steps for losses, over tokens for shares."""
    by_token = [row["tokens"] for row in rows]
    by_weight = [row["tokens"] * row["mean_weight"] for row in rows]
    total, weight = math.fsum(by_token), math.fsum(by_weight)
    squares = math.fsum(
        one**2 / row["effective_tokens"]
        for one, row in zip(by_weight, rows, strict=True)
        if row["effective_tokens"]
    )
    seconds = math.fsum(row["seconds"] for row in rows)
    last = rows[-_LAST_STEPS:]

    def share(name: str, parts: Sequence[float]) -> float:
        whole = math.fsum(parts)
        of = math.fsum(row[name] * part for row, part in zip(rows, parts, strict=True))
        return of / whole if whole else 0.0

    return {
        "loss": math.fsum(row["loss"] for row in rows) / len(rows),
        "final_loss": math.fsum(row["loss"] for row in last) / len(last),
        "mean_loss": share("mean_loss", by_token),
        "steps": len(rows),
        "response_tokens": int(total),
        "effective_tokens": weight**2 / squares if squares else 0.0,
        "mean_weight": weight / total if total else 0.0,
        "kept_share": share("kept_share", by_token),
        "eos_share": share("eos_share", by_weight),
        "tokens": sum(tokens),
        "tokens_per_second": sum(tokens) / seconds if seconds else 0.0,
        "seconds": seconds,
    }
