from __future__ import annotations

import itertools

import pytest
import torch

from postlude.tuning.batches import collate, make_plan, pack
from postlude.tuning.examples import Examples
from postlude.tuning.objective import TuneRun


def made(*lengths: int) -> Examples:
    """Sequences of these lengths; the first token of each is its prompt and token values count up."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    response = torch.ones(int(starts[-1]), dtype=torch.bool)
    response[starts[:-1]] = False
    return Examples(torch.arange(1, int(starts[-1]) + 1), response, starts)


def test_every_epoch_holds_everything_once() -> None:
    examples = made(*range(2, 13))
    plan = make_plan(examples, TuneRun(epochs=2, batch_size=2, accumulate=2), 99)
    assert plan.steps == 6 and len(plan.batches) == 12
    for epoch in (plan.batches[:6], plan.batches[6:]):
        assert sorted(index for batch in epoch for row in batch for index in row) == list(range(11))
    assert plan.batches[:6] != plan.batches[6:]
    assert plan.epochs == pytest.approx([4 / 11, 8 / 11, 1, 15 / 11, 19 / 11, 2])
    assert sum(plan.targets) == 2 * int(examples.target_starts[-1])


def test_a_step_is_the_same_however_it_is_divided() -> None:
    examples = made(*range(2, 19))

    def steps(batch_size: int, accumulate: int, ranks: int) -> list[list[int]]:
        run = TuneRun(epochs=1.5, batch_size=batch_size, accumulate=accumulate, seed=3)
        plan = make_plan(examples, run, 99, ranks=ranks)
        parts = accumulate * ranks
        assert len(plan.batches) == plan.steps * parts
        assert all(len(batch) <= batch_size for batch in plan.batches)
        return [
            sorted(i for batch in plan.batches[at : at + parts] for row in batch for i in row)
            for at in range(0, len(plan.batches), parts)
        ]

    expected = steps(4, 1, 1)
    for way in ((2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)):
        assert steps(*way) == expected


def test_steps_go_on_beyond_an_epoch_and_end_inside_one() -> None:
    examples = made(2, 3, 4)
    assert make_plan(examples, TuneRun(steps=5, batch_size=2), 9).steps == 5
    assert make_plan(examples, TuneRun(epochs=0.1, batch_size=2), 9).steps == 1
    assert make_plan(examples, TuneRun(epochs=2.5, batch_size=2), 9).steps == 5


def test_packing_fills_rows() -> None:
    lengths = [7, 3, 5, 5, 2, 8, 1]
    rows = pack(range(7), lengths, 10)
    assert sorted(itertools.chain.from_iterable(rows)) == list(range(7))
    assert all(sum(lengths[i] for i in row) <= 10 for row in rows)
    assert len(rows) == 4
    many = [3 + i % 5 for i in range(500)]
    rows = pack(range(500), many, 16)
    assert sum(many) / (16 * len(rows)) > 0.9


def test_a_packed_plan_pads_less() -> None:
    examples = made(*[3 + (7 * i) % 11 for i in range(40)])
    run = TuneRun(batch_size=4, epochs=2)
    loose = make_plan(examples, run, 16)
    tight = make_plan(examples, TuneRun(batch_size=4, epochs=2, packing=True), 16)
    assert tight.padding < loose.padding
    assert sorted(i for batch in tight.batches for row in batch for i in row) == sorted(
        2 * list(range(40))
    )


def test_collate_on_the_right() -> None:
    examples = made(2, 4)
    batch = collate(examples, [[0], [1]], {"x": torch.arange(4.0)})
    assert batch["input_ids"].tolist() == [[1, 2, 0, 0], [3, 4, 5, 6]]
    assert "attention_mask" not in batch and "position_ids" not in batch
    assert batch["predictors"].tolist() == [0, 4, 5, 6]
    assert batch["targets"].tolist() == [2, 4, 5, 6]
    assert batch["sequences"].tolist() == [0, 1, 1, 1]
    assert batch["column.x"].tolist() == [0, 1, 2, 3]


def test_collate_on_the_left() -> None:
    batch = collate(made(2, 4), [[1], [0]], {"x": torch.arange(4.0)}, padding="left")
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6], [0, 0, 1, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]
    assert batch["predictors"].tolist() == [0, 1, 2, 6]
    assert batch["targets"].tolist() == [4, 5, 6, 2]
    assert batch["column.x"].tolist() == [1, 2, 3, 0]


def test_collate_packed() -> None:
    batch = collate(made(2, 3, 3), [[2, 0], [1]])
    assert batch["input_ids"].tolist() == [[6, 7, 8, 1, 2], [3, 4, 5, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]
    assert "attention_mask" not in batch
    assert batch["predictors"].tolist() == [0, 1, 3, 5, 6]
    assert batch["sequences"].tolist() == [0, 0, 1, 2, 2]


def test_an_empty_batch() -> None:
    batch = collate(made(2), [], {"x": torch.arange(1.0)})
    assert batch["input_ids"].shape == (1, 1)
    assert all(len(batch[name]) == 0 for name in ("predictors", "targets", "sequences", "column.x"))
