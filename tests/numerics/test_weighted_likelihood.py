"""Columns and the weighted loss against the full softmax of torch and its autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from postlude.errors import DataError, SettingsError
from postlude.numerics import weighted_likelihood
from postlude.numerics.likelihood import token_statistics
from postlude.numerics.weighted_likelihood import (
    COLUMNS,
    Head,
    TokenColumns,
    token_columns,
    weighted_cross_entropy,
)

TOKENS, WIDTH, WORDS, TOP = 13, 6, 37, 5


def head(
    seed: int = 0, dtype: torch.dtype = torch.float64, width: int = WIDTH
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias, targets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    targets = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    return 2 * normal(TOKENS, width), normal(WORDS, width), normal(WORDS), targets


@pytest.fixture(params=[1, 5, 13, 4096], ids=lambda rows: f"{rows}rows", autouse=True)
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens per piece."""
    monkeypatch.setattr(weighted_likelihood, "_ROWS", request.param)
    monkeypatch.setattr(weighted_likelihood, "_PIECE", 1)
    found: int = request.param
    return found


def slow_columns(logits: Tensor, targets: Tensor) -> dict[str, list[float]]:
    """One token and one word at a time."""
    found: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        total = math.fsum(math.exp(z) for z in row)
        p = [math.exp(z) / total for z in row]
        others = [w for w in range(len(row)) if w != target]
        found["log_probability"].append(math.log(p[target]))
        found["mass_above"].append(math.fsum(p[w] for w in others if row[w] > row[target]))
        found["mass_tied"].append(math.fsum(p[w] for w in others if row[w] == row[target]))
        found["entropy"].append(-math.fsum(x * math.log(x) for x in p))
        best = sorted(p, reverse=True)[:TOP]
        best = [x / math.fsum(best) for x in best]
        found["top_entropy"].append(-math.fsum(x * math.log(x) for x in best))
    return found


@pytest.mark.parametrize("biased", [False, True])
def test_columns(biased: bool) -> None:
    hidden, weight, bias, targets = head()
    offset = bias if biased else None
    got = token_columns(hidden, weight, targets, offset, COLUMNS, TOP)
    slow = slow_columns(functional.linear(hidden, weight, offset), targets)
    for name, expected in slow.items():
        torch.testing.assert_close(
            got.column(name), torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12
        )
    assert got.top == TOP


def test_columns_that_were_not_asked_for() -> None:
    hidden, weight, _, targets = head()
    got = token_columns(hidden, weight, targets)
    assert got.mass_above is None and got.top is None and not got.log_probability.requires_grad
    with pytest.raises(DataError, match="mass_above"):
        got.column("mass_above")
    part = token_columns(hidden, weight, targets, columns=["entropy"])[2:5]
    assert part.column("entropy").shape == (3,) and part.mass_above is None


def test_the_form_streamed_over_words_agrees(rows: int) -> None:
    hidden, weight, bias, targets = head()
    got = token_columns(hidden, weight, targets, bias, COLUMNS, TOP)
    for chunk in (1, 4, 36, 37, 8192):
        streamed = token_statistics(hidden, weight, targets, bias, chunk)
        for name in ("log_probability", "mass_above", "entropy"):
            torch.testing.assert_close(got.column(name), getattr(streamed, name))


