from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import postlude as pl
from postlude.errors import SettingsError
from postlude.numerics.activation_grids import Uniform
from postlude.numerics.formats import Integer
from postlude.numerics.rounding import nearest
from postlude.numerics.schemes import Granularity, Scheme
from postlude.quantization.budgeted import site_losses
from postlude.quantization.layerwise_ip import LayerwiseIP
from postlude.quantization.mptq_greedy import MPTQGreedy, shifted_range
from postlude.surgery.layers import quantized_linears

from .test_vision import build, outputs, pictures

CALIBRATION = [pictures(1)]


def bits_of(made: Any) -> dict[str, int]:
    return {path: layer.weight_scheme.format.bits for path, layer in quantized_linears(made.model)}


def average(made: Any) -> float:
    sizes = {
        path: layer.in_features * layer.out_features
        for path, layer in quantized_linears(made.model)
    }
    return sum(bits * sizes[path] for path, bits in bits_of(made).items()) / sum(sizes.values())


@pytest.mark.parametrize(
    "settings",
    [LayerwiseIP(weights=4, lowest=3, highest=5), MPTQGreedy(weights=4, lowest=3, highest=5)],
)
def test_the_budget_is_kept_and_spent(settings: Any) -> None:
    made = pl.quantize(build(), settings, calibration=CALIBRATION)
    assert 3.6 < average(made) <= 4
    assert len(set(bits_of(made).values())) > 1
    reported = made.made_by()["bits"]
    assert (
        all(bits_of(made)[path] == bits for path, bits in reported.items()) and len(reported) == 8
    )


def test_the_choice_is_that_of_trying_everything() -> None:
    """Two blocks of three sites: every combination of options, by the measured losses."""
    checkpoint = build()
    sites = [site for _, site in checkpoint.anatomy.sites()][:6]
    schemes = [Scheme(Integer(b, symmetric=False), Granularity("channel")) for b in (2, 3, 4)]
    losses = site_losses(checkpoint, CALIBRATION, sites, schemes, clip=False)
    sizes = [sum(r.weight(checkpoint.model).numel() for r in site.readers) // 32 for site in sites]
    costs = [[bits * size for bits in (2, 3, 4)] for size in sizes]
    budget = 3 * sum(sizes)
    best = min(
        (sum(losses[i][o] for i, o in enumerate(options)), options)
        for options in itertools.product(range(3), repeat=6)
        if sum(costs[i][o] for i, o in enumerate(options)) <= budget
    )
    settings = LayerwiseIP(weights=3, lowest=2, highest=4)
    assert settings.choose(losses, costs, budget).loss == pytest.approx(best[0], rel=1e-12)
    greedy = MPTQGreedy(weights=3, lowest=2, highest=4).choose(losses, costs, budget)
    assert best[0] <= greedy.loss and greedy.cost <= budget


def test_losses_are_those_of_one_site_rounded_alone() -> None:
    checkpoint = build()
    before = {name: p.clone() for name, p in checkpoint.model.named_parameters()}
    site = checkpoint.anatomy.blocks[1].site("qkv_in")
    scheme = Scheme(Integer(3, symmetric=False), Granularity("channel"))
    (found,) = site_losses(checkpoint, CALIBRATION, [site], [scheme], clip=False)
    assert all(torch.equal(p, before[name]) for name, p in checkpoint.model.named_parameters())
    with torch.no_grad():
        exact = checkpoint.model(**CALIBRATION[0]).logits
        for reader in site.readers:
            weight = reader.weight(checkpoint.model)
            weight.copy_(nearest(weight, scheme).decode())
        rounded = checkpoint.model(**CALIBRATION[0]).logits
    assert found[0] == pytest.approx(float((rounded - exact).double().square().mean()), rel=1e-4)


def test_shifted_ranges_put_every_channel_in_the_middle() -> None:
    rows = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)).double()
    rows = rows * torch.tensor([1, 5, 0.2, 1, 3]) + torch.tensor([0.0, 9, -4, 1, 0])
    for alpha in (0.0, 0.75, 1.0):
        scale, zero = shifted_range(rows, 4, alpha)
        codes = rows / scale + zero
        assert torch.allclose(codes.amin(0) + codes.amax(0), torch.full((5,), 15.0).double())
        assert codes.min() > -1e-9 and codes.max() < 15 + 1e-9
        rounded = Uniform(4).round_trip(rows, {"scale": scale, "zero_point": zero})
        assert ((rounded - rows).abs() <= scale / 2 + 1e-9).all()
    assert torch.allclose(codes.amax(0) - codes.amin(0), torch.full((5,), 15.0).double())


def test_the_average_may_not_be_below_the_lowest() -> None:
    with pytest.raises(SettingsError, match="average of 3 bits cannot be had"):
        LayerwiseIP(weights=3, lowest=4)
    with pytest.raises(SettingsError, match="expected 2 to 8"):
        MPTQGreedy(lowest=6, highest=4)
    with pytest.raises(SettingsError, match="alpha is between"):
        MPTQGreedy(alpha=2.0)
    exact = outputs(build())
    made = pl.quantize(build(), LayerwiseIP(weights=16, activations=8), calibration=CALIBRATION)
    assert float((outputs(made) - exact).norm() / exact.norm()) < 0.1
