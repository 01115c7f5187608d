from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import postlude as pl
from postlude.errors import SettingsError
from postlude.numerics.formats import Integer
from postlude.numerics.learned_rounding import StraightThrough
from postlude.numerics.reconstruction import mean_squared_error
from postlude.numerics.rounding import nearest
from postlude.numerics.schemes import Granularity, Scheme
from postlude.quantization.adalog import AdaLogViT
from postlude.quantization.block_reconstruction import BlockOutput, Passage, soft
from postlude.quantization.iands_vit import IandSViT
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.capture import BlockWalk
from postlude.surgery.layers import QuantizedLinear, quantized_linears
from postlude.surgery.static_quantizers import StaticQuantizer, switch_static_quantizers

from .test_vision import build, pictures

SCHEME = Scheme(Integer(3, symmetric=False), Granularity("channel"))
BATCHES = [pictures(1, 6), pictures(2, 6)]


def error(method: Any) -> float:
    """On the calibration pictures: noise teaches a network of this size nothing about other noise."""
    checkpoint = build()
    made = pl.quantize(checkpoint, method, calibration=BATCHES)
    with torch.no_grad():
        exact, found = (c.model(**BATCHES[0]).logits for c in (checkpoint, made))
    return float((found - exact).norm() / exact.norm())


def prepared(bits: int = 4) -> Checkpoint:
    """Re-parameterised, grids in front of the linears and in attention."""
    checkpoint = build()
    settings = IandSViT(weights=3, activations=bits)
    settings.rewrite(checkpoint, settings.statistics(checkpoint, BATCHES, 0), 0)
    return checkpoint


def passage(checkpoint: Checkpoint) -> Passage:
    block = checkpoint.anatomy.blocks[0]
    walks = [BlockWalk(checkpoint.model, checkpoint.anatomy, BATCHES) for _ in range(2)]
    return Passage(*walks, walks[0].outputs(block))


def test_other_weights_of_a_block_are_what_it_computes_with() -> None:
    checkpoint = build()
    block = checkpoint.anatomy.blocks[0]
    given = passage(checkpoint)
    module = checkpoint.model.get_submodule(block.name)
    before = {name: p.clone() for name, p in module.named_parameters()}
    inside = BlockOutput(checkpoint.model, block)
    assert set(inside.weights) == {path for site in block.sites for path in site.modules}
    same = inside.of(given.exact, lambda: inside.weights)
    torch.testing.assert_close(same(0), given.targets[0])
    other = {path: nearest(weight, SCHEME).decode() for path, weight in inside.weights.items()}
    found = inside.of(given.exact, lambda: other)(1)
    for path, weight in other.items():
        checkpoint.model.get_submodule(path).weight.data.copy_(weight)
    torch.testing.assert_close(found, given.exact.outputs(block)[1][0].flatten(1))
    assert before.keys() == dict(module.named_parameters()).keys()


def test_gradients_through_a_block_are_those_of_autograd_and_of_differences() -> None:
    """Float weights, nothing rounded: the block itself as PyTorch has it, and a step to both sides."""
    checkpoint = build()
    checkpoint.model.double()
    block = checkpoint.anatomy.blocks[0]
    batch = [{"pixel_values": pictures(1, 2)["pixel_values"].double()}]
    walk = BlockWalk(checkpoint.model, checkpoint.anatomy, batch)
    path = block.sites[0].modules[0]
    plain = checkpoint.model.get_submodule(path).weight
    slope = torch.randn_like(walk.outputs(block)[0][0].flatten(1))
    (expected,) = torch.autograd.grad((walk.call(block, 0)[0].flatten(1) * slope).sum(), plain)
    inside = BlockOutput(checkpoint.model, block)
    free = {path: weight.double().requires_grad_() for path, weight in inside.weights.items()}
    output = inside.of(walk, lambda: free)
    (found,) = torch.autograd.grad((output(0) * slope).sum(), free[path])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    step = torch.zeros_like(expected)
    step[3, 5] = 1e-5
    sides = []
    for sign in (1, -1):
        moved = {**free, path: free[path].detach() + sign * step}
        with torch.no_grad():
            sides.append(float((inside.of(walk, lambda moved=moved: moved)(0) * slope).sum()))
    assert (sides[0] - sides[1]) / 2e-5 == pytest.approx(float(expected[3, 5]), rel=1e-4)


def test_a_fixed_grid_lets_gradients_pass() -> None:
    checkpoint = prepared()
    switch_static_quantizers(checkpoint.model, on=True)
    grids = [m for m in checkpoint.model.modules() if isinstance(m, StaticQuantizer)]
    assert grids
    for grid in grids[:8]:
        x = torch.rand(1, 4, 5, 8)[..., : grid.get_buffer(grid.grid.names[0]).shape[-1] * 8]
        with torch.no_grad():
            rounded = grid(x)
        x.requires_grad_()
        passed = grid(x)
        assert torch.equal(passed, rounded)
        (passed * 3).sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, 3))


