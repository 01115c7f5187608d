"""transformers' Trainer with the loss of a token rule.

:class:`TokenLoss` is a set of overrides, as :class:`postlude.tuning.trainer.Resumable` is:

- the model runs once a micro-batch, up to the states that its head reads; only those that predict a learned token
  reach the head, piece by piece (``numerics.weighted_likelihood``).
- the denominator is counted over all micro-batches and ranks of an optimiser step.
- a step whose weights are all zero is left out, optimizer moments included, and counted.

The numbers of a step are read from the device once, before the optimizer moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler

from postlude.numerics.weighted_likelihood import TokenColumns
from postlude.surgery.head import LanguageHead
from postlude.tuning.batches import Plan, collate, model_inputs
from postlude.tuning.examples import Examples
from postlude.tuning.trainer import Resumable, autocasts
from postlude.tuning.weighting import StepStatistics, TargetTokens, TokenWeighting

if TYPE_CHECKING:
    from postlude.tuning.prior import Prior
    from postlude.tuning.reference import Reference

__all__ = ["Batches", "TokenLoss"]


class Batches(Dataset[dict[str, Tensor]]):
    """The micro-batches of a plan, made when they are asked for."""

    def __init__(
        self, examples: Examples, plan: Plan, columns: Mapping[str, Tensor] | None
    ) -> None:
        self.examples, self.plan, self.columns = examples, plan, columns

    def __len__(self) -> int:
        return len(self.plan.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return collate(self.examples, self.plan.batches[index], self.columns)


class TokenLoss(Resumable):
    """Overrides for supervised tuning by a token rule; call :meth:`weigh` beside :meth:`prepare`."""

    # The denominator is that of the whole step, so Trainer does not divide by the number of micro-batches.
    loss_is_scaled_for_ga = True

    def weigh(
        self,
        weighting: TokenWeighting,
        plan: Plan,
        head: LanguageHead,
        reference: Reference | None,
        prior: Prior | None,
    ) -> None:
        """Set up the loss.

        Args:
            weighting: rule, signal, denominator.
            plan: the micro-batches of the dataset.
            head: of the model.
            reference: to run beside it, if that is the signal.
            prior: whose columns are in the batches, if that is.
        """
        self._weighting, self._plan, self._head = weighting, plan, head
        self._batches = range(len(plan.batches))
        self._reference, self._prior = reference, prior
        self._precision = torch.bfloat16 if autocasts(self.model) else None
        self._sums: StepStatistics | None = None
        self._previous: StepStatistics | None = None
        self._numbers: dict[str, float] = {}
        self.skipped = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # The plan has shuffled the data; its order is what steps and denominators count on.
        return SequentialSampler(self._batches)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Micro-batches of one step, and the learned tokens of that step on all ranks."""
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        return batches, self._plan.targets[self.state.global_step]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The loss of a micro-batch, over the tokens of the whole step."""
        states = self._head.states(model, **model_inputs(inputs)).flatten(0, 1)
        hidden = states.index_select(0, inputs["predictors"])
        targets = inputs["targets"]
        tokens = TargetTokens(
            targets, torch.ones_like(targets, dtype=torch.bool), inputs["sequences"]
        )
        frozen: Any = None
        if self._reference is not None:
            frozen = self._reference(inputs)
        elif self._prior is not None:
            columns = {
                name.partition(".")[2]: value
                for name, value in inputs.items()
                if name.startswith("column.")
            }
            frozen = TokenColumns(**columns, top=self._prior.top)
        result = self._weighting(
            hidden,
            self._head.weight,
            tokens,
            bias=self._head.bias,
            reference=frozen,
            num_items=num_items_in_batch,
            previous=self._previous,
            precision=self._precision,
        )
        found = result.statistics
        self._sums = found if self._sums is None else self._sums + found
        # DistributedDataParallel averages gradients over ranks; the loss is a sum over them.
        return result.loss * self.args.world_size

    def _clip_grad_norm(self, model: Any) -> Any:
        sums, self._sums = self._sums, None
        if sums is None:
            raise RuntimeError("a step ended without a micro-batch; compute_loss was not called")
        if self.args.world_size > 1:
            torch.distributed.all_reduce(sums.values)
        if self._weighting.rescales:
            scale = sums.gradient_scale
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, scale.to(gradients[0].dtype))
        norm = super()._clip_grad_norm(model)  # type: ignore[misc]
        self._numbers = {
            "learning_rate": self.lr_scheduler.get_last_lr()[0],
            **sums.to_dict(),
            "gradient_norm": float(norm),
        }
        planned = self._plan.targets[self.state.global_step]
        if round(self._numbers["tokens"]) != planned:
            raise RuntimeError(
                f"step {self.state.global_step + 1} has {self._numbers['tokens']:.0f} learned tokens, planned were "
                f"{planned}: the Trainer has not kept the order of the batches"
            )
        self._refuse_not_finite(self._numbers)
        if sums.empty:
            # Without gradients the optimizer leaves weights and moments as they are.
            model.zero_grad(set_to_none=True)
            self.skipped += 1
        self._previous = sums
        return norm

    def _pace(self, row: dict[str, Any]) -> str:
        parts = len(self._plan.batches) // self._plan.steps
        last = self._plan.batches[(row["step"] - 1) * parts : row["step"] * parts]
        examples = sum(len(sequences) for rows in last for sequences in rows)
        return f"{examples / max(row['seconds'], 1e-6):.3g} examples/s"

    def _row(self) -> dict[str, Any]:
        step = self.state.global_step
        return {"epoch": round(self._plan.epochs[step - 1], 6), **self._numbers}

    def _own_state(self) -> dict[str, Any]:
        previous = None if self._previous is None else self._previous.values
        return {"previous": previous, "skipped": self.skipped}

    def _take_own_state(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"]
        values = state["previous"]
        if values is not None:
            self._previous = StepStatistics(values.to(self.args.device))
