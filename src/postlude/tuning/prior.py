"""A prior: what the frozen reference says about every token to be learned, computed once and stored.

It is a directory:

    manifest.json       format, what it was computed from (four hashes), how much it holds
    columns.safetensors tokens, bounds of the sequences, which tokens are learned, and one fp32 column for each of
                        ``numerics.weighted_likelihood.COLUMNS``, one number for every learned token

It holds for identical tokens only, so the hashes of reference, tokenizer, chat template and token ids are compared when
it is used, and what differs is named. Columns are fp32 since fp16 would move tokens across a rule's threshold.

A token's column does not depend on the batches of the run; only the last bits may, since matrix products of other
shapes can be added up in another order. On the same batch it is bit for bit what a reference run beside training gives.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import postlude
from postlude.errors import DataError
from postlude.numerics.weighted_likelihood import COLUMNS, TokenColumns, token_columns
from postlude.runs.atomic import atomic_directory, discard
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.checksums import hash_file
from postlude.runs.directory import RunDirectory, run_beside
from postlude.runs.progress import Progress
from postlude.surgery.head import LanguageHead
from postlude.tuning.batches import collate
from postlude.tuning.examples import Examples, check_tokens
from postlude.tuning.reference import Reference, frozen

__all__ = [
    "FORMAT",
    "Prior",
    "columns_of",
    "compute_prior",
    "identity",
]

FORMAT = 1
_MANIFEST, _COLUMNS = "manifest.json", "columns.safetensors"
_TOP = 20
_BATCH_TOKENS = 4096
_UNIT_TOKENS = 1 << 18
_PARTS = {
    "reference": "the reference model",
    "tokenizer": "the tokenizer",
    "template": "the chat template",
    "ids": "the tokens (data, truncation, or which of them are learned)",
}


@dataclasses.dataclass(frozen=True)
class Prior:
    """A stored prior.

    Attributes:
        manifest: what it was computed from.
        columns: fp32 ``[T]`` each, by name.
        top: words of ``top_entropy``.
        path: the directory.
    """

    manifest: Mapping[str, Any]
    columns: Mapping[str, Tensor]
    top: int
    path: Path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Prior:
        """Read a directory that ``postlude tune prior`` wrote.

        Raises:
            DataError: it is no prior, a damaged one, or of another version of the format.
        """
        directory = Path(path)
        file = directory / _MANIFEST
        if not file.is_file() or not (directory / _COLUMNS).is_file():
            raise DataError(
                f"{directory} holds no prior ({_MANIFEST} and {_COLUMNS}): compute one with "
                "`postlude tune prior CHECKPOINT data.jsonl -o DIRECTORY`."
            )
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            version, top, expected = manifest["format"], manifest["top"], manifest["sha256"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{file} is damaged ({error}): compute the prior again.") from error
        if version != FORMAT:
            raise DataError(
                f"{directory} has format {version}, this version reads format {FORMAT}: compute the prior again."
            )
        found = hash_file(directory / _COLUMNS)
        if found != expected:
            raise DataError(
                f"{directory / _COLUMNS} is damaged: its SHA-256 is {found[:12]}..., the manifest says "
                f"{expected[:12]}...: compute the prior again."
            )
        stored = load_file(directory / _COLUMNS)
        return cls(manifest, {name: stored[name] for name in COLUMNS}, top, directory)

    def check(self, expected: Mapping[str, str]) -> None:
        """Refuse a prior of anything else.

        Args:
            expected: see :func:`identity`.

        Raises:
            DataError: names every part that differs.
        """
        found = self.manifest["identity"]
        stale = [part for part in _PARTS if found.get(part) != expected[part]]
        if not stale:
            return
        lines = "\n".join(
            f"  {_PARTS[part]}: computed with {_short(found.get(part))}, this run has {_short(expected[part])}"
            for part in stale
        )
        advice = (
            f"It was computed with {self.manifest['made_of']}: pass that as --reference if it is what you want, or "
            if stale == ["reference"]
            else ""
        )
        raise DataError(
            f"The prior in {self.path} does not belong to this run:\n{lines}\n{advice or 'Now '}"
            "compute it again with `postlude tune prior`, on the same data and with the same --max-length."
        )


def identity(reference: str, tokenizer: Any, examples: Examples) -> dict[str, str]:
    """What a prior belongs to: hashes of reference, tokenizer, chat template and tokens.

    Args:
        reference: fingerprint of the reference model.
        tokenizer: that made the tokens.
        examples: the tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = (
        backend.to_str()
        if backend is not None
        else json.dumps(sorted(tokenizer.get_vocab().items()))
    )
    return {
        "reference": reference,
        "tokenizer": _hash(f"{words} {tokenizer.bos_token} {tokenizer.eos_token}"),
        "template": _hash(json.dumps(tokenizer.chat_template, sort_keys=True)),
        "ids": examples.digest(),
    }


