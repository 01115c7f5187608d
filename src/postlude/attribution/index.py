"""An index on disk: a row per training example, and what it was made from."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from postlude.attribution.data import Data, is_path, open_data
from postlude.attribution.examples import Collection
from postlude.attribution.representation import GradientRepresentation, Representation
from postlude.attribution.rows import Rows
from postlude.errors import DataError, SettingsError, StoreError
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.store import Damage, TensorStore
from postlude.surgery.gradients import CollectedLayer

__all__ = ["KIND", "Index", "LayerSource"]

KIND = "attribution index"
T = TypeVar("T")
# Numbers of one layer that are decoded at a time: as fp32 they fit into a core's cache.
_CHUNK = 1 << 18


class Index:
    """A finished index, opened for reading.

    Attributes:
        store: its tensors.
        manifest: what it was made from: ``postlude`` (version), ``model`` (path, fingerprint, tokenizer), ``data``
            (path, hash, examples), ``method`` (name and settings it was built for), ``representation``,
            ``collection``, ``layers``.
        representation, collection: from the manifest.
        layers: those whose gradients are kept, in the order of the forward pass.
        report: what the build that opened it says of itself; empty for an index that was there.

    Raises:
        StoreError: not an index, unfinished, damaged or of another version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.report: dict[str, Any] = {}
        self._records: Data | None = None
        self._cache: dict[str, Any] = {}
        self.store = TensorStore.open(path, kind=KIND)
        self.manifest = self.store.manifest
        try:
            self.representation = Representation.from_dict(self.manifest["representation"])
            self.collection = Collection(**self.manifest["collection"])
            self.layers = tuple(CollectedLayer(**one) for one in self.manifest["layers"])
        except (KeyError, TypeError, SettingsError) as error:
            raise StoreError(
                f"the manifest of {self.path} lacks or garbles a part ({error}): it is damaged, or of another "
                "version of Postlude; build the index again"
            ) from error

    @property
    def data_kind(self) -> str:
        """``texts`` or ``images``."""
        found: str = self.manifest["data"].get("kind", "texts")
        return found

    def use(self, records: Data) -> None:
        """Take the training examples from here, which are known to be those of the build."""
        self._records = records

    @property
    def path(self) -> Path:
        return self.store.path

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.store)

    @property
    def bytes(self) -> int:
        """Bytes of the shards on disk."""
        return self.store.bytes

    @property
    def curvature_bytes(self) -> int:
        """Bytes of what was fitted to the index and kept beside the shards."""
        files = (self.path / "curvature").rglob("*.safetensors")
        return sum(file.stat().st_size for file in files)

    def hash(self) -> str:
        """SHA-256 of the whole index."""
        return self.store.hash()

    def tensor(self, name: str) -> Tensor:
        """A tensor of all examples, copied out of the shards: ``[examples, ...]``."""
        return torch.cat([shard.tensor(name) for shard in self.store.shards])

    def layer(self, module: str) -> LayerSource:
        """The gradients of one layer.

        Raises:
            SettingsError: this index keeps no gradients, or not of that layer.
        """
        if not isinstance(self.representation, GradientRepresentation):
            raise SettingsError(
                f"{self.path} keeps {self.representation.kind!r}, not gradients of layers: build an index with a "
                "gradient method"
            )
        for layer in self.layers:
            if layer.module == module:
                return LayerSource(self, layer, self.representation)
        raise SettingsError(
            f"{self.path} keeps no gradients of {module!r}; it has {len(self.layers)} layers such as "
            f"{self.layers[0].module!r}"
        )

    def cached(self, name: str, make: Callable[[Index], T]) -> T:
        """What ``make`` computes from this index, computed once for as long as it is open."""
        if name not in self._cache:
            self._cache[name] = make(self)
        found: T = self._cache[name]
        return found

    def check_model(self, checkpoint: Checkpoint) -> None:
        """Refuse a model that is not the one the index was built with.

        Raises:
            StoreError: weights, configuration or tokenizer differ.
        """
        expected = self.manifest["model"]
        found = describe_model(checkpoint)
        for key, what in (("fingerprint", "model"), ("tokenizer", "tokenizer")):
            if found[key] != expected[key]:
                raise StoreError(
                    f"{self.path} was built with another {what} ({expected['path'] or 'in memory'}, "
                    f"{str(expected[key])[:12]}...) than the one given ({found['path'] or 'in memory'}, "
                    f"{str(found[key])[:12]}...). Gradients of two models cannot be compared: query with the model "
                    "the index was built with, or build an index for this one."
                )

    def records(self, path: Any = None) -> Data:
        """The training examples, read from where they were at the build, or from ``path``; read once.

        Raises:
            DataError: the file is not there.
            StoreError: it has changed since the build.
        """
        if self._records is not None and path is None:
            return self._records
        given = self.manifest["data"]
        source: Any = path or given["path"]
        if source is None:
            raise StoreError(
                f"{self.path} was built from examples in memory, so their text is not at hand: give the data"
            )
        if path is None and not os.path.exists(source):
            raise DataError(
                f"There is no file {source}, where the examples were when {self.path} was built: if they have moved, "
                "say where with --data (data=)."
            )
        records = open_data(source, "diffusion" if self.data_kind == "images" else "language")
        if records.hash != given["hash"]:
            name = source if is_path(source) else "the list of examples"
            raise StoreError(
                f"{name} has changed since {self.path} was built: {len(records)} "
                f"example{'s' * (len(records) != 1)} with hash {records.hash[:12]}..., "
                f"expected {given['examples']} with {given['hash'][:12]}.... Put the old file "
                "back, or build the index again."
            )
        self._records = records
        return records

    def query(self, source: Any, **settings: Any) -> Any:
        """Rank the training examples that support a text most.

        Args:
            source: a text or the path of a ``.png`` image, for which the answer is returned; or several, as a list or
                another path, for which a list of answers is.
            settings: ``top``, ``layers``, ``tokens`` and others of :func:`postlude.attribution.query.query`.

        Returns:
            :class:`postlude.attribution.answers.Answer`, or a list of them.
        """
        # Not at the top: asking needs the engine, which needs the index.
        from postlude.attribution.query import query, single

        answers = query(self, source, **settings)
        return answers[0] if single(source, self.data_kind) else answers

    def learn_weights(
        self, source: Any, out: str | os.PathLike[str] | None = None, **settings: Any
    ) -> Any:
        """Learn what each layer should count for, from queries alone, for ``index.query(..., weights=...)``.

        Args:
            source: queries, as for :meth:`query`, ``k`` or more of them.
            out: file to write the weights to.
            settings: those of :class:`postlude.attribution.layer_weights.Learning`, and ``method``, ``checkpoint``,
                ``keep``, ``progress`` of :func:`postlude.attribution.query.learn_weights`.

        Returns:
            :class:`postlude.attribution.layer_weights.LayerWeights`.
        """
        from postlude.attribution.layer_weights import Learning
        from postlude.attribution.query import learn_weights

        names = {field.name for field in dataclasses.fields(Learning)}
        learning = Learning(**{key: value for key, value in settings.items() if key in names})
        rest = {key: value for key, value in settings.items() if key not in names}
        found = learn_weights(self, source, learning, **rest)
        if out is not None:
            found.save(out)
        return found

    def scores(self, source: Any, **settings: Any) -> Tensor:
        """Scores of all examples: fp32 ``[queries, examples]``; see :func:`postlude.attribution.query.scores`."""
        from postlude.attribution.query import scores

        return scores(self, source, **settings)

    def verify(self) -> list[Damage]:
        """Read every byte; what is damaged, shard by shard."""
        return [damage for damage in self.store.verify() if damage is not None]