def test_ties_of_bfloat16() -> None:
    """Logits rounded to bfloat16 tie; what is above, tied and below adds up to one."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 4, generator=generator).bfloat16()
    hidden = torch.randn(200, 4, generator=generator).bfloat16()
    targets = torch.randint(0, 64, (200,), generator=generator)
    got = token_columns(hidden, weight, targets, columns=COLUMNS)
    logits = functional.linear(hidden, weight).float()
    p = logits.softmax(-1)
    target = logits.gather(1, targets[:, None])
    tied = torch.where(logits == target, p, 0).sum(1) - p.gather(1, targets[:, None])[:, 0]
    assert int((tied > 1e-6).sum()) > 5
    torch.testing.assert_close(got.column("mass_tied"), tied, rtol=1e-4, atol=1e-6)
    above = torch.where(logits > target, p, 0).sum(1)
    torch.testing.assert_close(got.column("mass_above"), above, rtol=1e-5, atol=1e-6)
    assert got.log_probability.dtype == torch.float32


def test_nothing_is_above_the_top_word_and_a_shift_changes_nothing() -> None:
    hidden, weight, bias, _ = head(dtype=torch.float32)
    top = functional.linear(hidden, weight, bias).argmax(-1)
    got = token_columns(hidden, weight, top, bias, COLUMNS, TOP)
    assert not got.column("mass_above").any()
    # A power of two near the logits' own size: the sums stay exact enough to compare.
    shifted = token_columns(hidden, weight, top, bias + 4, COLUMNS, TOP)
    for name in COLUMNS:
        torch.testing.assert_close(got.column(name), shifted.column(name), rtol=1e-4, atol=1e-6)


def slow_total(
    leaves: tuple[Tensor, ...],
    targets: Tensor,
    weights: Tensor,
    log_q: Tensor | None = None,
    strength: float = 0.0,
) -> Tensor:
    logits = functional.linear(*leaves)
    total = (weights * functional.cross_entropy(logits, targets, reduction="none")).sum()
    if log_q is not None:
        log_p = logits.log_softmax(-1)
        total = total + strength * (log_q.exp() * (log_q - log_p)).sum()
    return total


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_gradients_match_autograd(biased: bool, strength: float) -> None:
    hidden, weight, bias, targets = head()
    hidden_q, weight_q, bias_q, _ = head(1, width=4)
    prior = Head(hidden_q, weight_q, bias_q)
    leaves = [hidden, weight, *([bias] if biased else [])]
    got = [leaf.clone().requires_grad_() for leaf in leaves]
    expected = [leaf.clone().requires_grad_() for leaf in leaves]
    weights = torch.linspace(0, 2, TOKENS, dtype=torch.float64)
    result = weighted_cross_entropy(
        got[0], got[1], targets, weights, got[2] if biased else None, prior=prior, strength=strength
    )
    log_q = functional.linear(*prior).log_softmax(-1)
    total = slow_total(tuple(expected), targets, weights, log_q, strength)
    (3 * result.total).backward()
    (3 * total).backward()
    torch.testing.assert_close(result.total, total, rtol=1e-12, atol=1e-12)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)
    if strength:
        log_p = functional.linear(*(leaf.detach() for leaf in expected)).log_softmax(-1)
        kl = functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
        torch.testing.assert_close(result.divergence, kl, rtol=0, atol=1e-9)


def test_weights_read_from_the_logits_are_constants_of_the_gradient() -> None:
    hidden, weight, _, targets = head()
    got = [leaf.clone().requires_grad_() for leaf in (hidden, weight)]
    seen: list[TokenColumns] = []

    def weigh(columns: TokenColumns, tokens: slice) -> Tensor:
        seen.append(columns)
        return columns.log_probability.exp() * columns.column("mass_above")

    result = weighted_cross_entropy(
        got[0], got[1], targets, weigh, columns=COLUMNS, top=TOP
    )  # every column at once: forming one must not spoil what another or the gradient reads
    whole = token_columns(hidden, weight, targets, columns=COLUMNS, top=TOP)
    for name in COLUMNS:
        joined = torch.cat([piece.column(name) for piece in seen])
        torch.testing.assert_close(joined, whole.column(name), rtol=1e-12, atol=1e-14)
    weights = whole.log_probability.exp() * whole.column("mass_above")
    torch.testing.assert_close(result.weights, weights)
    assert not result.weights.requires_grad and not result.log_probability.requires_grad
    expected = [leaf.clone().requires_grad_() for leaf in (hidden, weight)]
    slow_total(tuple(expected), targets, weights).backward()
    result.total.backward()
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_no_divergence_from_itself() -> None:
    hidden, weight, bias, targets = head()
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    result = weighted_cross_entropy(
        *leaves[:2], targets, torch.zeros(TOKENS), bias,
        prior=Head(hidden, weight, bias), strength=1.0,
    )  # fmt: skip
    result.total.backward()
    assert float(result.total.detach()) == 0 and not result.divergence.any()
    for leaf in leaves:
        assert leaf.grad is not None and not leaf.grad.any()


def test_words_that_either_side_rules_out() -> None:
    hidden, weight, bias, _ = head()
    targets = torch.full((TOKENS,), 30)
    out = bias.clone()
    out[:10] = -torch.inf
    leaf = hidden.clone().requires_grad_()
    result = weighted_cross_entropy(
        leaf, weight, targets, torch.ones(TOKENS), out, columns=("entropy",),
        prior=Head(hidden, weight, out), strength=1.0,
    )  # fmt: skip
    result.total.backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all())
    assert not result.divergence.any()
    entropy = token_columns(hidden, weight, targets, out, ("entropy",)).column("entropy")
    expected = functional.linear(hidden, weight[10:], bias[10:])
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=expected).entropy())


def test_only_the_gradients_that_are_needed() -> None:
    hidden, weight, bias, targets = head()
    ones = torch.ones(TOKENS, dtype=torch.float64)
    frozen = hidden.clone().requires_grad_()
    weighted_cross_entropy(frozen, weight, targets, ones, bias).total.backward()
    assert frozen.grad is not None and weight.grad is None
    with torch.no_grad():
        result = weighted_cross_entropy(frozen, weight, targets, ones, bias)
    assert not result.total.requires_grad
    leaf = hidden.clone().requires_grad_()
    total = weighted_cross_entropy(leaf, weight, targets, ones).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        total.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = head(dtype=dtype)
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    weights = torch.linspace(0.5, 1, TOKENS)
    total = weighted_cross_entropy(*leaves[:2], targets, weights, bias).total
    total.backward()
    double = [leaf.detach().double().requires_grad_() for leaf in leaves]
    slow_total(tuple(double), targets, weights.double()).backward()
    assert total.dtype == torch.float32
    for one, other in zip(leaves, double, strict=True):
        assert one.grad is not None and other.grad is not None and one.grad.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        error = (one.grad.double() - other.grad).norm() / other.grad.norm()
        assert float(error) < tolerance


def test_autocast_has_no_say() -> None:
    hidden, weight, _, targets = head(dtype=torch.float32)
    ones = torch.ones(TOKENS)
    expected = weighted_cross_entropy(hidden, weight, targets, ones).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(weighted_cross_entropy(hidden, weight, targets, ones).total, expected)
        columns = token_columns(hidden, weight, targets)
    assert torch.equal(
        columns.log_probability, token_columns(hidden, weight, targets).log_probability
    )


def test_never_more_than_a_piece_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weighted_likelihood, "_ROWS", 4)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return result

    hidden, weight, bias, targets = head()
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    allowed = max(4 * WORDS, *(leaf.numel() for leaf in leaves))
    assert allowed < TOKENS * WORDS
    prior = Head(hidden.detach(), weight.detach(), bias.detach())
    with Watch():
        weighted_cross_entropy(
            *leaves[:2], targets, torch.ones(TOKENS), bias, columns=COLUMNS, top=TOP,
            prior=prior, strength=1.0,
        ).total.backward()  # fmt: skip
        token_columns(hidden, weight, targets, bias, COLUMNS, TOP)
    assert largest <= allowed


def test_no_tokens() -> None:
    _, weight, _, _ = head()
    empty = torch.zeros(0, WIDTH, dtype=torch.float64, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.int64)
    total = weighted_cross_entropy(
        empty, weight.requires_grad_(), targets, torch.zeros(0)
    ).total  # fmt: skip
    total.backward()
    assert float(total.detach()) == 0 and weight.grad is not None and not weight.grad.any()
    columns = token_columns(empty, weight, targets, columns=COLUMNS, top=TOP)
    assert columns.column("entropy").shape == (0,)


def test_wrong_input_is_refused() -> None:
    hidden, weight, _bias, targets = head()
    ones = torch.ones(TOKENS)
    with pytest.raises(DataError, match="vocabulary, width"):
        token_columns(hidden, weight[:, 1:], targets)
    with pytest.raises(DataError, match="-100"):
        weighted_cross_entropy(hidden, weight, torch.where(targets > 3, targets, -100), ones)
    with pytest.raises(DataError, match="weights for 13 tokens"):
        weighted_cross_entropy(hidden, weight, targets, ones[1:])
    with pytest.raises(SettingsError, match="mass_abve"):
        token_columns(hidden, weight, targets, columns=["mass_abve"])
    with pytest.raises(SettingsError, match="expected 2 to 37"):
        token_columns(hidden, weight, targets, columns=["top_entropy"], top=38)
    with pytest.raises(SettingsError, match="prior"):
        weighted_cross_entropy(hidden, weight, targets, ones, strength=1.0)
    with pytest.raises(DataError, match="same vocabulary"):
        weighted_cross_entropy(
            hidden, weight, targets, ones, prior=Head(hidden, weight[1:]), strength=1.0
        )
