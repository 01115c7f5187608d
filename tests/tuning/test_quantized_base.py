"""Adapters beside quantized layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from postlude.errors import SettingsError
from postlude.evaluation.size import size_of
from postlude.quantization import RTN, LoRC, QuaRot
from postlude.quantization.engine import quantize
from postlude.runs.loading import load
from postlude.surgery.layers import quantized_linears
from postlude.tuning.adapters import Adapter, attach, load_adapter
from postlude.tuning.merging import logits
from postlude.tuning.objective import TuneRun
from postlude.tuning.run import tune
from postlude.tuning.supervised import objective_of

LORA = Adapter("lora", rank=2, target=None)
RUN = TuneRun(steps=3, batch_size=4, learning_rate=3e-2, warmup=0.0)
WEIGHTS_ONLY = {"weights": 3, "activations": 16, "kv": 16}
PROBE = [torch.arange(12) * 7 % 259]


@pytest.fixture
def small(tiny: Callable[..., Any]) -> Any:
    """A quantized model in memory."""
    return quantize(tiny(), RTN(**WEIGHTS_ONLY), None, seed=0)


def test_only_the_factors_are_trained_and_merging_makes_a_quantized_checkpoint(
    small: Any, demonstrations: Path, tmp_path: Path
) -> None:
    small.save(tmp_path / "small")
    codes = {path: layer.codes.clone() for path, layer in quantized_linears(small.model)}
    before = size_of(small)["bits_per_weight"]
    goal = objective_of("sft")
    alone = tune(small, demonstrations, goal, RUN, adapter=LORA, out=tmp_path / "adapter")
    merged = tune(
        small, demonstrations, goal, RUN, adapter=LORA, merge=True, out=tmp_path / "merged"
    )
    assert alone.log[-1]["mean_loss"] < alone.log[0]["mean_loss"]
    loaded = load(tmp_path / "merged", device="cpu")
    assert all(
        torch.equal(layer.codes, codes[path]) for path, layer in quantized_linears(loaded.model)
    )
    assert size_of(loaded)["bits_per_weight"] > before
    assert loaded.made_by()["branch"]["layers_of_rank"] == {"2": len(codes)}
    # The adapter, loaded again, becomes the same branches.
    again = load_adapter(tmp_path / "adapter", device="cpu")
    assert_close(logits(again.model, PROBE), logits(loaded.model, PROBE), rtol=0, atol=2e-3)
    assert not torch.allclose(logits(small.model, PROBE)[0], logits(loaded.model, PROBE)[0])
    assert merged.result["merge_difference"] < 1e-2


def test_the_gradient_is_that_of_decoded_weights(small: Any, tiny: Callable[..., Any]) -> None:
    layer = next(layer for _, layer in quantized_linears(small.model))
    x = torch.randn(2, 3, layer.in_features, requires_grad=True)
    layer(x).square().sum().backward()
    found, x.grad = x.grad, None
    dense = layer.dense_weight()
    torch.nn.functional.linear(x, dense).square().sum().backward()
    assert_close(found, x.grad)


def test_branches_read_what_a_transform_made(tiny: Callable[..., Any]) -> None:
    """QuaRot has online transforms: an adapter outside of them and a branch behind them are the same."""
    tokens = torch.arange(64).view(4, 16)
    rotated = quantize(tiny(), QuaRot(rounding="nearest", **WEIGHTS_ONLY), tokens, seed=0)
    model = attach(rotated, LORA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    before = logits(model, PROBE)
    from postlude.tuning.quantized_base import to_branches

    assert_close(logits(to_branches(model), PROBE), before, rtol=0, atol=5e-3)


def test_the_reference_is_the_same_model_with_its_adapter_off(
    small: Any, demonstrations: Path, tmp_path: Path
) -> None:
    """A rule that reads the reference on every batch and one that reads a stored prior take the same weights."""
    from postlude.tuning.examples import read_examples
    from postlude.tuning.prior import compute_prior

    length = small.context
    examples = read_examples(demonstrations, small.tokenizer, length)
    compute_prior(small, examples, tmp_path / "prior", max_length=length)
    found = [
        tune(small, demonstrations, objective_of("prift-prob", **given), RUN, adapter=LORA)
        for given in ({"signal": "reference"}, {"prior": tmp_path / "prior"})
    ]
    weights = [[row["mean_weight"] for row in one.log] for one in found]
    assert weights[0] == pytest.approx(weights[1], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "adapter", "message"),
    [
        (RTN(weights=4, activations=8, kv=16), LORA, "rounds its input to 8 bits"),
        (RTN(weights=4, activations=16, kv=4), LORA, "rounds keys and values"),
        (LoRC(weights=4, activations=16, kv=16, rank=2), LORA, "has a low-rank branch already"),
        (RTN(**WEIGHTS_ONLY), Adapter("loha", rank=2), "only lora"),
        (RTN(**WEIGHTS_ONLY), None, "train an adapter beside the codes"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    tiny: Callable[..., Any],
    demonstrations: Path,
    settings: Any,
    adapter: Adapter | None,
    message: str,
) -> None:
    model = quantize(tiny(), settings, None, seed=0)
    with pytest.raises(SettingsError, match=message):
        tune(model, demonstrations, objective_of("sft"), RUN, adapter=adapter)


def test_a_variant_with_more_than_two_factors_stays_an_adapter(
    small: Any, demonstrations: Path
) -> None:
    biased = dataclasses.replace(LORA, settings={"lora_bias": True})
    with pytest.raises(SettingsError, match=r"more than two factors|cannot put the adapter"):
        tune(small, demonstrations, objective_of("sft"), RUN, adapter=biased, merge=True)
