"""TRAK: influence in the linear model that the gradients of the output span.

    f(z) = sum over predicted tokens of log(p / (1 - p))            log-odds of the right token
    phi(z) = projected gradient of f
    score(q, i) = phi(q)^T (Phi^T Phi + lam)^-1 phi(i)  *  (1 - p_i)

``1 - p_i``, the mean over the predicted tokens of example ``i``, is what its loss still pulls with: an example that
is already predicted teaches nothing more. Of a denoiser ``f`` is the loss, and there is no such factor. With several
models trained alike, the kernels and the factors
``1 - p_i`` are averaged each, and then multiplied (:func:`ensemble`).

Paper: TRAK (arXiv:2303.14186), whose code has no output function for language models; the sum over tokens is our
choice. Differs: the paper projects the gradient of all parameters at once with one dense random matrix, to one vector;
here every layer is projected on both sides and has a kernel of its own, so products between layers are left out,
and biases, norms and embeddings with them. The paper's ``lam`` is 0, which needs more examples than dimensions; here
it is ``damping * trace / D``. The scale of ``phi`` by the number of parameters is left out.

Cost: as LoGRA.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from postlude.attribution.examples import Batch, Collection
from postlude.attribution.index import Index
from postlude.attribution.logra import LoGRA
from postlude.attribution.outputs import Output, output, token_losses
from postlude.attribution.queries import Queries
from postlude.attribution.representation import DenseRepresentation, Recorder
from postlude.errors import SettingsError
from postlude.registry import method
from postlude.runs.checkpoint import Checkpoint

__all__ = ["TRAK", "TrakRepresentation", "ensemble"]


@output("log-odds")
def log_odds(checkpoint: Checkpoint, collection: Collection) -> Output:
    """Log-odds of the right tokens, summed (or averaged); beside it the mean of ``1 - p``, where others have a loss."""
    per_token = token_losses(checkpoint)

    def run(batch: Batch) -> tuple[Tensor, Tensor]:
        losses, rows = per_token(batch)
        # log(1 - p) of a token that is certain is minus infinity, and its gradient has no direction.
        missing = (-torch.expm1(-losses)).clamp(min=torch.finfo(losses.dtype).eps)
        zeros = losses.new_zeros(len(batch))
        odds = zeros.index_add(0, rows, -losses - missing.log())
        counts = batch.predicts.sum(1).to(zeros)
        if collection.loss == "mean":
            odds = odds / counts
        return odds, zeros.index_add(0, rows, missing.detach()) / counts

    return run


@dataclasses.dataclass(frozen=True)
class TrakRepresentation(DenseRepresentation):
    """Projected gradients of the log-odds, and the mean of ``1 - p``."""

    kind = "trak"
    output: str = "log-odds"

    @contextlib.contextmanager
    def recorder(self, checkpoint: Checkpoint, collection: Collection) -> Iterator[Recorder]:
        with super().recorder(checkpoint, collection) as record:

            def run(batch: Batch) -> dict[str, Tensor]:
                rows = record(batch)
                rows["missing"] = rows.pop("loss")
                return rows

            yield run


@method("attribute", "trak", family="influence", paper="arXiv:2303.14186", needs=("gradients",))
@dataclasses.dataclass(frozen=True)
class TRAK(LoGRA):
    """Influence in the linear model of the log-odds, weighted by what is not yet learned.

    Attributes:
        side: width of both sides of a projected gradient; narrower sides stay as they are.
        format: of the stored numbers: fp32, bf16 or int8.
        damping: multiplier of ``trace / D``.
        curvature: ``auto``, ``dual`` or ``exact``, which give the same numbers.
    """

    def representation(self) -> TrakRepresentation:
        return TrakRepresentation(side=self.side, format=self.format)

    def weights(self, index: Index, queries: Queries) -> tuple[Tensor, Tensor]:
        """``1 - p`` of the training examples."""
        return torch.ones(len(queries)), missing(index)

    def meaning(self, noun: str) -> str:
        if noun != "text":
            return super().meaning(noun)
        return (
            "A score estimates, from gradients, how much having learned the example raises the log-odds of the tokens "
            "of the text. The higher, the more; below zero it lowered them."
        )


def missing(index: Index) -> Tensor:
    """``[examples]``, the mean over predicted tokens of ``1 - p``."""
    return index.cached("missing", lambda one: one.tensor("missing").double())


def ensemble(method: TRAK, members: Sequence[tuple[Index, Queries]]) -> Tensor:
    """Scores of several models trained alike: mean kernel times mean ``1 - p``.

    Args:
        method: the settings.
        members: for every model its index over the same examples, and the queries recorded with it.

    Returns:
        fp32 ``[queries, examples]``.

    Raises:
        SettingsError: no members, or indices over different examples.
    """
    hashes = {index.manifest["data"]["hash"] for index, _ in members}
    if len(hashes) != 1:
        raise SettingsError(
            f"an ensemble takes one index or more over the same examples, got {len(members)} over {len(hashes)} sets"
        )
    kernel, factor = torch.zeros(()), torch.zeros((), dtype=torch.float64)
    for index, queries in members:
        own = missing(index).clamp(min=torch.finfo(torch.float32).tiny)
        kernel = kernel + method.score(index, queries).total.double() / own
        factor = factor + own
    return (kernel / len(members) * (factor / len(members))).float()
