"""Chunked likelihoods against the full softmax of torch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from postlude.errors import DataError, SettingsError
from postlude.numerics import likelihood
from postlude.numerics.likelihood import (
    TokenStatistics,
    kl_divergence,
    token_log_probability,
    token_statistics,
)

TOKENS, WIDTH, WORDS = 13, 6, 37


def head(
    seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight, bias, targets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    targets = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    return scale * normal(TOKENS, WIDTH), normal(WORDS, WIDTH), normal(WORDS), targets


@pytest.fixture(params=[(1, 1), (5, 4), (8, 37), (4, 36), (1024, 8192)], ids=str)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Sizes of a piece, tokens and words: one by one, ragged, whole."""
    monkeypatch.setattr(likelihood, "_TOKENS", request.param[0])
    words: int = request.param[1]
    return words


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> TokenStatistics:
    """One token and one word at a time."""
    logits = functional.linear(hidden, weight, bias)
    probability = logits.softmax(-1)
    above = []
    for token, target in enumerate(targets.tolist()):
        larger = [w for w in range(len(weight)) if logits[token, w] > logits[token, target]]
        above.append(sum(float(probability[token, w]) for w in larger))
    return TokenStatistics(
        -functional.cross_entropy(logits, targets, reduction="none"),
        torch.tensor(above, dtype=logits.dtype),
        torch.distributions.Categorical(logits=logits).entropy(),
        logits.argmax(-1),
        logits.logsumexp(-1),
    )


@pytest.mark.parametrize("biased", [False, True])
def test_statistics(chunk: int, biased: bool) -> None:
    hidden, weight, bias, targets = head()
    offset = bias if biased else None
    result = token_statistics(hidden, weight, targets, offset, chunk)
    for name, got, expected in zip(
        result._fields, result, reference(hidden, weight, offset, targets), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12, msg=name)
    log_probability = token_log_probability(hidden, weight, targets, offset, chunk)
    assert torch.equal(log_probability, result.log_probability)


def test_statistics_in_fp32_and_bf16(chunk: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, bias, targets = head(dtype=dtype)
        result = token_statistics(hidden, weight, targets, bias, chunk)
        expected = reference(hidden.double(), weight.double(), bias.double(), targets)
        assert result.log_probability.dtype == torch.float32
        for got, wanted in zip(result, expected, strict=True):
            torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-5, atol=1e-5)
        double = token_statistics(hidden, weight, targets, bias, chunk, precision=torch.float64)
        torch.testing.assert_close(double.log_probability, expected.log_probability)


def test_precision_of_the_model_rounds_the_logits() -> None:
    hidden, weight, _, targets = head(dtype=torch.bfloat16)
    logits = (hidden @ weight.T).float()
    result = token_log_probability(hidden, weight, targets, precision=torch.bfloat16)
    torch.testing.assert_close(result, -functional.cross_entropy(logits, targets, reduction="none"))
    assert result.dtype == torch.float32


def test_large_logits_do_not_overflow(chunk: int) -> None:
    hidden, weight, _, targets = head(dtype=torch.float32, scale=3000.0)
    result = token_statistics(hidden, weight, targets, chunk=chunk)
    expected = reference(hidden, weight, None, targets)
    for got, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-3)


