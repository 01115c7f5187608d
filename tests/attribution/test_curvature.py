"""The ways of inverting the curvature of a layer, against a dense solve on the same rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from postlude.attribution.curvature import (
    BACKENDS,
    CurvatureSettings,
    Dual,
    Exact,
    LayerCurvature,
    Plain,
    Truncated,
    choose,
)
from postlude.attribution.rows import DenseRows, FactorRows, Rows
from postlude.errors import DataError, SettingsError, UnknownNameError
from postlude.surgery.gradients import CollectedLayer

D1, D2, COUNT, QUERIES = 6, 5, 40, 4
LAYER = CollectedLayer("layer", 24, 20, D1, D2)
DOUBLE = CurvatureSettings(rank=D1 * D2, precision=torch.float64)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Rows in memory as a source."""

    held: Rows
    step: int = 7
    layer: CollectedLayer = LAYER

    def __len__(self) -> int:
        return len(self.held)

    def chunks(self, rows: int = 0) -> Iterator[tuple[int, Rows]]:
        for start in range(0, len(self), self.step):
            yield start, self.rows(start, min(start + self.step, len(self)))

    def rows(self, start: int = 0, stop: int | None = None) -> Rows:
        return self.held.take(slice(start, stop))


def drawn(count: int, kind: str, seed: int = 0, factor: float = 1.0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    if kind == "dense":
        g = torch.randn(count, D1, D2, generator=generator, dtype=torch.float64)
        return DenseRows(factor * g * 0.8 ** torch.arange(D2))
    columns = int(kind)
    u = torch.randn(count, columns, D1, generator=generator, dtype=torch.float64)
    v = torch.randn(count, columns, D2, generator=generator, dtype=torch.float64)
    return FactorRows(factor * u * 0.8 ** torch.arange(D1), v)


def dense_solve(queries: Rows, rows: Rows, settings: CurvatureSettings) -> Tensor:
    g, q = rows.flat().double(), queries.flat().double()
    h = g.T @ g
    lam = settings.damping * h.trace() / h.shape[0]
    if settings.rule == "paper":
        kept = min(settings.rank + settings.oversampling, *g.shape)
        lam = settings.damping * torch.linalg.eigvalsh(h).flip(0)[:kept].mean()
    return q @ torch.linalg.solve(h + lam * torch.eye(len(h), dtype=torch.float64), g.T)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", ["dense", "1", "3"])
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("rule", ["release", "paper"])
@pytest.mark.parametrize("count", [COUNT, 3])
def test_every_way_is_the_dense_solve(name: str, kind: str, rule: Any, count: int) -> None:
    settings = dataclasses.replace(DOUBLE, rule=rule)
    rows, queries = drawn(count, kind), drawn(QUERIES, kind, seed=1)
    fitted = BACKENDS[name].fit(Memory(rows), settings)
    expected = dense_solve(queries, rows, settings)
    tolerance = 1e-6 if (name, count) == ("truncated", 3) else 1e-9
    assert relative(fitted.scores(queries, Memory(rows)), expected) < tolerance
    matrices = fitted.matrices(queries, Memory(rows))
    assert relative(rows.against(matrices).double(), expected) < max(tolerance, 1e-7)
    state = fitted.state()
    kept = sum(x.numel() * x.element_size() for x in state.values() if x.ndim > 1)
    bound = BACKENDS[name].kept_bytes(count, LAYER, settings)
    assert kept == bound * (2 if name == "truncated" else 1)  # here its precision is fp64
    again = type(fitted).from_state(state)
    assert relative(again.scores(queries, Memory(rows)), expected) < 1e-5


@pytest.mark.parametrize("name", BACKENDS)
def test_in_fp32(name: str) -> None:
    rows, queries = drawn(COUNT, "2"), drawn(QUERIES, "2", seed=1)
    expected = dense_solve(queries, rows, DOUBLE)
    single = [FactorRows(r.u.float(), r.v.float()) for r in (rows, queries)]  # type: ignore[attr-defined]
    settings = dataclasses.replace(DOUBLE, precision=torch.float32)
    fitted = BACKENDS[name].fit(Memory(single[0]), settings)
    assert relative(fitted.scores(single[1], Memory(single[0])), expected) < 2e-5


@pytest.mark.parametrize("name", BACKENDS)
def test_scale_of_the_gradients_does_not_matter(name: str) -> None:
    settings = dataclasses.replace(DOUBLE, rank=5, tail="corrected")
    scores = []
    for factor in (1.0, 7.0):
        rows, queries = drawn(COUNT, "1", factor=factor), drawn(QUERIES, "1", 1, factor)
        scores.append(BACKENDS[name].fit(Memory(rows), settings).scores(queries, Memory(rows)))
    assert relative(scores[1], scores[0].double()) < 5e-6


def test_no_directions_divide_by_the_damping() -> None:
    rows, queries = drawn(COUNT, "1"), drawn(QUERIES, "1", seed=1)
    plain = Plain.fit(Memory(rows), DOUBLE).scores(queries, Memory(rows)).double()
    torch.testing.assert_close(plain, queries.flat() @ rows.flat().T)
    mean = float(rows.flat().square().sum()) / (D1 * D2)
    for tail, divisor in (("truncated", 0.5 * mean), ("corrected", 1.5 * mean)):
        settings = dataclasses.replace(DOUBLE, rank=0, tail=tail)
        found = Truncated.fit(Memory(rows), settings).scores(queries, Memory(rows))
        assert relative(found, plain / divisor) < 1e-12
    with pytest.raises(SettingsError, match="curvature_rank from 1"):
        Truncated.fit(Memory(rows), dataclasses.replace(DOUBLE, rank=0, rule="paper"))


def test_the_tail_correction_makes_a_truncation_better() -> None:
    rows, queries = drawn(200, "1"), drawn(QUERIES, "1", seed=1)
    expected = dense_solve(queries, rows, DOUBLE)
    errors = {}
    for rank in (2, 8, 20):
        for tail in ("truncated", "corrected"):
            settings = dataclasses.replace(DOUBLE, rank=rank, tail=tail)
            fitted = Truncated.fit(Memory(rows), settings)
            errors[rank, tail] = relative(fitted.scores(queries, Memory(rows)), expected)
        assert errors[rank, "corrected"] < errors[rank, "truncated"]
    assert errors[20, "corrected"] < errors[8, "corrected"] < errors[2, "corrected"]


def test_fewer_rows_than_dimensions_share_the_tail_among_themselves() -> None:
    """20 rows in 30 dimensions: what 8 directions leave out lies in 12 others, not in 22."""
    rows, queries = drawn(20, "1"), drawn(QUERIES, "1", seed=1)
    expected = dense_solve(queries, rows, DOUBLE)
    fitted = Truncated.fit(Memory(rows), dataclasses.replace(DOUBLE, rank=8, tail="corrected"))
    inverse = fitted.inverse
    left = float(rows.flat().square().sum() - inverse.squares.sum())
    assert inverse.tail == pytest.approx(left / 12, rel=1e-9)
    spread = dataclasses.replace(inverse, tail=left / 22).apply(queries.flat()) @ rows.flat().T
    found = fitted.scores(queries, Memory(rows))
    assert relative(found, expected) < relative(spread, expected)
    none = Truncated.fit(Memory(rows), dataclasses.replace(DOUBLE, rank=0, tail="corrected"))
    assert none.inverse.tail == pytest.approx(float(rows.flat().square().sum()) / 20)


@pytest.mark.parametrize("name", BACKENDS)
def test_how_rows_are_cut_does_not_matter(name: str) -> None:
    rows, queries = drawn(COUNT, "2"), drawn(QUERIES, "2", seed=1)
    settings = dataclasses.replace(DOUBLE, rank=6)
    found = [
        BACKENDS[name].fit(Memory(rows, step), settings).scores(queries, Memory(rows, step))
        for step in (1, 7, 100)
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_of_zeros_are_refused(name: str) -> None:
    rows = drawn(COUNT, "1", factor=0.0)
    with pytest.raises(DataError, match="all gradients of a layer zero"):
        BACKENDS[name].fit(Memory(rows), DOUBLE)


def picked(count: int, layer: CollectedLayer, asked: str = "auto", **settings: Any) -> str:
    return choose(asked, count, [layer], lambda _: 1, CurvatureSettings(**settings)).name


def test_the_cheapest_that_fits_is_taken() -> None:
    wide = CollectedLayer("wide", 256, 256, 64, 64)
    narrow = CollectedLayer("narrow", 16, 16, 4, 4)
    assert picked(500, wide) == "dual"
    assert picked(1_000_000, wide) == "exact"
    assert picked(1_000_000, CollectedLayer("huge", 512, 512, 128, 128)) == "truncated"
    assert picked(1_000_000, narrow) == "exact"
    assert picked(1_000_000, narrow, "dual") == "dual"
    assert picked(500, wide, rank=0) == "truncated"
    choice = choose("auto", 500, [wide], lambda _: 1, CurvatureSettings())
    assert str(choice).startswith("dual (least arithmetic")
    assert set(choice.costs) == set(BACKENDS)
    tight = choose("auto", 500, [wide], lambda _: 1, CurvatureSettings(rank=4), memory=1e6)
    assert tight.name == "truncated"
    with pytest.raises(UnknownNameError, match="Did you mean 'dual'"):
        picked(5, wide, "dul")


def test_names() -> None:
    kinds: list[type[LayerCurvature]] = [Dual, Exact, Truncated]
    assert [kind.name for kind in kinds] == list(BACKENDS)
