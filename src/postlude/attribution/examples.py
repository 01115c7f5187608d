"""Training examples and queries: records of a JSON-lines file, their tokens, and batches of them.

A record is an object with ``"text"``, or with ``"prompt"`` and ``"completion"``, and optionally an ``"id"``. A file is
read once from end to end, for its hash and to find what is wrong with it before anything is computed; after that
records are read where they are needed, so a file may be larger than memory.

Tokens of a prompt are not predicted (setting ``prompts`` of :class:`Collection`), those of a completion and of a text
are. No end-of-text token is added. A sequence longer than ``max_length`` is cut at its end, and the tokens cut
off are counted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from postlude.attribution.data import Data, batches
from postlude.errors import DataError, SettingsError
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.documents import encode

__all__ = ["Batch", "Collection", "Example", "Records", "batches", "tokenize"]

_KEYS = 'expected "text", or "prompt" and "completion", each a string'


@dataclasses.dataclass(frozen=True)
class Collection:
    """How gradients are collected, whatever the method makes of them.

    Attributes:
        max_length: tokens at which an example is cut; 0 for the model's context.
        layers: shell patterns of linear layers, separated by commas; embeddings and head are never among them.
        loss: ``sum`` over the predicted tokens of an example, or their ``mean``.
        prompts: ``mask`` leaves the tokens of a prompt out of the loss, ``train`` predicts them too.
        timesteps, noises: of a denoising loss: how many timesteps it is averaged over, and draws of noise at each.
        seed: of projections, starts and noise.
        tokens_per_batch: tokens in one pass, padding included; at least one example.
        shard_examples: examples of one shard, which is what a kill can cost.
    """

    max_length: int = 0
    layers: str = "*"
    loss: Literal["sum", "mean"] = "sum"
    prompts: Literal["mask", "train"] = "mask"
    timesteps: int = 10
    noises: int = 1
    seed: int = 0
    tokens_per_batch: int = 4096
    shard_examples: int = 1024

    def __post_init__(self) -> None:
        if self.loss not in ("sum", "mean"):
            raise SettingsError(f"loss is {self.loss!r}; expected sum or mean")
        if self.prompts not in ("mask", "train"):
            raise SettingsError(f"prompts is {self.prompts!r}; expected mask or train")
        for name in ("timesteps", "noises", "tokens_per_batch", "shard_examples"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.max_length < 0 or self.max_length == 1:
            raise SettingsError(f"max_length is {self.max_length}; expected at least 2 tokens")

    @property
    def draws(self) -> int:
        """Noised versions of an image that a denoising loss is averaged over."""
        return self.timesteps * self.noises

    @property
    def patterns(self) -> tuple[str, ...]:
        return tuple(part.strip() for part in self.layers.split(",") if part.strip())


@dataclasses.dataclass(frozen=True)
class Example:
    """A tokenized record.

    Attributes:
        id: as given in the record, or its number.
        tokens: after cutting.
        first: index of the first token that is predicted, at least 1.
        cut: tokens cut off.
    """

    id: int | str
    tokens: list[int]
    first: int
    cut: int

    @property
    def targets(self) -> int:
        return len(self.tokens) - self.first

    @property
    def count(self) -> int:
        return len(self.tokens)

    @staticmethod
    def batched(items: Sequence[Example], tokens_per_batch: int) -> list[Batch]:
        """Examples of similar length together, the longest first."""
        order = sorted(range(len(items)), key=lambda row: -len(items[row].tokens))
        result, start = [], 0
        while start < len(order):
            longest = len(items[order[start]].tokens)
            rows = order[start : start + max(1, tokens_per_batch // longest)]
            ids = torch.zeros(len(rows), longest, dtype=torch.int64)
            predicts = torch.zeros(len(rows), longest, dtype=torch.bool)
            for at, row in enumerate(rows):
                one = items[row]
                ids[at, : len(one.tokens)] = torch.tensor(one.tokens)
                predicts[at, one.first : len(one.tokens)] = True
            lengths = torch.tensor([len(items[row].tokens) for row in rows])
            result.append(Batch(rows, ids, predicts, lengths))
            start += len(rows)
        return result


@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples padded on the right.

    Attributes:
        rows: position of every example in the list that was batched.
        ids: ``int64 [rows, longest]``.
        predicts: bool, the same shape: True at tokens that are predicted; never in column 0.
        lengths: ``int64 [rows]`` without padding.
    """

    rows: list[int]
    ids: Tensor
    predicts: Tensor
    lengths: Tensor

    @property
    def mask(self) -> Tensor:
        """Bool ``[rows, longest]``, False where padded."""
        return torch.arange(self.ids.shape[1])[None] < self.lengths[:, None]

    def __len__(self) -> int:
        return len(self.rows)


