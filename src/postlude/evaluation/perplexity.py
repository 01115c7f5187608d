"""Perplexity of a language model on a text, and its distance to a reference model.

    loss       = mean over target tokens of -log p(token | tokens before it)
    perplexity = exp(loss)
    kl         = mean over the same positions of KL(reference || model)

A text is cut by one of two protocols:

- ``windows``, the usual one for WikiText-2: the text is tokenized once, with what the tokenizer puts
  before a text (BOS) once at its very start, and cut into ``floor(n / L)`` windows of ``L`` tokens
  that do not overlap; the tail is dropped. A window predicts its last ``L - 1`` tokens. All windows
  have equally many targets, so the mean over windows is the mean over tokens.
- ``documents``: each document is a sequence of its own, with what the tokenizer puts before it, cut
  at ``L`` tokens; the mean is over tokens, so longer documents weigh more.

The forward pass stops at the last hidden states; log-probabilities, KL and the agreement of the most
probable token are taken chunk by chunk over the vocabulary and never hold all the logits.

A model that quantizes activations per tensor has one range for all of a forward pass, so its result
would depend on how sequences are batched and padded. Such a model is run one sequence at a time.

Under torchrun every rank runs the batches ``rank, rank + ranks, ...``. Their sums are added in the order of the batches
whoever ran them, so the numbers are those of one rank, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from postlude.errors import ArchitectureError, DataError, NonFiniteError, SettingsError
from postlude.evaluation.size import size_of
from postlude.numerics.likelihood import kl_divergence, token_log_probability
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.documents import encode, read_documents, text_files
from postlude.runs.processes import Processes
from postlude.runs.progress import Progress
from postlude.surgery.layers import QuantizedLinear

__all__ = ["Sequences", "cut", "evaluate", "sequence_losses"]

Protocol = Literal["auto", "windows", "documents"]

_DEFAULT_LENGTH = 2048
_PROBE_TOKENS = 16
_SUMS = ("loss", "reference_loss", "kl", "top1_agreement")
_EXPECTED_REFERENCE = "expected the float model that this one was made from"


@dataclasses.dataclass(frozen=True)
class Sequences:
    """A text as sequences of tokens.

    Attributes:
        tokens: each ``int64 [length]``, of at least 2 tokens.
        protocol: how they were cut.
        skipped: documents of less than two tokens, which have nothing to predict.
    """

    tokens: list[Tensor]
    protocol: Literal["windows", "documents"]
    skipped: int = 0


def evaluate(
    checkpoint: Checkpoint,
    text: str | os.PathLike[str] | Sequence[str],
    *,
    max_length: int | None = None,
    reference: Checkpoint | None = None,
    protocol: Protocol = "auto",
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Loss, perplexity and size of a model; with a reference also the distance to it.

    Args:
        checkpoint: the model.
        text: path of a .txt file (``windows``), of a .jsonl file (``documents``) or of a directory
            of them (``documents`` if any is .jsonl); or the documents themselves.
        max_length: tokens of a window, or at which a document is cut; by default 2048, or the
            model's context if that is shorter.
        reference: the float model that ``checkpoint`` was made from.
        protocol: how to cut, if not by the kind of file. ``windows`` joins documents by an empty
            line.
        batch_tokens: tokens in one forward pass, padding included; at least one sequence.
        progress: where to show a bar.

    Returns:
        ``loss`` in nats per token, ``perplexity``, ``tokens`` (predicted ones), ``sequences``,
        ``skipped``, ``protocol``, ``max_length``, ``bytes``, ``bits_per_weight``; with a reference
        also ``kl`` in nats per token, ``top1_agreement`` in 0..1, ``reference_loss`` and
        ``reference_perplexity``.

    Raises:
        DataError: the text is too short, cannot be read, or there is no tokenizer.
        SettingsError: ``max_length`` does not fit, or the reference has another vocabulary.
        NonFiniteError: the model computes NaN.
    """
    contexts = [c.context for c in (checkpoint, reference) if c is not None]
    length = min(_DEFAULT_LENGTH, *contexts) if max_length is None else max_length
    if length < 2:
        raise SettingsError(f"max_length is {length}; expected at least 2 tokens")
    if length > min(contexts):
        raise SettingsError(
            f"max_length is {length}, but the model takes at most {min(contexts)} tokens: "
            "choose a shorter one"
        )
    documents, chosen = _documents(text, protocol)
    if reference is not None:
        _check_tokenizers(checkpoint, reference, documents)
    sequences = cut(checkpoint.tokenizer, documents, length, chosen)

    model = _Scorer(checkpoint, sequences)
    other = None if reference is None else _Scorer(reference, sequences)
    if other is not None and len(other.weight) != len(model.weight):
        raise SettingsError(
            f"The model predicts {len(model.weight)} tokens and the reference "
            f"{len(other.weight)}, so they cannot be compared: {_EXPECTED_REFERENCE}."
        )
    with Processes() as processes, _shown(progress) as shown:
        joint = any(scorer.mixes_rows for scorer in (model, other) if scorer is not None)
        batches = list(enumerate(_batches(sequences.tokens, 1 if joint else batch_tokens)))
        mine = processes.share(batches)
        parts = {
            number: _sums(batch, model, other)
            for number, batch in shown.iterate(mine, "evaluate", len(mine))
        }
        found = processes.gather([[number, part] for number, part in parts.items()])
    in_order = sorted((number, part) for share in found for number, part in share)
    sums = [sum(column) for column in zip(*(part for _, part in in_order), strict=True)]
    tokens = sum(len(sequence) - 1 for sequence in sequences.tokens)

    means = {name: value / tokens for name, value in zip(_SUMS, sums, strict=False)}
    result: dict[str, Any] = {
        "loss": means["loss"],
        "perplexity": _exp(means["loss"]),
        "tokens": tokens,
        "sequences": len(sequences.tokens),
        "skipped": sequences.skipped,
        "protocol": sequences.protocol,
        "max_length": length,
        **size_of(checkpoint),
    }
    if other is not None:
        result["kl"] = means["kl"]
        result["top1_agreement"] = means["top1_agreement"]
        result["reference_loss"] = means["reference_loss"]
        result["reference_perplexity"] = _exp(means["reference_loss"])
    return result


