"""Asking an index: the ranking against all scores, and the parts of a score against the score."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import postlude as pl
from postlude import _front_door
from postlude.attribution import BM25, EKFAC, TRAK, GradCos, GradDot, LoGRA, LoRIF, RepSim
from postlude.attribution.build import build
from postlude.attribution.engine import Attributor
from postlude.attribution.index import Index
from postlude.attribution.queries import record_queries
from postlude.attribution.query import method_of, query
from postlude.attribution.ranking import rank
from postlude.errors import DataError, SettingsError, StoreError
from postlude.runs.checkpoint import Checkpoint

from .small import WORDS, checkpoint, collection, texts, write

TRAIN, ASKED = texts(20), texts(3, seed=1)
LINEAR = [
    LoRIF(rank=2, projection_factor=2, format="fp32", curvature="dual"),
    LoRIF(rank=1, projection_factor=2, format="fp32", curvature="truncated", curvature_rank=5),
    LoRIF(rank=2, projection_factor=4, format="bf16", curvature="exact"),
    GradDot(projection_factor=2, format="fp32"),
    GradCos(projection_factor=2, format="fp32"),
    LoGRA(side=6, format="fp32"),
    TRAK(side=6, format="fp32"),
    EKFAC(),
    RepSim(format="fp32"),
    BM25(),
]


@pytest.fixture(scope="module")
def given() -> Checkpoint:
    return checkpoint()


@pytest.fixture(scope="module")
def lorif(given: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Three shards; its curvature is dual."""
    folder = tmp_path_factory.mktemp("lorif")
    data = write(folder / "train.jsonl", TRAIN)
    method = LoRIF(rank=2, projection_factor=2, format="fp32")
    return build(given, data, method, folder / "index", collection=collection())[0]


@pytest.mark.parametrize("method", LINEAR, ids=lambda one: f"{one.name}")
def test_the_parts_add_up_to_the_score(
    given: Checkpoint, method: Attributor, tmp_path: Path
) -> None:
    index, _ = build(given, TRAIN, method, tmp_path / "index", collection=collection())
    (answer,) = query(index, ASKED[:1], top=4, layers=True, tokens=True, checkpoint=given)
    # Stored in bf16, what the model computes again differs by the rounding.
    tolerance = 2e-2 if getattr(method, "format", "") == "bf16" else 2e-4
    for hit in answer.results:
        size = max(abs(hit.score), 0.01 * abs(answer.results[0].score))
        assert hit.tokens is not None and hit.query_tokens is not None
        for parts in (hit.tokens, hit.query_tokens):
            assert sum(part.score for part in parts) == pytest.approx(
                hit.score, rel=tolerance, abs=tolerance * size
            )
        if hit.layers is not None:
            assert sum(hit.layers.values()) == pytest.approx(hit.score, rel=1e-3, abs=1e-3 * size)
        assert "".join(part.text for part in hit.tokens) == f"<s>{TRAIN[hit.number]['text']}"
    assert "".join(part.text for part in answer.tokens) == f"<s>{ASKED[0]['text']}"
    assert (hit.layers is None) == (method.name in ("repsim", "bm25"))