@pytest.mark.parametrize("activations", [4, 16])
def test_a_trained_block_is_closer_to_the_float_block(activations: int) -> None:
    checkpoint = prepared(activations)
    block = checkpoint.anatomy.blocks[0]
    given = passage(checkpoint)
    norms = [m for m in checkpoint.model.modules() if isinstance(m, torch.nn.LayerNorm)]
    kept = [norm.weight.clone() for norm in norms]
    chance = torch.Generator().manual_seed(0)
    settings = IandSViT(weights=3, activations=activations, iterations=20, learning_rate=3e-3)
    made = settings.round_block(checkpoint.model, block, given, chance)
    inside = BlockOutput(checkpoint.model, block)
    start = inside.trained(StraightThrough, settings.weight_scheme, clip=True)
    plain = mean_squared_error(inside.of(given.rounded, soft(start)), given.targets)
    trained = inside.of(given.rounded, lambda: {p: one.decode() for p, one in made.items()})
    assert mean_squared_error(trained, given.targets) < 0.9 * plain
    assert all(torch.equal(norm.weight, old) for norm, old in zip(norms, kept, strict=True))
    assert all(norm.weight.grad is None for norm in norms)
    untouched = BlockOutput(checkpoint.model, block).weights
    assert all(torch.equal(untouched[path], weight) for path, weight in inside.weights.items())


@pytest.mark.parametrize("kind", [IandSViT, AdaLogViT])
def test_without_steps_weights_are_rounded_to_nearest(kind: Any) -> None:
    """Through the engine, and by the method that trains."""
    plain = pl.quantize(build(), kind(iterations=0), calibration=BATCHES)
    checkpoint = prepared()
    block = checkpoint.anatomy.blocks[0]
    inside = BlockOutput(checkpoint.model, block)
    none = kind(iterations=0).round_block(
        checkpoint.model, block, passage(checkpoint), torch.Generator().manual_seed(0)
    )
    for path, layer in quantized_linears(plain.model):
        if path in none:
            expected = nearest(inside.weights[path], layer.weight_scheme, clip=True)
            assert torch.equal(none[path].main.codes, expected.codes)
            torch.testing.assert_close(layer.dense_weight(), expected.decode())
    assert len(none) == 6


def test_training_helps_the_whole_model() -> None:
    few = {"weights": 3, "activations": 8}
    trained = error(IandSViT(**few, iterations=20, learning_rate=3e-3))
    assert trained < error(IandSViT(**few, iterations=0))


def test_learned_rounding_moves_codes_by_one_and_is_never_worse() -> None:
    few = {"weights": 3, "activations": 8}
    plain = pl.quantize(build(), AdaLogViT(**few), calibration=BATCHES)
    settings = AdaLogViT(**few, iterations=25, learning_rate=0.1)
    made = pl.quantize(build(), settings, calibration=BATCHES)
    moved = 0
    for (path, one), (_, other) in zip(
        quantized_linears(plain.model), quantized_linears(made.model), strict=True
    ):
        assert torch.equal(one.scale, other.scale), path
        steps = (one.dense_weight() - other.dense_weight()) / one.scale.float()
        assert steps.abs().max() < 1.01
        moved += int((steps.abs() > 0.5).sum())
    assert moved


@pytest.mark.parametrize("kind", [IandSViT, AdaLogViT])
def test_the_same_seed_gives_the_same_bits_and_a_resumed_run_too(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from postlude.runs.directory import RunDirectory

    settings = kind(iterations=3)
    whole = pl.quantize(build(), settings, calibration=BATCHES)
    unit = RunDirectory.unit

    def stopping(self: RunDirectory, name: str, compute: Any) -> dict[str, Tensor]:
        if name == "block-0001":
            raise KeyboardInterrupt
        return unit(self, name, compute)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "unit", stopping)
        with pytest.raises(KeyboardInterrupt):
            pl.quantize(build(), settings, calibration=BATCHES, run=tmp_path / "run")
    again = pl.quantize(build(), settings, calibration=BATCHES, run=tmp_path / "run")
    states = whole.model.state_dict(), again.model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_settings_without_sense_are_refused() -> None:
    with pytest.raises(SettingsError, match="iands-vit: iterations is -1; expected 0 or more"):
        IandSViT(iterations=-1)
    with pytest.raises(SettingsError, match="adalog: learning_rate is 0"):
        AdaLogViT(learning_rate=0)
    with pytest.raises(SettingsError, match="iterations is True"):
        dataclasses.replace(IandSViT(), iterations=True)


def test_float_weights_are_left_alone() -> None:
    made = pl.quantize(build(), IandSViT(weights=16, activations=8), calibration=BATCHES)
    assert not any(isinstance(m, QuantizedLinear) and m.weight_scheme for m in made.model.modules())