def _sums(batch: _Batch, model: _Scorer, reference: _Scorer | None) -> list[float]:
    """Over the targets of a batch: what ``_SUMS`` names, only the first without a reference."""
    targets = batch.targets
    hidden = model.hidden(batch)
    found = [float(model.losses(hidden, targets).sum())]
    if reference is None:
        return found
    expected = reference.hidden(batch)
    kl, agree = kl_divergence(
        expected.to(hidden.device),
        reference.weight.to(hidden.device),
        hidden,
        model.weight,
        bias_p=None if reference.bias is None else reference.bias.to(hidden.device),
        bias_q=model.bias,
    )
    return [
        *found,
        float(reference.losses(expected, targets).sum()),
        float(kl.double().sum()),
        float(agree.sum()),
    ]


def cut(
    tokenizer: Any,
    documents: Sequence[str],
    length: int,
    protocol: Literal["windows", "documents"],
) -> Sequences:
    """Tokenize documents and cut them by one of the protocols at the top of this file.

    Raises:
        DataError: nothing is left to predict, or there is no tokenizer.
    """
    if protocol == "windows":
        stream = torch.tensor(encode(tokenizer, "\n\n".join(documents)), dtype=torch.int64)
        count = len(stream) // length
        if count == 0:
            raise DataError(
                f"The text has {len(stream)} tokens; one window needs {length}. Give more text, or "
                f"shorter windows (--max-length {max(len(stream), 2)} or less)."
            )
        return Sequences(list(stream[: count * length].view(count, length)), "windows")
    encoded = [
        torch.tensor(encode(tokenizer, text)[:length], dtype=torch.int64) for text in documents
    ]
    tokens = [sequence for sequence in encoded if len(sequence) >= 2]
    if not tokens:
        raise DataError(
            f"None of the {len(documents)} documents has two tokens, so there is nothing to "
            "predict: give longer documents."
        )
    return Sequences(tokens, "documents", skipped=len(encoded) - len(tokens))


