"""Methods with a low-rank branch, each against the same thing computed by hand, on language models and a denoiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import postlude as pl
from postlude.errors import SettingsError, UnknownNameError
from postlude.evaluation.size import size_of
from postlude.numerics.factorize import weighted_svd
from postlude.numerics.formats import Integer
from postlude.numerics.low_rank import BranchFormat
from postlude.numerics.schemes import Granularity, Scheme
from postlude.quantization.correction import Correction
from postlude.quantization.engine import Quantizer, quantize
from postlude.quantization.loraq import LoRaQ
from postlude.quantization.lorc import LoRC
from postlude.quantization.qera_approx import QERAApprox
from postlude.quantization.qera_exact import QERAExact
from postlude.quantization.rtn import RTN
from postlude.quantization.smoothing import smoothing_candidates
from postlude.quantization.svdquant import SVDQuant
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.layers import QuantizedLinear
from postlude.surgery.transforms import InputScale

from .models import TOKENS, checkpoint, logits, site_inputs, twin

FEW: dict[type[Correction], dict[str, Any]] = {
    LoRC: {},
    QERAApprox: {},
    QERAExact: {},
    LoRaQ: {"iterations": 3},
    SVDQuant: {"iterations": 3, "grid": 3},
}
EVERY = pytest.mark.parametrize("kind", list(FEW), ids=lambda kind: kind.__name__)


def make(original: Checkpoint, settings: Quantizer) -> Checkpoint:
    return quantize(twin(original), settings, TOKENS)


def layer(made: Checkpoint, path: str) -> QuantizedLinear:
    found = made.model.get_submodule(path)
    assert isinstance(found, QuantizedLinear)
    return found


def weight_of(made: QuantizedLinear) -> Tensor:
    """What the layer stands for, branch and smoothing included."""
    assert made.branch is not None
    up, down = made.branch.up.dense_weight().float(), made.branch.down.dense_weight().float()
    whole = made.dense_weight() + up @ down
    return whole * made.transform.factor if isinstance(made.transform, InputScale) else whole


PATH = "model.layers.0.self_attn.q_proj"
INPUT = (0, "qkv_in")


@pytest.fixture(scope="module")
def llama() -> Checkpoint:
    return checkpoint("llama")


# Closed forms


@pytest.mark.parametrize("kind", [LoRC, QERAApprox, QERAExact])
def test_the_branch_is_the_closed_form(llama: Checkpoint, kind: type[LoRC]) -> None:
    made = make(llama, kind(weights=3, rank=2, branch="16", group="channel"))
    weight = llama.model.get_submodule(PATH).weight.data
    x = site_inputs(llama)[INPUT].reshape(-1, weight.shape[1])
    moment: Mapping[type, Tensor | None] = {
        LoRC: None,
        QERAApprox: x.square().mean(0),
        QERAExact: x.T @ x / len(x),
    }
    error = weight - Scheme(Integer(3)).encode(weight).decode()
    a, b = weighted_svd(error.T, 2, moment[kind])
    branch = layer(made, PATH).branch
    assert branch is not None
    found = branch.up.dense_weight().double() @ branch.down.dense_weight().double()
    torch.testing.assert_close(found, (a @ b).T, atol=3e-3 * float(error.abs().max()), rtol=0)


def test_what_each_metric_is_good_for(llama: Checkpoint) -> None:
    """The error of the outputs falls from lorc over approx to exact, that of the weights does not."""
    inputs = site_inputs(llama)
    outputs, weights = [], []
    for kind in (LoRC, QERAApprox, QERAExact):
        made = make(llama, kind(weights=3, rank=2, branch="16", group="channel"))
        squared = 0.0
        for block, site in llama.anatomy.sites():
            if (block.index, site.name) != INPUT:
                continue
            for path in site.modules:
                exact = llama.model.get_submodule(path).weight.data
                wrong = weight_of(layer(made, path)).double() - exact
                squared += float((inputs[INPUT] @ wrong.T).square().sum())
        outputs.append(squared)
        weights.append(made.made_by()["weight_error"])
    assert outputs[2] < outputs[1] < outputs[0]
    assert weights[0] < min(weights[1:])


# All of them


@EVERY
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_branch_brings_weights_closer(name: str, kind: type[Correction]) -> None:
    original = checkpoint(name)
    plain = make(original, RTN(weights=3, activations=16, kv=16, group="channel"))
    options = {"weights": 3, "activations": 16, "group": "channel", "rank": 4, "branch": "w8a8"}
    made = make(original, kind(**options, **FEW[kind]))
    if kind not in (QERAExact, SVDQuant):  # those look at outputs
        assert made.made_by()["weight_error"] < plain.made_by()["weight_error"]
    error = (logits(made.model) - logits(original.model)).norm()
    assert error < (logits(plain.model) - logits(original.model)).norm()
    paths = list(original.anatomy.linears())
    for path in paths:
        branch = layer(made, path).branch
        assert branch is not None and branch.rank == 4
        assert branch.up.codes.dtype == torch.uint8
        scheme = branch.down.weight_scheme
        assert scheme is not None and scheme.granularity == Granularity("group", 32)
    wrong = [
        weight_of(layer(made, path)).double() - original_weight(original, path) for path in paths
    ]
    whole = torch.stack([original_weight(original, path).square().sum() for path in paths]).sum()
    expected = (torch.stack([one.square().sum() for one in wrong]).sum() / whole).sqrt()
    assert made.made_by()["weight_error"] == pytest.approx(float(expected), rel=1e-4)


def original_weight(original: Checkpoint, path: str) -> Tensor:
    module = original.model.get_submodule(path)
    weight: Tensor = module.weight.data
    return weight.T if type(module).__name__ == "Conv1D" else weight


@EVERY
def test_gptq_may_round_what_is_left(llama: Checkpoint, kind: type[Correction]) -> None:
    options = {"weights": 3, "activations": 16, "rank": 2, "branch": "16", "group": "channel"}
    nearest = make(llama, kind(**options, **FEW[kind]))
    compensated = make(llama, kind(**options, rounding="gptq", **FEW[kind]))
    errors = [(logits(one.model) - logits(llama.model)).norm() for one in (nearest, compensated)]
    assert errors[1] < 1.1 * errors[0]
    assert not torch.equal(layer(nearest, PATH).codes, layer(compensated, PATH).codes)


# Bytes


def test_ranks_are_chosen_from_bytes_and_reported(llama: Checkpoint) -> None:
    made = make(llama, LoRaQ(branch="w4a8", bytes_as="svdquant:6", iterations=0))
    report = made.made_by()["branch"]
    format, half = BranchFormat.parse("w4a8"), BranchFormat()
    stored = allowed = 0
    for path in llama.anatomy.linears():
        found = layer(made, path)
        shape = (found.out_features, found.in_features)
        assert found.branch is not None
        rank, budget = found.branch.rank, half.stored_bits(*shape, min(6, *shape))
        assert format.stored_bits(*shape, rank) <= budget
        if rank < min(shape):
            assert format.stored_bits(*shape, rank + 1) > budget
        stored += format.stored_bits(*shape, rank)
        allowed += budget
    assert (report["bytes"], report["bytes_allowed"]) == (stored // 8, allowed // 8)
    assert report["format"] == "w4a8" and report["bytes_as"] == "svdquant:6"
    assert sum(report["layers_of_rank"].values()) == len(list(llama.anatomy.linears()))


def test_size_counts_the_branch(llama: Checkpoint) -> None:
    with_branch = make(llama, LoRaQ(rank=4, iterations=0))
    plain = make(llama, RTN(kv=16, group=64, activation_group=64))
    weights = sum(original_weight(llama, path).numel() for path in llama.anatomy.linears())
    more = size_of(with_branch)["bits_per_weight"] - size_of(plain)["bits_per_weight"]
    assert more == pytest.approx(8 * with_branch.made_by()["branch"]["bytes"] / weights)


def test_a_rank_is_cut_to_the_smaller_side(llama: Checkpoint) -> None:
    made = make(llama, LoRC(rank=1000))
    for path in llama.anatomy.linears():
        found = layer(made, path)
        assert found.branch is not None
        assert found.branch.rank == min(found.in_features, found.out_features)


def test_a_branch_larger_than_its_bytes_is_refused(llama: Checkpoint) -> None:
    with pytest.raises(
        SettingsError, match=r"rank 8 in w8a8 takes .* svdquant:4 leaves .*: give rank \d+ or less"
    ):
        make(llama, LoRaQ(rank=8, bytes_as="svdquant:4"))
    with pytest.raises(SettingsError, match=r"no branch in w8a8g1 fits .* rank 1 takes"):
        make(llama, LoRaQ(branch="w8a8g1", bytes_as="svdquant:1"))
    fits = make(llama, LoRaQ(rank=2, bytes_as="svdquant:4", iterations=0))
    assert fits.made_by()["branch"]["layers_of_rank"].keys() == {"2"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bytes_as": "svdquant"}, "a method and a rank as in svdquant:32"),
        ({"bytes_as": "svdquant:0"}, "a method and a rank"),
        ({"bytes_as": "gptq:8"}, "gptq has no low-rank branch: count as one of loraq, lorc"),
        ({"branch": "w8x"}, "branch 'w8x' is not understood"),
        ({"rank": 0}, "rank is 0; expected 1 or more"),
        ({"weights": 16}, "weights stay at 16 bits"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        LoRaQ(**settings)


def test_an_unknown_method_to_count_as() -> None:
    with pytest.raises(UnknownNameError, match="svdquant"):
        LoRaQ(bytes_as="svdquants:8")


# SVDQuant


def test_all_candidates_are_there() -> None:
    span_x, span_w = torch.tensor([4.0, 1.0, 0.0]), torch.tensor([0.5, 0.0, 2.0])
    found = list(smoothing_candidates(span_x, span_w, 20))
    assert len(found) == 39
    assert torch.equal(found[0], torch.ones(3, dtype=torch.float64))
    for d in found:
        assert float(d.log().mean()) == pytest.approx(0, abs=1e-12)
        assert d[1] == d[2]  # not usable: one, up to the common factor
    p = 7 / 20
    for q, d in zip((0, 1 - p), found[13:15], strict=True):
        assert float(d[0] / d[1]) == pytest.approx(4**p / 0.5**q)


def test_smoothing_and_the_lower_factor_are_shared(llama: Checkpoint) -> None:
    made = make(llama, SVDQuant(rank=3, **FEW[SVDQuant]))
    q, k, v = (layer(made, PATH.replace("q_proj", name)) for name in ("q_proj", "k_proj", "v_proj"))
    apart = make(llama, SVDQuant(rank=3, share=False, **FEW[SVDQuant]))
    for other in (k, v):
        assert q.branch is not None and other.branch is not None
        assert torch.equal(q.branch.down.weight, other.branch.down.weight)
        assert isinstance(q.transform, InputScale) and isinstance(other.transform, InputScale)
        assert torch.equal(q.transform.factor, other.transform.factor)
    a, b = layer(apart, PATH).branch, layer(apart, PATH.replace("q_proj", "k_proj")).branch
    assert a is not None and b is not None
    assert not torch.equal(a.down.weight, b.down.weight)


def test_the_search_takes_outliers_out_of_the_input() -> None:
    original = checkpoint("llama")
    norm = original.model.get_submodule("model.layers.0.input_layernorm")
    norm.weight.data[3] *= 40
    for name in ("q_proj", "k_proj", "v_proj"):
        original.model.get_submodule(PATH.replace("q_proj", name)).weight.data[:, 3] /= 40
    options = {"rank": 2, "activation_group": "token", "group": "channel", "share": True}
    smooth = make(original, SVDQuant(**options, iterations=3, grid=10))
    rough = make(original, SVDQuant(**options, iterations=3, grid=1))
    transform = layer(smooth, PATH).transform
    assert isinstance(transform, InputScale)
    assert transform.factor[3] < 0.5 * transform.factor.median()
    x = site_inputs(original)[INPUT]
    exact = original.model.get_submodule(PATH)(x).detach()
    errors = [float((layer(one, PATH)(x).detach() - exact).norm()) for one in (smooth, rough)]
    assert errors[0] < 0.5 * errors[1]


def test_more_iterations_are_never_worse(llama: Checkpoint) -> None:
    x = site_inputs(llama)[INPUT]
    exact = llama.model.get_submodule(PATH)(x).detach()
    errors = []
    for iterations in (1, 30):
        made = make(llama, SVDQuant(weights=3, rank=2, grid=1, share=False, iterations=iterations))
        errors.append(float((layer(made, PATH)(x).detach() - exact).norm()))
    assert errors[1] < errors[0]


# LoRaQ


def test_loraq_needs_no_data_unless_it_is_weighted() -> None:
    assert not LoRaQ().needs_calibration
    assert LoRaQ(weighted=True).needs_calibration
    assert SVDQuant().needs_calibration and not LoRC().needs_calibration


def test_the_fit_beats_one_shot_in_the_same_bytes(llama: Checkpoint) -> None:
    """L2 on a model: descent in a branch of 8 bits, against the 16-bit SVD in as many bytes."""
    options: dict[str, Any] = {"weights": 3, "bytes_as": "svdquant:4", "group": "channel"}
    one = make(llama, LoRaQ(**options, branch="16", iterations=0))
    fitted = make(llama, LoRaQ(**options, branch="w8a8", iterations=40))
    assert fitted.made_by()["weight_error"] < 0.9 * one.made_by()["weight_error"]


def test_a_rotated_bottleneck_starts_elsewhere() -> None:
    weight, scheme = torch.randn(24, 24), Scheme(Integer(4))
    found = [
        LoRaQ(rank=6, branch="w4a8", iterations=0, rotation=rotation).fit(
            weight, 6, scheme, scheme.encode, None
        )
        for rotation in (False, True)
    ]
    products = [one.branch() for one in found]
    u, s, vh = torch.linalg.svd(weight)
    best = (u[:, :6] * s[:6]) @ vh[:6]
    assert (products[1] - best).norm() < (products[0] - best).norm()


def test_loraq_may_smooth_as_svdquant_does(
    llama: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("postlude.quantization.loraq._GRID", 4)
    options: dict[str, Any] = {"rank": 3, "branch": "16", "iterations": 1}
    smooth = make(llama, LoRaQ(**options, smooth=True))
    peer = make(llama, SVDQuant(**options, share=False, grid=4))
    factors = [layer(one, PATH).transform for one in (smooth, peer)]
    assert isinstance(factors[0], InputScale) and isinstance(factors[1], InputScale)
    torch.testing.assert_close(factors[0].factor, factors[1].factor)
    assert layer(make(llama, LoRaQ(**options)), PATH).transform is None
    x = site_inputs(llama)[INPUT]
    exact = llama.model.get_submodule(PATH)(x).detach()
    assert (layer(smooth, PATH)(x) - exact).norm() < 0.2 * exact.norm()


# A denoiser


@pytest.fixture(scope="module")
def denoiser() -> Checkpoint:
    pytest.importorskip("diffusers")
    return pl.load("zoo:tiny-dit", dtype="float32")


def test_a_denoiser_is_saved_packed_and_read_bit_equal(
    denoiser: Checkpoint, tmp_path: Path
) -> None:
    settings = LoRaQ(bytes_as="svdquant:8", branch="w6a6", iterations=2)
    made = pl.quantize(denoiser, settings, out=tmp_path / "dit4")
    again = pl.load(tmp_path / "dit4")
    state, other = made.model.state_dict(), again.model.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)
    packed = [name for name in state if name.endswith("branch.up.codes")]
    assert len(packed) == 18 and all(state[name].dtype == torch.uint8 for name in packed)
    assert any("norm1.linear" in path for path in made.made_by()["kept"])
    assert made.made_by()["branch"]["bytes"] <= made.made_by()["branch"]["bytes_allowed"]
    assert dataclasses.replace(settings, kv=16) == settings