@pytest.mark.parametrize("method", LINEAR, ids=lambda one: f"{one.name}")
def test_the_ranking_is_that_of_all_scores(
    given: Checkpoint, method: Attributor, tmp_path: Path
) -> None:
    index, _ = build(given, TRAIN, method, tmp_path / "index", collection=collection())
    queries = record_queries(index, given, ASKED)
    scores = method.score(index, queries).total
    found = rank(method, index, queries, 6)
    expected = scores.sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(found.scores, expected.values[:, :6], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores.gather(1, found.numbers), found.scores, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.mean, scores.double().mean(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        found.deviation, scores.double().std(1, correction=0), rtol=1e-4, atol=1e-6
    )


def test_mean_and_deviation_do_not_cancel(lorif: Index, given: Checkpoint) -> None:
    @dataclasses.dataclass(frozen=True)
    class Far(LoRIF):
        def score(self, *args: Any, **kwargs: Any) -> Any:
            found = super().score(*args, **kwargs)
            return dataclasses.replace(found, total=1e6 + found.total.sign())

    method = Far(rank=2, projection_factor=2, format="fp32", curvature="dual")
    queries = record_queries(lorif, given, ASKED)
    expected = method.score(lorif, queries).total.double().std(1, correction=0)
    torch.testing.assert_close(rank(method, lorif, queries, 2).deviation, expected)


def test_one_text_gives_an_answer_and_several_a_list(
    lorif: Index, given: Checkpoint, tmp_path: Path
) -> None:
    text = TRAIN[7]["text"]
    answer = lorif.query(text, top=3, checkpoint=given)
    assert answer.results[0].id == "text-7"
    assert len(answer.results) == 3 and answer.examples == 20
    assert answer.results[0].layers is None and answer.results[0].tokens is None
    assert "dual" in answer.curvature
    file = write(tmp_path / "queries.jsonl", [TRAIN[7], ASKED[0]])
    for source in (file, str(file), [TRAIN[7], ASKED[0]]):
        both = lorif.query(source, top=3, checkpoint=given)
        for found, expected in zip(both[0].results, answer.results, strict=True):
            # Other company in a batch changes the last digits.
            assert found.score == pytest.approx(expected.score, rel=1e-4)
            assert dataclasses.replace(found, score=expected.score) == expected
        assert [one.id for one in both] == ["text-7", "text-0"]
    assert len(lorif.query(text, top=99, checkpoint=given).results) == 20
    scores = lorif.scores([text], checkpoint=given)
    assert scores.shape == (1, 20) and int(scores.argmax()) == 7


def test_other_settings_and_methods_of_the_same_index(lorif: Index, given: Checkpoint) -> None:
    text = ASKED[0]["text"]
    usual = lorif.query(text, checkpoint=given)
    damped = dataclasses.replace(method_of(lorif), damping=100.0)  # type: ignore[type-var]
    other = lorif.query(text, method=damped, checkpoint=given)
    assert other.results[0].score < usual.results[0].score
    assert lorif.query(text, method=GradCos(), checkpoint=given).unit == "cosine"
    with pytest.raises(
        SettingsError, match=r"for lorif and can answer: lorif, .*graddot.* --method bm25"
    ):
        lorif.query(text, method=BM25(), checkpoint=given)
    with pytest.raises(SettingsError, match="for logra build its own"):
        lorif.query(text, method=LoGRA(), checkpoint=given)
    wider = dataclasses.replace(method_of(lorif), rank=4)  # type: ignore[type-var]
    with pytest.raises(SettingsError, match=r"with other settings: rank 2 \(asked for 4\)\. "):
        lorif.query(text, method=wider, checkpoint=given)
    with pytest.raises(SettingsError, match="top is 0"):
        lorif.query(text, top=0, checkpoint=given)


def test_what_was_fitted_is_kept_and_gives_the_same(given: Checkpoint, tmp_path: Path) -> None:
    method = LoRIF(rank=1, projection_factor=4, format="fp32", curvature="exact")
    index, _ = build(given, TRAIN, method, tmp_path / "index", collection=collection())
    fresh = index.query(ASKED[0]["text"], checkpoint=given, keep=False)
    assert not (index.path / "curvature").exists()
    for _ in range(2):
        kept = Index(index.path).query(ASKED[0]["text"], checkpoint=given, data=TRAIN)
        scores = [hit.score for hit in fresh.results]
        assert [hit.score for hit in kept.results] == pytest.approx(scores, rel=1e-5)
    assert (index.path / "curvature").is_dir()


def test_long_sequences_are_cut_and_counted(given: Checkpoint, tmp_path: Path) -> None:
    long = {"id": "long", "text": " ".join(WORDS * 3)}
    train = [*TRAIN[:4], long]
    method = LoRIF(projection_factor=4)
    index, report = build(given, train, method, tmp_path / "index", collection=collection())
    length = len(given.tokenizer(long["text"])["input_ids"])
    assert (report["truncated"], report["truncated_tokens"]) == (1, length - 64)
    answer = index.query(long["text"] + " and", tokens=True, checkpoint=given)
    assert (answer.count, answer.truncated) == (64, length + 4 - 64)
    assert answer.results[0].id == "long"
    assert (answer.results[0].count, answer.results[0].truncated) == (64, length - 64)
    assert len(answer.results[0].tokens or []) == 64


def test_another_model_and_changed_data_are_refused(
    lorif: Index, given: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match="built with another model"):
        lorif.query("a boat", checkpoint=checkpoint(seed=1))
    changed = write(tmp_path / "train.jsonl", [*TRAIN[:-1], {**ASKED[0], "id": "new"}])
    with pytest.raises(StoreError, match="has changed since"):
        Index(lorif.path).query("a boat", checkpoint=given, data=changed)
    with pytest.raises(DataError, match=r"There is no file .*gone\.jsonl"):
        Index(lorif.path).query("a boat", checkpoint=given, data=tmp_path / "gone.jsonl")
    with pytest.raises(SettingsError, match="built with a model in memory"):
        lorif.query("a boat")
    with pytest.raises(DataError, match=r"^the text of the query is empty.* Give it some words"):
        lorif.query("  ", checkpoint=given)


def test_the_front_door(tiny_llama_dir: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", TRAIN)
    method = LoRIF(rank=1, projection_factor=4, format="int8")
    index = pl.attribute(tiny_llama_dir, data, method, out=tmp_path / "index")
    assert index.report["examples"] == 20
    assert index.query(TRAIN[3]["text"], top=1).results[0].id == "text-3"
    again = Index(tmp_path / "index")
    assert again.query(TRAIN[3]["text"], top=1).results[0].id == "text-3"
    assert method_of(again) == method
    with pytest.raises(
        SettingsError, match="takes the name or the settings of an attribute method"
    ):
        pl.attribute(tiny_llama_dir, data, 3, out=tmp_path / "other")  # type: ignore[arg-type]


def test_the_forecast_is_within_a_tenth_of_the_bytes(given: Checkpoint, tmp_path: Path) -> None:
    from postlude.attribution.examples import Records
    from postlude.attribution.forecast import forecast
    from postlude.attribution.plan import Hardware

    machine = Hardware("a machine", 1e10, 1e10, 1e9, 1e9)
    records, shards = texts(80), collection(shard_examples=80)
    for method in (LoRIF(rank=2, format="int8"), LoGRA(side=8, format="fp32")):
        expected = forecast(given, Records(records), method, shards, machine)
        assert expected is not None and expected.seconds > 0
        _, report = build(
            given,
            records,
            method,
            tmp_path / method.name,
            collection=collection(shard_examples=80),
        )
        assert expected.bytes == pytest.approx(report["bytes"], rel=0.1)
        assert "80 examples of about" in str(expected)
    assert forecast(given, Records(records), BM25(), shards, machine) is None


def test_the_page_of_an_answer(lorif: Index, given: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "page.html"
    answers = _front_door.attribution_query(
        lorif, [TRAIN[2], ASKED[0]], checkpoint=given, top=2, html=out, command="postlude attribute"
    )
    page = out.read_text(encoding="utf-8")
    assert "Score by layer" in page and "postlude attribute" in page
    assert page.count("<li>") >= 4
    assert "text-2" in page
    assert json.dumps([answer.to_dict() for answer in answers])


def test_an_index_of_any_method_opens_in_a_process_of_its_own(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    # What a method keeps has to be known although nothing has imported the method's file.
    build(pl.load(tiny_llama_dir), ["one text", "another text"], BM25(), tmp_path / "index")
    code = (
        "from postlude.attribution.index import Index; "
        f"print(Index({str(tmp_path / 'index')!r}).representation.kind)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "tokens", done.stderr
