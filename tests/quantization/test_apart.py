"""Weights of a site that a method says it rounds apart may be rounded by different ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from postlude import registry
from postlude.quantization.engine import Quantizer
from postlude.surgery.anatomy import anatomy_of


def _settings() -> Iterator[Any]:
    for info in registry.available("quantize"):
        try:
            settings = info.settings(rounding="gptq")
        except TypeError:
            settings = info.settings()
        if "language" in settings.kinds and settings.rounds_apart:
            yield pytest.param(settings, id=info.name)


@pytest.mark.parametrize("settings", list(_settings()))
def test_alone_and_with_the_others_of_the_site(settings: Quantizer, make_model: Any) -> None:
    model = make_model("llama")
    site = anatomy_of(model).blocks[0].sites[0]
    weights = [reader.weight(model).detach() for reader in site.readers]
    scheme = settings.weight_scheme(site)
    assert scheme is not None and len(weights) == 3
    seen = settings.observes(site)
    seen.update(torch.randn(200, site.width, generator=torch.Generator().manual_seed(0)))
    whole = settings.round_site(site, weights, seen, scheme)
    alone = [settings.round_site(site, [weight], seen, scheme)[0] for weight in weights]
    for one, other in zip(whole, alone, strict=True):
        for name, part in one.parts().items():
            assert torch.equal(part, other.parts()[name]), name
