"""The methods beside LoRIF, each against something slow: one backward pass per example and dense solves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from postlude.attribution import BM25, EKFAC, TRAK, GradCos, GradDot, LoGRA, LoRIF, RepSim
from postlude.attribution.build import build
from postlude.attribution.engine import Attributor
from postlude.attribution.index import Index
from postlude.attribution.queries import record_queries
from postlude.attribution.trak import ensemble
from postlude.errors import SettingsError
from postlude.runs.checkpoint import Checkpoint

from .small import checkpoint, collection, gradients, texts

TRAIN, ASKED = texts(14), texts(3, seed=1)
# Two narrow layers: dense solves of the whole gradient stay small.
LAYERS = "*.0.self_attn.k_proj,*.1.self_attn.v_proj"
PATHS = ("model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.v_proj")


@pytest.fixture(scope="module")
def given() -> Checkpoint:
    return checkpoint(dtype=torch.float64)


def asked(
    given: Checkpoint, method: Attributor, folder: Path, per_layer: bool = False, **settings: Any
) -> Any:
    index, _ = build(
        given, TRAIN, method, folder / "index", collection=collection(layers=LAYERS, **settings)
    )
    queries = record_queries(index, given, ASKED)
    return method.score(index, queries, per_layer=per_layer)


@pytest.fixture(scope="module")
def slow(given: Checkpoint) -> dict[str, tuple[Tensor, Tensor]]:
    """Of every layer, flat gradients of the queries and of the training examples."""
    both = [[gradients(given, one) for one in records] for records in (ASKED, TRAIN)]
    return {
        path: tuple(torch.stack([one[path].flatten() for one in rows]) for rows in both)  # type: ignore[misc]
        for path in PATHS
    }


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(
        found.double(), expected.double(), atol=tolerance * scale, rtol=tolerance
    )


def test_graddot(given: Checkpoint, slow: dict[str, tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    found = asked(given, GradDot(projection_factor=1, format="fp32"), tmp_path, per_layer=True)
    expected = {path: q @ t.T for path, (q, t) in slow.items()}
    close(found.total, sum(expected.values()))  # type: ignore[arg-type]
    for path, one in expected.items():
        close(found.layers[path], one)


def test_gradcos_takes_one_norm_over_all_layers(
    given: Checkpoint, slow: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    found = asked(given, GradCos(projection_factor=1, format="fp32"), tmp_path)
    q, t = (torch.cat([pair[side] for pair in slow.values()], 1) for side in (0, 1))
    close(found.total, torch.nn.functional.cosine_similarity(q[:, None], t[None], dim=-1))
    assert float(found.total.abs().max()) <= 1 + 1e-6


def test_graddot_reads_an_index_of_factors(
    given: Checkpoint, slow: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    """With all columns kept the factors are the gradients."""
    whole = LoRIF(rank=32, projection_factor=1, format="fp32", factor_iterations=40)
    index, _ = build(given, TRAIN, whole, tmp_path / "i", collection=collection(layers=LAYERS))
    method = GradDot()
    found = method.score(index, record_queries(index, given, ASKED)).total
    close(found, sum(q @ t.T for q, t in slow.values()))  # type: ignore[arg-type]


@pytest.mark.parametrize("curvature", ["exact", "dual"])
def test_logra(
    given: Checkpoint, slow: dict[str, tuple[Tensor, Tensor]], tmp_path: Path, curvature: Any
) -> None:
    """A mean of outer products, damped by a tenth of its mean eigenvalue."""
    method = LoGRA(side=1000, format="fp32", curvature=curvature)
    found = asked(given, method, tmp_path, per_layer=True)
    for path, (q, t) in slow.items():
        h = t.T @ t / len(t)
        damped = h + 0.1 * h.trace() / len(h) * torch.eye(len(h), dtype=torch.float64)
        close(found.layers[path], q @ torch.linalg.solve(damped, t.T), 1e-3)


def log_odds_gradients(
    given: Checkpoint, record: dict[str, Any]
) -> tuple[dict[str, Tensor], float]:
    ids = torch.tensor([given.tokenizer(record["text"])["input_ids"]])
    given.model.zero_grad()
    logits = given.model(ids, use_cache=False).logits[0, :-1]
    p = logits.softmax(-1)[torch.arange(len(logits)), ids[0, 1:]]
    (p / (1 - p)).log().sum().backward()
    found = {
        path: given.model.get_submodule(path).weight.grad.T.clone().flatten() for path in PATHS
    }
    given.model.zero_grad()
    return found, float((1 - p).detach().mean())


def test_trak(given: Checkpoint, tmp_path: Path) -> None:
    found = asked(given, TRAK(side=1000, format="fp32"), tmp_path)
    queries, train = (
        [log_odds_gradients(given, one) for one in records] for records in (ASKED, TRAIN)
    )
    total = torch.zeros(len(ASKED), len(TRAIN), dtype=torch.float64)
    for path in PATHS:
        q = torch.stack([one[path] for one, _ in queries])
        t = torch.stack([one[path] for one, _ in train])
        h = t.T @ t
        damped = h + 0.1 * h.trace() / len(h) * torch.eye(len(h), dtype=torch.float64)
        total += q @ torch.linalg.solve(damped, t.T)
    close(found.total, total * torch.tensor([missing for _, missing in train]), 1e-3)


def test_an_ensemble_of_trak_averages_kernels_and_factors(tmp_path: Path) -> None:
    method, members, kernels, factors = TRAK(side=6, format="fp32"), [], [], []
    for seed in (0, 1):
        model = checkpoint(seed=seed)
        index, _ = build(
            model, TRAIN, method, tmp_path / str(seed), collection=collection(layers=LAYERS)
        )
        queries = record_queries(index, model, ASKED)
        members.append((index, queries))
        factors.append(index.tensor("missing").double())
        kernels.append(method.score(index, queries).total.double() / factors[-1])
    expected = sum(kernels) / 2 * (sum(factors) / 2)
    close(ensemble(method, members), expected)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="got 0 over 0 sets"):
        ensemble(method, [])


@pytest.mark.parametrize(("layer", "pooling"), [(-1, "mean"), (0, "last"), (1, "last")])
def test_repsim(given: Checkpoint, tmp_path: Path, layer: int, pooling: Any) -> None:
    found = asked(given, RepSim(layer=layer, pooling=pooling, format="fp32"), tmp_path).total

    def state(record: dict[str, Any]) -> Tensor:
        ids = torch.tensor([given.tokenizer(record["text"])["input_ids"]])
        look: list[Tensor] = []
        blocks = given.model.model.layers
        with (
            torch.no_grad()
        ):  # transformers puts the last block's states through the norm; a hook does not
            handle = blocks[-1].register_forward_hook(lambda *args: look.append(args[2]))
            states = given.model(ids, output_hidden_states=True, use_cache=False).hidden_states
            handle.remove()
        chosen = (
            (look[0][0] if isinstance(look[0], tuple) else look[0])
            if layer == -1
            else states[layer]
        )
        return chosen[0].mean(0) if pooling == "mean" else chosen[0, -1]

    q, t = (torch.stack([state(one) for one in records]) for records in (ASKED, TRAIN))
    close(found, torch.nn.functional.cosine_similarity(q[:, None], t[None], dim=-1))


def test_repsim_refuses_a_layer_that_is_not_there(given: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"layer is 3.*0 \(embeddings\) to 2"):
        asked(given, RepSim(layer=3), tmp_path)


def test_bm25_counts_tokens_of_shards_of_other_widths(given: Checkpoint, tmp_path: Path) -> None:
    from postlude.numerics.bm25 import Postings

    found = asked(given, BM25(), tmp_path, shard_examples=3).total
    ids = [torch.tensor(given.tokenizer(one["text"])["input_ids"]) for one in TRAIN]
    postings = Postings.of(ids, 1.5, 0.75)
    for row, record in zip(found, ASKED, strict=True):
        close(row, postings.scores(torch.tensor(given.tokenizer(record["text"])["input_ids"])))


@pytest.mark.parametrize("fisher", ["true", "empirical"])
def test_ekfac(
    given: Checkpoint, slow: dict[str, tuple[Tensor, Tensor]], tmp_path: Path, fisher: Any
) -> None:
    """Factors from one example at a time, and the inverse as a dense matrix."""
    found = asked(given, EKFAC(fisher=fisher), tmp_path, per_layer=True)
    for path, (q, t) in slow.items():
        a, s, squares = reference_factors(given, path, fisher)
        q_a, q_s = torch.linalg.eigh(a)[1], torch.linalg.eigh(s)[1]
        kron = torch.kron(q_a, q_s)
        values = (squares @ kron).square().mean(0)
        inverse = kron @ torch.diag(1 / (values + 0.1 * values.mean())) @ kron.T
        close(found.layers[path], q @ inverse @ t.T, 2e-3)


def reference_factors(given: Checkpoint, path: str, fisher: str) -> tuple[Tensor, Tensor, Tensor]:
    """``A``, ``S`` and the flat gradients of every example, by its own passes through the model."""
    from postlude.attribution.kronecker_factors import _uniforms

    module = given.model.get_submodule(path)
    seen: dict[str, Tensor] = {}

    def keep(_: Any, args: Any, output: Tensor) -> None:
        seen["x"] = args[0].detach()[0]
        output.register_hook(lambda gradient: seen.update(dy=gradient[0]))

    handle = module.register_forward_hook(keep)
    a = torch.zeros(32, 32, dtype=torch.float64)
    s = torch.zeros(16, 16, dtype=torch.float64)
    rows = []
    for number, record in enumerate(TRAIN):
        ids = torch.tensor([given.tokenizer(record["text"])["input_ids"]])
        logits = given.model(ids, use_cache=False).logits[0, :-1]
        labels = ids[0, 1:]
        if fisher == "true":
            cumulated = logits.detach().float().softmax(-1).cumsum(-1)
            draws = _uniforms(0, number, len(labels))
            labels = torch.tensor(
                [int((c <= u * c[-1]).sum()) for c, u in zip(cumulated, draws, strict=True)]
            )
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        a += seen["x"].T @ seen["x"]
        s += seen["dy"].T @ seen["dy"]
        rows.append((seen["x"].T @ seen["dy"]).flatten())
    handle.remove()
    given.model.zero_grad()
    return a, s, torch.stack(rows)


def test_ekfac_of_low_rank_queries_is_the_product_with_their_svd(
    given: Checkpoint, slow: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    index, _ = build(given, TRAIN, EKFAC(), tmp_path / "i", collection=collection(layers=LAYERS))
    queries = record_queries(index, given, ASKED)
    found = EKFAC(query_rank=3).score(index, queries, per_layer=True)
    for path, curvature in EKFAC()._fits(index, given):
        q, t = slow[path]
        u, values, vh = torch.linalg.svd(curvature.precondition(q.view(-1, 32, 16).float()))
        values[:, 3:] = 0
        near = (u[..., :16] * values[:, None]) @ vh
        close(found.layers[path], near.flatten(1).double() @ t.T, 1e-3)


def test_ekfac_keeps_its_factors_in_the_index(given: Checkpoint, tmp_path: Path) -> None:
    index, _ = build(given, TRAIN, EKFAC(), tmp_path / "i", collection=collection(layers=LAYERS))
    files = sorted(path.name.partition("@")[0] for path in (index.path / "curvature").rglob("*@*"))
    assert files == ["bases", "eigenvalues"]
    before = index.hash()
    again = Index(index.path)
    again.records(TRAIN)
    for method in (EKFAC(), EKFAC(damping=0.1)):  # another damping is no other fit
        method.score(again, record_queries(again, given, ASKED))
    assert len(list((index.path / "curvature").iterdir())) == 1
    assert again.hash() == before


def test_batches_do_not_matter_to_ekfac(given: Checkpoint, tmp_path: Path) -> None:
    one = asked(given, EKFAC(), tmp_path / "a", tokens_per_batch=1)
    many = asked(given, EKFAC(), tmp_path / "b", tokens_per_batch=10**6, shard_examples=100)
    close(one.total, many.total, 1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoGRA(side=0), "logra: side is 0"),
        (lambda: LoGRA(damping=0.0), "damping is 0.0; expected a positive"),
        (lambda: TRAK(curvature="truncated"), "trak: curvature is 'truncated'"),  # type: ignore[arg-type]
        (lambda: GradDot(format="fp16"), "fp16"),  # type: ignore[arg-type]
        (lambda: RepSim(pooling="max"), "pooling is 'max'"),  # type: ignore[arg-type]
        (lambda: RepSim(format="int4"), "format is 'int4'"),  # type: ignore[arg-type]
        (lambda: BM25(b=1.5), "b is 1.5; expected 0 to 1"),
        (lambda: BM25(k1=-1.0), "k1 is -1"),
        (lambda: EKFAC(fisher="exact"), "fisher is 'exact'"),  # type: ignore[arg-type]
        (lambda: EKFAC(damping=-1.0), "damping is -1"),
        (lambda: EKFAC(query_rank=-1), "query_rank is -1"),
    ],
)
def test_settings_that_make_no_sense(make: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make()
