"""Products of factors against those of the matrices that they stand for."""

from __future__ import annotations

import dataclasses

import torch

from postlude.attribution.rows import FactorRows


def test_products_of_factors_are_those_of_the_matrices() -> None:
    generator = torch.Generator().manual_seed(0)

    def rows(n: int, c: int) -> FactorRows:
        return FactorRows(
            torch.randn(n, c, 6, generator=generator), torch.randn(n, c, 5, generator=generator)
        )

    a, b = rows(4, 3), rows(7, 2)
    torch.testing.assert_close(a.products(b), a.flat() @ b.flat().T)
    torch.testing.assert_close(a.energies(), a.flat().square().sum(1))
    m = torch.randn(3, 6, 5, generator=generator)
    torch.testing.assert_close(a.against(m), m.flatten(1) @ a.flat().T)
    assert a.against(m[:0]).shape == (0, 4)
    scaled = dataclasses.replace(a, scale=torch.rand(4, 3, generator=generator))
    folded = FactorRows(a.u * scaled.scale.unsqueeze(-1), a.v)  # type: ignore[union-attr]
    torch.testing.assert_close(scaled.dense(), folded.dense())
    torch.testing.assert_close(scaled.products(b), folded.products(b))
    torch.testing.assert_close(b.products(scaled), b.products(folded))
    torch.testing.assert_close(scaled.energies(), folded.energies())
    torch.testing.assert_close(scaled.against(m), folded.against(m))
    joined = scaled.take([0, 2]).followed_by([scaled.take(slice(3, 4))])
    torch.testing.assert_close(joined.dense(), folded.dense()[[0, 2, 3]])
    assert joined.double().dense().dtype == torch.float64
