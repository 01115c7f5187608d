from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from postlude.errors import ArchitectureError, DataError, NonFiniteError, SettingsError
from postlude.evaluation.perplexity import Sequences, cut, evaluate, sequence_losses
from postlude.numerics.formats import Integer
from postlude.numerics.schemes import Granularity, Scheme
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.documents import encode, read_documents
from postlude.runs.loading import load
from postlude.runs.progress import Progress
from postlude.surgery.anatomy import anatomy_of
from postlude.surgery.layers import QuantizedLinear

DOCUMENTS = ["A dog barks.", "The night was calm, and the boat went on.", "x", "Rain " * 20, ""]


@pytest.fixture(scope="module")
def llama(tiny_llama_dir: Path) -> Checkpoint:
    return load(tiny_llama_dir, device="cpu")


@pytest.fixture(scope="module")
def changed(make_checkpoint: Callable[..., Path], llama: Checkpoint) -> Checkpoint:
    """The same model with every weight moved a little."""
    checkpoint = load(llama.path, device="cpu")
    generator = torch.Generator().manual_seed(5)
    for parameter in checkpoint.model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    checkpoint.path = None
    return checkpoint


def logits_of(checkpoint: Checkpoint, sequence: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return checkpoint.model(sequence[None]).logits[0, :-1].double()


def naive(checkpoint: Checkpoint, sequences: list[torch.Tensor]) -> tuple[float, int]:
    """One sequence at a time, all logits, torch's own cross-entropy."""
    losses = [
        functional.cross_entropy(logits_of(checkpoint, s), s[1:], reduction="none")
        for s in sequences
    ]
    joined = torch.cat(losses)
    return float(joined.mean()), len(joined)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [1, 100, 4096])