def test_masked_words_have_no_probability(chunk: int) -> None:
    hidden, weight, bias, _ = head()
    bias[:20] = -torch.inf
    targets = torch.full((TOKENS,), 25)
    result = token_statistics(hidden, weight, targets, bias, chunk)
    logits = functional.linear(hidden, weight, bias)[:, 20:]
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(result.entropy, expected)
    torch.testing.assert_close(result.logsumexp, logits.logsumexp(-1))
    other = 0.5 * weight
    kl, _ = kl_divergence(hidden, weight, hidden, other, bias, bias, chunk)
    log_q = functional.linear(hidden, other, bias)[:, 20:].log_softmax(-1)
    expected = functional.kl_div(
        log_q, logits.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(kl, expected)


def test_ties_are_not_above() -> None:
    # Logits are small integers, hence exact: 3, 3, 5, 1 for every token.
    weight = torch.tensor([[3.0], [3.0], [5.0], [1.0]])
    targets = torch.arange(4)
    result = token_statistics(torch.ones(4, 1), weight, targets, chunk=1)
    p = torch.tensor([3.0, 3.0, 5.0, 1.0]).softmax(0)
    expected = torch.stack([p[2], p[2], torch.tensor(0.0), p[:3].sum()])
    torch.testing.assert_close(result.mass_above, expected)
    assert result.top1.tolist() == [2] * 4


def test_uniform_distribution() -> None:
    result = token_statistics(torch.zeros(2, 3), torch.zeros(8, 3), torch.tensor([0, 7]), chunk=3)
    torch.testing.assert_close(result.entropy, torch.full((2,), 8.0).log())
    assert result.mass_above.tolist() == [0.0, 0.0] and result.top1.tolist() == [0, 0]


@pytest.mark.parametrize("biased", [False, True])
def test_gradients_match_cross_entropy(chunk: int, biased: bool) -> None:
    hidden, weight, bias, targets = head()
    token_weight = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    leaves = [hidden, weight, bias] if biased else [hidden, weight]
    got = [leaf.clone().requires_grad_() for leaf in leaves]
    expected = [leaf.clone().requires_grad_() for leaf in leaves]
    chunked = token_log_probability(got[0], got[1], targets, got[2] if biased else None, chunk)
    (chunked * token_weight).sum().backward()
    full = -functional.cross_entropy(
        functional.linear(expected[0], expected[1], expected[2] if biased else None),
        targets,
        reduction="none",
    )
    (full * token_weight).sum().backward()
    torch.testing.assert_close(chunked, full)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_gradcheck_and_partial_gradients() -> None:
    hidden, weight, bias, targets = head()
    hidden, weight, bias, targets = hidden[:3], weight[:7], bias[:7], targets[:3] % 7
    for needs in (
        (True, False, False),
        (False, True, False),
        (False, False, True),
        (True, True, True),
    ):
        leaves = tuple(
            leaf.clone().requires_grad_(need)
            for leaf, need in zip((hidden, weight, bias), needs, strict=True)
        )
        assert torch.autograd.gradcheck(
            lambda h, w, b: token_log_probability(h, w, targets, b, chunk=3), leaves
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_low_precision(dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = head(dtype=dtype)
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    token_log_probability(hidden, weight, targets, bias, chunk=10).mean().backward()
    double = [leaf.detach().double().requires_grad_() for leaf in leaves]
    (-functional.cross_entropy(functional.linear(*double), targets)).backward()
    for one, other in zip(leaves, double, strict=True):
        assert one.grad is not None and other.grad is not None and one.grad.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        assert float((one.grad.double() - other.grad).norm()) <= tolerance * float(
            other.grad.norm()
        )


def test_autocast_does_not_lower_the_precision() -> None:
    hidden, weight, _, targets = head(dtype=torch.float32)
    hidden.requires_grad_()
    expected = token_log_probability(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = token_log_probability(hidden, weight, targets)
        assert torch.equal(result, expected)
        (grad,) = torch.autograd.grad(result.sum(), hidden)
        kl_divergence(hidden, weight, hidden, weight)
        assert torch.is_autocast_enabled("cpu")
    (wanted,) = torch.autograd.grad(expected.sum(), hidden)
    assert torch.equal(grad, wanted)


def test_never_more_than_a_piece_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "_TOKENS", 4)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    hidden, weight, bias, targets = head()
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    allowed = max(4 * 9, *(leaf.numel() for leaf in leaves))
    assert allowed < TOKENS * WORDS
    with Watch():
        token_log_probability(hidden, weight, targets, bias, chunk=9).sum().backward()
        token_statistics(hidden, weight, targets, bias, chunk=9)
        kl_divergence(hidden, weight, hidden, weight, chunk=9)
    assert largest <= allowed


def test_kl_divergence(chunk: int) -> None:
    hidden_p, weight_p, bias_p, _ = head(0)
    hidden_q, weight_q, bias_q, _ = head(1)
    hidden_q, weight_q = hidden_q[:, :4], weight_q[:, :4]  # the widths may differ
    kl, agree = kl_divergence(hidden_p, weight_p, hidden_q, weight_q, bias_p, bias_q, chunk)
    log_p = functional.linear(hidden_p, weight_p, bias_p).log_softmax(-1)
    log_q = functional.linear(hidden_q, weight_q, bias_q).log_softmax(-1)
    expected = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(kl, expected)
    assert torch.equal(agree, log_p.argmax(-1) == log_q.argmax(-1)) and agree.dtype == torch.bool


def test_small_kl_survives_fp32() -> None:
    hidden, weight, _, _ = head(dtype=torch.float32, scale=1.0)
    other = hidden * (1 + 1e-4)
    kl, agree = kl_divergence(hidden, weight, other, weight, chunk=10)
    exact, _ = kl_divergence(hidden.double(), weight.double(), other.double(), weight.double())
    assert float(exact.max()) < 1e-6
    torch.testing.assert_close(kl.double(), exact, rtol=0.05, atol=1e-13)
    assert bool(agree.all()) and bool((kl >= 0).all())
    same, _ = kl_divergence(hidden, weight, hidden, weight, chunk=10)
    assert torch.equal(same, torch.zeros(TOKENS))


def test_kl_of_distant_heads_is_finite() -> None:
    hidden, weight, _, _ = head(dtype=torch.float32, scale=200.0)
    kl, _ = kl_divergence(hidden, weight, -hidden, weight, chunk=10)
    exact, _ = kl_divergence(hidden.double(), weight.double(), -hidden.double(), weight.double())
    torch.testing.assert_close(kl.double(), exact, rtol=1e-4, atol=1e-3)


def test_no_tokens() -> None:
    _, weight, _, _ = head()
    empty = torch.zeros(0, WIDTH, dtype=torch.float64, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.int64)
    result = token_log_probability(empty, weight.requires_grad_(), targets)
    result.sum().backward()
    assert result.shape == (0,) and weight.grad is not None and not weight.grad.any()
    assert token_statistics(empty, weight, targets).entropy.shape == (0,)


def test_wrong_input_is_refused() -> None:
    hidden, weight, bias, targets = head()
    with pytest.raises(DataError, match="vocabulary, width"):
        token_log_probability(hidden, weight[:, 1:], targets)
    with pytest.raises(DataError, match="bias"):
        token_log_probability(hidden, weight, targets, bias[1:])
    with pytest.raises(DataError, match="-100"):
        token_log_probability(hidden, weight, torch.where(targets > 3, targets, -100))
    with pytest.raises(DataError, match="integers"):
        token_statistics(hidden, weight, targets.double())
    with pytest.raises(DataError, match="same vocabulary"):
        kl_divergence(hidden, weight, hidden, weight[1:])
    with pytest.raises(SettingsError, match="chunk"):
        token_statistics(hidden, weight, targets, chunk=0)
    with pytest.raises(SettingsError, match="precision"):
        token_statistics(hidden, weight, targets, precision=torch.int32)
