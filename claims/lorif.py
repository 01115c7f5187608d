"""LoRIF: does a rank-1 index predict retrained models as well as LoGRA's dense one, at a fraction of its bytes?

LoRIF (arXiv:2601.21929) reports the linear datamodeling score (LDS) of LoGRA (arXiv:2405.13954) at up to 20 times
fewer bytes, on models of 0.1 to 70 billion parameters. Here every method scores the same fine-tuned model and is judged
by the same bank of models, each fine-tuned from the same checkpoint on a random half of the same short documents.

What is in the bank is kept in ``runs/claims``; a run that was stopped goes on from there.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import postlude as pl
from _claim import ROOT, Claim, data_directory, documents
from postlude.evaluation.lds import Retraining, draw_subsets, retrain, retraining_bank
from postlude.evaluation.perplexity import cut
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.directory import RunDirectory
from postlude.runs.documents import data_hash, encode
from postlude.runs.progress import Progress
from postlude.zoo import tiny_lm

QUERIES = 60


@dataclasses.dataclass
class Bench:
    """A checkpoint to fine-tune, short documents to learn from and to ask about, and a bank of models.

    Attributes:
        name: of the model.
        checkpoint: where every training starts.
        train, queries: documents.
        settings: of every training.
        subsets, seeds: random halves, and trainings of each.
    """

    name: str
    checkpoint: Checkpoint
    train: Sequence[str]
    queries: Sequence[str]
    settings: Retraining
    subsets: int
    seeds: int

    def tokens(self, documents: Sequence[str]) -> list[Tensor]:
        """Sequences as the index sees them."""
        found = cut(
            self.checkpoint.tokenizer, documents, self.checkpoint.context, "documents"
        ).tokens
        if len(found) != len(documents):
            raise ValueError(f"{len(documents) - len(found)} documents have less than two tokens")
        return found

    @cached_property
    def masks(self) -> Tensor:
        """``bool [subsets, examples]``."""
        return draw_subsets(len(self.train), self.subsets)

    @cached_property
    def run(self) -> RunDirectory:
        """Where trained things are kept."""
        manifest = {
            "model": self.checkpoint.fingerprint(),
            "train": data_hash(self.train),
            "queries": data_hash(self.queries),
            "settings": dataclasses.asdict(self.settings),
            "subsets": self.subsets,
        }
        return RunDirectory(ROOT / "runs" / "claims" / f"lorif-{self.name}", manifest)

    def bank(self, progress: Progress) -> Tensor:
        """``[subsets, seeds, queries]`` losses."""
        return retraining_bank(
            self.checkpoint,
            self.tokens(self.train),
            self.tokens(self.queries),
            self.masks,
            self.settings,
            seeds=self.seeds,
            unit=self.run.unit,
            progress=progress,
        )

    def trained(self) -> Checkpoint:
        """The model to explain: trained on every document, otherwise as those of the bank."""

        def compute() -> dict[str, Tensor]:
            full = retrain(self.checkpoint, self.tokens(self.train), self.settings)
            return dict(full.model.state_dict())

        explained = copy.deepcopy(self.checkpoint.model)
        explained.load_state_dict(self.run.unit("trained-on-everything", compute))
        return dataclasses.replace(self.checkpoint, model=explained, path=None)


def pieces(tokenizer: Any, text: str, count: int, length: int) -> list[str]:
    """Consecutive passages of a text, of about ``length`` tokens each."""
    ids = encode(tokenizer, text, add_special_tokens=False)
    if len(ids) < count * length:
        raise ValueError(f"the text has {len(ids)} tokens; expected {count * length}")
    windows = [ids[i * length : (i + 1) * length] for i in range(count)]
    return [tokenizer.decode(window, skip_special_tokens=True) for window in windows]


def split(found: Sequence[str], queries: int = QUERIES) -> tuple[list[str], list[str]]:
    """Passages to learn from, and others from among them to ask about."""
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return [found[i] for i in order[queries:]], [found[i] for i in order[:queries]]


def built_in(quick: bool) -> Bench:
    """tiny-lm on the text that was held out from its training."""
    checkpoint = pl.load("zoo:tiny-lm", dtype="float32")
    train, queries = split(pieces(checkpoint.tokenizer, tiny_lm.held_out_text(), 480 + QUERIES, 48))
    return Bench(
        "tiny-lm-quick" if quick else "tiny-lm",
        checkpoint,
        train,
        queries,
        Retraining(epochs=2, rate=5e-4),
        subsets=4 if quick else 50,
        seeds=2,
    )


def stories(quick: bool) -> Bench | None:
    """stories260k on WikiText-2, where its files are."""
    data = data_directory()
    if data is None:
        return None
    checkpoint = pl.load(data / "stories260k", dtype="float32")
    text = documents(data / "text" / "wikitext2_valid.txt", 200_000)[0]
    train, queries = split(pieces(checkpoint.tokenizer, text, 600 + QUERIES, 64))
    return Bench(
        "stories260k-quick" if quick else "stories260k",
        checkpoint,
        train,
        queries,
        Retraining(epochs=3, rate=1e-3),
        subsets=4 if quick else 100,
        seeds=2,
    )
