"""GRPO: several answers to each prompt, and the model moves towards those that a reward puts above their group's mean.

For the ``generations`` answers to one prompt with rewards r and log-probabilities of their tokens:

    A_i   = (r_i - mean(r)) / (std(r) + 1e-4)               or without the division
    ratio = p(token) / p(token) when it was sampled
    loss  = -mean_i mean_t min(ratio A_i, clip(ratio, 1 - e, 1 + e) A_i) + beta KL(p || reference)

with the estimator exp(log q - log p) - (log q - log p) - 1 of the divergence. Answers are sampled from the model as it
stands, at ``temperature``; with one pass over them (``iterations`` 1) every ratio is 1. A group whose rewards are all
equal teaches nothing: the share of such groups is logged.

Paper: DeepSeekMath, arXiv:2402.03300. On text, sampling, advantages, loss and loop are TRL's (:mod:`trl_groups`), whose
trainer has no place for sound; for audio language models they are our own (:mod:`audio_groups`), with the same
formulas, and divided credit is for those. ``loss_type`` is the denominator:
``grpo`` is the paper's mean over answers of means over tokens; ``dapo`` (TRL's default, arXiv:2503.14476) and ``bnpo``
divide by the tokens of the step or of the micro-batch, ``dr_grpo`` (arXiv:2503.20783) by the longest answer allowed.

A reward is a Python function, see :mod:`postlude.tuning.rewards`; several are summed with their weights. Of a reward
with dimensions the credit may be divided: each dimension is compared within the group by itself, and its advantage goes
only to the tokens that speak of it. Then two dimensions that are wrong in opposite ways do not cancel.

Data: one JSON object a line, ``{"prompt": "...", ...}`` with the prompt a string, or a list of messages that goes
through the chat template (``prompts`` then holds the text of the last one, ``messages`` all); for an audio language
model ``{"audio": "wav/1.wav", "prompt": "...", ...}``. Memory: with beta above 0 and no adapters a second copy of the
model.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from postlude.errors import DataError, SettingsError
from postlude.numerics.advantage import MEANS
from postlude.registry import method
from postlude.runs.ranks import ranks
from postlude.tuning import audio_groups, on_trl, trl_groups
from postlude.tuning.audio_groups import DIMENSION
from postlude.tuning.objective import Job, Objective, Outcome
from postlude.tuning.prompts import Prompt, read_prompts
from postlude.tuning.rewards import GIVEN, NAMED, Dimensioned, Reward, find_reward, parse_reward
from postlude.tuning.speech_baseline import reward_without_ears
from postlude.tuning.speech_rewards import SpeechReward
from postlude.tuning.trl_groups import Rollouts

__all__ = ["GRPO", "Reward", "Rollouts", "find_reward", "parse_reward"]

LOSSES = ("grpo", "dapo", "bnpo", "dr_grpo")
CREDITS = ("answer", "dimension")

# What samples and learns, by the kind of the model; with the denominators it knows.
_LOOPS = {
    "language": (trl_groups.reinforce, LOSSES),
    "audio": (audio_groups.reinforce, tuple(MEANS)),
}


@method("tune", "grpo", family="objective", paper="arXiv:2402.03300", needs=("prompts", "reward"))
@dataclasses.dataclass(frozen=True)
class GRPO(Objective):
    """Reinforce the answers that a reward puts above those to the same prompt (group relative policy optimisation).

    Attributes:
        reward: ``module:function`` words or names such as ``speech-verifiable``, each with ``=WEIGHT`` where it is not
            1; from Python also functions.
        generations: answers to each prompt; a batch is a whole number of such groups.
        max_new_tokens: longest answer.
        temperature: of sampling.
        beta: weight of the divergence from the reference; 0 needs no reference.
        iterations: passes over the answers before new ones are sampled.
        clip_ratio: how far the ratio of probabilities may move from 1.
        normalize: divide by the standard deviation of the group.
        loss_type: denominator: grpo, dapo, bnpo or dr_grpo.
        credit: ``answer`` gives every token what the whole answer got, ``dimension`` what the dimension got that it
            speaks of; for a reward with dimensions, on an audio language model.
        sentence_encoder: directory of the sentence encoder that ``speech-similarity`` compares descriptions with.
    """

    hears: ClassVar[bool] = True

    reward: tuple[str, ...] = ()
    generations: int = 8
    max_new_tokens: int = 128
    temperature: float = 1.0
    beta: float = 0.0
    iterations: int = 1
    clip_ratio: float = 0.2
    normalize: bool = True
    loss_type: str = "grpo"
    credit: str = "answer"
    sentence_encoder: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.reward, str) or callable(self.reward):
            object.__setattr__(self, "reward", (self.reward,))
        if self.generations < 2:
            raise SettingsError(
                f"generations is {self.generations}; expected at least 2, to be compared with each other"
            )
        for name in ("max_new_tokens", "iterations"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; expected 1 or more")
        for name in ("temperature", "clip_ratio"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise SettingsError(f"{name} is {getattr(self, name)}; expected a number above 0")
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise SettingsError(f"beta is {self.beta}; expected 0 or more")
        if self.loss_type not in LOSSES:
            raise SettingsError(f"loss_type is {self.loss_type!r}; expected {', '.join(LOSSES)}")
        if self.credit not in CREDITS:
            raise SettingsError(f"credit is {self.credit!r}; expected {', '.join(CREDITS)}")

    def rewards(self) -> list[Reward]:
        """The functions.

        Raises:
            SettingsError: none were named.
            UnknownNameError: one that there is not.
        """
        if not self.reward:
            raise SettingsError(
                "grpo needs a reward: name a function, for example --reward my_rewards:exact, or one of "
                f"{', '.join(NAMED)}"
            )
        return [
            parse_reward(one, self.sentence_encoder)
            if isinstance(one, str)
            else Reward(getattr(one, "__name__", type(one).__name__), one)
            for one in self.reward
        ]

    @property
    def needs_reference(self) -> bool:
        """See :attr:`Objective.needs_reference`."""
        return self.beta > 0

    def describe(self) -> dict[str, Any]:
        """See :meth:`Objective.describe`; of a reward its name, its weight and a digest of what it is written as."""
        settings = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "reward"
        }
        rewards = [
            {"name": one.name, "weight": one.weight, "source": one.digest()}
            for one in self.rewards()
        ]
        return {"objective": "grpo", "reward": rewards, **settings}

    def check(self, job: Job) -> None:
        """See :meth:`Objective.check`."""
        on_trl.check_job(job, "grpo")
        kind = job.checkpoint.kind
        rewards = self.rewards()
        prompts = self._prompts(job)
        for reward in rewards:
            self._check_columns(reward, prompts)
        _, losses = _LOOPS[kind]
        if self.loss_type not in losses:
            raise SettingsError(
                f"loss_type is {self.loss_type!r}; expected {', '.join(losses)} for an {kind} model"
            )
        if self.credit == "dimension":
            divided = [one for one in rewards if isinstance(one.function, Dimensioned)]
            if kind != "audio" or len(rewards) != 1 or not divided:
                raise SettingsError(
                    "credit=dimension is for an audio language model and one reward that has dimensions, such as "
                    f"{next(iter(NAMED))}; this is a {kind} model with {', '.join(one.name for one in rewards)}. "
                    "Leave it out."
                )
        self._check_groups(job)
        if kind != "audio":
            self._check_sizes(job, prompts)
            on_trl.import_trl()

    def _prompts(self, job: Job) -> list[Prompt]:
        checkpoint = job.checkpoint
        if checkpoint.kind not in _LOOPS:
            checkpoint.language  # noqa: B018 - raises, and says what the model is for
        if checkpoint.kind == "audio":
            return audio_groups.read(job)
        return read_prompts(job.data, checkpoint.tokenizer)

    def _check_columns(self, reward: Reward, prompts: Sequence[Prompt]) -> None:
        needs, _, _ = reward.asks_for()
        for name in sorted(needs - {*GIVEN}):
            missing = next((one for one in prompts if name not in one.columns), None)
            if missing is not None:
                raise DataError(
                    f"The reward {reward.name} asks for the column {name!r}, and {missing.where} has "
                    f"{', '.join(map(repr, sorted(missing.columns))) or 'no other column than its prompt'}."
                )
        if isinstance(reward.function, Dimensioned):
            for one in prompts:
                try:
                    reward.function.check(one.columns)
                except DataError as error:
                    # The long answers hold the same questions without the columns.
                    answered = (
                        isinstance(reward.function, SpeechReward) and "completion" in one.columns
                    )
                    advice = ". Take reinforce.jsonl, which has them" if answered else ""
                    raise DataError(
                        f"The reward {reward.name}, {one.where}: {error}{advice}"
                    ) from error

    def _check_sizes(self, job: Job, prompts: Sequence[Prompt]) -> None:
        limit = on_trl.length_limit(job)
        for prompt in prompts:
            if prompt.tokens + self.max_new_tokens > limit:
                raise SettingsError(
                    f"The prompt of {prompt.where} has {prompt.tokens} tokens: with max_new_tokens "
                    f"{self.max_new_tokens} that is more than the {limit} of this run. Shorten it, ask for shorter "
                    "answers, or raise max_length if the model's context is longer."
                )

    def _check_groups(self, job: Job) -> None:
        whole = job.run.batch_size * job.run.accumulate * ranks()
        if whole % self.generations:
            raise SettingsError(
                f"A step holds {whole} answers (batch size x accumulation x devices), which is no whole number of "
                f"groups of {self.generations}: make it a multiple of generations."
            )

    def train(self, job: Job) -> Outcome:
        """See :meth:`Objective.train`."""
        rewards = self.rewards()
        prompts = self._prompts(job)
        run = job.run
        groups = run.batch_size * run.accumulate * ranks() // self.generations
        steps = run.steps or math.ceil(run.epochs * len(prompts) / groups) * self.iterations
        order = _order(len(prompts), math.ceil(steps / self.iterations) * groups, run.seed)
        reinforce, _ = _LOOPS[job.checkpoint.kind]
        rows, samples = reinforce(job, self, prompts, rewards, order, steps)
        result = {
            "loss": on_trl.mean(rows, "loss"),
            "first_reward": rows[0]["reward"] if rows else None,
            "final_reward": on_trl.mean(rows, "reward", 10),
            **_final(rows),
            "final_kl": on_trl.mean(rows, "kl", 10),
            "completion_length": on_trl.mean(rows, "completion_length", 10),
            "zero_variance_groups": on_trl.mean(rows, "zero_variance_groups"),
            "answers_per_second": on_trl.mean(rows, "answers_per_second"),
            **self._without_ears(rewards, prompts),
            "steps": len(rows),
            "prompts": len(prompts),
            "samples": samples,
        }
        return Outcome(result, rows)

    def _without_ears(self, rewards: Sequence[Reward], prompts: Sequence[Prompt]) -> dict[str, Any]:
        """What saying the same of every clip would get; nothing where another model has to judge that."""
        function = rewards[0].function
        if len(rewards) > 1 or not isinstance(function, SpeechReward) or self.sentence_encoder:
            return {}
        answer, value = reward_without_ears(function, [one.columns for one in prompts])
        return {"baseline_answer": answer, "baseline_reward": value * rewards[0].weight}

    def reference(self, job: Job) -> Any:
        """The frozen model; None where there is no divergence, or where the adapters are switched off for it."""
        if self.beta == 0:
            return None
        if job.reference is not None:
            return job.reference.model
        if not job.adapters:
            return copy.deepcopy(job.model).requires_grad_(False)
        probe = torch.arange(8, device=job.model.device)[None]
        with torch.no_grad():
            with job.model.disable_adapter():
                off = job.model(probe).logits
            if not torch.allclose(job.model(probe).logits, off, rtol=1e-3, atol=1e-3):
                raise SettingsError(
                    "The new adapters do not start from the model before tuning (their initialisation changes it), so "
                    "it is not there to hold to: name it as the reference, or set beta to 0."
                )
        return None


def _final(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What each dimension of a reward got in the last steps."""
    names = [name for name in (rows[-1] if rows else ()) if name.startswith(f"{DIMENSION}.")]
    found = {name.partition(".")[2]: on_trl.mean(rows, name, 10) for name in names}
    return {"final_rewards": found} if found else {}


def _order(count: int, length: int, seed: int) -> list[int]:
    """Which prompt comes when, for the whole run: one order of all of them after the other.

    TRL draws an order for every epoch from one generator, so a run that is resumed in the second gets another.
    """
    order: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    while len(order) < length:
        order += torch.randperm(count, generator=generator).tolist()
    return order[:length]
