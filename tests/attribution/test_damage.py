"""What a quantized model lost, text by text, and as something to attribute."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from postlude import _front_door
from postlude.attribution import BM25, GradDot
from postlude.attribution.build import build
from postlude.attribution.damage import damage, divergence
from postlude.attribution.examples import Records
from postlude.attribution.queries import record_queries
from postlude.attribution.query import scores
from postlude.errors import SettingsError, UnknownNameError
from postlude.quantization import RTN
from postlude.quantization.engine import quantize
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.gradients import linear_paths

from .small import checkpoint, collection, texts, write

TRAIN, QUERIES = texts(9), texts(4, seed=3)


def twin(given: Checkpoint) -> Checkpoint:
    return dataclasses.replace(given, model=copy.deepcopy(given.model))


@pytest.fixture(scope="module")
def exact() -> Checkpoint:
    return checkpoint(dtype=torch.float64)


@pytest.fixture(scope="module")
def rounded(exact: Checkpoint) -> Checkpoint:
    """Its weights on a grid of 3 bits, still as weights."""
    found = twin(exact)
    small = quantize(twin(exact), RTN(weights=3, activations=16, kv=16), None)
    for path in linear_paths(exact.anatomy):
        weight = small.model.get_submodule(path).dense_weight()
        found.model.get_submodule(path).weight.data.copy_(weight)
    return found


def log_probabilities(given: Checkpoint, text: str) -> tuple[Tensor, Tensor]:
    """``[tokens, words]`` of the predicted tokens of a text, and those tokens."""
    ids = torch.tensor([given.tokenizer(text)["input_ids"]])
    return given.model(ids, use_cache=False).logits[0, :-1].log_softmax(1), ids[0, 1:]


def test_every_measure_by_its_definition(exact: Checkpoint, rounded: Checkpoint) -> None:
    found = damage(rounded, exact, Records.open(QUERIES), collection())
    for number, record in enumerate(QUERIES):
        with torch.no_grad():
            q, words = log_probabilities(exact, record["text"])
            p, _ = log_probabilities(rounded, record["text"])
        at = torch.arange(len(words)), words
        expected = {
            "kl": (q.exp() * (q - p)).sum(1).mean(),
            "gap": (q[at] - p[at]).mean(),
            "loss": -p[at].mean(),
        }
        for name, value in expected.items():
            assert float(getattr(found, name)[number]) == pytest.approx(float(value), rel=1e-6)
        assert int(found.tokens[number]) == len(words)


def test_the_divergence_is_what_is_differentiated(
    exact: Checkpoint, rounded: Checkpoint, tmp_path: Path
) -> None:
    """Products with the gradient of KL by autograd; and none of it is left where nothing was lost."""
    method = GradDot(projection_factor=1, format="fp32")
    index, _ = build(
        rounded, write(tmp_path / "train.jsonl", TRAIN), method, tmp_path / "index",
        collection=collection(),
    )  # fmt: skip
    found = scores(index, QUERIES, checkpoint=rounded, output=divergence(exact))
    paths = linear_paths(rounded.anatomy)

    def gradients(loss: Tensor) -> list[Tensor]:
        weights = [rounded.model.get_submodule(path).weight for path in paths]
        return list(torch.autograd.grad(loss, weights))

    for row, query in enumerate(QUERIES[:2]):
        with torch.no_grad():
            q, _ = log_probabilities(exact, query["text"])
        p, _ = log_probabilities(rounded, query["text"])
        lost = gradients((q.exp() * (q - p)).sum())
        for column, one in enumerate(TRAIN[:3]):
            p, words = log_probabilities(rounded, one["text"])
            taught = gradients(-p[torch.arange(len(words)), words].sum())
            expected = sum(float((a * b).sum()) for a, b in zip(lost, taught, strict=True))
            assert float(found[row, column]) == pytest.approx(expected, rel=1e-3)
    nothing = record_queries(index, rounded, QUERIES, divergence(rounded))
    assert float(nothing.rows(index.layers[0]).energies().max()) < 1e-20


def test_texts_that_lost_most_are_written_and_asked_about(
    tmp_path: Path, exact: Checkpoint, rounded: Checkpoint
) -> None:
    model, reference = (
        dataclasses.replace(one, model=copy.deepcopy(one.model).float()) for one in (rounded, exact)
    )
    lost = tmp_path / "lost.jsonl"
    found = _front_door.attribution_damage(model, QUERIES, lost, reference=reference, top=2)
    order = found.damage.kl.argsort(descending=True)[:2].tolist()
    assert found.numbers == order
    written = [json.loads(line) for line in lost.read_text().splitlines()]
    assert written == [QUERIES[number] for number in sorted(order)]
    index, _ = build(model, TRAIN, GradDot(), tmp_path / "index", collection=collection())
    asked: dict[str, Any] = {"checkpoint": model, "top": 3, "overwrite": True}
    chosen = [
        _front_door.attribution_select(index, str(lost), tmp_path / "o.jsonl", **asked, **more)
        for more in ({"reference": reference}, {})
    ]
    assert chosen[0].strengths != chosen[1].strengths


def test_what_cannot_be_asked_is_refused(
    tmp_path: Path, exact: Checkpoint, rounded: Checkpoint
) -> None:
    out = tmp_path / "lost.jsonl"
    with pytest.raises(UnknownNameError, match="kl"):
        _front_door.attribution_damage(rounded, QUERIES, out, reference=exact, top=1, by="k")
    with pytest.raises(SettingsError, match="top is 5; expected 1 to 4"):
        _front_door.attribution_damage(rounded, QUERIES, out, reference=exact, top=5)
    other = checkpoint(vocab_size=300)
    with pytest.raises(SettingsError, match="vocabulary of 300 words"):
        _front_door.attribution_damage(rounded, QUERIES, out, reference=other, top=1)
    assert not out.exists()
    index, _ = build(rounded, TRAIN, BM25(), tmp_path / "index", collection=collection())
    with pytest.raises(SettingsError, match="built for bm25, which keeps no gradients"):
        record_queries(index, rounded, QUERIES, divergence(exact))
