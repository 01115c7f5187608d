"""What is differentiated: functions of a batch, one number per example.

An output is made for a checkpoint and then called with batches. It returns the number whose gradient is collected,
one per example or their sum, and the loss ``[examples]``. A further output is a function with ``@output("name")``; one
name can stand for a function of each kind of model (:mod:`postlude.attribution.denoising` has those of denoisers).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from postlude.attribution.examples import Batch, Collection
from postlude.errors import SettingsError, UnknownNameError
from postlude.numerics.likelihood import token_log_probability
from postlude.numerics.weighted_likelihood import weighted_cross_entropy
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.batches import device_of

__all__ = [
    "Maker",
    "Output",
    "Predictions",
    "check_output",
    "output",
    "output_function",
    "predictions",
    "token_losses",
]

Output = Callable[[Any], tuple[Tensor, Tensor]]
Maker = Callable[[Checkpoint, Collection], Output]

_OUTPUTS: dict[str, dict[str, Maker]] = {}


def output(name: str, kind: str = "language") -> Callable[[Maker], Maker]:
    """Register a function that makes an output for models of a kind."""

    def register(maker: Maker) -> Maker:
        _OUTPUTS.setdefault(name, {})[kind] = maker
        return maker

    return register


def check_output(name: str) -> None:
    """Refuse a name that no output has.

    Raises:
        UnknownNameError: it says which there are.
    """
    if name not in _known():
        raise UnknownNameError("output", name, _known())


def output_function(name: str, kind: str = "language") -> Maker:
    """The output of that name for models of a kind.

    Raises:
        UnknownNameError: there is none.
        SettingsError: not for that kind of model.
    """
    check_output(name)
    makers = _known()[name]
    if kind not in makers:
        raise SettingsError(
            f"the output {name!r} is of {' and '.join(makers)} models, and this is a {kind} model: choose another "
            "method"
        )
    return makers[kind]


def _known() -> dict[str, dict[str, Maker]]:
    importlib.import_module("postlude.attribution.denoising")
    return _OUTPUTS


class Predictions(NamedTuple):
    """The predicted tokens of a batch, row after row.

    Attributes:
        hidden: ``[targets, hidden_size]``, the states that predict them, differentiable.
        targets: ``[targets]`` token ids.
        rows: ``[targets]``, the example of each.
        weight, bias: of the head, detached.
    """

    hidden: Tensor
    targets: Tensor
    rows: Tensor
    weight: Tensor
    bias: Tensor | None


def predictions(checkpoint: Checkpoint) -> Callable[[Batch], Predictions]:
    """A function that runs a batch through the model up to its head.

    Padding is on the right and attention is causal, so padded tokens reach no other; no attention mask is passed,
    and the model takes its fastest path.
    """
    model, anatomy = checkpoint.model, checkpoint.language
    decoder, head = model.get_submodule(anatomy.decoder), model.get_submodule(anatomy.head)
    weight = (head.dense_weight() if hasattr(head, "dense_weight") else head.weight).detach()
    bias = getattr(head, "bias", None)
    bias = None if bias is None else bias.detach()
    device = device_of(model)

    def run(batch: Batch) -> Predictions:
        ids, predicts = batch.ids.to(device), batch.predicts.to(device)[:, 1:]
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][predicts]
        rows = torch.arange(len(ids), device=device)[:, None].expand_as(predicts)[predicts]
        return Predictions(hidden, ids[:, 1:][predicts], rows, weight, bias)

    return run


def token_losses(checkpoint: Checkpoint) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    """A function from a batch to ``losses [targets]`` in nats, differentiable, and the ``row [targets]`` of each.

    No logits are kept: they are formed again in the backward pass.
    """
    predict = predictions(checkpoint)

    def losses(batch: Batch) -> tuple[Tensor, Tensor]:
        found = predict(batch)
        log_p = token_log_probability(found.hidden, found.weight, found.targets, bias=found.bias)
        return -log_p, found.rows

    return losses


@output("loss")
def loss(checkpoint: Checkpoint, collection: Collection) -> Output:
    """Causal cross-entropy, summed (or averaged) over the predicted tokens of an example."""
    predict = predictions(checkpoint)

    def run(batch: Batch) -> tuple[Tensor, Tensor]:
        found = predict(batch)
        counts = batch.predicts.sum(1).to(found.hidden.device, torch.float32)
        share = torch.ones_like(counts) if collection.loss == "sum" else 1 / counts
        # One pass over the logits gives the sum and its gradient.
        result = weighted_cross_entropy(
            found.hidden, found.weight, found.targets, share[found.rows], bias=found.bias
        )
        losses = -result.log_probability * share[found.rows].to(result.log_probability)
        return result.total, losses.new_zeros(len(batch)).index_add(0, found.rows, losses)

    return run
