from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from postlude.errors import ArchitectureError
from postlude.numerics.rotation import random_orthogonal
from postlude.report.stream_error import StreamError, basis_change
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.loading import load
from postlude.surgery.rewrite import fold_norms, rotate_residual, untie_head


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> Checkpoint:
    return load(tiny_llama_dir, dtype="float32")


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(3, 259, (3, 16), generator=torch.Generator().manual_seed(0))


def changed(model: Checkpoint) -> Checkpoint:
    return dataclasses.replace(model, model=copy.deepcopy(model.model))


def test_the_basis_is_found() -> None:
    turn = random_orthogonal(16, torch.Generator().manual_seed(0))
    embedding = torch.randn(50, 16, dtype=torch.float64)
    found = basis_change(embedding, (embedding @ turn).bfloat16())
    assert (found - turn).abs().max() < 2e-3
    torch.testing.assert_close(basis_change(embedding, embedding @ turn), turn)


def test_a_rotation_is_no_error(model: Checkpoint, tokens: torch.Tensor) -> None:
    other = changed(model)
    untie_head(other.model, other.anatomy)
    fold_norms(other.model, other.anatomy)
    turn = random_orthogonal(other.anatomy.hidden_size, torch.Generator().manual_seed(1))
    rotate_residual(other.model, other.anatomy, turn)
    error = StreamError(model, tokens).of(other)
    assert max(error["p95"]) < 1e-4


def test_against_a_loop(model: Checkpoint, tokens: torch.Tensor) -> None:
    other = changed(model)
    block = other.model.model.layers[1]
    block.mlp.down_proj.weight.data *= 1.5
    error = StreamError(model, tokens).of(other)
    assert error["median"][0] < 1e-6
    with torch.no_grad():
        # The entry of transformers before the last one is after block 0; the last has gone through the final norm.
        states = []
        for one in (model, other):
            kept: list[torch.Tensor] = []
            hook = one.model.model.norm.register_forward_pre_hook(
                lambda _, args, kept=kept: kept.append(args[0])
            )
            one.model(tokens)
            hook.remove()
            states.append(kept[0].flatten(0, 1))
    ratios = sorted(float((b - a).norm() / a.norm()) for a, b in zip(*states, strict=True))
    assert error["median"][1] == pytest.approx(ratios[(len(ratios) - 1) // 2], rel=1e-4)


def test_another_model_is_refused(
    model: Checkpoint, tokens: torch.Tensor, make_checkpoint: object
) -> None:
    other = load(make_checkpoint("llama", seed=5), dtype="float32")  # type: ignore[operator]
    with pytest.raises(ArchitectureError, match="in every orthonormal basis"):
        StreamError(model, tokens).of(other)
