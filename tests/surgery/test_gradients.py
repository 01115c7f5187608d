from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from postlude.errors import ArchitectureError, DataError, SettingsError
from postlude.numerics.formats import Integer
from postlude.numerics.schemes import Granularity, Scheme
from postlude.surgery.anatomy import anatomy_of
from postlude.surgery.gradients import (
    CollectedLayer,
    GradientCollector,
    Projection,
    linear_paths,
    rademacher,
)
from postlude.surgery.layers import QuantizedLinear
from postlude.surgery.rewrite import replace_module

from .models import MODELS, build

TOKENS = torch.randint(0, 97, (3, 9), generator=torch.Generator().manual_seed(1))


def summed_loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids, use_cache=False).logits
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )


def one_by_one(model: nn.Module, paths: tuple[str, ...], ids: Tensor) -> dict[str, Tensor]:
    """Weight gradients in ``[in, out]``, one backward pass per example."""
    found: dict[str, list[Tensor]] = {path: [] for path in paths}
    for row in ids:
        model.zero_grad()
        summed_loss(model, row[None]).backward()
        for path in paths:
            module = model.get_submodule(path)
            gradient = module.weight.grad.clone()
            found[path].append(gradient if type(module).__name__ == "Conv1D" else gradient.T)
    model.zero_grad()
    return {path: torch.stack(rows) for path, rows in found.items()}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_gradients_are_those_of_one_backward_pass_per_example(name: str) -> None:
    model = build(name)
    paths = linear_paths(anatomy_of(model))
    expected = one_by_one(model, paths, TOKENS)
    with GradientCollector(model, paths) as collector:
        found = collector.collect(lambda: summed_loss(model, TOKENS), len(TOKENS))
    assert list(found) == list(paths)
    for path in paths:
        scale = expected[path].abs().max()
        assert (found[path] - expected[path]).abs().max() < 1e-13 * scale, path
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("projection", [Projection(factor=4, seed=3), Projection(side=7)])
def test_projected_gradients(name: str, projection: Projection) -> None:
    model = build(name)
    paths = linear_paths(anatomy_of(model))
    whole = one_by_one(model, paths, TOKENS)
    with GradientCollector(model, paths, projection) as collector:
        found = collector.collect(lambda: summed_loss(model, TOKENS), len(TOKENS))
        layers = {layer.module: layer for layer in collector.layers}
    for path in paths:
        layer, matrices = layers[path], []
        for side, features in (("in", layer.in_features), ("out", layer.out_features)):
            signs = projection.signs(path, side, features)
            assert signs is not None
            assert set(signs.unique().tolist()) == {-1, 1}
            matrices.append(signs.double() / signs.shape[1] ** 0.5)
        p_in, p_out = matrices
        expected = p_in.T @ whole[path] @ p_out
        assert found[path].shape[1:] == (layer.in_width, layer.out_width)
        assert (found[path] - expected).abs().max() < 1e-12 * expected.abs().max()


def test_rounded_widths() -> None:
    assert [Projection(4).width(n) for n in (1, 4, 5, 172)] == [1, 1, 2, 43]
    assert [Projection(side=16).width(n) for n in (5, 16, 172)] == [5, 16, 16]
    assert Projection(1).signs("a", "in", 8) is None
    assert Projection(side=8).scale(8) == 1


def test_projections_follow_from_seed_layer_and_side() -> None:
    draw = rademacher(0, "layer", "in", 64, 16)
    assert torch.equal(draw, rademacher(0, "layer", "in", 64, 16))
    for other in (
        rademacher(1, "layer", "in", 64, 16),
        rademacher(0, "other", "in", 64, 16),
        rademacher(0, "layer", "out", 64, 16),
    ):
        assert not torch.equal(draw, other)
    assert abs(float(draw.double().mean())) < 0.1


def test_padding_changes_no_gradient() -> None:
    model = build("llama")
    paths = linear_paths(anatomy_of(model))
    short = TOKENS[:1, :5]
    padded = TOKENS.clone()
    padded[0, 5:] = 0
    labels = padded.clone()
    labels[0, 5:] = -100

    def loss() -> Tensor:
        logits = model(padded, use_cache=False).logits
        return nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )

    with GradientCollector(model, paths, Projection(2)) as collector:
        alone = collector.collect(lambda: summed_loss(model, short), 1)
        together = collector.collect(loss, 3)
    for path in paths:
        scale = alone[path].abs().max()
        assert (alone[path][0] - together[path][0]).abs().max() < 1e-12 * scale


