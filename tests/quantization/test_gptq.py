"""The order of GPTQ (arXiv:2210.17323) against a loop that runs the whole model for every site."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from postlude.numerics.rounding import gptq, nearest
from postlude.quantization.engine import Quantizer, quantize
from postlude.quantization.gptq import GPTQ
from postlude.quantization.quarot import QuaRot
from postlude.quantization.rtn import RTN
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import LinearRef
from postlude.surgery.layers import QuantizedLinear

from .models import TOKENS, checkpoint, site_inputs, twin


def by_loop(float_model: Checkpoint, settings: Quantizer) -> dict[str, Tensor]:
    """Codes of every linear.

    The model after the rewrites, in float; site after site in the order of the forward pass. Every Hessian is of
    inputs that no quantizer touched, through weights that are already rounded.
    """
    model, anatomy = float_model.model, float_model.anatomy
    codes = {}
    for block, site in anatomy.sites():
        x = site_inputs(float_model)[block.index, site.name]
        layer = model.get_submodule(site.modules[0])
        if isinstance(layer, QuantizedLinear) and layer.transform is not None:
            x = layer.transform(x)
        hessian = torch.zeros(site.width, site.width, dtype=torch.float64)
        for token in x.flatten(0, 1):
            hessian += 2 * torch.outer(token, token) / x.flatten(0, 1).shape[0]
        scheme = settings.weight_scheme(site)
        assert scheme is not None
        for path in site.modules:
            weight = LinearRef(path, site.readers[0].role).weight(model)
            done = gptq(
                weight,
                hessian,
                scheme,
                damping=settings.damping,
                act_order=settings.act_order,
                clip=settings.clip,
            )
            codes[path] = done.codes
            weight.copy_(done.decode())
    return codes


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", GPTQ()),
        ("llama", GPTQ(group=32, act_order=True)),
        ("qwen2", GPTQ(weights=3, damping=0.1)),
        ("gpt2", GPTQ(group=48)),
        ("mistral", GPTQ(clip=True)),
        ("llama", QuaRot(clip=False)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_codes_are_those_of_the_loop(name: str, settings: Quantizer) -> None:
    original = checkpoint(name)
    made = twin(original)
    quantize(made, settings, TOKENS)
    settings.fold(original)
    settings.rewrite(original, {}, 0)
    expected = by_loop(original, settings)
    assert sorted(expected) == sorted(set(made.anatomy.linears()))
    for path, codes in expected.items():
        layer = made.model.get_submodule(path)
        weight = layer.weight_scheme.decode(codes, layer.scale, layer.zero_point)
        torch.testing.assert_close(layer.dense_weight(), weight, atol=0, rtol=0)


def test_activations_and_cache_are_in_float_while_hessians_are_collected() -> None:
    codes = []
    for settings in (GPTQ(activations=2, kv=2), GPTQ(activations=16, kv=16)):
        made = checkpoint("llama")
        quantize(made, settings, TOKENS)
        codes.append([made.model.get_submodule(path).codes for path in made.anatomy.linears()])
    assert all(torch.equal(a, b) for a, b in zip(*codes, strict=True))


def test_the_output_projection_sees_rounded_values() -> None:
    """Hessians of a float model throughout would give other codes."""
    made, float_hessians = checkpoint("llama"), checkpoint("llama")
    settings = GPTQ(weights=2)
    quantize(made, settings, TOKENS)
    x = site_inputs(float_hessians)
    different = 0
    for block, site in made.anatomy.sites():
        rows = x[block.index, site.name].flatten(0, 1)
        scheme = settings.weight_scheme(site)
        assert scheme is not None
        for path in site.modules:
            weight = float_hessians.model.get_submodule(path).weight
            codes = gptq(weight, 2 * rows.T @ rows / len(rows), scheme).codes
            layer = made.model.get_submodule(path)
            same = torch.equal(
                layer.weight_scheme.decode(codes, layer.scale, layer.zero_point),
                layer.dense_weight(),
            )
            first = block.index == 0 and site.name == "qkv_in"
            assert same or not first
            different += not same
    assert different >= 10  # of the 11 that have something rounded before them


def test_rounding_is_a_choice_of_every_method() -> None:
    """rtn with ``rounding="gptq"`` is gptq, and the other way round."""
    one, other, plain = checkpoint("llama"), checkpoint("llama"), checkpoint("llama")
    quantize(one, RTN(rounding="gptq"), TOKENS)
    quantize(other, GPTQ(), TOKENS)
    quantize(plain, GPTQ(rounding="nearest"), TOKENS)
    for path in one.anatomy.linears():
        assert torch.equal(
            one.model.get_submodule(path).codes, other.model.get_submodule(path).codes
        )
        layer = plain.model.get_submodule(path)
        weight = checkpoint("llama").model.get_submodule(path).weight
        expected = nearest(weight, layer.weight_scheme).decode()
        torch.testing.assert_close(layer.dense_weight(), expected, atol=0, rtol=0)
