"""Learned weights of layers: what each layer of a model counts for when it attributes.

Layers store different things. A score of the engine is a sum over layers, ``tau = sum_l w_l s_l``, usually with all
``w_l = 1``; here they are learned from queries alone, without any label (:mod:`postlude.numerics.group_weights`)::

    index --(queries)--> s_l [layers, queries, examples] --> w [layers], of mean 1 --> weights.safetensors

The weights act on the gradients of a query, so the index and everything fitted to it stay as they are, and a
weighted query costs what an unweighted one does. Equal weights are ones: the score is then the unweighted one to the
last bit. Queries that share a subject, a style or a background teach weights for just that.

Paper: "Learning to weight parameters for data attribution" (arXiv:2506.05647). Our choices, where it does not say: a
group is a linear layer; the default of ``k``; Adam on the logits of a softmax; a sample of the examples where there
are very many. For gradients of several layers in one random projection there would be no groups: here every layer
has its own.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from postlude import registry
from postlude.attribution.engine import Attributor, InfluenceAttributor
from postlude.attribution.index import Index
from postlude.attribution.queries import Queries
from postlude.errors import OutputExistsError, SettingsError, StoreError
from postlude.numerics.group_weights import learn_group_weights
from postlude.runs.atomic import atomic_write
from postlude.runs.progress import Progress

__all__ = ["LayerWeights", "Learning", "contributions", "learn"]

_KIND = "postlude layer weights"
_FEW = 50  # queries: five times the least default k, our choice


@dataclasses.dataclass(frozen=True)
class Learning:
    """How weights are learned.

    Attributes:
        k: how many of the best examples of a query count as found; 0 for 1 % of the examples, at least 10 and at most
            the number of queries.
        regularizer: pulls towards equal weights; above 0.01 it takes the gain away.
        steps, rate: of Adam.
        center: subtract the mean over examples first, for scores with a large common part.
        examples: of the index to learn from, drawn at random where it has more.
        seed: of that draw.
    """

    k: int = 0
    regularizer: float = 0.01
    steps: int = 200
    rate: float = 0.05
    center: bool = False
    examples: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("k", 0), ("steps", 0), ("examples", 1)):
            if getattr(self, name) < least:
                raise SettingsError(f"{name} is {getattr(self, name)}; expected from {least}")
        if not 0 <= self.regularizer < math.inf:
            raise SettingsError(f"regularizer is {self.regularizer}; expected 0 or more")
        if not 0 < self.rate < math.inf:
            raise SettingsError(f"rate is {self.rate}; expected more than 0")

    def found(self, queries: int, examples: int) -> int:
        """``k`` for so many queries and examples.

        Raises:
            SettingsError: fewer examples, or fewer queries, than ``k``.
        """
        least = 10
        k = self.k or min(max(least, examples // 100), max(least, queries))
        if examples < k:
            raise SettingsError(
                f"the index has {examples} examples, and weights are learned from the {k} best of each query: choose "
                f"a smaller k (--k), below {examples}"
            )
        if queries < k:
            raise SettingsError(
                f"{queries} quer{'y is' if queries == 1 else 'ies are'} fewer than k, {k}: weights of layers that so "
                f"few agree on say little of others. Give {k} queries or more, or a smaller k (--k {queries})."
            )
        return k


@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """Weights of the layers of one index, for one method.

    Attributes:
        layers: module paths, in the order of the index.
        values: fp64 ``[layers]``, positive, of mean 1.
        index: hash of the index.
        method: ``name`` and ``settings`` of the method that scored.
        learned: how: settings, ``queries``, ``queries_hash``, ``loss_before``, ``loss_after``, ``seconds`` of learning
            and ``scoring_seconds`` of the contributions.
    """

    layers: tuple[str, ...]
    values: Tensor
    index: str
    method: dict[str, Any]
    learned: dict[str, Any] = dataclasses.field(default_factory=dict)

    def named(self) -> dict[str, float]:
        """Weight by module path."""
        return dict(zip(self.layers, self.values.tolist(), strict=True))

    def notes(self) -> list[str]:
        """Sentences on how far to believe them: what the losses are, and whether the queries were few."""
        found = [
            f"loss: minus the mean score of the {self.learned['k']} best examples of a query over the norm of all its "
            "scores, at equal weights and after learning. Lower: the best stand out more, on these queries; it does "
            "not say that they are right."
        ]
        queries, expected = self.learned["queries"], max(_FEW, len(self.layers))
        if queries < expected:
            found.append(
                f"Few queries: {queries} for {len(self.layers)} layers. Weights can over-fit them, and say little of "
                f"others; give {expected} or more, and judge on queries that were not learned from."
            )
        return found

    def check(self, index: Index, method: Attributor) -> None:
        """Refuse an index, or a method, that these weights were not learned for.

        Raises:
            SettingsError: they differ; says in what.
        """
        own = tuple(layer.module for layer in index.layers)
        if self.layers != own:
            only = [one for one in self.layers if one not in own]
            lacking = [one for one in own if one not in self.layers]
            words = [
                f"{name} {len(some)}, for example {some[0]!r}"
                for name, some in (("not in the index:", only), ("without a weight:", lacking))
                if some
            ]
            raise SettingsError(
                f"the weights are of {len(self.layers)} layers and {index.path} keeps {len(own)} "
                f"({'; '.join(words) or 'in another order'}): learn weights for this index with `postlude attribute "
                "learn-weights`"
            )
        if self.index != index.hash():
            raise SettingsError(
                f"the weights were learned for another index ({self.index[:12]}...) than {index.path} "
                f"({index.hash()[:12]}...): learn them for this one with `postlude attribute learn-weights`"
            )
        asked = _described(method)
        if asked != self.method:
            differ = [
                f"{key} {self.method['settings'].get(key)} (asked with {asked['settings'].get(key)})"
                for key in sorted(asked["settings"].keys() | self.method["settings"].keys())
                if asked["settings"].get(key) != self.method["settings"].get(key)
            ]
            what = (
                f"settings {', '.join(differ)}"
                if asked["name"] == self.method["name"]
                else f"the method {self.method['name']}, not {asked['name']}"
            )
            raise SettingsError(
                f"the weights were learned for {what}: what a layer is worth depends on how it scores; learn weights "
                "for this method and these settings"
            )

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write one safetensors file: ``weights``, and the rest in its header.

        Raises:
            OutputExistsError: there is such a file, and overwriting was not asked for.
        """
        target = Path(path)
        if target.exists() and not (overwrite and target.is_file()):
            raise OutputExistsError(
                f"{target} already exists. Choose another output, or ask for it to be replaced (--overwrite)."
            )
        described = {
            "kind": _KIND,
            "layers": self.layers,
            "index": self.index,
            "method": self.method,
            "learned": self.learned,
        }
        # One entry: safetensors writes several in an order that differs from file to file.
        header = {"postlude": json.dumps(described, sort_keys=True)}
        target.resolve().parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as temporary:
            save_file({"weights": self.values.double().contiguous()}, temporary, metadata=header)
            # The library writes for the owner alone.
            temporary.chmod(0o644)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerWeights:
        """Read what :meth:`save` wrote.

        Raises:
            StoreError: no such file, or one of something else.
        """
        if not Path(path).is_file():
            raise StoreError(
                f"There is no file {path}; `postlude attribute learn-weights` makes one."
            )
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("postlude", "{}"))
                if header.get("kind") != _KIND:
                    raise StoreError(f"{path} holds no weights of layers: {header.get('kind')!r}.")
                values = file.get_tensor("weights")
            return cls(
                tuple(header["layers"]),
                values,
                header["index"],
                header["method"],
                header["learned"],
            )
        except (
            SafetensorError,
            KeyError,
            ValueError,
            OSError,
            RecursionError,
            struct.error,
        ) as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(
                f"{path} holds no weights of layers, or is damaged: {error}"
            ) from error


