"""OffQ with the outlier direction of the weights."""

from __future__ import annotations

import pytest
import torch

import postlude as pl
from postlude.errors import DataError
from postlude.numerics.directions import acute_angle
from postlude.quantization import OffQWeights
from postlude.quantization.offq_weights import product_sizes, written_moment
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import anatomy_of
from postlude.surgery.probes import approximate_block
from postlude.zoo.planting import Plant, directions
from postlude.zoo.tiny_lm import build

from .models import checkpoint, logits, twin

PLANT = Plant(explosion=0, decay=1)


@pytest.fixture
def planted() -> Checkpoint:
    """Two blocks, one that makes a massive activation and one that removes it."""
    model = build(
        3, hidden_size=64, layers=2, heads=2, kv_heads=1, intermediate_size=96, vocab_size=128,
        context=32, plant=PLANT,
    )  # fmt: skip
    return Checkpoint(model.eval(), None, anatomy_of(model))


def test_it_finds_what_was_planted(planted: Checkpoint) -> None:
    _, defect, _ = directions(PLANT, 64, 3)
    found = OffQWeights().statistics(planted, None, 0)
    leading = found["residual.basis"][:, 0]
    assert float(acute_angle(leading, defect)) < 5
    assert found["residual.order"][0] == 0
    basis = found["residual.basis"]
    torch.testing.assert_close(basis.T @ basis, torch.eye(64).double(), atol=1e-12, rtol=0)
    # The planted neuron's product is the largest.
    assert found["0.product"][0] == PLANT.neuron


def test_the_moment_and_the_sizes_by_their_definitions(planted: Checkpoint) -> None:
    model, anatomy = planted.model, planted.language
    expected = torch.zeros(64, 64, dtype=torch.float64)
    for block in anatomy.blocks:
        change = approximate_block(model, anatomy, block, 16 * 64, 5).change
        for column in change.T:
            expected += torch.outer(column, column)
    torch.testing.assert_close(written_moment(model, anatomy, 5), expected)
    mlp = model.model.layers[1].mlp
    rows = [
        float(up.detach().norm() * gate.detach().norm())
        for up, gate in zip(mlp.up_proj.weight, mlp.gate_proj.weight, strict=True)
    ]
    sizes = product_sizes(model, anatomy.blocks[1])
    torch.testing.assert_close(sizes.float(), torch.tensor(rows))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_needs_no_text_and_its_rewrites_change_nothing(name: str) -> None:
    model = checkpoint(name)
    before = logits(model.model)
    same = pl.quantize(twin(model), OffQWeights(weights=16, activations=16, kv=16))
    torch.testing.assert_close(logits(same.model), before, atol=2e-4, rtol=1e-3)
    small = pl.quantize(twin(model), OffQWeights(activation_group=16))
    assert small.made_by()["settings"]["rounding"] == "nearest"


def test_gptq_asks_for_text() -> None:
    with pytest.raises(DataError, match="offq-weights learns from calibration text"):
        pl.quantize(checkpoint("llama"), OffQWeights(rounding="gptq"))
