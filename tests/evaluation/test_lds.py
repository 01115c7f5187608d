from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from scipy.stats import spearmanr

from postlude.errors import DataError, NonFiniteError, SettingsError
from postlude.evaluation.lds import (
    Retraining,
    bootstrap_mean,
    draw_subsets,
    lds,
    reliability,
    retrain,
    retraining_bank,
    spearman,
)
from postlude.evaluation.perplexity import Sequences, sequence_losses
from postlude.runs.directory import RunDirectory
from postlude.runs.loading import load


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_spearman_equals_scipy_with_ties() -> None:
    first = normal(40, 6).mul(3).round()
    second = first + normal(40, 6, seed=1).mul(2).round()
    expected = [spearmanr(first[:, q], second[:, q]).statistic for q in range(6)]
    numpy.testing.assert_allclose(spearman(first, second), expected, rtol=1e-12)


def test_a_column_of_one_value_predicts_nothing() -> None:
    assert spearman(torch.zeros(5, 1), normal(5, 1)).tolist() == [0.0]


def test_lds_equals_a_loop() -> None:
    scores, losses = normal(5, 30), normal(20, 5, seed=1)
    subsets = draw_subsets(30, 20)
    rows = []
    for query in range(5):
        predicted = [
            sum(float(scores[query, i]) for i in range(30) if subsets[m, i]) for m in range(20)
        ]
        rows.append(spearmanr(predicted, [-float(x) for x in losses[:, query]]).statistic)
    found = lds(scores, subsets, losses)
    assert found.value == pytest.approx(numpy.mean(rows), abs=1e-12)
    assert found.low < found.value < found.high
    numpy.testing.assert_allclose(found.per_query, rows, atol=1e-12)


def test_scores_that_make_the_losses_reach_one_and_their_negatives_minus_one() -> None:
    scores, subsets = normal(4, 30), draw_subsets(30, 20)
    losses = -(subsets.double() @ scores.T)
    assert lds(scores, subsets, losses)[:3] == (1.0, 1.0, 1.0)
    assert lds(-scores, subsets, losses).value == -1.0


def test_the_interval_is_that_of_the_mean() -> None:
    values = normal(400)
    found = bootstrap_mean(values)
    half = 1.96 * float(values.std()) / 20
    assert found.value == pytest.approx(float(values.mean()))
    assert found.high - found.value == pytest.approx(half, rel=0.1)
    assert found.value - found.low == pytest.approx(half, rel=0.1)


def test_reliability_is_the_mean_over_pairs_of_seeds() -> None:
    losses = normal(15, 3, 4)
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = numpy.mean([spearman(losses[:, a], losses[:, b]).mean() for a, b in pairs])
    assert reliability(losses).value == pytest.approx(expected)
    with pytest.raises(DataError, match="2 seeds or more"):
        reliability(losses[:, :1])


def test_subsets() -> None:
    few, many = draw_subsets(31, 3, seed=5), draw_subsets(31, 8, seed=5)
    assert torch.equal(few, many[:3])
    assert many.sum(1).tolist() == [16] * 8
    assert not torch.equal(many[0], many[1])
    assert not torch.equal(many, draw_subsets(31, 8, seed=6))
    with pytest.raises(SettingsError, match="some but not all"):
        draw_subsets(30, 8, fraction=0.01)
    with pytest.raises(SettingsError, match="at least 2"):
        draw_subsets(30, 1)


