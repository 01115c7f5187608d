"""GRPO on an audio language model: answers about recordings are sampled, compared and learned from.

TRL's trainer carries text and images, so the loop is ours; the formulas (:mod:`postlude.numerics.advantage`) are the
same. A recording and its question are read once for all answers of a group, when they are sampled and when gradients
are taken (:mod:`postlude.runs.rollouts`). Model and encoder run without dropout throughout, so the ratio of the first
pass over the answers is exactly 1.

With divided credit, each dimension of the reward is compared within the group by itself, and a token gets the mean of
the advantages of the dimensions that it speaks of (:mod:`postlude.tuning.credit`). Advantages have a spread of 1 either
way, so both kinds of credit take steps of about one size.

Random numbers of an answer depend on the seed and on its place in the run, not on what was drawn before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler

from postlude.errors import DataError, SettingsError
from postlude.numerics.advantage import (
    MEANS,
    clipped,
    credited,
    divergence,
    equal_groups,
    group_advantages,
)
from postlude.runs.listening import Features, Listener
from postlude.runs.progress import Progress
from postlude.runs.quiet import quiet_transformers
from postlude.runs.ranks import ranks
from postlude.runs.rollouts import Answers, log_probabilities, read_prompts, sample_answers
from postlude.surgery.batches import placed_on
from postlude.tuning import on_trl
from postlude.tuning.credit import token_dimensions
from postlude.tuning.objective import Job
from postlude.tuning.prompts import Prompt, asked_with, other_columns
from postlude.tuning.recordings import AUDIO, Recordings, audio_path
from postlude.tuning.rewards import Dimensioned, Reward
from postlude.tuning.rows import Row, read_rows
from postlude.tuning.speech_baseline import NOTHING_READ, unreadable
from postlude.tuning.speech_rewards import SpeechReward
from postlude.tuning.states import seeded
from postlude.tuning.trainer import arguments, joined, only

if TYPE_CHECKING:
    from postlude.tuning.reinforcement import GRPO

__all__ = ["DIMENSION", "AudioGroups", "read", "reinforce"]

DIMENSION = "reward"
"""Columns of the log are ``reward`` for the sum and ``reward.NAME`` for a dimension."""

_SHOWN = 4
_LARGE_PRIME = 1_000_003
_FORM = (
    '"audio" (a file beside the data), "prompt" (a string) and the columns that the reward asks for'
)


def read(job: Job) -> list[Prompt]:
    """The lines of the data; recordings are not opened.

    Raises:
        DataError: a line of another form, or a recording that is not there; names the line.
    """
    return [_prompt(row) for row in read_rows(job.data)]


def _prompt(row: Row) -> Prompt:
    fields = row.fields
    for name in (AUDIO, "prompt"):
        if not (isinstance(fields.get(name), str) and fields[name]):
            raise DataError(
                f"{row.where} has keys {sorted(fields)} and {name!r} is {fields.get(name)!r}; expected {_FORM}."
            )
    columns = other_columns(row, "prompt")
    path = audio_path(row)
    if not path.is_file():
        raise DataError(f"{row.where}: there is no recording {path}.")
    return Prompt(fields["prompt"], columns, 0, row.where, row)


def _heard(job: Job, objective: GRPO, prompts: Sequence[Prompt]) -> list[Features]:
    """What the model hears of the recording of each prompt.

    Raises:
        DataError: a recording that cannot be read or is too long; names the line.
        SettingsError: no room for an answer behind a prompt.
    """
    recordings = Recordings(Listener(job.checkpoint))
    display = job.progress or Progress(show=False)
    with display:
        rows = display.iterate(prompts, "recordings")
        found = [recordings.read(prompt.row) for prompt in rows if prompt.row is not None]
    for what, number in recordings.counts()["converted"].items():
        display.log(f"{number} recordings converted: {what}")
    # Tokens of a prompt beside those of its recording, by its text.
    written: dict[str, int] = {}
    limit = on_trl.length_limit(job)
    for prompt, features in zip(prompts, found, strict=True):
        if prompt.prompt not in written:
            ids = recordings.listener.prepare([features], [prompt.prompt])["input_ids"]
            written[prompt.prompt] = ids.shape[1] - features.embeddings
        tokens = written[prompt.prompt] + features.embeddings
        if tokens + objective.max_new_tokens > limit:
            raise SettingsError(
                f"Prompt and recording of {prompt.where} have {tokens} tokens: with max_new_tokens "
                f"{objective.max_new_tokens} that is more than the {limit} of this run. Ask for shorter answers, cut "
                "the recording, or raise max_length if the model's context is longer."
            )
    return found


def reinforce(
    job: Job,
    objective: GRPO,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    order: Sequence[int],
    steps: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train ``job.model``; see :func:`postlude.tuning.trl_groups.reinforce`."""
    from transformers import Trainer

    run = job.run
    heard = _heard(job, objective, prompts)
    reference = objective.reference(job)
    plan = _Plan(order, objective, run.batch_size, run.accumulate * ranks(), steps)
    try:
        with quiet_transformers(), seeded(run.seed):
            trainer = joined(AudioGroups, Trainer)(
                model=job.model,
                args=arguments(run, job.directory, job.model, steps),
                train_dataset=plan,
                data_collator=only,
            )
            trainer.prepare(job.directory, job.progress)
            trainer.arrange(job, objective, prompts, heard, rewards, reference)
            trainer.run()
    finally:
        job.model.eval()
    return trainer.rows, trainer.samples


