from __future__ import annotations

import cmath
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from postlude.errors import SettingsError, UnknownNameError
from postlude.zoo.smn.baselines import GaussSettings, SirenSettings, WireSettings
from postlude.zoo.smn.networks import NETWORKS, build, settings_for, width_for
from postlude.zoo.smn.settings import NetworkSettings
from postlude.zoo.smn.subtractive import VARIANTS, SMNSettings

KODAK = 768 * 512
POINT = (0.3, -0.7)


def trained(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_counts_of_smn_at_width_256() -> None:
    settings = SMNSettings(256)
    assert settings.weights == 264_192
    assert settings.parameters == 264_195 == trained(build(settings, 0))
    assert settings.released_parameters == 264_210
    assert settings.published_parameters == 264_216
    assert f"{settings.flops(KODAK) / 1e9:.1f}" == "207.8"
    with_biases = SMNSettings(256, variant="paper")
    assert with_biases.parameters == trained(build(with_biases, 0))


def test_count_of_the_radiance_class() -> None:
    settings = SMNSettings(256, in_features=90, out_features=5, variant="field")
    assert settings.parameters == 287_752 == trained(build(settings, 0))


def test_counts_of_the_baselines() -> None:
    for kind in (SirenSettings, GaussSettings):
        assert kind(300).published_parameters == 272_703 == trained(build(kind(300), 0))
        assert f"{kind(300).flops(KODAK) / 1e9:.1f}" == "214.5"
    wire = WireSettings(int(420 / math.sqrt(2)))
    assert (wire.width, wire.parameters, wire.published_parameters) == (296, 265_515, 265_523)
    assert wire.numbers == trained(build(wire, 0))
    assert f"{wire.flops(KODAK) / 1e9:.1f}" == "835.3"


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("features", [(2, 3), (3, 1)])
def test_numbers_are_those_of_the_network(name: str, features: tuple[int, int]) -> None:
    settings = settings_for(
        name, {"width": 11, "in_features": features[0], "out_features": features[1]}
    )
    network = build(settings, 3)
    assert settings.numbers == trained(network)
    assert network(torch.zeros(4, 5, features[0])).shape == (4, 5, features[1])


@pytest.mark.parametrize("name", NETWORKS)
def test_width_for(name: str) -> None:
    width = width_for(name, 5_000)
    sizes = [settings_for(name, {"width": w}).numbers for w in (width, width + 1)]
    assert sizes[0] <= 5_000 < sizes[1]


@pytest.mark.parametrize("name", NETWORKS)
def test_same_seed_same_weights(name: str) -> None:
    settings = settings_for(name, {"width": 5})
    state = build(settings, 1).state_dict()
    assert all(
        torch.equal(state[key], value) for key, value in build(settings, 1).state_dict().items()
    )
    other = build(settings, 2).state_dict()
    assert not torch.equal(other["readout.weight"], state["readout.weight"])


def matrix(layer: Any, x: list[complex], part: int | None = None) -> list[complex]:
    """One multiplication after another."""
    weight = layer.weight.tolist()
    bias = layer.bias.tolist() if layer.bias is not None else None
    if part is not None:  # complex
        real, imaginary = weight
        weight = [
            [complex(a, b) for a, b in zip(p, q, strict=True)]
            for p, q in zip(real, imaginary, strict=True)
        ]
        bias = [complex(a, b) for a, b in zip(*bias, strict=True)]
    gain = getattr(layer, "gain", 1.0)
    rows = range(len(weight))
    return [
        gain * (sum(weight[r][c] * x[c] for c in range(len(x))) + (bias[r] if bias else 0))
        for r in rows
    ]


def slow_smn(network: Any) -> list[float]:
    settings, variant = network.settings, VARIANTS[network.settings.variant]
    amplitudes = network.amplitudes.tolist()
    sine = lambda values: [math.sin(v) for v in values]  # noqa: E731
    v = matrix(network.first, list(POINT))
    z = [
        sum(a * math.sin(w * one) for a, w in zip(amplitudes, settings.frequencies, strict=True))
        for one in v
    ]
    m1 = sine(matrix(network.mask1, z))
    m2 = matrix(network.mask2, m1)
    m2 = sine(m2) if variant.mask == "sin" else [max(0.0, one) for one in m2]
    mask = m1 if variant.added == "first" else m2
    z1 = sine(matrix(network.main1, [a + b for a, b in zip(z, mask, strict=True)]))
    z1 = [a * b if settings.combine == "product" else a + b for a, b in zip(z1, m2, strict=True)]
    z2 = sine(matrix(network.main2, z1))
    z2 = [a**2 if settings.square else a for a in z2]
    y = matrix(network.readout, z1 + z2 if variant.concatenate else z2)
    return [1 / (1 + math.exp(-one)) if variant.sigmoid else one for one in y]


SMNS: list[dict[str, Any]] = [
    {},
    {"variant": "paper"},
    {"variant": "field"},
    {"combine": "sum"},
    {"square": False},
    {"frequencies": (8.0,)},
    {"learnable": False, "frequencies": (8.0, 40.0)},
]


def jittered(network: nn.Module) -> nn.Module:
    """Biases that start at zero would hide mistakes."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(1)
            )
    return network.double()


@pytest.mark.parametrize("values", SMNS, ids=str)
def test_smn_against_loops(values: dict[str, Any]) -> None:
    network = jittered(build(SMNSettings(width=7, **values), 0))
    expected = torch.tensor(slow_smn(network), dtype=torch.float64)
    torch.testing.assert_close(network(torch.tensor(POINT, dtype=torch.float64)), expected)


def slow_baseline(network: Any) -> list[float]:
    settings = network.settings
    h: list[Any] = list(POINT)
    if settings.name == "wire":
        wave = lambda y: [  # noqa: E731
            cmath.exp(1j * settings.omega * one - abs(settings.scale * one) ** 2) for one in y
        ]
        h = wave(matrix(network.first, h))
        for layer in network.layers:
            h = wave(matrix(layer, h, part=0))
        return [one.real for one in matrix(network.readout, h, part=0)]
    if settings.name == "relu-pe":
        h = h + [
            f(2**k * x)
            for k in range(settings.frequencies)
            for f in (math.sin, math.cos)
            for x in POINT
        ]
    activation = {
        "siren": math.sin,
        "gauss": lambda y: math.exp(-(y**2)),
        "relu-pe": lambda y: max(0.0, y),
    }[settings.name]
    for layer in network.layers:
        h = [activation(one) for one in matrix(layer, h)]
    return matrix(network.readout, h)


@pytest.mark.parametrize("name", ["siren", "gauss", "wire", "relu-pe"])
def test_baselines_against_loops(name: str) -> None:
    network = jittered(build(settings_for(name, {"width": 6}), 0))
    expected = torch.tensor(slow_baseline(network), dtype=torch.float64)
    torch.testing.assert_close(network(torch.tensor(POINT, dtype=torch.float64)), expected)


def test_weights_of_the_code_are_stored_at_unit_scale() -> None:
    network: Any = build(SMNSettings(64), 0)
    assert float(network.first.weight.detach().abs().max()) == pytest.approx(
        math.sqrt(4.5), rel=0.05
    )
    assert float(network.main1.weight.detach().abs().max()) == pytest.approx(1, rel=0.01)
    assert network.main1.gain == math.sqrt(6 / 64)
    assert network.readout.gain == math.sqrt(6 / 128)
    assert network.first.bias is None


def loss(network: nn.Module) -> Tensor:
    x = torch.rand(32, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    target = torch.sin(3 * x.sum(-1, keepdim=True)).expand(-1, 3)
    return (network(x) - target).square().mean()


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_of_the_amplitudes(variant: str) -> None:
    network: Any = build(SMNSettings(8, variant=variant), 0).double()
    loss(network).backward()
    for i in range(3):
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                network.amplitudes[i] += step
                values.append(float(loss(network)))
                network.amplitudes[i] -= step
        difference = (values[0] - values[1]) / 2e-6
        assert network.amplitudes.grad[i] == pytest.approx(difference, rel=1e-4)
        assert network.amplitudes.grad[i] != 0


def test_fixed_amplitudes_are_stored_and_not_trained() -> None:
    network = build(SMNSettings(8, learnable=False), 0)
    assert "amplitudes" not in dict(network.named_parameters())
    assert "amplitudes" in network.state_dict()


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("sirne", {}, "Did you mean 'siren'"),
        ("smn", {"widht": 3}, "Did you mean 'width'"),
        ("smn", {"width": 0}, "width is 0; expected a whole number"),
        ("smn", {"variant": "cod"}, "Did you mean 'code'"),
        ("smn", {"combine": "add"}, "combination of smn"),
        ("smn", {"frequencies": ()}, "one to three positive"),
        ("smn", {"frequencies": (8.0, -1.0)}, "one to three positive"),
    ],
)
def test_refused(name: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises((SettingsError, UnknownNameError), match=message):
        settings_for(name, values)


def test_the_base_is_no_network() -> None:
    with pytest.raises(NotImplementedError):
        NetworkSettings.build(SMNSettings(4), torch.Generator())
