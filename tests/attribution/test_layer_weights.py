"""Learned weights of layers: equal ones change no bit, parts add up, files belong to one index and method."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from postlude.attribution import BM25, EKFAC, TRAK, GradCos, GradDot, LoGRA, LoRIF, RepSim
from postlude.attribution.build import build
from postlude.attribution.engine import Attributor
from postlude.attribution.index import Index
from postlude.attribution.layer_weights import LayerWeights, Learning, contributions, learn
from postlude.attribution.queries import record_queries
from postlude.attribution.query import learn_weights, query, scores
from postlude.attribution.ranking import rank
from postlude.errors import OutputExistsError, SettingsError, StoreError
from postlude.runs.checkpoint import Checkpoint

from .small import checkpoint, collection, texts

TRAIN, ASKED = texts(24), texts(12, seed=1)
METHODS = [
    LoRIF(rank=2, projection_factor=2, format="fp32", curvature="dual"),
    LoRIF(rank=1, projection_factor=4, format="int8", curvature="truncated", curvature_rank=5),
    GradDot(projection_factor=2, format="fp32"),
    GradCos(projection_factor=2, format="fp32"),
    LoGRA(side=6, format="fp32", curvature="exact"),
    TRAK(side=6, format="fp32"),
    EKFAC(),
    EKFAC(query_rank=2),
]
SOME = "*layers.0*"


@pytest.fixture(scope="module")
def given() -> Checkpoint:
    return checkpoint()


@pytest.fixture(scope="module")
def lorif(given: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("weights")
    method = LoRIF(rank=1, projection_factor=2, format="fp32")
    return build(given, TRAIN, method, folder / "index", collection=collection(layers=SOME))[0]


@pytest.fixture(scope="module")
def learned(given: Checkpoint, lorif: Index) -> LayerWeights:
    return learn_weights(lorif, ASKED, checkpoint=given)


def weights_of(index: Index, method: Attributor, values: torch.Tensor) -> LayerWeights:
    method_ = {"name": method.name, "settings": dataclasses.asdict(method)}
    layers = tuple(layer.module for layer in index.layers)
    return LayerWeights(layers, values, index.hash(), method_)


@pytest.mark.parametrize("method", METHODS, ids=lambda one: one.name)
def test_weights_scale_the_parts_of_layers(
    given: Checkpoint, method: Attributor, tmp_path: Path
) -> None:
    index, _ = build(
        given, TRAIN, method, tmp_path / "index", collection=collection(layers="*layers.0*_proj")
    )
    queries = record_queries(index, given, ASKED[:3])
    plain = method.score(index, queries).total
    parts = contributions(method, index, queries)
    assert parts.shape == (len(index.layers), 3, len(TRAIN))
    torch.testing.assert_close(parts.sum(0), plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))

    ones = weights_of(index, method, torch.ones(len(index.layers), dtype=torch.float64))
    assert torch.equal(method.score(index, queries.weighted(ones.named())).total, plain)

    values = torch.rand(len(index.layers), generator=torch.Generator().manual_seed(0)).double()
    some = weights_of(index, method, values / values.mean())
    weighted = queries.weighted(some.named())
    expected = torch.einsum("l,lqn->qn", some.values.float(), parts)
    close = {"rtol": 2e-4, "atol": 2e-5 * float(expected.abs().max())}
    # A query that is cut to a rank is cut before it is multiplied.
    found = method.score(index, weighted).total
    torch.testing.assert_close(found, expected, **close)
    ranking = rank(method, index, weighted, 5)
    torch.testing.assert_close(ranking.scores, expected.topk(5).values, **close)
    given_all = scores(index, ASKED[:3], method=method, weights=some, checkpoint=given)
    torch.testing.assert_close(given_all, found)


@pytest.mark.parametrize("method", [METHODS[0], METHODS[4], METHODS[6]], ids=lambda one: one.name)
def test_parts_by_layer_and_token_are_those_of_the_weighted_score(
    given: Checkpoint, method: Attributor, tmp_path: Path
) -> None:
    index, _ = build(
        given, TRAIN, method, tmp_path / "index", collection=collection(layers="*layers.0*_proj")
    )
    values = torch.arange(1, len(index.layers) + 1).double()
    some = weights_of(index, method, values / values.mean())
    (answer,) = query(
        index, ASKED[:1], top=3, layers=True, tokens=True, weights=some, checkpoint=given
    )
    largest = abs(answer.results[0].score)
    for hit in answer.results:
        assert hit.layers is not None and hit.tokens is not None and hit.query_tokens is not None
        for total in (
            sum(hit.layers.values()),
            sum(piece.score for piece in hit.tokens),
            sum(piece.score for piece in hit.query_tokens),
        ):
            assert total == pytest.approx(hit.score, rel=1e-3, abs=1e-3 * largest)


def test_learning_is_repeatable_and_raises_the_signal(
    given: Checkpoint, lorif: Index, learned: LayerWeights, tmp_path: Path
) -> None:
    again = lorif.learn_weights(ASKED, tmp_path / "weights.safetensors", checkpoint=given)
    assert torch.equal(again.values, learned.values)
    assert learned.learned["loss_after"] < learned.learned["loss_before"]
    assert len(learned.notes()) == 2
    many = dataclasses.replace(learned, learned={**learned.learned, "queries": 50})
    assert len(many.notes()) == 1
    assert (learned.learned["k"], learned.learned["queries"]) == (10, 12)
    assert float(learned.values.mean()) == pytest.approx(1)
    loaded = LayerWeights.load(tmp_path / "weights.safetensors")
    assert torch.equal(loaded.values, learned.values) and loaded.named() == learned.named()
    assert loaded.method == learned.method and loaded.index == lorif.hash()
    plain, weighted = (
        query(lorif, ASKED[0]["text"], top=5, checkpoint=given, weights=one)[0]
        for one in (None, tmp_path / "weights.safetensors")
    )
    assert [hit.score for hit in plain.results] != [hit.score for hit in weighted.results]


def test_learning_from_a_sample_of_the_examples(given: Checkpoint, lorif: Index) -> None:
    queries = record_queries(lorif, given, ASKED)
    method = LoRIF(rank=1, projection_factor=2, format="fp32")
    some = learn(method, lorif, queries, Learning(examples=15, seed=1))
    assert some.learned["examples"] == 15
    number = torch.tensor([3, 7])
    whole = contributions(method, lorif, queries)
    assert torch.equal(contributions(method, lorif, queries, examples=number), whole[:, :, number])


def test_weights_of_another_index_or_layer_set_or_method(
    given: Checkpoint, lorif: Index, learned: LayerWeights, tmp_path: Path
) -> None:
    method = LoRIF(rank=1, projection_factor=2, format="fp32")
    other, _ = build(
        given, TRAIN[:20], method, tmp_path / "other", collection=collection(layers=SOME)
    )
    with pytest.raises(SettingsError, match=r"learned for another index .* than .*other"):
        query(other, "a bird", weights=learned, checkpoint=given)
    fewer, _ = build(
        given, TRAIN, method, tmp_path / "fewer", collection=collection(layers="*q_proj")
    )
    expected = (
        r"weights are of 7 layers and .* keeps 2 \(not in the index: 6, .* without a weight: 1"
    )
    with pytest.raises(SettingsError, match=expected):
        query(fewer, "a bird", weights=learned, checkpoint=given)
    with pytest.raises(SettingsError, match=r"settings damping 0\.5 \(asked with 2\.0\)"):
        query(
            lorif,
            "a bird",
            method=dataclasses.replace(method, damping=2.0),
            weights=learned,
            checkpoint=given,
        )
    with pytest.raises(SettingsError, match="the method lorif, not graddot"):
        query(lorif, "a bird", method=GradDot(), weights=learned, checkpoint=given)


def test_too_few_queries_or_examples(given: Checkpoint, lorif: Index) -> None:
    with pytest.raises(SettingsError, match=r"3 queries are fewer than k, 10: .*\(--k 3\)"):
        learn_weights(lorif, ASKED[:3], checkpoint=given)
    assert learn_weights(lorif, ASKED[:3], Learning(k=3), checkpoint=given).learned["k"] == 3
    with pytest.raises(SettingsError, match=r"1 query is fewer than k, 10"):
        learn_weights(lorif, "a bird", checkpoint=given)
    with pytest.raises(SettingsError, match=r"has 24 examples, .* the 30 best"):
        learn_weights(lorif, ASKED, Learning(k=30), checkpoint=given)


@pytest.mark.parametrize("method", [BM25(), RepSim()], ids=lambda one: one.name)
def test_methods_without_layers_have_no_weights(
    given: Checkpoint, learned: LayerWeights, method: Attributor, tmp_path: Path
) -> None:
    index, _ = build(given, TRAIN, method, tmp_path / "index", collection=collection())
    with pytest.raises(SettingsError, match=f"a score of {method.name} is no sum over layers"):
        learn_weights(index, ASKED, checkpoint=given)
    with pytest.raises(SettingsError, match=r"weights are of 7 layers and .* keeps 0"):
        query(index, "a bird", weights=learned, checkpoint=given)


def test_files_of_weights(learned: LayerWeights, tmp_path: Path) -> None:
    path = learned.save(tmp_path / "deep" / "weights.safetensors")
    with pytest.raises(OutputExistsError, match="already exists"):
        learned.save(path)
    learned.save(path, overwrite=True)
    with pytest.raises(StoreError, match="There is no file"):
        LayerWeights.load(tmp_path / "none.safetensors")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(StoreError, match="is damaged"):
        LayerWeights.load(path)
    save_file({"weights": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(StoreError, match="holds no weights of layers"):
        LayerWeights.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", ["k", "steps", "examples", "regularizer", "rate"])
def test_settings_of_learning_out_of_range(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} is -1"):
        Learning(**{name: -1})
