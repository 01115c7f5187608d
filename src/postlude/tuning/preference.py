"""DPO: learn from pairs of a better and a worse answer, each pair with a weight of its own.

For a pair i of a prompt with the answers "chosen" (w) and "rejected" (l), and log p, log q the log-probabilities of a
whole answer under the model and under the reference (the model before tuning, or another one):

    d_i  = (log p(w) - log q(w)) - (log p(l) - log q(l))
    l_i  = -log sigmoid(beta d_i)
    loss = sum_i weight_i l_i / sum_i weight_i       over all pairs of a step, on all devices

Paper: direct preference optimisation, arXiv:2305.18290. The loss without weights, batches and the training loop are
TRL's; with weights of one the loss of a batch is TRL's exactly. TRL has no weight per pair. Weighting pairs by a
verdict on their answers is the step of arXiv:2512.19728 that needs it.

Answers are scored by the reference once, before training, as the model stands then: no second model is held in memory,
whatever kind of adapter is trained.

Data: one JSON object a line (or a .json file with a list of them), told apart by their keys:

    {"prompt": "...", "chosen": "...", "rejected": "...", "weight": 1.0}     strings, or lists of messages
    {"messages": [...], "chosen": {"role": "assistant", "content": "..."}, "rejected": {...}}
    {"chosen": [messages], "rejected": [messages]}                           which begin with the same turns
    {"conversations": [{"from": "human", "value": "..."}], "chosen": {"from": "gpt", "value": "..."}, ...}

``weight`` is 1 where it is missing. Pairs of weight 0, pairs of twice the same answer and pairs whose prompt leaves no
room for an answer teach nothing; they are left out and counted.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from postlude.errors import DataError, SettingsError
from postlude.registry import method
from postlude.runs.ranks import ranks
from postlude.tuning import on_trl
from postlude.tuning.objective import Job, Objective, Outcome
from postlude.tuning.rows import Row, read_rows
from postlude.tuning.trainer import arguments, joined

__all__ = ["DPO", "Pair", "WeightedPairs", "preference_losses", "read_pairs", "weighted_mean"]

_FORMS = (
    '"prompt", "chosen" and "rejected"; "messages", "chosen" and "rejected"; "chosen" and "rejected" as lists of '
    'messages; or "conversations", "chosen" and "rejected"'
)
Messages = list[dict[str, str]]

# What ShareGPT calls the roles.
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}

# What TRL logs, under our names.
_NAMES = {
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "logps/chosen": "chosen_logp",
    "logps/rejected": "rejected_logp",
}


def preference_losses(
    chosen: Tensor, rejected: Tensor, base_chosen: Tensor, base_rejected: Tensor, beta: float
) -> Tensor:
    """``-log sigmoid(beta d)`` of every pair, ``[pairs]``, from log-probabilities of whole answers."""
    margin = (chosen - base_chosen) - (rejected - base_rejected)
    return -torch.nn.functional.logsigmoid(beta * margin)


def weighted_mean(losses: Tensor, weights: Tensor, total: Tensor | float | None = None) -> Tensor:
    """``sum_i weight_i l_i / total``; the total is the sum of the weights when None."""
    return (weights * losses).sum() / (weights.sum() if total is None else total)


@dataclasses.dataclass(frozen=True)
class Pair:
    """One prompt with two answers.

    Attributes:
        prompt, chosen, rejected: all strings, or all lists of ``{"role", "content"}``.
        weight: of the pair, not negative.
    """

    prompt: Any
    chosen: Any
    rejected: Any
    weight: float = 1.0


def read_pairs(path: str | os.PathLike[str]) -> list[Pair]:
    """Read pairs; see the top of this file.

    Raises:
        DataError: names file and line: none of the forms, an empty answer, a weight that is no number of 0 or more,
            strings in some lines and messages in others, or no weight above 0 at all.
    """
    rows = read_rows(path)
    pairs = [_pair(row) for row in rows]
    kinds = {isinstance(pair.prompt, str) for pair in pairs}
    if len(kinds) > 1:
        other = next(
            row
            for row, pair in zip(rows, pairs, strict=True)
            if isinstance(pair.prompt, str) is not isinstance(pairs[0].prompt, str)
        )
        words = (
            ("strings", "messages") if isinstance(pairs[0].prompt, str) else ("messages", "strings")
        )
        raise DataError(
            f"{rows[0].where} holds {words[0]} and {other.where} {words[1]}: expected one of the two throughout."
        )
    if not any(pair.weight for pair in pairs):
        raise DataError(f"{path}: every pair has weight 0, so there is nothing to learn.")
    return pairs


@method(
    "tune",
    "dpo",
    family="objective",
    paper="arXiv:2305.18290",
    needs=("pairs of answers",),
)
@dataclasses.dataclass(frozen=True)
class DPO(Objective):
    """Prefer the better of two answers (direct preference optimisation), with an optional weight per pair.

    Attributes:
        beta: how strongly the model is held to the reference; larger holds more.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise SettingsError(f"beta is {self.beta}; expected a number above 0")

    def check(self, job: Job) -> None:
        """See :meth:`Objective.check`."""
        on_trl.check_job(job, "dpo")
        _check_template(job, read_pairs(job.data))
        on_trl.import_trl()

    def train(self, job: Job) -> Outcome:
        """See :meth:`Objective.train`."""
        trl = on_trl.import_trl()
        pairs = read_pairs(job.data)
        kept = [pair for pair in pairs if pair.weight > 0 and pair.chosen != pair.rejected]
        if not kept:
            raise DataError(f"{job.data}: no pair has a weight and two different answers.")
        size = job.run.batch_size * job.run.accumulate * ranks()
        with on_trl.training(job):
            args = arguments(
                job.run,
                job.directory,
                job.model,
                job.run.steps or math.ceil(job.run.epochs * math.ceil(len(kept) / size)),
                kind=trl.DPOConfig,
                per_device_train_batch_size=job.run.batch_size,
                **on_trl.keep_activations(trl.DPOConfig),
                beta=self.beta,
                max_length=on_trl.length_limit(job),
                precompute_ref_log_probs=True,
            )
            trainer = _make_trainer(
                job.model,
                args,
                kept,
                job.checkpoint.tokenizer,
                None if job.reference is None else job.reference.model,
            )
            trainer.prepare(job.directory, job.progress)
            trainer.run()
        rows = trainer.rows
        return Outcome(
            {
                "loss": on_trl.mean(rows, "loss"),
                "final_loss": on_trl.mean(rows, "loss", 10),
                "accuracy": on_trl.mean(rows, "accuracy", 10),
                "margin": on_trl.mean(rows, "margin", 10),
                "steps": len(rows),
                "pairs": len(trainer.train_dataset),
                "left_out": len(pairs) - len(trainer.train_dataset),
            },
            rows,
        )