def test_a_layer_called_twice_sums_and_leading_axes_may_be_split() -> None:
    torch.manual_seed(0)

    class Recurrent(nn.Module):
        """Rows are split into windows before the linear, as in a windowed vision transformer."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.last = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            windows = x.reshape(-1, 2, 4)
            return self.last(self.inner(self.inner(windows).tanh()).tanh().mean(1))

    model, x = Recurrent().double(), torch.randn(3, 6, 4, dtype=torch.float64)
    expected: dict[str, list[Tensor]] = {"inner": [], "last": []}
    for row in x:
        model.zero_grad()
        model(row[None]).square().sum().backward()
        for path in expected:
            expected[path].append(model.get_submodule(path).weight.grad.T.clone())
    with GradientCollector(model, expected) as collector:
        found = collector.collect(lambda: model(x).square().sum(), 3)
    for path, rows in expected.items():
        torch.testing.assert_close(found[path], torch.stack(rows), rtol=1e-12, atol=1e-14)


def test_weights_in_codes_are_read_as_what_they_stand_for() -> None:
    model = build("llama", torch.float32)
    path = "model.layers.1.mlp.down_proj"
    plain = model.get_submodule(path)
    layer = QuantizedLinear.like(plain, weight=Scheme(Integer(8), Granularity("channel")))
    layer.store(layer.weight_scheme.encode(plain.weight.data))
    plain.weight.data = layer.dense_weight()
    expected = one_by_one(model, (path,), TOKENS)[path]
    replace_module(model, path, layer)
    with GradientCollector(model, [path]) as collector:
        found = collector.collect(lambda: summed_loss(model, TOKENS), 3)[path]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_stand_for_their_base_layers() -> None:
    peft = pytest.importorskip("peft")
    model = build("llama")
    path = "model.layers.0.mlp.up_proj"
    expected = one_by_one(model, (path,), TOKENS)[path]
    settings = peft.LoraConfig(r=2, target_modules=["up_proj"], lora_dropout=0.5)
    # Fresh adapters add zero, so the gradients of the base layers are those of the plain model.
    adapted = peft.get_peft_model(model, settings).get_base_model()
    assert path in linear_paths(anatomy_of(adapted))
    with GradientCollector(adapted, [path]) as collector:
        found = collector.collect(lambda: summed_loss(adapted, TOKENS), 3)
    torch.testing.assert_close(found[path], expected, rtol=1e-12, atol=1e-12)
    assert adapted.get_submodule(path).lora_A["default"].weight.requires_grad


def test_gradients_are_handed_over_one_layer_at_a_time_and_observed_raw() -> None:
    model = build("gpt2")
    paths = linear_paths(anatomy_of(model), "*c_fc")
    seen: list[str] = []
    raw: dict[str, Tensor] = {}

    def each(layer: CollectedLayer, gradients: Tensor) -> tuple[int, ...]:
        seen.append(layer.module)
        return tuple(gradients.shape)

    def observe(layer: CollectedLayer, x: Tensor, dy: Tensor) -> None:
        raw[layer.module] = x.mT @ dy

    with GradientCollector(model, paths, Projection(4)) as collector:
        shapes = collector.collect(lambda: summed_loss(model, TOKENS), 3, each, observe)
    assert seen == list(reversed(paths))
    assert set(shapes.values()) == {(3, 16, 43)}
    for path, expected in one_by_one(model, paths, TOKENS).items():
        torch.testing.assert_close(raw[path], expected, rtol=1e-12, atol=1e-13)


def test_the_model_is_left_as_it_was() -> None:
    model = build("llama").train()
    frozen = model.get_submodule("model.norm").weight
    frozen.requires_grad_(False)
    with GradientCollector(model, linear_paths(anatomy_of(model), "*o_proj")):
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
    assert model.training
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    assert not any(module._forward_hooks for module in model.modules())


def test_refusals(make_model: Callable[..., nn.Module]) -> None:
    model = build("llama")
    anatomy = anatomy_of(model)
    with pytest.raises(SettingsError, match="no linear layer matches 'lm_head'"):
        linear_paths(anatomy, "lm_head")
    assert len(linear_paths(anatomy, ["*q_proj", "*k_proj"])) == 4
    with pytest.raises(ArchitectureError, match="is a Embedding"):
        GradientCollector(model, ["model.embed_tokens"])
    with pytest.raises(ArchitectureError, match="no module 'nowhere'"):
        GradientCollector(model, ["nowhere"])
    for wrong in ({"factor": 0}, {"factor": 2.5}, {"side": -1}, {"factor": 2, "side": 8}):
        with pytest.raises(SettingsError, match="projection"):
            Projection(**wrong)
    path = "model.layers.0.mlp.down_proj"
    with GradientCollector(model, [path, "lm_head"]) as collector:
        with pytest.raises(ArchitectureError, match=r"1 of 2 layers, for example 'lm_head'"):
            collector.collect(lambda: model.model(TOKENS).last_hidden_state.sum(), 3)
        with pytest.raises(DataError, match="does not divide into 2 examples"):
            collector.collect(lambda: summed_loss(model, TOKENS), 2)
        assert len(collector.collect(lambda: summed_loss(model, TOKENS), 3)) == 2
    rounded = QuantizedLinear(8, 8, bias=False, input=Scheme(Integer(8), Granularity("token")))
    with pytest.raises(ArchitectureError, match="rounds its input"):
        GradientCollector(nn.Sequential(rounded), ["0"])
