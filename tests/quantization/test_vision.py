from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import postlude as pl
from postlude.errors import DataError, SettingsError
from postlude.numerics.activation_grids import Uniform, percentile_range
from postlude.quantization.adalog import AdaLogViT
from postlude.quantization.repq_vit import RepQViT
from postlude.quantization.repquant import dual_clipping
from postlude.quantization.vision import reparameterise
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import anatomy_of
from postlude.surgery.capture import observe
from postlude.surgery.static_quantizers import (
    AttentionOperands,
    StaticQuantizer,
    switch_static_quantizers,
)


def build(model_type: str = "vit", seed: int = 0, **settings: Any) -> Checkpoint:
    """Two blocks of width 32 with three loud channels behind every norm."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    config = AutoConfig.for_model(
        model_type, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        image_size=16, patch_size=4, num_labels=5, initializer_range=0.3, **settings,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        known = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
        model = (known[0] if isinstance(known, tuple) else known)(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    anatomy = anatomy_of(model)
    for _, site in anatomy.sites():
        if site.norm:
            norm = model.get_submodule(site.norm)
            norm.weight.data[:3] *= 20
            for path in site.modules:
                model.get_submodule(path).weight.data[:, :3] /= 20
    return Checkpoint(model=model, tokenizer=None, anatomy=anatomy)


def pictures(seed: int, rows: int = 12) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    }


def outputs(checkpoint: Checkpoint) -> Tensor:
    with torch.no_grad():
        return checkpoint.model(**pictures(9)).logits


def norm_sites(checkpoint: Checkpoint) -> list[Any]:
    return [(block, site) for block, site in checkpoint.anatomy.sites() if site.norm]


@pytest.mark.parametrize("bias", [True, False])
def test_reparameterised_model_is_the_same_function(bias: bool) -> None:
    checkpoint = build(qkv_bias=bias)
    checkpoint.model.double()
    inputs = {"pixel_values": pictures(9)["pixel_values"].double()}
    before = checkpoint.model(**inputs).logits
    generator = torch.Generator().manual_seed(0)
    for _, site in norm_sites(checkpoint):
        scale = torch.rand(32, generator=generator).double() + 0.1
        zero = torch.randint(0, 16, (32,), generator=generator).double()
        reparameterise(
            checkpoint.model, site, {"scale": scale, "zero_point": zero}, torch.Tensor.mean
        )
    assert (checkpoint.model(**inputs).logits - before).abs().max() < 1e-12


def seen(checkpoint: Checkpoint, index: int, name: str) -> Tensor:
    found: list[Tensor] = []
    observe(checkpoint.model, checkpoint.anatomy, [pictures(1)], {(index, name): found.append})
    return found[0].detach().flatten(0, 1)


def test_one_range_gives_every_channel_its_own_codes_if_the_zero_point_comes_before_rounding() -> (
    None
):
    checkpoint = build()
    checkpoint.model.double()
    block, site = norm_sites(checkpoint)[0]
    batch = {"pixel_values": pictures(1)["pixel_values"].double()}

    def rows() -> Tensor:
        found: list[Tensor] = []
        observe(checkpoint.model, checkpoint.anatomy, [batch], {(0, site.name): found.append})
        return found[0].flatten(0, 1)

    x = rows()
    scale, zero = percentile_range(x, 4)
    own = (x / scale + zero).round().clamp(0, 15)
    whole = reparameterise(
        checkpoint.model, site, {"scale": scale, "zero_point": zero}, torch.Tensor.mean
    )
    moved = rows()
    s, z = (whole[name].double() for name in ("scale", "zero_point"))
    # The parameters are kept in fp32, which moves a value across a boundary once in a great while.
    before = (moved / s + z).round().clamp(0, 15)
    assert (before == own).double().mean() > 0.999
    after = ((moved / s).round() + z).clamp(0, 15)
    assert ((after - own).abs() < 1e-9).double().mean() < 0.9
    assert (after - own).abs().max() > 0.3
    assert block.index == 0


def test_channels_that_do_not_move_are_left_finite() -> None:
    checkpoint = build()
    _, site = norm_sites(checkpoint)[0]
    norm = checkpoint.model.get_submodule(site.norm)
    norm.weight.data[5] = 0.0
    before = outputs(checkpoint)
    scale, zero = percentile_range(seen(checkpoint, 0, site.name), 4)
    reparameterise(checkpoint.model, site, {"scale": scale, "zero_point": zero}, torch.Tensor.mean)
    assert (outputs(checkpoint) - before).abs().max() < 1e-3 * before.abs().max()


@pytest.mark.parametrize("model_type", ["vit", "deit", "dinov2"])
def test_loud_channels_do_not_hurt_repq(model_type: str) -> None:
    checkpoint = build(model_type)
    exact = outputs(checkpoint)
    calibration = [pictures(1), pictures(2)]

    def error(method: Any) -> float:
        made = pl.quantize(checkpoint, method, calibration=calibration)
        return float((outputs(made) - exact).norm() / exact.norm())

    from postlude.quantization import RTN

    plain = error(RTN(weights=8, activations=4, activation_group="tensor"))
    assert error(RepQViT(weights=8, activations=4)) < 0.7 * plain


def test_attention_and_gelu_are_rounded_for_real() -> None:
    made = pl.quantize(build(), AdaLogViT(weights=4, activations=4), calibration=[pictures(1)])
    operands = [m for m in made.model.modules() if isinstance(m, AttentionOperands)]
    assert len(operands) == 2
    probabilities: list[Tensor] = []
    products: list[Tensor] = []
    for one in operands:
        one.probabilities.register_forward_hook(lambda *a: probabilities.append(a[2]))
    for block in made.anatomy.blocks:
        down = made.model.get_submodule(block.site("down_in").modules[0])
        down.transform.register_forward_hook(lambda *a: products.append(a[2]))
    before = outputs(made)
    assert all(len(p.unique()) <= 17 for p in probabilities) and len(probabilities) == 2
    assert all(len(p.unique()) <= 17 for p in products) and len(products) == 2
    switch_static_quantizers(made.model, on=False)
    assert not torch.equal(outputs(made), before)


def test_output_error_chooses_a_base_that_is_not_worse_than_two() -> None:
    checkpoint = build(seed=3)
    settings = AdaLogViT(weights=16, activations=3)
    statistics = settings.statistics(checkpoint, [pictures(1)], 0)
    bases = [float(v) for name, v in statistics.items() if name.endswith("probabilities.base")]
    assert len(bases) == 2 and all(1 <= base <= 137 for base in bases)


def test_weights_alone_and_activations_alone() -> None:
    checkpoint = build()
    exact = outputs(checkpoint)
    weights = pl.quantize(checkpoint, RepQViT(weights=8, activations=16), calibration=[pictures(1)])
    assert not any(isinstance(m, StaticQuantizer) for m in weights.model.modules())
    inputs = pl.quantize(checkpoint, RepQViT(weights=16, activations=8), calibration=[pictures(1)])
    for made in (weights, inputs):
        assert 0 < float((outputs(made) - exact).norm() / exact.norm()) < 0.15


def test_dual_clipping_loses_less_than_the_whole_range() -> None:
    rows = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    rows[:, 1] = rows[:, 1].exp()
    scale, zero = dual_clipping(rows, 3)
    grid = Uniform(3)
    clipped = grid.round_trip(rows.double(), {"scale": scale, "zero_point": zero})
    low, high = rows.amin(0).double(), rows.amax(0).double()
    step = (high - low) / 7
    whole = grid.round_trip(rows.double(), {"scale": step, "zero_point": (-low / step).round()})
    errors = [(found - rows).square().mean(0) for found in (clipped, whole)]
    assert (errors[0] <= errors[1] + 1e-12).all() and errors[0][1] < 0.9 * errors[1][1]


def test_what_cannot_be_done_is_refused(tiny_llama_dir: Any) -> None:
    with pytest.raises(
        SettingsError, match="quantizes vision models, and this is a language model"
    ):
        pl.quantize(tiny_llama_dir, "repq-vit", calibration=["text"])
    with pytest.raises(DataError, match="learns from calibration images"):
        pl.quantize(build(), RepQViT())
    with pytest.raises(SettingsError, match="fixed ranges"):
        RepQViT(activation_group="tensor")
    again = pl.quantize(build(), RepQViT(), calibration=[pictures(1)])
    with pytest.raises(SettingsError, match="already quantized"):
        pl.quantize(again, RepQViT(), calibration=[pictures(1)])
    assert copy.deepcopy(again.model) is not again.model