def _make_trainer(
    model: Any, args: Any, pairs: Sequence[Pair], tokenizer: Any, reference: Any
) -> Any:
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    collator = DataCollatorForPreference(tokenizer.pad_token_id, max_length=args.max_length)
    return joined(WeightedPairs, DPOTrainer)(
        model,
        reference=reference,
        ref_model=on_trl.NoReference(model.config),
        args=args,
        data_collator=functools.partial(_collate, collator),
        train_dataset=Dataset.from_list([dataclasses.asdict(pair) for pair in pairs]),
        processing_class=tokenizer,
    )


def _collate(collator: Callable[..., Any], examples: list[dict[str, Any]]) -> dict[str, Any]:
    return {**collator(examples), "weight": torch.tensor([one["weight"] for one in examples])}


class WeightedPairs(on_trl.OnTRL):
    """Overrides of TRL's DPO trainer: a weight per pair, and answers scored by the reference beforehand."""

    names: ClassVar[Mapping[str, str]] = _NAMES

    # The loss is divided by the weights of the whole step, so nothing is left to divide.
    loss_is_scaled_for_ga = True

    beta: float
    data_collator: Any

    def __init__(self, *args: Any, reference: Any = None, **kwargs: Any) -> None:
        self._reference = reference
        super().__init__(*args, **kwargs)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if len(dataset) == 0:
            raise DataError(
                f"No prompt leaves room for an answer within max_length {self.args.max_length}: raise it."
            )
        self.ref_model = None
        loader = DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator)
        scores = [
            self.accelerator.gather_for_metrics(self._reference_scores(batch))
            for batch in self.accelerator.prepare(loader)
        ]
        for column, values in zip(
            ("ref_chosen_logps", "ref_rejected_logps"), zip(*scores, strict=True), strict=True
        ):
            dataset = dataset.add_column(column, torch.cat(values).tolist())
        return dataset

    @torch.no_grad()
    def _reference_scores(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        ids, mask = batch["input_ids"], batch["completion_mask"]
        inputs = {"input_ids": ids, "attention_mask": batch["attention_mask"], "use_cache": False}
        if self._reference is None:
            with self.accelerator.autocast():
                outputs = self.model(
                    **inputs, labels=ids.masked_fill(mask == 0, -100), fused_lm_head=True
                )
            scores = outputs.log_probs[:, 1 - mask.shape[1] :]
        else:
            logits = self._reference.to(ids.device)(**inputs).logits[:, :-1].float()
            scores = logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
            scores = scores * mask[:, 1:]
        return scores.sum(1).chunk(2)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        total = torch.stack([batch["weight"].sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(total).sum()

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The loss of a micro-batch, over the weights of the whole step."""
        inputs = dict(inputs)
        weights = inputs.pop("weight")
        seen: list[Tensor] = []

        def watched(**kwargs: Any) -> Any:
            outputs = model(**kwargs)
            seen.append(outputs.log_probs)
            return outputs

        # TRL's own loss, a mean without weights, is not looked at; its forward pass is, and what it logs is kept.
        super().compute_loss(watched, inputs)  # type: ignore[misc]
        length = inputs["completion_mask"].shape[1] - 1
        chosen, rejected = seen[0][:, -length:].sum(1).chunk(2)
        losses = preference_losses(
            chosen, rejected, inputs["ref_chosen_logps"], inputs["ref_rejected_logps"], self.beta
        )
        if num_items_in_batch is None:
            return weighted_mean(losses, weights)
        # Gradients are averaged over ranks, and the weights were summed over them.
        return weighted_mean(losses, weights, num_items_in_batch / self.accelerator.num_processes)


def _check_template(job: Job, pairs: Sequence[Pair]) -> None:
    if not isinstance(pairs[0].prompt, str) and job.checkpoint.tokenizer.chat_template is None:
        raise DataError(
            f"{job.data} holds messages, and the model's tokenizer has no chat template to write them with. Give "
            '"prompt", "chosen" and "rejected" as strings instead, or put the chat_template.jinja that the model was '
            "made for beside its tokenizer."
        )


def _pair(row: Row) -> Pair:
    fields = row.fields
    if not {"chosen", "rejected"} <= fields.keys():
        raise DataError(f"{row.where} has keys {sorted(fields)}; expected {_FORMS}.")
    chosen, rejected = (_messages(row, fields[key], "assistant") for key in ("chosen", "rejected"))
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not any(turn["content"] for turn in answer):
            raise DataError(f'{row.where}: "{name}" is empty. Remove such pairs.')
    weight = _weight(row)
    if all(isinstance(fields.get(key), str) for key in ("prompt", "chosen", "rejected")):
        return Pair(fields["prompt"], fields["chosen"], fields["rejected"], weight)
    key = next((name for name in ("prompt", "messages", "conversations") if name in fields), None)
    if key is None:
        same = _shared_turns(row, chosen, rejected)
        return Pair(chosen[:same], chosen[same:], rejected[same:], weight=weight)
    return Pair(_messages(row, fields[key], "user"), chosen, rejected, weight=weight)


def _weight(row: Row) -> float:
    weight = row.fields.get("weight", 1.0)
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not (number and math.isfinite(weight) and weight >= 0):
        raise DataError(
            f'{row.where} has "weight" {weight!r}; expected a finite number of 0 or more.'
        )
    return float(weight)


def _messages(row: Row, part: Any, role: str) -> Messages:
    """A string, a message or a list of them, as a list of ``{"role", "content"}``."""
    turns = part if isinstance(part, list) else [part]
    found = []
    for turn in turns:
        if isinstance(turn, str):
            turn = {"role": role, "content": turn}
        elif isinstance(turn, dict) and {"from", "value"} <= turn.keys():
            turn = {"role": _ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
        if not isinstance(turn, dict) or not all(
            isinstance(turn.get(key), str) for key in ("role", "content")
        ):
            raise DataError(
                f'{row.where}: expected strings, or messages as objects with "role" and "content", both strings; '
                f"found {json.dumps(turn, ensure_ascii=False)[:80]}."
            )
        found.append({"role": turn["role"], "content": turn["content"]})
    if not found:
        raise DataError(f"{row.where} has an empty list of messages.")
    return found


def _shared_turns(row: Row, chosen: Messages, rejected: Messages) -> int:
    """With how many turns both begin; each keeps one at least."""
    same = 0
    for first, second in zip(chosen[:-1], rejected[:-1], strict=False):
        if first != second:
            break
        same += 1
    if same == 0:
        raise DataError(
            f'{row.where} has no "prompt", and its two answers do not begin with the same turns. Expected {_FORMS}.'
        )
    return same