@dataclasses.dataclass(frozen=True)
class LayerSource:
    """The gradients of one layer of all examples of an index."""

    index: Index
    layer: CollectedLayer
    representation: GradientRepresentation

    def __len__(self) -> int:
        return len(self.index)

    @property
    def row_bytes(self) -> int:
        """Bytes of this layer in one row."""
        return self.representation.row_bytes((self.layer,))

    def rows(self, start: int = 0, stop: int | None = None) -> Rows:
        """The gradients of some examples; fp32, decoded here."""
        end = len(self) if stop is None else stop
        parts = list(self._parts(start, end, end - start or 1))
        if len(parts) == 1:
            return parts[0][1]
        return parts[0][1].followed_by([rows for _, rows in parts[1:]])

    def chunks(
        self, rows: int = 0, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, Rows]]:
        """``(first example, gradients)`` of consecutive examples, in order, at most ``rows`` of them at a time.

        By default as many as fit into a core's cache, of all examples.
        """
        if not rows:
            width = max(1, self.representation.row_numbers(self.layer))
            rows = max(64, _CHUNK // width)
        yield from self._parts(start, len(self) if stop is None else stop, rows)

    def _parts(self, start: int, stop: int, rows: int) -> Iterator[tuple[int, Rows]]:
        shards = self.index.store.shards
        begin = max(0, bisect.bisect_right(shards, start, key=lambda one: one.start) - 1)
        for shard in itertools.islice(shards, begin, None):
            low, high = max(start, shard.start), min(stop, shard.stop)
            if shard.start >= stop:
                break
            if low >= high:
                continue
            mapped: dict[str, Tensor] = {}

            def read(
                name: str,
                shard: Any = shard,
                mapped: dict[str, Tensor] = mapped,
            ) -> Tensor:
                if name not in mapped:
                    mapped[name] = shard.tensor(f"{self.layer.module}/{name}")
                return mapped[name]

            for first in range(low, high, rows):
                last = min(first + rows, high)
                found = self.representation.rows(
                    self.layer, read, first - shard.start, last - shard.start
                )
                yield first, found


def describe_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """What an index remembers of a model."""
    tokenizer = None
    if checkpoint.tokenizer is not None:
        backend = getattr(checkpoint.tokenizer, "backend_tokenizer", None)
        text = (
            backend.to_str()
            if backend is not None
            else json.dumps(sorted(checkpoint.tokenizer.get_vocab().items()))
        )
        tokenizer = hashlib.sha256(text.encode()).hexdigest()
    return {
        "path": None if checkpoint.path is None else str(checkpoint.path),
        "fingerprint": checkpoint.fingerprint(),
        "tokenizer": tokenizer,
    }