@pytest.mark.parametrize(
    ("scores", "losses", "message"),
    [
        (normal(3, 9), normal(4, 3), r"expected \[Q, N\]"),
        (normal(3, 10), normal(4, 2), r"expected \[Q, N\]"),
        (normal(3, 10) / 0, normal(4, 3), "30 of 30 scores are not finite"),
    ],
)
def test_bad_input(scores: torch.Tensor, losses: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        lds(scores, draw_subsets(10, 4), losses)


def test_bad_settings() -> None:
    with pytest.raises(SettingsError, match="epochs is 0"):
        Retraining(epochs=0)
    with pytest.raises(SettingsError, match="rate is -1"):
        Retraining(rate=-1)


# Training


@pytest.fixture(scope="module")
def checkpoint(tiny_llama_dir: Path) -> Any:
    return load(tiny_llama_dir, dtype="float32")


def sequences(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 12, (count,), generator=generator).tolist()
    return [torch.randint(3, 259, (length,), generator=generator) for length in lengths]


def test_training_equals_the_same_steps_by_hand(checkpoint: Any) -> None:
    tokens = sequences(4)
    trained = retrain(checkpoint, tokens, Retraining(epochs=1, rate=1e-2, batch=4))
    model = load(checkpoint.path, dtype="float32").model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for row in tokens:
        logits = model(row[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    (sum(losses) / sum(len(row) - 1 for row in tokens)).backward()
    optimizer.step()
    expected = model.state_dict()
    for name, tensor in trained.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


def test_training_learns_is_repeatable_and_leaves_its_start_alone(checkpoint: Any) -> None:
    before = checkpoint.fingerprint()
    tokens = sequences(6)
    settings = Retraining(epochs=4, rate=1e-2, batch=4)
    first, again, other = (retrain(checkpoint, tokens, settings, seed) for seed in (0, 0, 1))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert checkpoint.fingerprint() == before
    asked = Sequences(tokens, "documents")
    start, end = (numpy.mean(sequence_losses(one, asked)) for one in (checkpoint, first))
    assert end < start - 0.5


def test_a_loss_that_is_not_finite_is_refused(checkpoint: Any) -> None:
    with pytest.raises(NonFiniteError, match="lower rate"):
        retrain(checkpoint, sequences(4), Retraining(rate=1e30, batch=2))
    with pytest.raises(DataError, match="nothing to train on"):
        retrain(checkpoint, [], Retraining())


def test_a_bank_goes_on_where_it_was_stopped(checkpoint: Any, tmp_path: Path) -> None:
    train, queries = sequences(8), sequences(3, seed=1)
    subsets = draw_subsets(8, 3)
    settings = Retraining(epochs=1, rate=1e-2, batch=4)
    whole = retraining_bank(checkpoint, train, queries, subsets, settings, seeds=2)
    assert whole.shape == (3, 2, 3)
    run = RunDirectory(tmp_path / "run", {"what": "bank"})
    done = 0

    def stopping(name: str, compute: Any) -> Any:
        nonlocal done
        if done == 2:
            raise KeyboardInterrupt
        done += 1
        return run.unit(name, compute)

    with pytest.raises(KeyboardInterrupt):
        retraining_bank(checkpoint, train, queries, subsets, settings, seeds=2, unit=stopping)
    assert len(run.finished()) == 2
    resumed = retraining_bank(checkpoint, train, queries, subsets, settings, seeds=2, unit=run.unit)
    assert torch.equal(resumed, whole)
    with pytest.raises(DataError, match="there are 7"):
        retraining_bank(checkpoint, train[:7], queries, subsets, settings)


def test_the_truth_by_leaving_out(checkpoint: Any) -> None:
    """Scores that say which half holds copies of the query: the bank must agree."""
    queries = sequences(2)
    train = [*[queries[0]] * 4, *[queries[1]] * 4, *sequences(8, seed=2)]
    scores = torch.zeros(2, 16)
    scores[0, :4] = scores[1, 4:8] = 1
    subsets = draw_subsets(16, 8)
    losses = retraining_bank(
        checkpoint, train, queries, subsets, Retraining(epochs=2, rate=1e-2, batch=4)
    )
    found = lds(scores, subsets, losses.mean(1))
    assert found.value > 0.7
    swapped = lds(scores.flip(0), subsets, losses.mean(1))
    assert swapped.value < found.value - 0.5