def sequence_losses(
    checkpoint: Checkpoint, sequences: Sequences, *, batch_tokens: int = 4096
) -> list[float]:
    """The mean loss in nats per token of every sequence, in their order."""
    scorer = _Scorer(checkpoint, sequences)
    means = [math.nan] * len(sequences.tokens)
    for batch in _batches(sequences.tokens, 1 if scorer.mixes_rows else batch_tokens):
        losses = scorer.losses(scorer.hidden(batch), batch.targets)
        parts = losses.split([length - 1 for length in batch.lengths])
        for index, part in zip(batch.indices, parts, strict=True):
            means[index] = float(part.mean())
    return means


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Sequences padded on the right; causal attention keeps the padding from their own tokens.

    Attributes:
        indices: which sequences, row by row.
        lengths: of the rows without padding.
        ids: ``int64 [rows, longest]``.
        mask: bool, the same shape, False where padded.
        targets: ``int64 [sum(lengths - 1)]``, row after row.
    """

    indices: list[int]
    lengths: list[int]
    ids: Tensor
    mask: Tensor
    targets: Tensor


def _batches(tokens: list[Tensor], batch_tokens: int) -> list[_Batch]:
    # The longest first: what does not fit into memory fails at once, and rows of a batch are alike.
    order = sorted(range(len(tokens)), key=lambda index: -len(tokens[index]))
    batches: list[_Batch] = []
    start = 0
    while start < len(order):
        longest = len(tokens[order[start]])
        indices = order[start : start + max(1, batch_tokens // longest)]
        rows = [tokens[index] for index in indices]
        lengths = [len(row) for row in rows]
        ids = torch.stack([functional.pad(row, (0, longest - len(row))) for row in rows])
        mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
        targets = torch.cat([row[1:] for row in rows])
        batches.append(_Batch(indices, lengths, ids, mask, targets))
        start += len(indices)
    return batches


class _Scorer:
    """A model as its last hidden states and the matrix that turns them into logits."""

    def __init__(self, checkpoint: Checkpoint, sequences: Sequences) -> None:
        model, anatomy = checkpoint.model, checkpoint.language
        self.model = model
        self.decoder = model.get_submodule(anatomy.decoder)
        head = model.get_submodule(anatomy.head)
        weight = head.dense_weight() if hasattr(head, "dense_weight") else head.weight
        self.weight: Tensor = weight.detach()
        bias = getattr(head, "bias", None)
        self.bias: Tensor | None = None if bias is None else bias.detach()
        self.device = self.weight.device
        self.mixes_rows = any(
            isinstance(module, QuantizedLinear)
            and module.input_scheme is not None
            and module.input_scheme.granularity.kind == "tensor"
            for module in model.modules()
        )
        self._check_tokens(sequences)
        self._check_head(sequences.tokens[0][:_PROBE_TOKENS][None])

    @torch.no_grad()
    def hidden(self, batch: _Batch) -> Tensor:
        """``[targets, hidden_size]``: the states that predict ``batch.targets``."""
        padded = not bool(batch.mask.all())
        states = self._states(batch.ids, batch.mask if padded else None)
        predicts = batch.mask[:, 1:].to(states.device)
        return states[:, :-1][predicts]

    @torch.no_grad()
    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """``float64 [targets]`` in nats."""
        losses = -token_log_probability(
            hidden, self.weight, targets.to(hidden.device), bias=self.bias
        ).double()
        if bool(losses.isnan().any()):
            raise NonFiniteError(
                f"The model computes NaN for {int(losses.isnan().sum())} of {len(losses)} tokens, "
                "although its weights are finite. Expected finite values: float16 overflows where "
                'bfloat16 does not, so load it with dtype="bfloat16" or "float32".'
            )
        return losses

    def _states(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        with _evaluating(self.model):
            output = self.decoder(
                input_ids=ids.to(self.device),
                attention_mask=None if mask is None else mask.to(self.device),
                use_cache=False,
            )
        states: Tensor = output.last_hidden_state
        return states

    def _check_tokens(self, sequences: Sequences) -> None:
        rows = self.model.get_input_embeddings().weight.shape[0]
        largest = max(int(sequence.max()) for sequence in sequences.tokens)
        if largest >= rows:
            raise DataError(
                f"The tokenizer gives token {largest}, but the model has {rows} embeddings: "
                "the tokenizer is not the one of this model."
            )

    @torch.no_grad()
    def _check_head(self, ids: Tensor) -> None:
        # Some architectures scale or cap logits after the head. Rather than knowing which, see.
        with _evaluating(self.model):
            logits = self.model(input_ids=ids.to(self.device), use_cache=False).logits.float()
        plain = functional.linear(self._states(ids, None), self.weight, self.bias).float()
        both_nan = logits.isnan() & plain.isnan()
        difference = (logits - plain)[~both_nan].abs()
        scale = logits.nan_to_num().abs().max()
        if difference.numel() and not bool(difference.max() <= 1e-3 * scale):
            raise ArchitectureError(
                f"The logits of this {type(self.model).__name__} are not its head applied to its "
                f"last hidden states (they differ by {float(difference.max()):.3g}): it scales or "
                "caps them, or quantizes the head's input, which evaluate does not support."
            )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and on again if it was on."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _documents(
    text: str | os.PathLike[str] | Sequence[str], protocol: Protocol
) -> tuple[list[str], Literal["windows", "documents"]]:
    if protocol not in ("auto", "windows", "documents"):
        raise SettingsError(f"protocol is {protocol!r}; expected auto, windows or documents")
    if isinstance(text, str | os.PathLike):
        files = text_files(Path(text))
        documents = read_documents(Path(text))
        kind: Literal["windows", "documents"] = (
            "documents" if any(file.suffix == ".jsonl" for file in files) else "windows"
        )
    else:
        documents, kind = list(text), "documents"
        if not documents:
            raise DataError("There are no documents to evaluate on: expected at least one text.")
    return documents, kind if protocol == "auto" else protocol


def _check_tokenizers(
    checkpoint: Checkpoint, reference: Checkpoint, documents: Sequence[str]
) -> None:
    if reference.tokenizer is None or checkpoint.tokenizer is None:
        return
    ours, theirs = checkpoint.tokenizer, reference.tokenizer
    start = documents[0][:2000]
    if ours.get_vocab() != theirs.get_vocab() or encode(ours, start) != encode(theirs, start):
        raise SettingsError(
            f"The model's tokenizer ({len(ours)} tokens) is not the reference's ({len(theirs)}), "
            f"so their predictions cannot be compared: {_EXPECTED_REFERENCE}."
        )


def _shown(progress: Progress | None) -> Any:
    """The caller's display, which it has already opened, or one that shows nothing."""
    return contextlib.nullcontext(progress) if progress is not None else Progress(show=False)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