def compute_prior(
    reference: Checkpoint,
    examples: Examples,
    out: str | os.PathLike[str],
    *,
    max_length: int,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compute and store the columns of every learned token.

    Finished pieces are kept beside the output (``.NAME.run``): the same call after a kill goes on from them.

    Args:
        reference: the frozen model as it was loaded.
        examples: the tokens.
        out: the directory to write.
        max_length: at which the examples were cut.
        dtype: to compute in; None for that of the model, on a CPU fp32.
        overwrite: replace ``out``.
        progress: where to show a bar.

    Returns:
        What is in the manifest.

    Raises:
        OutputExistsError: ``out`` exists.
        RunDirectoryError: a run of something else was stopped there.
    """
    final = Path(os.path.realpath(out))
    key = identity(reference.fingerprint(), reference.tokenizer, examples)
    model = frozen(reference.model, dtype)
    head = LanguageHead(model, reference.language)
    check_tokens(examples, model)
    head.check(examples.ids(0))
    run = Reference(model, head)
    top = min(_TOP, len(head.weight))
    about = {
        "format": FORMAT,
        "postlude": postlude.__version__,
        "identity": key,
        "made_of": str(reference.path or "a model in memory"),
        "computed_in": str(head.weight.dtype).removeprefix("torch."),
        "device": head.weight.device.type,
        "max_length": max_length,
        "top": top,
        "columns": list(COLUMNS),
        **examples.counts(),
    }
    units = _units(examples)
    kept = RunDirectory(run_beside(final), {"verb": "prior", **about}, overwrite)
    if progress is not None and kept.finished():
        progress.log(f"resuming: {len(kept.finished())} of {len(units)} pieces are there")
    pieces = []
    bar = progress.iterate(units, "prior") if progress is not None else units
    for number, unit in enumerate(bar):
        piece = functools.partial(_unit, run, examples, unit, top)
        pieces.append(kept.unit(f"piece-{number:06d}", piece))
    columns = {name: torch.cat([piece[name] for piece in pieces]) for name in COLUMNS}
    for name, column in columns.items():
        if not bool(column.isfinite().all()):
            raise DataError(
                f"The reference gives {name} values that are not finite ({int((~column.isfinite()).sum())} of "
                f"{len(column)}). float16 overflows where bfloat16 does not: choose another --dtype."
            )
    stored = {
        **columns,
        "tokens": examples.tokens,
        "starts": examples.starts,
        "response": examples.response,
    }
    with atomic_directory(final, overwrite, marker=_MANIFEST) as directory:
        save_file(stored, directory / _COLUMNS)
        about["sha256"] = hash_file(directory / _COLUMNS)
        text = json.dumps(about, indent=2, sort_keys=True, ensure_ascii=False)
        (directory / _MANIFEST).write_text(text + "\n", encoding="utf-8")
    discard(kept.path, final)
    return about


def _units(examples: Examples) -> list[list[list[int]]]:
    """Batches of sequences of like length, in groups of consecutive sequences that are stored together."""
    lengths = examples.lengths.tolist()
    units: list[list[list[int]]] = []
    start = 0
    while start < len(examples):
        stop, tokens = start, 0
        while stop < len(examples) and (tokens < _UNIT_TOKENS or stop == start):
            tokens += lengths[stop]
            stop += 1
        order = sorted(range(start, stop), key=lambda index: -lengths[index])
        batches, at = [], 0
        while at < len(order):
            size = max(1, _BATCH_TOKENS // lengths[order[at]])
            batches.append(order[at : at + size])
            at += size
        units.append(batches)
        start = stop
    return units


def _unit(
    reference: Reference, examples: Examples, batches: list[list[int]], top: int
) -> dict[str, Tensor]:
    bounds = examples.target_starts.tolist()
    first = min(min(batch) for batch in batches)
    last = max(max(batch) for batch in batches)
    found = {name: torch.empty(bounds[last + 1] - bounds[first]) for name in COLUMNS}
    for indices in batches:
        batch = collate(examples, [[index] for index in indices])
        columns = columns_of(reference, batch, top)
        at = 0
        for index in indices:
            size = bounds[index + 1] - bounds[index]
            place = slice(bounds[index] - bounds[first], bounds[index + 1] - bounds[first])
            for name in COLUMNS:
                found[name][place] = getattr(columns, name)[at : at + size].cpu()
            at += size
    return found


def columns_of(reference: Reference, batch: Mapping[str, Tensor], top: int = _TOP) -> TokenColumns:
    """Every column of the learned tokens of a batch."""
    head = reference(batch)
    targets = batch["targets"].to(head.hidden.device)
    return token_columns(
        head.hidden, head.weight, targets, head.bias, COLUMNS, min(top, len(head.weight))
    )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _short(value: str | None) -> str:
    return "nothing" if not value else f"{value[:12]}..."
