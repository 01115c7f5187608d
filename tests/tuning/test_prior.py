from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from postlude.errors import DataError, OutputExistsError, RunDirectoryError, SettingsError
from postlude.numerics.weighted_likelihood import COLUMNS
from postlude.runs.vocabulary import check_vocabulary
from postlude.surgery.head import LanguageHead
from postlude.tuning import prior as module
from postlude.tuning.batches import collate
from postlude.tuning.examples import Examples, read_examples
from postlude.tuning.prior import Prior, columns_of, compute_prior, identity
from postlude.tuning.reference import Reference, cast


@pytest.fixture
def examples(demonstrations: Path, tiny_tokenizer: Any) -> Examples:
    return read_examples(demonstrations, tiny_tokenizer, 64)


def reference_of(checkpoint: Any) -> Reference:
    return Reference(checkpoint.model, LanguageHead(checkpoint.model, checkpoint.anatomy))


def test_stored_columns_are_those_of_the_whole_distribution(
    tiny: Callable[..., Any], examples: Examples, tmp_path: Path
) -> None:
    checkpoint = tiny()
    compute_prior(checkpoint, examples, tmp_path / "prior", max_length=64)
    stored = Prior.load(tmp_path / "prior")
    at = 0
    for index in range(len(examples)):
        ids = examples.ids(index)
        with torch.no_grad():
            log_p = checkpoint.model(input_ids=ids[None]).logits[0].log_softmax(-1)
        for place in examples.targets(index).nonzero()[:, 0].tolist():
            row, target = log_p[place - 1].double(), int(ids[place])
            p = row.exp()
            top = row.topk(20).values.log_softmax(0)
            expected = {
                "log_probability": row[target],
                "mass_above": p[row > row[target]].sum(),
                "mass_tied": p[row == row[target]].sum() - p[target],
                "entropy": -(p * row).sum(),
                "top_entropy": -(top.exp() * top).sum(),
            }
            for name in COLUMNS:
                assert stored.columns[name][at] == pytest.approx(expected[name].item(), abs=1e-5), (
                    name
                )
            at += 1
    assert at == len(stored.columns["entropy"]) == stored.manifest["response_tokens"]
    assert stored.columns["mass_above"].dtype == torch.float32


