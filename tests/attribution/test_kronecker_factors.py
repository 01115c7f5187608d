"""Labels that a model draws; the factors themselves are tested with the method that they are for."""

from __future__ import annotations

import torch

from postlude.attribution.kronecker_factors import sampled


def test_sampled_tokens_follow_the_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, 8, generator=generator), torch.randn(6, 8, generator=generator)
    uniforms = torch.rand(4000, generator=generator)
    drawn = sampled(hidden.expand(4000, -1), weight, None, uniforms)
    shares = torch.bincount(drawn, minlength=6) / 4000
    torch.testing.assert_close(shares, (hidden @ weight.T).softmax(-1)[0], atol=0.03, rtol=0)
    # The ends of the interval are tokens too, and one that is impossible is never drawn.
    ends = sampled(
        hidden.expand(2, -1),
        weight,
        torch.tensor([-torch.inf] + [0.0] * 5),
        torch.tensor([0.0, 1 - 1e-7]),
    )
    assert ends.tolist() == [1, 5]
