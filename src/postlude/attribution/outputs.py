"""What is differentiated: functions of a batch, one number per example.

An output is made for a checkpoint and then called with batches. It returns, per example, the number whose gradient
is collected and the loss. A further output is a function with ``@output("name")``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from postlude.attribution.examples import Batch, Collection
from postlude.errors import UnknownNameError
from postlude.numerics.likelihood import token_log_probability
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.capture import device_of

__all__ = ["Output", "output", "output_function", "token_losses"]

Output = Callable[[Batch], tuple[Tensor, Tensor]]
Maker = Callable[[Checkpoint, Collection], Output]

_OUTPUTS: dict[str, Maker] = {}


def output(name: str) -> Callable[[Maker], Maker]:
    """Register a function that makes an output."""

    def register(maker: Maker) -> Maker:
        _OUTPUTS[name] = maker
        return maker

    return register


def output_function(name: str) -> Maker:
    """The output of that name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in _OUTPUTS:
        raise UnknownNameError("output", name, _OUTPUTS)
    return _OUTPUTS[name]


def token_losses(checkpoint: Checkpoint) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    """A function from a batch to ``losses [targets]`` in nats, differentiable, and the ``row [targets]`` of each.

    Padding is on the right and attention is causal, so padded tokens reach no other; no attention mask is passed,
    and the model takes its fastest path. No logits are kept.
    """
    model, anatomy = checkpoint.model, checkpoint.anatomy
    decoder, head = model.get_submodule(anatomy.decoder), model.get_submodule(anatomy.head)
    weight = (head.dense_weight() if hasattr(head, "dense_weight") else head.weight).detach()
    bias = getattr(head, "bias", None)
    device = device_of(model)

    def losses(batch: Batch) -> tuple[Tensor, Tensor]:
        ids, predicts = batch.ids.to(device), batch.predicts.to(device)
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
        chosen = hidden[:, :-1][predicts[:, 1:]]
        targets = ids[:, 1:][predicts[:, 1:]]
        rows = torch.arange(len(ids), device=device)[:, None].expand_as(ids)[:, 1:][predicts[:, 1:]]
        found = -token_log_probability(
            chosen, weight, targets, bias=None if bias is None else bias.detach()
        )
        return found, rows

    return losses


@output("loss")
def loss(checkpoint: Checkpoint, collection: Collection) -> Output:
    """Causal cross-entropy, summed (or averaged) over the predicted tokens of an example."""
    per_token = token_losses(checkpoint)

    def run(batch: Batch) -> tuple[Tensor, Tensor]:
        values, rows = per_token(batch)
        sums = values.new_zeros(len(batch)).index_add(0, rows, values)
        if collection.loss == "mean":
            sums = sums / batch.predicts.sum(1).to(sums)
        return sums, sums

    return run
