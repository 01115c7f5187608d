from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from postlude.attribution.build import build
from postlude.attribution.examples import Records, tokenize
from postlude.attribution.index import Index
from postlude.attribution.lorif import LoRIF
from postlude.attribution.queries import record_queries, record_rows
from postlude.attribution.representation import FactorRepresentation
from postlude.errors import SettingsError
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.gradients import Projection

from .small import checkpoint, collection, gradients, texts

TRAIN, ASKED = texts(20), texts(3, seed=9)
# Everything kept: no projection, every column of the factors, nothing rounded.
WHOLE = LoRIF(rank=64, projection_factor=1, format="fp32", curvature_rank=10**6)
# Two layers of the first block, one narrow: D = 32 * 16 and 32 * 32.
SOME = "*layers.0*k_proj,*layers.0*q_proj"


def made(given: Checkpoint, method: LoRIF, path: Path, **settings: Any) -> Index:
    index, _ = build(given, TRAIN, method, path, collection=collection(**settings))
    return index


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def rank_correlation(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_an_index_of_everything_holds_the_gradients_of_autograd(
    model_type: str, tmp_path: Path
) -> None:
    given = checkpoint(model_type, torch.float64)
    method = dataclasses.replace(WHOLE, factor_iterations=1)
    index = made(given, method, tmp_path / "index")
    assert len(index.layers) == len(set(given.anatomy.linears()))
    for number in (0, 7, 19):
        expected = gradients(given, TRAIN[number])
        for layer in index.layers:
            rows = index.layer(layer.module).rows(number, number + 1)
            assert relative(rows.dense()[0], expected[layer.module]) < 1e-6


@pytest.mark.parametrize("curvature", ["dual", "exact", "truncated"])
def test_scores_of_everything_are_the_exact_damped_inverse(curvature: Any, tmp_path: Path) -> None:
    given = checkpoint(dtype=torch.float64)
    index = made(given, WHOLE, tmp_path / "index", layers=SOME)
    queries = record_queries(index, given, ASKED)
    method = dataclasses.replace(WHOLE, curvature=curvature, oversampling=0)
    found = method.score(index, queries, per_layer=True)
    train = [gradients(given, record) for record in TRAIN]
    asked = [gradients(given, record) for record in ASKED]
    total = torch.zeros(len(ASKED), len(TRAIN), dtype=torch.float64)
    # In fp32, what is left of a gradient outside of all directions is rounding, weighted by 1 / lam.
    tolerance = 2e-4 if curvature == "truncated" else 2e-5
    assert found.layers is not None
    for layer in index.layers:
        g = torch.stack([one[layer.module].flatten() for one in train])
        q = torch.stack([one[layer.module].flatten() for one in asked])
        h = g.T @ g
        lam = 0.5 * h.trace() / len(h)
        part = q @ torch.linalg.solve(h + lam * torch.eye(len(h), dtype=torch.float64), g.T)
        assert relative(found.layers[layer.module], part) < tolerance
        total += part
    assert relative(found.total, total) < tolerance


def test_projected_factors_are_those_of_the_projected_gradient(tmp_path: Path) -> None:
    given = checkpoint(dtype=torch.float64)
    method = LoRIF(rank=2, projection_factor=4, format="fp32")
    index = made(given, method, tmp_path / "index", seed=5)
    projection = Projection(4, seed=5)
    expected = gradients(given, TRAIN[3])
    for layer in index.layers:
        sides = []
        for side, n in (("in", layer.in_features), ("out", layer.out_features)):
            signs = projection.signs(layer.module, side, n)  # type: ignore[arg-type]
            assert signs is not None
            sides.append(signs.double() * projection.scale(n))
        whole = sides[0].T @ expected[layer.module] @ sides[1]
        rows = index.layer(layer.module).rows(3, 4)
        u, s, vh = torch.linalg.svd(whole)
        best = (u[:, :2] * s[:2]) @ vh[:2]
        lost = (rows.dense()[0] - whole).square().sum() / whole.square().sum()
        optimum = (best - whole).square().sum() / whole.square().sum()
        assert float(lost - optimum) < 2e-3


@pytest.fixture(scope="module")
def plain() -> Checkpoint:
    return checkpoint()


@pytest.fixture(scope="module")
def small_index(plain: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return made(plain, LoRIF(format="fp32"), tmp_path_factory.mktemp("lorif") / "index")


@pytest.mark.parametrize("changes", [{"tokens_per_batch": 1}, {"shard_examples": 3}])
def test_batches_and_shards_do_not_matter(tmp_path: Path, changes: dict[str, int]) -> None:
    given = checkpoint(dtype=torch.float64)
    method = LoRIF(format="fp32")
    made(given, method, tmp_path / "one")
    made(given, method, tmp_path / "other", **changes)
    indices = [Index(tmp_path / name) for name in ("one", "other")]
    for layer in indices[0].layers:
        rows = [index.layer(layer.module).rows() for index in indices]
        assert relative(rows[1].dense(), rows[0].dense()) < 1e-6
    scores = [method.score(one, record_queries(one, given, ASKED)).total for one in indices]
    assert relative(scores[1], scores[0]) < 2e-5


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3", "mistral"])
def test_padding_changes_no_factor(model_type: str) -> None:
    given = checkpoint(model_type, torch.float64)
    records = Records([TRAIN[0], {"text": TRAIN[1]["text"] * 3}])
    examples = tokenize(given.tokenizer, records, 0, 2, 64, collection())
    assert len(examples[0].tokens) < len(examples[1].tokens)
    with FactorRepresentation(format="fp32").recorder(given, collection()) as record:
        alone = record_rows(record, examples[:1], 1000)
        padded = record_rows(record, examples, 1000)
    for name, rows in alone.items():
        torch.testing.assert_close(padded[name][:1], rows, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("format", ["int8", "bf16"])
def test_fewer_bits_keep_the_ranking(
    plain: Checkpoint, small_index: Index, tmp_path: Path, format: Any
) -> None:
    method = LoRIF(format="fp32")
    queries = record_queries(small_index, plain, ASKED)
    expected = method.score(small_index, queries).total
    method = LoRIF(format=format)
    index = made(plain, method, tmp_path / "index")
    queries = record_queries(index, plain, ASKED)
    assert queries.representation.format == "fp32"  # type: ignore[attr-defined]
    found = method.score(index, queries).total
    assert rank_correlation(found.flatten(), expected.flatten()) > 0.999
    for ours, theirs in zip(found, expected, strict=True):
        assert float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1]) > 0.999
    whole = small_index.representation.row_bytes(index.layers)
    assert (
        index.representation.row_bytes(index.layers) <= whole * {"int8": 0.5, "bf16": 0.5}[format]
    )


def test_a_copy_finds_itself(plain: Checkpoint, small_index: Index) -> None:
    queries = record_queries(small_index, plain, TRAIN[:10])
    for method in (
        LoRIF(format="fp32"),
        LoRIF(format="fp32", curvature="truncated", curvature_rank=8),
        LoRIF(format="fp32", curvature="exact", rule="paper", damping=0.1),
    ):
        assert method.score(small_index, queries).total.argmax(1).tolist() == list(range(10))


def test_a_kept_fit_gives_the_same_bits_and_belongs_to_one_index(
    plain: Checkpoint, small_index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    from postlude.attribution.curvature import Truncated

    queries = record_queries(small_index, plain, ASKED)
    method = LoRIF(format="fp32", curvature="truncated", curvature_rank=8)
    fresh = method.score(small_index, queries).total
    kept = method.score(small_index, queries, keep=True).total

    def fitted_again(*_: Any) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr(Truncated, "fit", fitted_again)
    again = method.score(small_index, queries, keep=True).total
    assert torch.equal(fresh, kept)
    assert torch.equal(kept, again)
    (folder,) = (small_index.path / "curvature").iterdir()
    assert small_index.hash() in (folder / "manifest.json").read_text()
    with pytest.raises(AssertionError, match="fitted again"):  # another damping is another fit
        dataclasses.replace(method, damping=1.0).score(small_index, queries, keep=True)


def test_rank_zero_is_the_inner_product_over_the_damping(
    plain: Checkpoint, small_index: Index
) -> None:
    queries = record_queries(small_index, plain, ASKED)
    method = LoRIF(format="fp32", curvature_rank=0, tail="truncated")
    found = method.score(small_index, queries, per_layer=True).layers
    assert found is not None
    for layer in small_index.layers:
        rows = small_index.layer(layer.module).rows().flat()
        asked = queries.rows(layer).flat()
        lam = 0.5 * float(rows.square().sum()) / layer.size
        assert relative(found[layer.module], asked @ rows.T / lam) < 1e-5


def test_layers_and_losses_can_be_chosen(plain: Checkpoint, tmp_path: Path) -> None:
    method = LoRIF(format="fp32")
    sums = made(plain, method, tmp_path / "sum", layers="*mlp*")
    means = made(plain, method, tmp_path / "mean", layers="*mlp*", loss="mean")
    assert len(sums.layers) == 6
    lengths = sums.tensor("tokens") - 1
    assert torch.equal(lengths, means.tensor("tokens") - 1)
    torch.testing.assert_close(means.tensor("loss"), sums.tensor("loss") / lengths)
    for layer in sums.layers:
        whole = sums.layer(layer.module).rows().dense() / lengths[:, None, None]
        assert relative(means.layer(layer.module).rows().dense(), whole) < 1e-4


def test_bytes_are_those_that_were_foretold(small_index: Index, tmp_path: Path) -> None:
    given = checkpoint()
    for method in (LoRIF(format="int8", rank=3), LoRIF(format="bf16")):
        index = made(given, method, tmp_path / method.format, shard_examples=20)
        stored = sum(
            tensor.numel() * tensor.element_size()
            for shard in index.store.shards
            for tensor in map(shard.tensor, shard.names())
        )
        row = index.representation.row_bytes(index.layers)
        assert stored == len(index) * (row + 12)  # and its loss, tokens and tokens cut off


def test_refused_settings(small_index: Index, plain: Checkpoint) -> None:
    for settings, message in (
        ({"damping": 0.0}, "damping is 0.0; expected a positive"),
        ({"rule": "other"}, "rule is 'other'; expected release, paper"),
        ({"tail": "none"}, "tail is 'none'"),
        ({"curvature": "dul"}, "curvature is 'dul'"),
        ({"rank": 0}, "rank is 0"),
        ({"projection_factor": 0}, "projection factor is 0"),
        ({"format": "fp16"}, "whose range gradients leave"),
        ({"format": "int3"}, "format is 'int3'; expected fp32, bf16, int8"),
        ({"curvature_rank": -1}, "curvature_rank is -1"),
    ):
        with pytest.raises(SettingsError, match=message):
            LoRIF(**settings)  # type: ignore[arg-type]
    queries = record_queries(small_index, plain, ASKED)
    with pytest.raises(SettingsError, match=r"format fp32 \(asked for int8\)"):
        LoRIF(format="int8").score(small_index, queries)
    with pytest.raises(SettingsError, match="keeps no gradients of 'lm_head'"):
        small_index.layer("lm_head")