def test_cached_is_online_exactly(
    tiny: Callable[..., Any], examples: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny()
    rows = [[index] for index in range(len(examples))]
    # One batch of everything in both, in the same order of rows.
    monkeypatch.setattr(module, "_units", lambda examples: [[[index for [index] in rows]]])
    compute_prior(checkpoint, examples, tmp_path / "prior", max_length=64)
    stored = Prior.load(tmp_path / "prior")
    batch = collate(examples, rows, stored.columns)
    online = columns_of(reference_of(checkpoint), batch)
    for name in COLUMNS:
        assert torch.equal(batch[f"column.{name}"], getattr(online, name)), name


def test_other_batches_move_the_last_bits_at_most(
    tiny: Callable[..., Any], examples: Examples, tmp_path: Path
) -> None:
    checkpoint = tiny()
    compute_prior(checkpoint, examples, tmp_path / "prior", max_length=64)
    stored = Prior.load(tmp_path / "prior")
    for rows in ([[3], [1]], [[7, 2, 5]], [[i] for i in range(11)]):
        batch = collate(examples, rows, stored.columns)
        online = columns_of(reference_of(checkpoint), batch)
        for name in COLUMNS:
            torch.testing.assert_close(
                batch[f"column.{name}"], getattr(online, name), atol=2e-6, rtol=2e-6
            )


def test_a_killed_computation_resumes(
    tiny: Callable[..., Any], examples: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny()
    monkeypatch.setattr(module, "_UNIT_TOKENS", 60)
    compute_prior(checkpoint, examples, tmp_path / "whole", max_length=64)
    original, calls = module._unit, []

    def failing(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(module, "_unit", failing)
    with pytest.raises(KeyboardInterrupt):
        compute_prior(checkpoint, examples, tmp_path / "prior", max_length=64)
    assert not (tmp_path / "prior").exists()
    other = dataclasses.replace(examples, tokens=examples.tokens.flip(0))
    with pytest.raises(RunDirectoryError, match="belongs to another run"):
        compute_prior(checkpoint, other, tmp_path / "prior", max_length=64)
    compute_prior(checkpoint, examples, tmp_path / "prior", max_length=64)
    pieces = len(module._units(examples))
    assert len(calls) == pieces + 1  # what was finished is not computed again
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["prior", "whole"]
    whole, again = (
        (tmp_path / name / "columns.safetensors").read_bytes() for name in ("whole", "prior")
    )
    assert whole == again


def test_a_stale_prior_is_refused_with_the_reason(
    tiny: Callable[..., Any],
    examples: Examples,
    tmp_path: Path,
    tiny_tokenizer: Any,
    plain_tokenizer: Any,
) -> None:
    checkpoint = tiny()
    compute_prior(checkpoint, examples, tmp_path / "prior", max_length=64)
    stored = Prior.load(tmp_path / "prior")
    fits = identity(checkpoint.fingerprint(), tiny_tokenizer, examples)
    stored.check(fits)
    cut = dataclasses.replace(
        examples,
        tokens=examples.tokens[:20],
        response=examples.response[:20],
        starts=examples.starts[:2],
    )
    templated = type("T", (), {})()
    templated.__dict__.update(
        backend_tokenizer=tiny_tokenizer.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{{ messages }}",
    )
    cases = {
        "the reference model: computed with": identity(tiny(seed=1).fingerprint(), tiny_tokenizer, examples),
        "the tokenizer: computed with": identity(checkpoint.fingerprint(), plain_tokenizer, examples),
        "the chat template: computed with": identity(checkpoint.fingerprint(), templated, examples),
        r"the tokens \(data, truncation, or which": identity(checkpoint.fingerprint(), tiny_tokenizer, cut),
    }  # fmt: skip
    for message, expected in cases.items():
        with pytest.raises(DataError, match=message) as caught:
            stored.check(expected)
        assert str(caught.value).count("computed with ") == 1 + ("reference" in message)
    # Which of the two tokens of a response are learned is part of the tokens.
    moved = examples.response.clone()
    moved[int(examples.response.nonzero()[0])] = False
    other = dataclasses.replace(examples, response=moved)
    with pytest.raises(DataError, match="which of them are learned"):
        stored.check(identity(checkpoint.fingerprint(), tiny_tokenizer, other))


def test_the_type_to_compute_in_is_no_part_of_what_it_belongs_to(
    tiny: Callable[..., Any], examples: Examples, tmp_path: Path
) -> None:
    checkpoint = tiny()
    cast(checkpoint.model, torch.bfloat16)
    columns = []
    for dtype in (None, torch.bfloat16, torch.float64):
        about = compute_prior(
            checkpoint, examples, tmp_path / "prior", max_length=64, dtype=dtype, overwrite=True
        )
        assert about["identity"]["reference"] == checkpoint.fingerprint()
        columns.append(Prior.load(tmp_path / "prior").columns["entropy"])
    assert columns[2].dtype == torch.float32
    torch.testing.assert_close(columns[0], columns[2], atol=1e-5, rtol=1e-5)
    assert not torch.equal(columns[0], columns[1])


def test_damage_is_found(tiny: Callable[..., Any], examples: Examples, tmp_path: Path) -> None:
    folder = tmp_path / "prior"
    with pytest.raises(DataError, match="holds no prior"):
        Prior.load(folder)
    compute_prior(tiny(), examples, folder, max_length=64)
    with pytest.raises(OutputExistsError):
        compute_prior(tiny(), examples, folder, max_length=64)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(DataError, match="has format 99"):
        Prior.load(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        Prior.load(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    data = bytearray((folder / "columns.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "columns.safetensors").write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"columns\.safetensors is damaged"):
        Prior.load(folder)


def test_the_reference_is_left_as_it_was(tiny: Callable[..., Any], examples: Examples) -> None:
    checkpoint = tiny("gpt2")
    before = checkpoint.fingerprint()
    checkpoint.model.train()
    reference = reference_of(checkpoint)
    batch = collate(examples, [[0], [1]])
    first, second = reference(batch), reference(batch)
    assert torch.equal(first.hidden, second.hidden)  # no dropout
    assert not first.hidden.requires_grad and not first.weight.requires_grad
    assert checkpoint.model.training
    assert checkpoint.fingerprint() == before
    assert all(parameter.grad is None for parameter in checkpoint.model.parameters())


def test_another_vocabulary(
    tiny: Callable[..., Any], plain_tokenizer: Any, tiny_tokenizer: Any
) -> None:
    with pytest.raises(SettingsError, match="vocabulary of 300 words and the model one of 259"):
        check_vocabulary(tiny(), tiny(vocab_size=300))
    other = tiny()
    words = plain_tokenizer.get_vocab()
    swapped = {**words, "!": words['"'], '"': words["!"]}
    other.tokenizer = type(
        "T", (), {"get_vocab": lambda self: swapped, "__len__": lambda self: 259}
    )()
    with pytest.raises(SettingsError, match="The reference's tokenizer has other words"):
        check_vocabulary(tiny(), other)
    check_vocabulary(tiny(), tiny(seed=1))


def test_tokens_without_embedding(
    tiny: Callable[..., Any], examples: Examples, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="gives token 223, but the model has 100 embeddings"):
        compute_prior(tiny(vocab_size=100), examples, tmp_path / "prior", max_length=64)
