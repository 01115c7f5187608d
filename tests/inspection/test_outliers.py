from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import scipy.stats
import torch

from postlude.errors import DataError, SettingsError
from postlude.inspection.outliers import Outliers, measure_tensor
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import anatomy_of

TYPES = ("llama", "gpt2")


def checkpoint(model: Any, tokenizer: Any = None) -> Checkpoint:
    return Checkpoint(model, tokenizer, anatomy_of(model))


def some_tokens(samples: int = 3, length: int = 17) -> torch.Tensor:
    return torch.randint(3, 259, (samples, length), generator=torch.Generator().manual_seed(0))


def test_statistics_of_a_tensor_against_sorting_and_scipy() -> None:
    x = torch.randn(4, 9, 12, generator=torch.Generator().manual_seed(1)).double()
    x[2, 5, 7] = -40
    x[1, 0] = 0  # a constant token has no kurtosis
    found = measure_tensor(x, top=2)
    rows = x.reshape(-1, 12).numpy()
    assert found["absmax"] == 40
    assert found["median"] == pytest.approx(float(x.abs().median()), rel=2e-2)
    import numpy

    lively = rows[numpy.abs(rows).sum(1) > 0]
    kurtosis = scipy.stats.kurtosis(lively, axis=1, fisher=False).mean()
    assert found["kurtosis"] == pytest.approx(kurtosis)
    kurtosis = scipy.stats.kurtosis(rows, axis=0, fisher=False).mean()
    assert found["channel_kurtosis"] == pytest.approx(kurtosis)
    assert found["top_tokens"][0] == (2 * 9 + 5, 7, -40.0)
    assert found["top_channels"][0] == (7, 40.0)
    assert len(found["top_tokens"]) == len(found["top_channels"]) == 2


@pytest.mark.parametrize("model_type", TYPES)
def test_sites_and_layers_agree_with_hooks_and_hidden_states(
    model_type: str, make_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = make_model(model_type)
    made = checkpoint(model, tiny_tokenizer)
    tokens = some_tokens()
    report = Outliers(top=3).inspect(made, tokens)
    seen: dict[tuple[int, str], torch.Tensor] = {}
    handles = [
        model.get_submodule(site.modules[0]).register_forward_pre_hook(
            lambda _, args, key=(block.index, site.name): seen.__setitem__(key, args[0])
        )
        for block, site in made.anatomy.sites()
    ]
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    assert [(site.block, site.site) for site in report.sites] == list(seen)
    for site in report.sites:
        x = seen[site.block, site.site]
        assert site.width == x.shape[-1]
        assert site.absmax == pytest.approx(float(x.abs().max()))
        assert site.median == pytest.approx(float(x.abs().double().quantile(0.5)), rel=5e-3)
        top = site.top_tokens[0]
        assert abs(top.value) == pytest.approx(site.absmax)
        assert float(x[top.sample, top.position, top.channel]) == pytest.approx(top.value)
        assert top.token_id == int(tokens[top.sample, top.position])
        assert top.text == tiny_tokenizer.decode([top.token_id]) or "\ufffd" in str(
            tiny_tokenizer.decode([top.token_id])
        )
        assert site.top_channels[0].absmax == pytest.approx(site.absmax)
    assert [layer.layer for layer in report.layers] == [-1, 0, 1]
    for layer, hidden in zip(report.layers[:-1], states, strict=False):
        norms = hidden.norm(dim=-1)
        assert layer.max_norm == pytest.approx(float(norms.max()))
        assert layer.median_norm == pytest.approx(float(norms.median()))
        assert layer.absmax == pytest.approx(float(hidden.abs().max()))
    # transformers normalises the last one; ours is the input of the final norm.
    final = model.get_submodule(made.anatomy.final_norm)
    assert report.traced_norms.shape == (3, 17)
    assert report.layers[-1].max_norm != pytest.approx(float(states[-1].norm(dim=-1).max()))
    assert final is not None


def test_a_planted_outlier_is_named(make_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = make_model("llama")
    made = checkpoint(model, tiny_tokenizer)
    with torch.no_grad():
        model.get_submodule(made.anatomy.embeddings[0]).weight[70] = 0
        model.get_submodule(made.anatomy.embeddings[0]).weight[70, 5] = 1000
    tokens = some_tokens()
    tokens[tokens == 70] = 71
    tokens[1, 4] = 70
    report = Outliers().inspect(made, tokens)
    assert report.layers[0].absmax == 1000
    assert report.layers[0].ratio > 1000
    top = report.sites[0].top_tokens[0]
    assert (top.sample, top.position, top.token_id, top.channel) == (1, 4, 70, 5)
    assert top.text == tiny_tokenizer.decode([70])
    assert "1 x" not in report.summary().split("\n")[0]
    assert "ratio" in report.summary()
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["sites"][0]["block"] == 0


def test_batches_do_not_matter(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import postlude.inspection.outliers as module
    from postlude.surgery.batches import token_batches

    made = checkpoint(make_model("llama"))
    whole = Outliers().inspect(made, some_tokens()).to_dict()
    monkeypatch.setattr(module, "token_batches", lambda tokens: token_batches(tokens, 1))
    single = Outliers().inspect(made, some_tokens()).to_dict()
    for a, b in zip(whole["sites"], single["sites"], strict=True):
        assert a["absmax"] == pytest.approx(b["absmax"], rel=1e-4)
        assert a["kurtosis"] == pytest.approx(b["kurtosis"], rel=1e-3)
        places = [[(t["sample"], t["position"]) for t in site["top_tokens"]] for site in (a, b)]
        assert places[0] == places[1]


def test_bad_input_is_refused(make_model: Callable[..., Any]) -> None:
    made = checkpoint(make_model("llama"))
    with pytest.raises(SettingsError, match="at least one"):
        Outliers(top=0)
    with pytest.raises(DataError, match="Pass a text"):
        Outliers().inspect(made, None)
    with pytest.raises(DataError, match="expected integers"):
        Outliers().inspect(made, torch.ones(3))
    with pytest.raises(DataError, match="another model's tokenizer"):
        Outliers().inspect(made, torch.full((1, 4), 259))
    with pytest.raises(DataError, match="takes 1 to 64"):
        Outliers().inspect(made, torch.ones(1, 65, dtype=torch.long))