class _Plan(Dataset[dict[str, Any]]):
    """Which prompts a micro-batch asks about, in the order of the run; the same ones again for a further pass."""

    def __init__(
        self, order: Sequence[int], objective: GRPO, batch_size: int, micros: int, steps: int
    ) -> None:
        self._order, self._micros, self._passes = order, micros, objective.iterations
        self._prompts = batch_size // objective.generations
        self._length = steps * micros

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, micro = divmod(index, self._micros)
        round_, again = divmod(step, self._passes)
        number = round_ * self._micros + micro
        start = number * self._prompts
        return {
            "prompts": list(self._order[start : start + self._prompts]),
            "number": number,
            "again": again > 0,
        }


@dataclasses.dataclass
class _Group:
    """Answers of a micro-batch, and what they are learned with.

    Attributes:
        inputs: of the model's forward, one row a prompt.
        answers: ``generations`` a prompt, one after the other.
        advantages: ``[N, T]`` or ``[N, 1]``.
        reference: log-probabilities ``[N, T]`` of the frozen model; None without divergence.
        old: the same of the model that sampled; None before the first pass.
        numbers: for the log.
    """

    inputs: dict[str, Tensor]
    answers: Answers
    advantages: Tensor
    reference: Tensor | None
    old: Tensor | None
    numbers: dict[str, float]


