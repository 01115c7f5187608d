"""EK-FAC influence: the curvature of the whole gradient, without projection and without an index of gradients.

    score(q, i) = sum over layers of  <(H + lam)^-1 G_q, G_i>,     G [in_features, out_features], unprojected

with ``H`` in Kronecker factors whose eigenvalues are corrected (:mod:`postlude.numerics.kronecker`). The factors
come from the Fisher matrix: gradients of the loss of labels that the **model** draws, not of those in the data
(``fisher="empirical"`` takes the latter). Two passes over the data fit them: one for ``A`` and ``S``, one for
``Lambda`` in their eigenvectors. Factors are kept in the index; gradients are not, so every query is a pass over
the training data that computes them again. Slow to ask, and the most faithful of the methods here where the layers
are small: the reference to judge others by.

Paper: arXiv:2308.03296 (Grosse et al., influence functions for large language models), with the eigenvalues of
arXiv:1806.03884. Differs: biases are left out (a layer's bias is a column of ones in the paper's ``A``); the
default damping is a tenth of the mean eigenvalue of each layer, as in the paper, not a constant.

Cost: fitting, three passes over ``fit_examples`` and one eigendecomposition of each side of every layer,
``4 (I^2 + O^2 + I O)`` bytes a layer; a query, one pass over all of the training data, in which each example costs
``2 I O`` operations a query and layer, or ``2 rank (I + O)`` a token with ``query_rank``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from postlude.attribution.engine import Attributor, kept_fits
from postlude.attribution.examples import Batch, Collection, Example, batches
from postlude.attribution.explain import Factors, Parts, token_parts
from postlude.attribution.index import Index
from postlude.attribution.kronecker_factors import Numbered, drawn_losses, eigenvalues, moments
from postlude.attribution.outputs import output_function
from postlude.attribution.queries import Queries, Scores, record_rows
from postlude.attribution.representation import (
    DenseRepresentation,
    Recorder,
    Representation,
)
from postlude.errors import SettingsError
from postlude.numerics.kronecker import KroneckerBasis, KroneckerCurvature, low_rank
from postlude.registry import method
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.progress import Progress, Task
from postlude.surgery.gradients import (
    CollectedLayer,
    GradientCollector,
    Projection,
    linear_paths,
)

__all__ = ["EKFAC", "NoRows"]

_WHOLE = DenseRepresentation(factor=1, format="fp32")


@dataclasses.dataclass(frozen=True)
class NoRows(Representation):
    """Nothing is kept of a training example; queries are whole gradients."""

    kind = "nothing"

    @contextlib.contextmanager
    def recorder(self, checkpoint: Checkpoint, collection: Collection) -> Iterator[Recorder]:
        yield lambda batch: {}

    def row_bytes(self, layers: Sequence[CollectedLayer]) -> int:
        return 0

    def layers(self, checkpoint: Checkpoint, collection: Collection) -> tuple[CollectedLayer, ...]:
        return _WHOLE.layers(checkpoint, collection)

    def full_precision(self) -> DenseRepresentation:
        return _WHOLE


@method("attribute", "ekfac", family="influence", paper="arXiv:2308.03296", needs=("gradients",))
@dataclasses.dataclass(frozen=True)
class EKFAC(Attributor):
    """Whole gradients with Kronecker-factored curvature; slow to ask, the reference for others.

    Attributes:
        damping: added to every eigenvalue; none for a tenth of a layer's mean eigenvalue.
        fisher: ``true`` takes labels that the model draws, ``empirical`` those of the data.
        query_rank: rank that preconditioned query gradients are cut to, for speed; 0 keeps them whole.
        fit_examples: training examples that the factors come from, drawn at random; 0 for all.
    """

    damping: float | None = None
    fisher: Literal["true", "empirical"] = "true"
    query_rank: int = 0
    fit_examples: int = 0

    def __post_init__(self) -> None:
        if self.damping is not None and not 0 <= self.damping < math.inf:
            raise SettingsError(f"ekfac: damping is {self.damping}; expected none, or from 0")
        if self.fisher not in ("true", "empirical"):
            raise SettingsError(f"ekfac: fisher is {self.fisher!r}; expected true or empirical")
        for name in ("query_rank", "fit_examples"):
            if getattr(self, name) < 0:
                raise SettingsError(f"ekfac: {name} is {getattr(self, name)}; expected from 0")

    def representation(self) -> NoRows:
        return NoRows()

    def reads(self, representation: Representation) -> bool:
        # The training data are read again, so any index will do that knows them.
        return True

    def prepare(
        self, index: Index, checkpoint: Checkpoint, progress: Progress | None = None
    ) -> None:
        for _ in self._fits(index, checkpoint, progress):
            pass

    def score(
        self,
        index: Index,
        queries: Queries,
        *,
        per_layer: bool = False,
        keep: bool = False,
        progress: Progress | None = None,
    ) -> Scores:
        checkpoint = queries.checkpoint
        asked = self._queries(index, queries)
        factors: dict[str, Factors] = {}
        for path, curvature in self._fits(index, checkpoint, progress):
            matrices = curvature.precondition(asked[path])
            narrow = 0 < self.query_rank < min(matrices.shape[-2:])
            factors[path] = low_rank(matrices, self.query_rank) if narrow else (matrices, None)
        parts = {path: torch.zeros(len(queries), len(index)) for path in factors}
        whole = {path: one for path, (one, right) in factors.items() if right is None}
        narrowed = {path: (a, b) for path, (a, b) in factors.items() if b is not None}
        with progress or Progress(show=False) as shown:
            task = shown.task("gradients of the training examples", total=len(index))
            # Whole matrices meet whole gradients; factors meet what gradients are made of, token by token.
            for paths, projection in (
                (list(whole), Projection()),
                (list(narrowed), Projection(side=1)),
            ):
                if paths:
                    self._pass(index, checkpoint, paths, projection, whole, narrowed, parts, task)
            task.close()
        total = torch.stack(list(parts.values())).sum(0)
        return Scores(total, parts if per_layer else None)

    def _pass(
        self,
        index: Index,
        checkpoint: Checkpoint,
        paths: list[str],
        projection: Projection,
        whole: dict[str, Tensor],
        narrowed: dict[str, tuple[Tensor, Tensor]],
        parts: dict[str, Tensor],
        task: Task,
    ) -> None:
        """Scores of all training examples at some layers, into ``parts``."""
        output = output_function(_WHOLE.output)(checkpoint, index.collection)
        with GradientCollector(checkpoint.model, paths, projection) as collector:
            for batch, numbers in _numbered(index, checkpoint, range(len(index))):

                def meet(
                    layer: CollectedLayer, gradients: Tensor, numbers: list[int] = numbers
                ) -> None:
                    if layer.module in whole:
                        matrices = whole[layer.module].flatten(1).to(gradients)
                        found = matrices @ gradients.flatten(1).mT
                        parts[layer.module][:, numbers] = found.float().cpu()

                def observe(
                    layer: CollectedLayer, x: Tensor, dy: Tensor, numbers: list[int] = numbers
                ) -> None:
                    u, v = (one.to(x.device) for one in narrowed[layer.module])
                    reads = torch.einsum("nti,qir->qntr", x.float(), u)
                    writes = torch.einsum("nto,qor->qntr", dy.float(), v)
                    parts[layer.module][:, numbers] += (reads * writes).sum((2, 3)).cpu()

                collector.collect(
                    lambda batch=batch: output(batch)[0].sum(),  # type: ignore[misc]
                    len(batch),
                    meet,
                    observer=observe if paths[0] in narrowed else None,
                )
                task.advance(len(batch))

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
        checkpoint = queries.checkpoint
        with _WHOLE.recorder(checkpoint, index.collection) as record:
            rows = record_rows(record, train, index.collection.tokens_per_batch)
        asked = self._queries(index, queries)
        of_train: list[dict[str, Factors]] = [{} for _ in pairs]
        of_query: list[dict[str, Factors]] = [{} for _ in pairs]
        for path, curvature in self._fits(index, checkpoint):
            gradients = rows[f"{path}/g"]
            for at, (q, _) in enumerate(pairs):
                of_train[at][path] = curvature.precondition(asked[path][q]), None
                weighed = queries.weight(path) * curvature.precondition(gradients[at])
                of_query[at][path] = weighed, None
        collection = index.collection
        ours = token_parts(checkpoint, collection, _WHOLE, train, [[one] for one in of_train])
        if not tokens:
            return [Parts(found[0][1]) for found in ours]
        examples = [queries.examples[q] for q, _ in pairs]
        theirs = token_parts(checkpoint, collection, _WHOLE, examples, [[one] for one in of_query])
        return [
            Parts(one[0][1], one[0][0], other[0][0])
            for one, other in zip(ours, theirs, strict=True)
        ]

    def _queries(self, index: Index, queries: Queries) -> dict[str, Tensor]:
        """Whole gradients of queries by layer, times its weight.

        They are recorded now if an index of another method recorded them projected.
        """
        if queries.representation == _WHOLE:
            return {
                layer.module: queries.weight(layer.module) * queries.rows(layer).dense()
                for layer in queries.layers
            }
        with _WHOLE.recorder(queries.checkpoint, index.collection) as record:
            tensors = record_rows(record, queries.examples, index.collection.tokens_per_batch)
        whole = {
            name.removesuffix("/g"): one for name, one in tensors.items() if name.endswith("/g")
        }
        return {path: queries.weight(path) * one for path, one in whole.items()}

    def _fits(
        self, index: Index, checkpoint: Checkpoint, progress: Progress | None = None
    ) -> Iterator[tuple[str, KroneckerCurvature]]:
        """The curvature of every layer, from what an earlier call kept in the index's folder."""
        index.check_model(checkpoint)
        paths = linear_paths(checkpoint.anatomy, index.collection.patterns)
        chosen = self._fit_numbers(index)
        settings = {"fisher": self.fisher, "fit_examples": self.fit_examples}
        run = kept_fits(index, "ekfac", settings)
        if self.fisher == "true":
            loss = drawn_losses(checkpoint, index.collection)
        else:
            output = output_function(_WHOLE.output)(checkpoint, index.collection)

            def loss(batch: Batch, numbers: list[int]) -> Tensor:
                return output(batch)[0].sum()

        def data(name: str) -> Iterator[Numbered]:
            with progress or Progress(show=False) as shown:
                task = shown.task(name, total=len(chosen))
                for batch, numbers in _numbered(index, checkpoint, chosen):
                    yield batch, numbers
                    task.advance(len(batch))
                task.close()

        def fit_bases() -> dict[str, Tensor]:
            sums = moments(checkpoint, paths, data("moments of inputs and gradients"), loss)
            found = {}
            for path, (a, s) in sums.items():
                basis = KroneckerBasis.of(a, s)
                found[f"{path}/in"], found[f"{path}/out"] = basis.inputs, basis.outputs
            return found

        stored = run.unit("bases", fit_bases)
        bases = {
            path: KroneckerBasis(stored[f"{path}/in"], stored[f"{path}/out"]) for path in paths
        }
        values = run.unit(
            "eigenvalues", lambda: eigenvalues(checkpoint, bases, data("eigenvalues"), loss)
        )
        for path in paths:
            yield path, KroneckerCurvature.of(bases[path], values[path].float(), self.damping)

    def _fit_numbers(self, index: Index) -> list[int]:
        if not 0 < self.fit_examples < len(index):
            return list(range(len(index)))
        generator = torch.Generator().manual_seed(index.collection.seed)
        drawn = torch.randperm(len(index), generator=generator)[: self.fit_examples]
        return sorted(drawn.tolist())


def _numbered(index: Index, checkpoint: Checkpoint, numbers: Sequence[int]) -> Iterator[Numbered]:
    """Batches of some training examples, in order, with the number of every row."""
    records, collection = index.records(), index.collection
    for first in range(0, len(numbers), collection.shard_examples):
        some = numbers[first : first + collection.shard_examples]
        examples = [records.examples(checkpoint, collection, n, n + 1)[0] for n in some]
        for batch in batches(examples, collection.tokens_per_batch):
            yield batch, [some[row] for row in batch.rows]