def test_documents_equal_a_loop_over_them(
    make_model: Callable[..., Any], tiny_tokenizer: Any, model_type: str, batch_tokens: int
) -> None:
    model = make_model(model_type)
    checkpoint = Checkpoint(model, tiny_tokenizer, anatomy_of(model))
    result = evaluate(checkpoint, DOCUMENTS, max_length=32, batch_tokens=batch_tokens)
    tokens = [torch.tensor(encode(tiny_tokenizer, d)[:32]) for d in DOCUMENTS]
    loss, count = naive(checkpoint, [t for t in tokens if len(t) > 1])
    assert result["loss"] == pytest.approx(loss, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert result["tokens"] == count == 12 + 31 + 1 + 31
    assert (result["sequences"], result["skipped"]) == (4, 1)
    assert result["protocol"] == "documents" and result["max_length"] == 32


def test_windows_equal_a_loop_over_them(llama: Checkpoint, tmp_path: Path, some_text: str) -> None:
    file = tmp_path / "text.txt"
    file.write_text(some_text)
    result = evaluate(llama, file, max_length=20, batch_tokens=70)
    ids = llama.tokenizer(some_text)["input_ids"]
    windows = [torch.tensor(ids[i : i + 20]) for i in range(0, len(ids) - 19, 20)]
    loss, count = naive(llama, windows)
    assert result["loss"] == pytest.approx(loss, rel=1e-6)
    assert result["tokens"] == count == len(ids) // 20 * 19
    assert result["protocol"] == "windows" and result["sequences"] == len(ids) // 20
    # One BOS in all, at the very start, and the tail dropped.
    pieces = cut(llama.tokenizer, [some_text], 20, "windows").tokens
    assert torch.stack(pieces).flatten().tolist() == ids[: len(ids) // 20 * 20]
    assert (torch.stack(pieces) == 1).sum() == 1
    # Without a length: the context.
    assert evaluate(llama, file)["max_length"] == 64


def test_the_protocol_follows_the_kind_of_file(
    llama: Checkpoint, tmp_path: Path, some_text: str
) -> None:
    text, lines, both = tmp_path / "a.txt", tmp_path / "a.jsonl", tmp_path / "both"
    text.write_text(some_text)
    lines.write_text("\n".join(json.dumps({"text": d}) for d in [some_text[:300], some_text[300:]]))
    both.mkdir()
    (both / "a.txt").write_text(some_text)
    (both / "b.txt").write_text(some_text)
    assert evaluate(llama, str(lines))["protocol"] == "documents"
    assert evaluate(llama, both)["protocol"] == "windows"
    (both / "c.jsonl").write_text(lines.read_text())
    assert evaluate(llama, both)["protocol"] == "documents"
    as_windows = evaluate(llama, lines, protocol="windows")
    assert as_windows["protocol"] == "windows"
    assert as_windows["tokens"] == (1 + len(some_text) + 2) // 64 * 63
    assert evaluate(llama, text, protocol="documents")["sequences"] == 1
    with pytest.raises(SettingsError, match="'window'; expected auto"):
        evaluate(llama, text, protocol="window")  # type: ignore[arg-type]


def test_the_distance_to_a_reference_equals_the_full_softmax(
    llama: Checkpoint, changed: Checkpoint
) -> None:
    result = evaluate(changed, DOCUMENTS, reference=llama, batch_tokens=100)
    divergence, agree, count = 0.0, 0, 0
    tokens = [torch.tensor(encode(llama.tokenizer, d)[:64]) for d in DOCUMENTS]
    tokens = [t for t in tokens if len(t) > 1]
    for sequence in tokens:
        p = logits_of(llama, sequence).log_softmax(-1)
        q = logits_of(changed, sequence).log_softmax(-1)
        divergence += float((p.exp() * (p - q)).sum())
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(p)
    assert result["kl"] == pytest.approx(divergence / count, rel=1e-5)
    assert result["top1_agreement"] == pytest.approx(agree / count)
    assert 0 < result["top1_agreement"] < 1
    assert result["loss"] == pytest.approx(naive(changed, tokens)[0], rel=1e-6)
    assert result["reference_loss"] == pytest.approx(naive(llama, tokens)[0], rel=1e-6)
    assert result["reference_perplexity"] == pytest.approx(math.exp(result["reference_loss"]))


def test_a_model_is_at_no_distance_from_itself(llama: Checkpoint) -> None:
    result = evaluate(llama, DOCUMENTS, reference=llama)
    assert result["kl"] == pytest.approx(0, abs=1e-7)
    assert result["top1_agreement"] == 1
    assert result["loss"] == result["reference_loss"]


def test_same_result_every_time_and_a_bar(llama: Checkpoint) -> None:
    with Progress(show=False) as progress:
        first = evaluate(llama, DOCUMENTS, progress=progress)
    assert first == evaluate(llama, DOCUMENTS)
    json.dumps(first, allow_nan=False)


def test_losses_come_back_in_the_order_of_the_sequences(llama: Checkpoint) -> None:
    sequences = cut(llama.tokenizer, DOCUMENTS, 64, "documents")
    losses = sequence_losses(llama, sequences, batch_tokens=100)
    for loss, sequence in zip(losses, sequences.tokens, strict=True):
        assert loss == pytest.approx(naive(llama, [sequence])[0], rel=1e-6)


def test_half_precision_is_close_to_its_own_logits(tiny_llama_dir: Path) -> None:
    checkpoint = load(tiny_llama_dir, dtype="bfloat16", device="cpu")
    tokens = [torch.tensor(encode(checkpoint.tokenizer, DOCUMENTS[1]))]
    result = evaluate(checkpoint, [DOCUMENTS[1]])
    assert result["loss"] == pytest.approx(naive(checkpoint, tokens)[0], rel=1e-2)


def test_a_training_model_is_evaluated_without_dropout(make_model: Callable[..., Any]) -> None:
    model = make_model(attention_dropout=0.5).train()
    checkpoint = Checkpoint(model, None, anatomy_of(model))
    sequences = Sequences([torch.arange(3, 40)], "documents")
    losses = sequence_losses(checkpoint, sequences)
    assert model.training
    model.eval()
    assert losses == sequence_losses(checkpoint, sequences)


def test_ranges_per_tensor_do_not_depend_on_the_batch(tiny_llama_dir: Path) -> None:
    checkpoint = load(tiny_llama_dir, device="cpu")
    per_tensor = Scheme(Integer(4), Granularity("tensor"))
    for name in list(checkpoint.anatomy.linears()):
        linear = checkpoint.model.get_submodule(name)
        layer = QuantizedLinear.like(linear, input=per_tensor)
        layer.weight.data.copy_(linear.weight.data)
        checkpoint.model.set_submodule(name, layer)
    tokens = [torch.tensor(encode(checkpoint.tokenizer, d)[:64]) for d in DOCUMENTS]
    loss, _ = naive(checkpoint, [t for t in tokens if len(t) > 1])
    result = evaluate(checkpoint, DOCUMENTS)
    assert result["loss"] == pytest.approx(loss, rel=1e-6)
    assert result["bits_per_weight"] == 32


def test_text_that_is_too_short(llama: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("Too short.")
    with pytest.raises(DataError, match=r"has 11 tokens; one window needs 64.*--max-length 11"):
        evaluate(llama, file)
    assert evaluate(llama, file, max_length=11)["tokens"] == 10
    with pytest.raises(DataError, match="None of the 2 documents has two tokens"):
        evaluate(llama, ["", ""])
    with pytest.raises(DataError, match="no documents"):
        evaluate(llama, [])


def test_lengths_that_do_not_fit(llama: Checkpoint) -> None:
    with pytest.raises(SettingsError, match="max_length is 1; expected at least 2"):
        evaluate(llama, DOCUMENTS, max_length=1)
    with pytest.raises(SettingsError, match="max_length is 65, but the model takes at most 64"):
        evaluate(llama, DOCUMENTS, max_length=65)


def test_references_that_cannot_be_compared(
    llama: Checkpoint, make_model: Callable[..., Any], plain_tokenizer: Any
) -> None:
    other = Checkpoint(llama.model, plain_tokenizer, llama.anatomy)
    with pytest.raises(SettingsError, match=r"tokenizer .* is not the reference's"):
        evaluate(llama, DOCUMENTS, reference=other)
    model = make_model(vocab_size=300)
    wider = Checkpoint(model, llama.tokenizer, anatomy_of(model))
    with pytest.raises(SettingsError, match="predicts 259 tokens and the reference 300"):
        evaluate(llama, DOCUMENTS, reference=wider)
    model = make_model(vocab_size=100)
    narrow = Checkpoint(model, llama.tokenizer, anatomy_of(model))
    with pytest.raises(DataError, match="the model has 100 embeddings"):
        evaluate(narrow, DOCUMENTS)


def test_a_checkpoint_without_tokenizer_needs_one(llama: Checkpoint) -> None:
    bare = Checkpoint(llama.model, None, llama.anatomy, llama.path)
    with pytest.raises(DataError, match="no tokenizer"):
        evaluate(bare, DOCUMENTS)


def test_logits_that_are_not_the_head_alone_are_refused(tiny_llama_dir: Path) -> None:
    checkpoint = load(tiny_llama_dir, device="cpu")

    def cap(module: Any, inputs: Any, output: Any) -> Any:
        return torch.tanh(output)

    checkpoint.model.lm_head.register_forward_hook(cap)
    with pytest.raises(ArchitectureError, match="scales or caps"):
        evaluate(checkpoint, DOCUMENTS)


def test_nan_is_an_error_and_a_collapse_is_not(tiny_llama_dir: Path) -> None:
    checkpoint = load(tiny_llama_dir, device="cpu")
    checkpoint.model.model.norm.weight.data *= 1e5
    collapsed = evaluate(checkpoint, DOCUMENTS)
    assert collapsed["loss"] > 700 and collapsed["perplexity"] == math.inf
    checkpoint.model.model.norm.weight.data[0] = math.nan
    with pytest.raises(NonFiniteError, match="computes NaN"):
        evaluate(checkpoint, DOCUMENTS)


def test_the_real_model_on_the_five_stories(stories_dir: Path, data_dir: Path) -> None:
    checkpoint = load(stories_dir, device="cpu")
    file = data_dir / "text" / "tinystories_sample.jsonl"
    result = evaluate(checkpoint, file, max_length=256)
    assert result["loss"] == pytest.approx(1.251, abs=5e-4)
    losses = sequence_losses(
        checkpoint, cut(checkpoint.tokenizer, read_documents(file), 256, "documents")
    )
    assert losses == pytest.approx([1.288, 1.286, 0.952, 1.464, 1.227], abs=5e-4)
