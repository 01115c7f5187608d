"""Representation similarity: which training examples look alike inside the model.

    score(q, i) = cos(h(q), h(i)),    h = hidden states of one layer, of the last token or their mean over tokens

A control, not an explanation: it uses the model but not how it learned, and knows nothing of a loss. Whatever an
influence method adds must show beside it. Layers are numbered as transformers numbers hidden states: 0 are the
embeddings, ``i`` the output of block ``i - 1``, -1 the last block's; no norm after it. Which layer and pooling serve
best is to be found on a development set. Folklore.

Cost: one forward pass, ``hidden_size`` numbers an example; a query reads the index once.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from postlude.attribution.engine import Attributor
from postlude.attribution.examples import Batch, Collection, Example, batches
from postlude.attribution.explain import Parts
from postlude.attribution.formats import FORMATS
from postlude.attribution.index import Index
from postlude.attribution.queries import Queries, Scores
from postlude.attribution.representation import Recorder, Representation
from postlude.errors import SettingsError
from postlude.registry import method
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.progress import Progress
from postlude.surgery.capture import observe
from postlude.surgery.gradients import CollectedLayer

__all__ = ["HiddenRepresentation", "RepSim"]


@dataclasses.dataclass(frozen=True)
class HiddenRepresentation(Representation):
    """One hidden state of an example.

    Attributes:
        layer: 0 the embeddings, ``i`` the output of block ``i - 1``; negative from the end.
        pooling: ``mean`` over tokens, or the ``last``.
        format: of the stored numbers.
    """

    kind = "hidden"
    layer: int = -1
    pooling: Literal["mean", "last"] = "mean"
    format: str = "bf16"

    @contextlib.contextmanager
    def recorder(self, checkpoint: Checkpoint, collection: Collection) -> Iterator[Recorder]:
        stored = FORMATS[self.format]

        def record(batch: Batch) -> dict[str, Tensor]:
            states = self.states(checkpoint, batch)
            if self.pooling == "mean":
                mask = batch.mask.to(states.device)[..., None]
                pooled = (states * mask).sum(1) / batch.lengths.to(states)[:, None]
            else:
                last = batch.lengths.to(states.device) - 1
                pooled = states[torch.arange(len(batch), device=states.device), last]
            return {f"hidden{key}": x for key, x in stored.encode(pooled[:, None]).items()}

        yield record

    def states(self, checkpoint: Checkpoint, batch: Batch) -> Tensor:
        """fp32 ``[rows, tokens, hidden_size]`` of the layer."""
        count = len(checkpoint.anatomy.blocks) + 1
        if not -count <= self.layer < count:
            raise SettingsError(
                f"layer is {self.layer}; this model has the hidden states 0 (embeddings) to {count - 1}"
            )
        wanted = self.layer % count - 1
        found: list[Tensor] = []

        def look(index: int, states: Tensor) -> None:
            if index == wanted:
                found.append(states.float())

        # Padding is on the right and attention causal: no token sees it.
        observe(checkpoint.model, checkpoint.anatomy, [batch.ids], {}, residual=look)
        return found[0]

    def row_bytes(self, layers: Sequence[CollectedLayer]) -> int:
        raise SettingsError("the size of hidden states is that of the model, not of layers")

    def full_precision(self) -> HiddenRepresentation:
        return dataclasses.replace(self, format="fp32")


@method("attribute", "repsim", family="control", needs=("hidden states",))
@dataclasses.dataclass(frozen=True)
class RepSim(Attributor):
    """Cosine of hidden states: a control that knows no loss.

    Attributes:
        layer: 0 the embeddings, ``i`` the output of block ``i - 1``; negative from the end.
        pooling: ``mean`` over tokens, or the ``last``.
        format: of the stored numbers: fp32, bf16 or int8.
    """

    layer: int = -1
    pooling: Literal["mean", "last"] = "mean"
    format: Literal["fp32", "bf16", "int8"] = "bf16"

    def __post_init__(self) -> None:
        if self.pooling not in ("mean", "last"):
            raise SettingsError(f"repsim: pooling is {self.pooling!r}; expected mean or last")
        if self.format not in FORMATS:
            raise SettingsError(f"repsim: format is {self.format!r}; expected {', '.join(FORMATS)}")

    def representation(self) -> HiddenRepresentation:
        return HiddenRepresentation(self.layer, self.pooling, self.format)

    def score(
        self,
        index: Index,
        queries: Queries,
        *,
        per_layer: bool = False,
        keep: bool = False,
        progress: Progress | None = None,
    ) -> Scores:
        self.check(index)
        asked = _unit_rows(queries.tensors["hidden"][:, 0])
        parts = []
        for shard in index.store.shards:
            stored = {key: shard.tensor(key) for key in shard.names() if key.startswith("hidden")}
            rows = FORMATS[self.format].decode(
                lambda key, stored=stored: stored[f"hidden{key}"],  # type: ignore[misc]
                0,
                len(shard),
            )
            parts.append(asked @ _unit_rows(rows[:, 0]).mT)
        return Scores(torch.cat(parts, 1))

    def explain(
        self,
        index: Index,
        queries: Queries,
        pairs: Sequence[tuple[int, int]],
        train: Sequence[Example],
        *,
        tokens: bool = False,
        keep: bool = False,
    ) -> list[Parts]:
        # A mean is a sum over tokens; the state of the last token is no sum of anything.
        if not tokens or self.pooling != "mean":
            return [Parts() for _ in pairs]
        asked = sorted({q for q, _ in pairs})
        states = self._token_states(queries.checkpoint, [queries.examples[q] for q in asked], index)
        of_query = dict(zip(asked, states, strict=True))
        found = []
        of_train = self._token_states(queries.checkpoint, train, index)
        for (q, _), theirs in zip(pairs, of_train, strict=True):
            ours = of_query[q]
            a, b = ours.mean(0), theirs.mean(0)
            norm = a.norm() * b.norm()
            found.append(
                Parts(None, theirs @ a / (len(theirs) * norm), ours @ b / (len(ours) * norm))
            )
        return found

    def _token_states(
        self, checkpoint: Checkpoint, examples: Sequence[Example], index: Index
    ) -> list[Tensor]:
        found: list[Tensor] = [torch.empty(0)] * len(examples)
        for batch in batches(examples, index.collection.tokens_per_batch):
            states = self.representation().states(checkpoint, batch).double().cpu()
            for at, row in enumerate(batch.rows):
                found[row] = states[at, : int(batch.lengths[at])]
        return found

    @property
    def unit(self) -> str:
        return "cosine"


def _unit_rows(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