class AudioGroups(on_trl.OnTRL):
    """Overrides of transformers' Trainer; call :meth:`arrange` beside :meth:`prepare`.

    Attributes:
        samples: some of the last answers, as :func:`reinforce` returns them.
    """

    def arrange(
        self,
        job: Job,
        objective: GRPO,
        prompts: Sequence[Prompt],
        heard: Sequence[Features],
        rewards: Sequence[Reward],
        reference: Any,
    ) -> None:
        """Set up what is asked, of which recordings, and how answers are judged."""
        self._objective, self._listener = objective, Listener(job.checkpoint)
        self._prompts, self._heard, self._rewards = prompts, heard, rewards
        self._frozen = reference
        self._ends = _ends(job)
        self._asked = 0
        self._groups: dict[int, _Group] = {}
        self._found: list[dict[str, float]] = []
        self._metrics: Any = {"train": {}}
        self._numbers: dict[str, float] = {}
        self._started = time.monotonic()
        self.samples: list[dict[str, Any]] = []

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]

    def _due(self, step: int) -> bool:
        # Answers that are still to be learned from are not kept.
        return step % self._objective.iterations == 0 and super()._due(step)

    # ------------------------------------------------------------------------------------------------ answers

    @torch.no_grad()
    def _ask(self, model: Any, chosen: Sequence[int], number: int) -> _Group:
        settings = self._objective
        prompts = [self._prompts[index] for index in chosen]
        features = [self._heard[index] for index in chosen]
        texts = [prompt.prompt for prompt in prompts]
        inputs = placed_on(self._listener.prepare(features, texts), model)
        generator = torch.Generator().manual_seed(self.args.seed * _LARGE_PRIME + number)
        answers = sample_answers(
            model,
            read_prompts(model, inputs).repeated(settings.generations),
            self._ends,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            generator=generator,
        )
        ids = answers.ids()
        said = [self._listener.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
        asked = [prompt for prompt in prompts for _ in range(settings.generations)]
        advantages, numbers = self._judge(asked, ids, said)
        held = None if settings.beta == 0 else self._of_reference(model, inputs, answers)
        mask = answers.mask
        lengths = mask.sum(1).double()
        numbers |= {
            "completion_length": float(lengths.mean()),
            "truncated_completions": float((~answers.ended).double().mean()),
        }
        wide = torch.zeros(len(mask), mask.shape[1] if advantages.shape[1] > 1 else 1)
        wide[:, : advantages.shape[1]] = advantages
        return _Group(inputs, answers, wide.to(mask.device), held, None, numbers)

    def _of_reference(self, model: Any, inputs: Mapping[str, Tensor], answers: Answers) -> Tensor:
        """Of the frozen model, or of the model with its adapters off."""
        frozen = model if self._frozen is None else self._frozen
        with model.disable_adapter() if self._frozen is None else contextlib.nullcontext():
            prefix = read_prompts(frozen, inputs).repeated(self._objective.generations)
            found, _ = log_probabilities(frozen, prefix, answers, self._objective.temperature)
        return found

    # ---------------------------------------------------------------------------------------- rewards, credit

    def _judge(
        self, asked: Sequence[Prompt], ids: Sequence[Sequence[int]], said: list[str]
    ) -> tuple[Tensor, dict[str, float]]:
        """Advantages ``[N, T]`` or ``[N, 1]``, and numbers for the log."""
        settings = self._objective
        columns = asked_with(asked)
        numbers: dict[str, float] = {}
        totals, of_each = torch.zeros(len(said), dtype=torch.float64), []
        shown: Tensor | None = None
        for reward in self._rewards:
            values = torch.tensor(reward(said, columns), dtype=torch.float64)
            totals += reward.weight * values
            of_each.append(values.tolist())
            if len(self._rewards) > 1:
                numbers[f"{DIMENSION}.{reward.name}"] = float(values.mean())
            elif isinstance(reward.function, Dimensioned):
                shown = torch.tensor(
                    reward.function.by_dimension(said, **columns), dtype=torch.float64
                )
                means = shown.mean(0).tolist()
                for name, mean in zip(reward.function.dimensions, means, strict=True):
                    numbers[f"{DIMENSION}.{name}"] = mean
            if isinstance(reward.function, SpeechReward):
                numbers["unreadable_answers"] = unreadable(said)
        generations = settings.generations
        spread = totals.unflatten(0, (-1, generations)).std(1)
        numbers |= {
            "reward": float(totals.mean()),
            "reward_std": float(spread.mean()),
            "zero_variance_groups": float(equal_groups(totals, generations).double().mean()),
        }
        if shown is not None:
            same = equal_groups(shown, generations).double()
            numbers["zero_variance_dimensions"] = float(same.mean())
        self.samples = [
            {
                "prompt": f"{prompt.columns[AUDIO]}: {prompt.prompt}",
                "completion": text,
                "rewards": [values[at] for values in of_each],
            }
            for at, (prompt, text) in enumerate(zip(asked, said, strict=True))
        ][:_SHOWN]
        if settings.credit == "answer" or shown is None:
            advantages = group_advantages(totals, generations, settings.normalize)[:, None]
        else:
            function: Any = self._rewards[0].function
            among = token_dimensions(self._listener.tokenizer, ids, said, function)
            advantages = credited(group_advantages(shown, generations, settings.normalize), among)
        return advantages.float(), numbers

    # ------------------------------------------------------------------------------------------------- the loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The loss of a micro-batch; its answers are sampled on the first pass."""
        settings = self._objective
        model.eval()
        number = inputs["number"]
        if not inputs["again"]:
            bare = self.accelerator.unwrap_model(model)
            self._groups[number] = self._ask(bare, inputs["prompts"], number)
        group = self._groups[number]
        answers, mask = group.answers, group.answers.mask.float()
        prefix = read_prompts(model, group.inputs).repeated(settings.generations)
        found, entropy = log_probabilities(model, prefix, answers, settings.temperature)
        if group.old is None:
            group.old = found.detach()
        values = clipped(found, group.old, group.advantages, settings.clip_ratio)
        ratio = (found.detach() - group.old).exp()
        tokens = mask.sum()
        moved = ((ratio - 1).abs() > settings.clip_ratio).float()
        numbers = {
            **group.numbers,
            "entropy": float((entropy * mask).sum() / tokens),
            "clipped_tokens": float((moved * mask).sum() / tokens),
        }
        if group.reference is not None:
            held = divergence(found, group.reference)
            values = values - settings.beta * held
            numbers["kl"] = float((held.detach() * mask).sum() / tokens)
        self._found.append(numbers)
        self._asked += len(mask)
        return -MEANS[settings.loss_type](values, mask, settings.max_new_tokens)

    # Each micro-batch is a mean of its own, so the Trainer divides by their number.
    loss_is_scaled_for_ga = False

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Micro-batches of one step; there are no labels to count."""
        return [next(epoch_iterator) for _ in range(num_batches)], None

    def _pace(self, row: dict[str, Any]) -> str:
        return f"reward {row['reward']:.3f}, {row['answers_per_second']:.3g} answers/s"

    def _row(self) -> dict[str, Any]:
        row = super()._row()
        found, self._found = self._found, []
        names = list(found[0])
        means = torch.tensor([[one[name] for name in names] for one in found], dtype=torch.float64)
        every = self.accelerator.gather(means.mean(0)[None].to(self.args.device)).mean(0).tolist()
        row |= dict(zip(names, every, strict=True))
        if self.state.global_step == 1 and row.get("unreadable_answers") == 1:
            self._progress.log(NOTHING_READ)
        now = time.monotonic()
        # Also of a further pass over the same answers: what is learned from in a second.
        row["answers_per_second"] = self._asked * self.args.world_size / (now - self._started)
        self._started, self._asked = now, 0
        if self.state.global_step % self._objective.iterations == 0:
            self._groups.clear()
        return row


def _ends(job: Job) -> set[int]:
    ends: set[int] = set()
    inner = job.checkpoint.model
    for one in (
        getattr(getattr(inner, "generation_config", None), "eos_token_id", None),
        job.checkpoint.tokenizer.eos_token_id,
    ):
        ends.update(one if isinstance(one, list | tuple) else [] if one is None else [one])
    return ends