def contributions(
    method: Attributor,
    index: Index,
    queries: Queries,
    *,
    keep: bool = False,
    progress: Progress | None = None,
    examples: Tensor | None = None,
) -> Tensor:
    """``[layers, queries, examples]``: the part of every layer in every score; scores are their sum.

    Args:
        method, index, queries, keep, progress: as for :meth:`postlude.attribution.engine.Attributor.score`.
        examples: numbers of those that are wanted; all otherwise.

    Raises:
        SettingsError: a method whose scores are no sum over layers.
    """
    if isinstance(method, InfluenceAttributor):
        method.check(index)
        with progress or Progress(show=False) as shown:
            found = method.layer_scores(index, queries, keep=keep)
            return torch.stack(
                [
                    (part if examples is None else part[:, examples]).float()
                    for _, part in shown.iterate(found, "layers", total=len(index.layers))
                ]
            )
    parts = method.score(index, queries, per_layer=True, keep=keep, progress=progress).layers
    if not parts:
        raise SettingsError(
            f"a score of {method.name} is no sum over layers, so there are no layers to weigh: take an influence "
            "method"
        )
    stacked = torch.stack([parts[layer.module] for layer in index.layers])
    return stacked if examples is None else stacked[:, :, examples]


def learn(
    method: Attributor,
    index: Index,
    queries: Queries,
    settings: Learning | None = None,
    *,
    keep: bool = False,
    progress: Progress | None = None,
) -> LayerWeights:
    """Learn weights of layers from queries.

    Args:
        method: that scores.
        index: that is asked.
        queries: recorded for it; ``k`` of them or more.
        settings: of the learning.
        keep: keep what is fitted to the index beside it.
        progress: where to show it.

    Raises:
        SettingsError: fewer queries or examples than ``k``, or a method without layers.
    """
    settings = settings or Learning()
    count = min(len(index), settings.examples)
    k = settings.found(len(queries), count)
    some = None
    if count < len(index):
        generator = torch.Generator().manual_seed(settings.seed)
        some = torch.randperm(len(index), generator=generator)[:count].sort().values
    started = time.perf_counter()
    parts = contributions(
        method, index, queries.weighted(None), keep=keep, progress=progress, examples=some
    )
    scored = time.perf_counter()
    found = learn_group_weights(
        parts,
        k=k,
        regularizer=settings.regularizer,
        steps=settings.steps,
        rate=settings.rate,
        center=settings.center,
    )
    return LayerWeights(
        tuple(layer.module for layer in index.layers),
        found.weights,
        index.hash(),
        _described(method),
        {
            **dataclasses.asdict(settings),
            "k": k,
            "examples": count,
            "queries": len(queries),
            "loss_before": float(found.losses[0]),
            "loss_after": float(found.losses[-1]),
            "scoring_seconds": scored - started,
            "seconds": time.perf_counter() - scored,
        },
    )


def _described(method: Attributor) -> dict[str, Any]:
    settings: Mapping[str, Any] = dataclasses.asdict(method)
    found: dict[str, Any] = json.loads(
        json.dumps({"name": registry.info_of(method).name, "settings": settings})
    )
    return found
