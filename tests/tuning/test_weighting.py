"""The engine: denominators over a step, bounds, signals, statistics, refusals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from postlude.errors import DataError, InputError, SettingsError
from postlude.numerics.weighted_likelihood import COLUMNS, Head, TokenColumns, token_columns
from postlude.tuning.anchored import ASFT
from postlude.tuning.eaft import EAFT
from postlude.tuning.importance import PEARToken
from postlude.tuning.likelihood_rules import DFT, SFT, TALR, ProFit, Threshold
from postlude.tuning.prift import PriFTMass, PriFTProb
from postlude.tuning.weighting import StepStatistics, TargetTokens, TokenWeighting

TOKENS, WIDTH, WORDS = 24, 5, 33


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def hidden() -> Tensor:
    return random(TOKENS, WIDTH).requires_grad_()


@pytest.fixture
def weight() -> Tensor:
    return random(WORDS, WIDTH, seed=1).requires_grad_()


@pytest.fixture
def prior() -> Head:
    return Head(random(TOKENS, WIDTH, seed=2), random(WORDS, WIDTH, seed=3))


@pytest.fixture
def tokens() -> TargetTokens:
    generator = torch.Generator().manual_seed(4)
    targets = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    mask = torch.rand(TOKENS, generator=generator) < 0.8
    return TargetTokens(targets, mask, torch.arange(TOKENS) // 8)


def losses(hidden: Tensor, weight: Tensor, tokens: TargetTokens) -> Tensor:
    """``-log p`` of the masked-in tokens."""
    logits = functional.linear(hidden, weight)[tokens.mask]
    return functional.cross_entropy(logits, tokens.targets[tokens.mask], reduction="none")


# Targets


def test_targets_of_padded_rows() -> None:
    labels = torch.tensor([[-100, -100, 7, 8, -100], [-100, 3, 4, 5, 6]])
    tokens = TargetTokens.from_labels(labels)
    assert tokens.mask.tolist() == [0, 1, 1, 0, 0, 1, 1, 1, 1, 0]
    assert tokens.targets[tokens.mask].tolist() == [7, 8, 3, 4, 5, 6]
    assert tokens.sequence[tokens.mask].tolist() == [0, 0, 1, 1, 1, 1]
    states = torch.arange(10).reshape(2, 5)
    assert TargetTokens.align(states).tolist() == list(range(10))


def test_targets_of_packed_rows() -> None:
    labels = torch.tensor([[-100, 1, 2, 3, 4, 5, -100, 7]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1]])
    tokens = TargetTokens.from_labels(labels, positions)
    # The first token of a document is nobody's target: not even of the last token before it.
    assert tokens.targets[tokens.mask].tolist() == [1, 2, 4, 5, 7]
    first, second, third = tokens.sequence[tokens.mask].unique_consecutive().tolist()
    assert tokens.sequence[tokens.mask].tolist() == [first] * 2 + [second] * 2 + [third]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_weight_one_is_the_loss_of_transformers(
    make_model: Callable[..., Any], model_type: str
) -> None:
    model = make_model(model_type)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 259, (3, 12), generator=generator)
    labels = ids.clone()
    labels[0, :4], labels[1, 9:] = -100, -100
    model.zero_grad()
    expected = model(input_ids=ids, labels=labels).loss
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    tokens = TargetTokens.from_labels(labels)
    states = model.base_model(input_ids=ids).last_hidden_state
    result = TokenWeighting(SFT())(tokens.align(states), model.lm_head.weight, tokens)
    result.loss.backward()
    torch.testing.assert_close(result.loss, expected, rtol=0, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-6)


def test_dft_is_the_dft_of_trl(make_model: Callable[..., Any]) -> None:
    """Its trainer takes log-probabilities from its fused head and weights each by its exponential."""
    utils = pytest.importorskip("trl.trainer.utils")
    model = make_model("llama")
    ids = torch.randint(3, 259, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :4], labels[1, 9:] = -100, -100
    tokens = TargetTokens.from_labels(labels)
    items = 64
    states = model.base_model(input_ids=ids).last_hidden_state
    ours = TokenWeighting(DFT())(
        tokens.align(states), model.lm_head.weight, tokens, num_items=items
    ).loss
    gradients = torch.autograd.grad(ours, list(model.parameters()))
    utils.add_fused_lm_head(model)
    log_p = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    theirs = -(log_p * log_p.exp().detach()).sum() / items
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    for one, other in zip(
        gradients, torch.autograd.grad(theirs, list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# Denominators


def test_all_tokens_or_the_kept(hidden: Tensor, weight: Tensor, tokens: TargetTokens) -> None:
    each = losses(hidden, weight, tokens).detach()
    kept = (-each).exp() >= 0.02
    assert 0 < int(kept.sum()) < len(each)
    profit = TokenWeighting(ProFit(0.02))(hidden, weight, tokens)
    torch.testing.assert_close(profit.loss.detach(), each[kept].sum() / len(each))
    threshold = TokenWeighting(Threshold(0.02))
    assert threshold.rescales and threshold.denominator == "kept"
    result = threshold(hidden, weight, tokens)
    # The gradient is divided by all tokens until the step is over.
    torch.testing.assert_close(result.loss.detach(), each[kept].sum() / len(each))
    torch.testing.assert_close(result.statistics.loss, each[kept].mean())
    torch.testing.assert_close(
        result.loss.detach() * result.statistics.gradient_scale, each[kept].mean()
    )


def test_a_mean_weight_of_one(hidden: Tensor, weight: Tensor, tokens: TargetTokens) -> None:
    each = losses(hidden, weight, tokens).detach()
    weighting = TokenWeighting(DFT(), normalize="mean1")
    result = weighting(hidden, weight, tokens)
    weights = (-each).exp()
    torch.testing.assert_close(result.statistics.loss, (weights * each).sum() / weights.sum())
    assert weighting.rescales and weighting.denominator == "weights"
    kept = TokenWeighting(PriFTMass(), signal="online", normalize="kept")
    assert kept.denominator == "kept"


@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize(
    "weighting",
    [
        TokenWeighting(DFT()),
        TokenWeighting(Threshold(0.02)),
        TokenWeighting(DFT(), normalize="mean1"),
        TokenWeighting(TALR()),
    ],
    ids=["tokens", "kept", "mean1", "talr"],
)
def test_accumulated_micro_batches_are_one_step(
    weighting: TokenWeighting, micro: int, hidden: Tensor, weight: Tensor, tokens: TargetTokens
) -> None:
    previous = weighting(hidden, weight, tokens).statistics
    whole = weighting(hidden, weight, tokens, previous=previous)
    whole.loss.backward()
    scale = whole.statistics.gradient_scale if weighting.rescales else 1
    assert hidden.grad is not None and weight.grad is not None
    expected = [hidden.grad * scale, weight.grad * scale]
    hidden.grad = weight.grad = None
    total: StepStatistics | None = None
    items = int(tokens.mask.sum())
    # Of very unequal numbers of tokens.
    borders = [0, 3, 4, 17, TOKENS] if micro == 4 else [0, TOKENS] if micro == 1 else [0, 5, TOKENS]
    for start, stop in itertools.pairwise(borders):
        part = TargetTokens(
            tokens.targets[start:stop], tokens.mask[start:stop], tokens.sequence[start:stop]
        )
        result = weighting(hidden[start:stop], weight, part, num_items=items, previous=previous)
        result.loss.backward()
        total = result.statistics if total is None else total + result.statistics
    assert total is not None
    scale = total.gradient_scale if weighting.rescales else 1
    torch.testing.assert_close(total.values, whole.statistics.values)
    for one, other in zip((hidden.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(one * scale, other, rtol=1e-9, atol=1e-12)


def test_nothing_to_learn_from(hidden: Tensor, weight: Tensor, tokens: TargetTokens) -> None:
    nothing = TargetTokens(tokens.targets, torch.zeros_like(tokens.mask), tokens.sequence)
    for part, rule in ((nothing, SFT()), (tokens, Threshold(0.999)), (tokens, ProFit(0.999))):
        result = TokenWeighting(rule)(hidden, weight, part)
        result.loss.backward()
        assert result.statistics.empty and float(result.statistics.loss) == 0
        assert all(math.isfinite(value) for value in result.statistics.to_dict().values())
        assert hidden.grad is not None and not hidden.grad.any()
        assert weight.grad is not None and not weight.grad.any()
    assert (
        float(TokenWeighting(Threshold(0.999))(hidden, weight, tokens).statistics.gradient_scale)
        == 0
    )


# Bounds


def test_order_of_the_options(hidden: Tensor, weight: Tensor, tokens: TargetTokens) -> None:
    targets = tokens.targets[tokens.mask]
    protected = int(targets[3])
    weighting = TokenWeighting(DFT(), floor=0.01, ceil=0.05, always_keep_ids=(protected,))
    found = weighting(hidden, weight, tokens).weights
    expected = (-losses(hidden, weight, tokens).detach()).exp().clamp(0.01, 0.05)
    expected[targets == protected] = 1
    torch.testing.assert_close(found, expected)
    assert {0.01, 0.05, 1.0} <= {round(w, 12) for w in found.tolist()}


def test_statistics(hidden: Tensor, weight: Tensor, tokens: TargetTokens) -> None:
    targets = tokens.targets[tokens.mask]
    eos = int(targets[2])
    result = TokenWeighting(Threshold(0.02, loss="probability"), eos_ids=(eos,))(
        hidden, weight, tokens
    )
    w = result.weights
    logged = result.statistics.to_dict()
    assert logged["tokens"] == len(targets)
    assert logged["mean_weight"] == pytest.approx(float(w.mean()))
    assert logged["kept_share"] == pytest.approx(float((w > 0).double().mean()))
    assert logged["effective_tokens"] == pytest.approx(float(w.sum() ** 2 / w.square().sum()))
    assert logged["eos_share"] == pytest.approx(float(w[targets == eos].sum() / w.sum()))
    assert logged["mean_loss"] == pytest.approx(float(-result.log_probability.mean()))


# Signals


@pytest.mark.parametrize("rule", [PriFTMass(), PriFTMass(tie="strict"), PriFTProb(), EAFT(top=7)])
def test_cached_is_the_reference_exactly(
    rule: Any, hidden: Tensor, weight: Tensor, tokens: TargetTokens, prior: Head
) -> None:
    live = TokenWeighting(rule, signal="reference")
    cached = TokenWeighting(rule, signal="cached")
    assert live.needs_reference_model and not cached.needs_reference_model
    # Products of a row depend in their last bit on the rows beside it, so the same tokens at once: the learned ones.
    learned = TargetTokens(
        *(x[tokens.mask] for x in (tokens.targets, tokens.mask, tokens.sequence))
    )
    hidden, prior = (
        hidden[tokens.mask].float(),
        Head(prior.hidden[tokens.mask].float(), prior.weight.float()),
    )
    weight, tokens = weight.float(), learned
    columns = token_columns(*prior[:2], tokens.targets, columns=cached.reference_columns, top=7)
    one = live(hidden, weight, tokens, reference=prior)
    other = cached(hidden, weight, tokens, reference=columns)
    assert torch.equal(one.weights, other.weights) and torch.equal(one.loss, other.loss)
    online = TokenWeighting(rule, signal="online")(hidden, weight, tokens)
    assert not torch.equal(one.weights, online.weights)


def test_prift_prob_is_dft_read_from_the_reference(
    hidden: Tensor, weight: Tensor, tokens: TargetTokens, prior: Head
) -> None:
    one = TokenWeighting(PriFTProb())(hidden, weight, tokens, reference=prior)
    other = TokenWeighting(DFT(), signal="reference")(hidden, weight, tokens, reference=prior)
    assert torch.equal(one.loss, other.loss)


def test_the_reference_has_no_gradient(
    hidden: Tensor, weight: Tensor, tokens: TargetTokens, prior: Head
) -> None:
    frozen = Head(prior.hidden.clone().requires_grad_(), prior.weight.clone().requires_grad_())
    for rule in (PriFTProb(), ASFT()):
        TokenWeighting(rule)(hidden, weight, tokens, reference=frozen).loss.backward()
    assert frozen.hidden.grad is None and frozen.weight.grad is None
    assert torch.equal(frozen.weight, prior.weight)


def test_talr_reads_the_loss_of_the_signal(
    hidden: Tensor, weight: Tensor, tokens: TargetTokens, prior: Head
) -> None:
    weighting = TokenWeighting(TALR(), signal="reference")
    first = weighting(hidden, weight, tokens, reference=prior)
    assert first.weights.unique().tolist() == [1.0]
    second = weighting(hidden, weight, tokens, reference=prior, previous=first.statistics)
    each = losses(prior.hidden, prior.weight, tokens)
    torch.testing.assert_close(second.weights, (-each / each.mean()).exp().clamp(min=0.01))


def test_a_divergence_is_divided_by_tokens(
    hidden: Tensor, weight: Tensor, tokens: TargetTokens, prior: Head
) -> None:
    result = TokenWeighting(ASFT(0.3))(hidden, weight, tokens, reference=prior)
    each = losses(hidden, weight, tokens)
    log_p = functional.linear(hidden, weight)[tokens.mask].log_softmax(-1)
    log_q = functional.linear(prior.hidden, prior.weight)[tokens.mask].log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    expected = (each.detach().neg().exp() * each).mean() + 0.3 * kl.mean()
    torch.testing.assert_close(result.loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.statistics.loss, expected.detach(), rtol=0, atol=1e-12)
    found = torch.autograd.grad(result.loss, (hidden, weight))
    for one, other in zip(found, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_no_divergence_at_the_start(hidden: Tensor, weight: Tensor, tokens: TargetTokens) -> None:
    same = Head(hidden.detach(), weight.detach())
    asft = TokenWeighting(ASFT(5.0))(hidden, weight, tokens, reference=same)
    dft = TokenWeighting(DFT())(hidden, weight, tokens)
    assert float(asft.statistics["divergence"]) == 0
    assert torch.equal(asft.loss, dft.loss)
    pairs = zip(
        torch.autograd.grad(asft.loss, (hidden, weight)),
        torch.autograd.grad(dft.loss, (hidden, weight)),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-15)


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": PriFTMass}, "not a token rule"),
        ({"rule": DFT(), "signal": "offline"}, "Did you mean"),
        ({"rule": DFT(), "normalize": "mean"}, "Did you mean"),
        ({"rule": PEARToken(), "signal": "online"}, "compares"),
        ({"rule": SFT(), "signal": "reference"}, "no signal"),
        ({"rule": ASFT(), "signal": "cached"}, "whole distribution"),
        ({"rule": ASFT(), "normalize": "mean1"}, "divergence"),
        ({"rule": DFT(), "floor": -1.0}, "floor"),
        ({"rule": DFT(), "floor": 2.0, "ceil": 1.0}, "ceil"),
        ({"rule": DFT(), "ceil": 0.0}, "ceil above 0"),
    ],
)
def test_combinations_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TokenWeighting(**settings)


def test_references_that_do_not_fit(
    hidden: Tensor, weight: Tensor, tokens: TargetTokens, prior: Head
) -> None:
    live, cached = TokenWeighting(PriFTMass()), TokenWeighting(PriFTMass(), signal="cached")
    columns = token_columns(*prior[:2], tokens.targets, columns=COLUMNS, top=5)
    cases: list[tuple[TokenWeighting, Head | TokenColumns | None, str]] = [
        (live, None, "a Head"),
        (live, columns, "a Head"),
        (cached, prior, "TokenColumns"),
        (
            live,
            Head(prior.hidden, prior.weight[1:]),
            "vocabulary of 32 words and the model one of 33",
        ),
        (live, Head(prior.hidden[1:], prior.weight), "covers 23 tokens and the model 24"),
        (cached, columns[:-2], "covers 22 tokens"),
        (cached, TokenColumns(columns.log_probability), "no 'mass_above'"),
        (TokenWeighting(EAFT(), signal="cached"), columns, "of 5 words and eaft asks for 20"),
    ]
    for weighting, reference, message in cases:
        with pytest.raises(DataError, match=message):
            weighting(hidden, weight, tokens, reference=reference)
    rows = TargetTokens(tokens.targets[:, None], tokens.mask, tokens.sequence)
    with pytest.raises(DataError, match="from_labels"):
        TokenWeighting(SFT())(hidden, weight, rows)
    with pytest.raises(SettingsError, match="expected 2 to 33"):
        TokenWeighting(EAFT(top=50))(hidden, weight, tokens)
