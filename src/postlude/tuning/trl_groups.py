"""GRPO on text: TRL's trainer samples, compares and learns.

What is added is the reference, which need not have been read from a path, and states that a killed run resumes from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from postlude.tuning import on_trl
from postlude.tuning.objective import Job
from postlude.tuning.prompts import Prompt, asked_with, text_of
from postlude.tuning.rewards import Reward
from postlude.tuning.trainer import arguments, joined

if TYPE_CHECKING:
    from postlude.tuning.reinforcement import GRPO

__all__ = ["Rollouts", "reinforce"]

_SHOWN = 4

# What TRL logs, under our names.
_NAMES = {
    "reward": "reward",
    "reward_std": "reward_std",
    "frac_reward_zero_std": "zero_variance_groups",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "completion_length",
    "completions/clipped_ratio": "truncated_completions",
    "clip_ratio/region_mean": "clipped_tokens",
}


def reinforce(
    job: Job,
    objective: GRPO,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    order: Sequence[int],
    steps: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train ``job.model``; see :meth:`postlude.tuning.reinforcement.GRPO.train`.

    Args:
        job: what to train, for how long.
        objective: the settings.
        prompts: lines of the data.
        rewards: functions and weights.
        order: which prompt comes when.
        steps: of the optimiser.

    Returns:
        One row for every step, and some of the last answers.
    """
    trl = on_trl.import_trl()
    run = job.run
    with on_trl.training(job):
        # Before TRL gives the model another forward, which a copy would share.
        reference = objective.reference(job)
        args = arguments(
            run,
            job.directory,
            job.model,
            steps,
            kind=trl.GRPOConfig,
            per_device_train_batch_size=run.batch_size,
            **on_trl.keep_activations(trl.GRPOConfig),
            disable_dropout=True,
            shuffle_dataset=False,
            num_generations=objective.generations,
            max_completion_length=objective.max_new_tokens,
            temperature=objective.temperature,
            num_iterations=objective.iterations,
            epsilon=objective.clip_ratio,
            scale_rewards="group" if objective.normalize else "none",
            loss_type=objective.loss_type,
            reward_weights=[reward.weight for reward in rewards],
        )
        trainer = _make_trainer(job, args, prompts, order, rewards)
        try:
            trainer.hold_to(reference, objective.beta)
            trainer.prepare(job.directory, job.progress)
            trainer.run()
        finally:
            if reference is not None:
                on_trl.unpatch(reference)
    return trainer.rows, trainer.samples()


class Rollouts(on_trl.OnTRL):
    """Overrides of TRL's GRPO trainer: a reference that was not read from a path, and states between generations."""

    names: ClassVar[Mapping[str, str]] = _NAMES

    # Of the trainer that this is joined with.
    _logs: Any
    _step: int
    beta: float
    temperature: float
    num_iterations: int

    def hold_to(self, reference: Any, beta: float) -> None:
        """Add ``beta`` times the divergence from a frozen model, or from the model without its adapters when None."""
        self.beta = beta
        if reference is not None:
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(reference, temperature=self.temperature)
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)

    def samples(self) -> list[dict[str, Any]]:
        """Some of the answers that were generated last."""
        texts = list(zip(self._logs["prompt"], self._logs["completion"], strict=True))
        rewards = [list(values) for values in self._logs["rewards"].values()]
        return [
            {
                "prompt": text_of(prompt),
                "completion": text_of(completion),
                "rewards": [values[index] for values in rewards],
            }
            for index, (prompt, completion) in enumerate(texts[:_SHOWN])
        ]

    def _due(self, step: int) -> bool:
        # Answers that are still to be learned from are not kept.
        return step % self.num_iterations == 0 and super()._due(step)

    def _own_state(self) -> dict[str, Any]:
        return {"step": self._step}

    def _take_own_state(self, state: dict[str, Any]) -> None:
        self._step = state["step"]


def _make_trainer(
    job: Job,
    args: Any,
    prompts: Sequence[Prompt],
    order: Sequence[int],
    rewards: Sequence[Reward],
) -> Any:
    from datasets import Dataset
    from trl import GRPOTrainer

    def scorer(reward: Reward) -> Callable[..., list[float]]:
        def score(completions: list[Any], row: list[int], **_: Any) -> list[float]:
            chosen = [prompts[index] for index in row]
            return reward([text_of(one) for one in completions], asked_with(chosen))

        score.__name__ = reward.name
        return score

    # Only the number of the row goes through TRL, so columns may hold anything.
    rows = [{"prompt": prompts[index].prompt, "row": index} for index in order]
    return joined(Rollouts, GRPOTrainer)(
        job.model,
        reward_funcs=[scorer(reward) for reward in rewards],
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=job.checkpoint.tokenizer,
    )