class Records(Data):
    """The records of a file or of a list, checked.

    Attributes:
        path: of the file; None for a list.
        hash: SHA-256 over the records, in order; the same for a file and for a list of its records.

    Args:
        source: path of a ``.jsonl`` file, or records, or texts.
        name: what messages call the record of a list of one.

    Raises:
        DataError: no such file, a line that is not such a record, an empty example, an id that two examples have,
            or no example at all.
    """

    kind = "texts"

    def __init__(
        self,
        source: str | os.PathLike[str] | Sequence[Mapping[str, Any] | str],
        *,
        name: str = "example 0",
    ) -> None:
        self.path: Path | None = None
        self._list: list[Mapping[str, Any]] | None = None
        self._name = name
        ids: dict[int | str, int] = {}
        digest = hashlib.sha256()
        if isinstance(source, str | os.PathLike):
            self.path = Path(source)
            if self.path.is_dir():
                raise DataError(f"{source} is a directory; expected a .jsonl file.")
            if not self.path.is_file():
                raise DataError(f"There is no file {source}; expected a .jsonl file.")
            if self.path.suffix not in (".jsonl", ".json"):
                ending = (
                    f"ends in {self.path.suffix}" if self.path.suffix else "has no .jsonl ending"
                )
                raise DataError(
                    f"{source} {ending}; expected a .jsonl file, one JSON object a line."
                )
            self._starts, self._lines = array("q"), array("q")
            self._scan(digest, ids)
            count = len(self._starts)
        else:
            self._list = [{"text": one} if isinstance(one, str) else one for one in source]
            for number, record in enumerate(self._list):
                _check(record, self.where(number), "Give it some words.")
                _check_id(record, ids, number, "example", self.where(number))
                digest.update(_canonical(record))
            count = len(self._list)
        if not count:
            raise DataError(f"{source if self.path else 'The list'} holds no example.")
        self.hash = digest.hexdigest()
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        if not 0 <= number < self._count:
            raise IndexError(f"record {number} of {self._count}")
        if self._list is not None:
            return self._list[number]
        return next(self._read(number, number + 1))

    @classmethod
    def open(cls, source: Any, name: str = "example 0") -> Self:
        return cls(source, name=name)

    def check(self, checkpoint: Checkpoint, collection: Collection) -> None:
        if collection.max_length > checkpoint.context:
            raise SettingsError(
                f"max_length is {collection.max_length}, but the model takes at most {checkpoint.context} tokens: "
                "choose a shorter one"
            )
        if checkpoint.tokenizer is None:
            raise DataError(
                f"{checkpoint.path or 'this checkpoint'} has no tokenizer, so text cannot be read with it; put its "
                "tokenizer files beside the weights"
            )

    def examples(
        self,
        checkpoint: Checkpoint,
        collection: Collection,
        start: int = 0,
        stop: int | None = None,
    ) -> list[Example]:
        length = collection.max_length or checkpoint.context
        end = len(self) if stop is None else stop
        return tokenize(checkpoint.tokenizer, self, start, end, length, collection)

    def where(self, number: int) -> str:
        """A record's place, for messages."""
        if self._list is None:
            return f"{self.path} line {self._lines[number]}"
        return self._name if len(self._list) == 1 else f"example {number}"

    def text(self, number: int) -> str:
        """What a person reads: the text, or prompt and completion as one."""
        record = self[number]
        return str(record["text"]) if "text" in record else record["prompt"] + record["completion"]

    def id(self, number: int) -> int | str:
        found = self[number].get("id", number)
        return found if isinstance(found, int | str) else number

    def slice(self, start: int, stop: int) -> Iterator[Mapping[str, Any]]:
        """Records in order."""
        if self._list is not None:
            yield from self._list[start:stop]
        else:
            yield from self._read(start, stop)

    def _read(self, start: int, stop: int) -> Iterator[Mapping[str, Any]]:
        assert self.path is not None
        with open(self.path, "rb") as file:
            for number in range(start, stop):
                file.seek(self._starts[number])
                yield json.loads(file.readline().decode("utf-8-sig"))

    def _scan(self, digest: Any, ids: dict[int | str, int]) -> None:
        assert self.path is not None
        position = 0
        with open(self.path, "rb") as file:
            for line, raw in enumerate(file, start=1):
                start, position = position, position + len(raw)
                content = raw.strip()
                if not content:
                    continue
                where = f"{self.path} line {line}"
                try:
                    record = json.loads(content.decode("utf-8-sig"))
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{where} is not UTF-8: {error.reason}. Expected UTF-8 text."
                    ) from error
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{where} is not valid JSON: {error}.") from error
                _check(record, where)
                _check_id(record, ids, line, "line", where)
                digest.update(_canonical(record))
                self._starts.append(start)
                self._lines.append(line)


