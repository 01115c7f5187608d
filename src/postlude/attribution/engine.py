"""One scoring engine: what is kept of an example, times curvature.

An attribution method is a settings class, a subclass of :class:`Attributor`. It says what it keeps of an example
(:meth:`Attributor.representation`) and how queries are scored against an index that keeps just that
(:meth:`Attributor.score`). Methods whose representations are equal share an index: an index built for LoRIF answers
GradDot, and every damping, without another pass over the data.

:class:`InfluenceAttributor` is the engine of all that score by gradients: the score is a sum over layers, one
layer at a time is fitted, scored and dropped.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from postlude import registry
from postlude.attribution.curvature import (
    Choice,
    CurvatureSettings,
    LayerCurvature,
    Plain,
)
from postlude.attribution.explain import Parts, influence_parts
from postlude.attribution.index import Index, LayerSource
from postlude.attribution.queries import Queries, Scores
from postlude.attribution.representation import GradientRepresentation, Representation
from postlude.attribution.rows import Rows
from postlude.errors import SettingsError
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.directory import RunDirectory
from postlude.runs.progress import Progress
from postlude.surgery.gradients import CollectedLayer

__all__ = [
    "Attributor",
    "InfluenceAttributor",
    "kept_fits",
]

# What a kept curvature may take where the index is smaller.
_KEPT_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Attributor(ABC):
    """Base of the settings of every attribution method."""

    # Kinds of models that it works on.
    kinds: ClassVar[tuple[str, ...]] = ("language",)

    def check_model(self, checkpoint: Checkpoint) -> None:
        """Refuse a model of a kind that this method does not work on.

        Raises:
            SettingsError: names methods that do.
        """
        if checkpoint.kind in self.kinds:
            return
        others = [
            info.name
            for info in registry.available("attribute")
            if checkpoint.kind in info.settings().kinds
        ]
        raise SettingsError(
            f"{self.name} attributes {' and '.join(self.kinds)} models, and "
            f"{checkpoint.path or 'this checkpoint'} is a {checkpoint.kind} model; "
            + (f"methods for it: {', '.join(others)}" if others else "no method is for those")
        )

    @abstractmethod
    def representation(self) -> Representation:
        """What an index for this method keeps."""

    @abstractmethod
    def score(
        self,
        index: Index,
        queries: Queries,
        *,
        per_layer: bool = False,
        keep: bool = False,
        progress: Progress | None = None,
    ) -> Scores:
        """Score every example of an index for every query.

        Args:
            index: that keeps this method's representation.
            queries: recorded for that index, see :func:`record_queries`.
            per_layer: also return the part of every layer.
            keep: keep what was fitted to the index beside it, so that the next call reads the index once; unless
                that is more than the index and more than 1 GiB.
            progress: where to show it.
        """

    def explain(
        self,
        index: Index,
        queries: Queries,
        pairs: Sequence[tuple[int, int]],
        train: Sequence[Any],
        *,
        tokens: bool = False,
        keep: bool = False,
    ) -> list[Parts]:
        """The parts of single scores, by layer and by token; none where a method has no such parts.

        Args:
            index, queries: as for :meth:`score`.
            pairs: ``(query, example number)`` of each score.
            train: the training examples of the pairs, tokenized.
            tokens: also by token, which runs the model on the examples again.
            keep: as for :meth:`score`.
        """
        return [Parts() for _ in pairs]

    def prepare(  # noqa: B027 - most methods need nothing beside the rows
        self, index: Index, checkpoint: Checkpoint, progress: Progress | None = None
    ) -> None:
        """Make what queries need beside the rows; called at the end of a build, and safe to call again."""

    @property
    def unit(self) -> str:
        """What a score is measured in."""
        return "influence"

    def meaning(self, noun: str) -> str:
        """What a score says, a sentence or two for people, of a query that is a ``noun``: text or image."""
        return (
            "A score estimates, from gradients, how much having learned the example lowers the model's loss on the "
            f"{noun}. The higher, the more; below zero it raised it."
        )

    @property
    def name(self) -> str:
        return registry.info_of(self).name

    def check(self, index: Index) -> None:
        """Refuse an index that keeps something else.

        Raises:
            SettingsError: another method's index (says which methods it can answer), or other settings (names each).
        """
        ours, theirs = self.representation(), index.representation
        if self.reads(theirs):
            return
        built = index.manifest["method"]["name"]
        if built != self.name:
            others = [
                info.name
                for info in registry.available("attribute")
                if info.name != built and info.settings().reads(theirs)
            ]
            raise SettingsError(
                f"{index.path} was built for {built} and can answer: {', '.join([built, *others])}; for {self.name} "
                f"build its own: postlude attribute build CHECKPOINT DATA -o OTHER_INDEX --method {self.name}"
            )
        mine, found = ours.to_dict(), theirs.to_dict()
        different = [
            f"{key} {found.get(key)} (asked for {mine.get(key)})"
            for key in sorted(mine.keys() | found.keys())
            if mine.get(key) != found.get(key)
        ]
        raise SettingsError(
            f"{index.path} was built for {built} with other settings: {', '.join(different)}. What an index keeps "
            "cannot be changed by a query: ask without them, or build another index."
        )

    def reads(self, representation: Representation) -> bool:
        """Whether this method can score from an index that keeps ``representation``."""
        return self.representation() == representation


@dataclasses.dataclass(frozen=True)
class InfluenceAttributor(Attributor):
    """Base of the methods that score by gradients: a curvature per layer, and the sum over layers."""

    kinds: ClassVar[tuple[str, ...]] = ("language", "diffusion")

    def chosen_curvature(
        self, index: Index
    ) -> tuple[type[LayerCurvature], CurvatureSettings, Choice | None]:
        """Which curvature to fit to an index, with which settings; none by default."""
        return Plain, CurvatureSettings(), None

    def weights(self, index: Index, queries: Queries) -> tuple[Tensor, Tensor] | None:
        """Factors ``[queries]`` and ``[examples]`` on scores, for methods that scale them; none by default."""
        return None

    def layer_factors(
        self, index: Index, layer: CollectedLayer, fitted: LayerCurvature, source: LayerSource
    ) -> Tensor | None:
        """Factors ``[examples]`` on the part of one layer, for methods that correct it; none by default."""
        return None

    def layer_scores(
        self, index: Index, queries: Queries, *, keep: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """``(module path, [queries, examples])``, layer by layer."""
        weights = self.weights(index, queries)
        for layer, fitted, source in self.fits(index, keep=keep):
            scores = fitted.scores(self.query_rows(index, queries, layer), source)
            factors = self.layer_factors(index, layer, fitted, source)
            if factors is not None:
                scores = scores * factors.to(scores)
            if weights is not None:
                scores = weights[0][:, None].to(scores) * scores * weights[1].to(scores)
            yield layer.module, scores

    def query_rows(self, index: Index, queries: Queries, layer: CollectedLayer) -> Rows:
        """Query gradients of a layer, times its weight, in the precision of scoring."""
        rows = queries.rows(layer)
        _, settings, _ = self.chosen_curvature(index)
        rows = rows.double() if settings.precision == torch.float64 else rows
        return rows if queries.weights is None else rows.scaled(queries.weight(layer.module))

    def explain(
        self,
        index: Index,
        queries: Queries,
        pairs: Sequence[tuple[int, int]],
        train: Sequence[Any],
        *,
        tokens: bool = False,
        keep: bool = False,
    ) -> list[Parts]:
        representation = queries.representation
        if not isinstance(representation, GradientRepresentation):
            raise SettingsError(f"{representation.kind!r} has no gradients of layers")
        return influence_parts(
            queries.checkpoint,
            index.collection,
            representation,
            queries.examples,
            train,
            pairs,
            (
                (
                    layer,
                    fitted,
                    source,
                    self.query_rows(index, queries, layer),
                    self.layer_factors(index, layer, fitted, source),
                )
                for layer, fitted, source in self.fits(index, keep=keep)
            ),
            self.weights(index, queries),
            queries.weight,
            tokens=tokens,
        )

    def taken(self, index: Index, *, keep: bool = False) -> str:
        """Which curvature scoring takes, and whether an earlier call kept it, in a line for people."""
        kind, settings, _ = self.chosen_curvature(index)
        run = self._kept(index, kind, settings) if keep else None
        stored = set() if run is None else set(run.finished())
        there = all(_unit(layer.module) in stored for layer in index.layers)
        return f"curvature: {kind.name}, {'read from the index' if there else 'fitted now'}"

    def fits(
        self, index: Index, *, keep: bool = False
    ) -> Iterator[tuple[CollectedLayer, LayerCurvature, LayerSource]]:
        """The curvature of every layer, one at a time, with the rows it was fitted to."""
        kind, settings, _ = self.chosen_curvature(index)
        run = self._kept(index, kind, settings) if keep else None
        for layer in index.layers:
            source = index.layer(layer.module)
            if run is None:
                fitted = kind.fit(source, settings)
            else:
                fit = functools.partial(kind.fit, source, settings)
                state = run.unit(_unit(layer.module), lambda fit=fit: fit().state())  # type: ignore[misc]
                fitted = kind.from_state(state)
            yield layer, fitted, source

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
        _, _, choice = self.chosen_curvature(index)
        total: Tensor | None = None
        parts: dict[str, Tensor] = {}
        with progress or Progress(show=False) as shown:
            if choice is not None:
                shown.log(self.taken(index, keep=keep))
            found = self.layer_scores(index, queries, keep=keep)
            for module, scores in shown.iterate(found, "layers", total=len(index.layers)):
                total = scores.clone() if total is None else total.add_(scores)
                if per_layer:
                    parts[module] = scores
        assert total is not None
        return Scores(total.float(), parts if per_layer else None, choice)

    def _kept(
        self, index: Index, kind: type[LayerCurvature], settings: CurvatureSettings
    ) -> RunDirectory | None:
        """Where fits to this index are kept, tied to its hash; None for those that are not."""
        size = sum(kind.kept_bytes(len(index), layer, settings) for layer in index.layers)
        # What would dwarf the index is fitted again for every call rather than kept.
        if kind is Plain or size > max(_KEPT_BYTES, index.bytes):
            return None
        values = {
            key: str(value) if isinstance(value, torch.dtype) else value
            for key, value in dataclasses.asdict(settings).items()
        }
        return kept_fits(index, kind.name, values)


def kept_fits(index: Index, name: str, settings: Mapping[str, Any]) -> RunDirectory:
    """Where fits of a curvature to an index are kept, tied to the index's hash and to the settings."""
    manifest = {"index": index.hash(), "curvature": name, "settings": dict(settings)}
    key = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
    return RunDirectory(index.path / "curvature" / f"{name}-{key}", manifest)


def _unit(module: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in module)