def _canonical(record: Mapping[str, Any]) -> bytes:
    # A record is what it says, in a file or in a list, however its keys are ordered.
    return json.dumps(record, sort_keys=True).encode() + b"\n"


def _check_id(
    record: Mapping[str, Any], ids: dict[int | str, int], place: int, unit: str, where: str
) -> None:
    """Answers name examples by their ids, so no two may share one."""
    given = record.get("id")
    if not isinstance(given, int | str):
        return
    first = ids.setdefault(given, place)
    if first != place:
        raise DataError(
            f"{where} has the id {given!r}, which {unit} {first} has too. Give every example an id of its own, or "
            "leave the ids out."
        )


def _check(record: Any, where: str, advice: str = "Remove the line, or fill it.") -> None:
    if not isinstance(record, Mapping):
        raise DataError(f"{where} is a JSON {type(record).__name__}; {_KEYS}.")
    parts = [record.get(name) for name in ("text", "prompt", "completion")]
    text, prompt, completion = parts
    if isinstance(text, str):
        if not text.strip():
            raise DataError(f'{where} is empty: its "text" has no words. {advice}')
        return
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise DataError(
                f'{where} is empty: its "completion" has no words, so nothing is predicted. {advice}'
            )
        return
    raise DataError(f"{where} has keys {sorted(map(str, record))}; {_KEYS}.")


def tokenize(
    tokenizer: Any, records: Records, start: int, stop: int, length: int, collection: Collection
) -> list[Example]:
    """The tokens of some records.

    Args:
        tokenizer: of the model.
        records: of the data.
        start, stop: which.
        length: tokens at which an example is cut.
        collection: whether prompts are predicted.

    Raises:
        DataError: a record of which no token is predicted, before or after it is cut; names its line.
    """
    found = []
    for number, record in enumerate(records.slice(start, stop), start=start):
        if "text" in record:
            tokens, first = encode(tokenizer, record["text"]), 1
        else:
            tokens = encode(tokenizer, record["prompt"])
            first = max(1, len(tokens)) if collection.prompts == "mask" else 1
            tokens = tokens + encode(tokenizer, record["completion"], add_special_tokens=False)
        cut = max(0, len(tokens) - length)
        if len(tokens) <= first:
            raise DataError(
                f"{records.where(number)} is empty: {len(tokens)} tokens, of which none is predicted. Give "
                "it more text."
            )
        if len(tokens) - cut <= first:
            raise DataError(
                f"{records.where(number)} has a prompt of {first} tokens and is cut at {length}, so nothing of its "
                "completion is left to predict: shorten the prompt, or raise max_length."
            )
        given = record.get("id", number)
        name = given if isinstance(given, int | str) else number
        found.append(Example(name, tokens[: len(tokens) - cut], first, cut))
    return found
