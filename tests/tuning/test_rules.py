"""Each rule against its formula written out, and the identities that its paper rests on."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from postlude.errors import InputError
from postlude.numerics.weighted_likelihood import TokenColumns, token_columns
from postlude.tuning.anchored import ASFT, SFTKL
from postlude.tuning.eaft import EAFT
from postlude.tuning.importance import (
    IWSFT,
    PSFT,
    IWSFTToken,
    PEARBlock,
    PEARSequence,
    PEARToken,
)
from postlude.tuning.likelihood_rules import DFT, SFT, TALR, Power, ProFit, Threshold
from postlude.tuning.prift import PriFTMass, PriFTProb
from postlude.tuning.weighting import RuleInputs, TargetTokens, TokenRule, TokenWeighting

TOKENS, WORDS = 40, 30


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def words(size: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randint(0, WORDS, (size,), generator=torch.Generator().manual_seed(seed))


def weights_of(
    rule: TokenRule, online: Tensor, reference: Tensor, lengths: list[int] | None = None
) -> Tensor:
    sequence = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths or [len(online)])])
    signal = reference if rule.signal == "reference" else online
    return rule.weights(RuleInputs(TokenColumns(signal), online, reference, sequence))


def gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf), leaf)
    return found


def engine(rule: TokenRule, targets: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss of the rule as a function of logits: states that an identity head reads."""
    tokens = TargetTokens(targets, torch.ones_like(targets).bool(), torch.zeros_like(targets))
    eye = torch.eye(WORDS, dtype=torch.float64)
    return lambda logits: TokenWeighting(rule)(logits, eye, tokens).loss


# Gradient identities


def test_dft_has_the_gradient_of_one_minus_p() -> None:
    logits, targets = 2 * normal(TOKENS, WORDS), words()

    def one_minus_p(leaf: Tensor) -> Tensor:
        return (1 - leaf.softmax(-1).gather(1, targets[:, None])).mean()

    difference = gradient(engine(DFT(), targets), logits) - gradient(one_minus_p, logits)
    assert float(difference.abs().max()) < 1e-12


@pytest.mark.parametrize("exponent", [0.5, 1.0, 8.0])
def test_power_has_the_gradient_of_its_loss(exponent: float) -> None:
    logits, targets = 2 * normal(TOKENS, WORDS), words()

    def loss(leaf: Tensor) -> Tensor:
        p = leaf.softmax(-1).gather(1, targets[:, None])
        return ((1 - p**exponent) / exponent).mean()

    difference = gradient(engine(Power(exponent), targets), logits) - gradient(loss, logits)
    assert float(difference.abs().max()) < 1e-12


def test_psft_has_the_gradient_of_the_clipped_objective() -> None:
    old, targets = normal(TOKENS, WORDS), words()
    logits = old + 0.4 * normal(TOKENS, WORDS, seed=1)
    log_old = old.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def loss(leaf: Tensor) -> Tensor:
        ratio = (leaf.log_softmax(-1).gather(1, targets[:, None])[:, 0] - log_old).exp()
        return -torch.minimum(ratio, ratio.clamp(0.8, 1.28)).sum()

    leaf = logits.clone().requires_grad_()
    log_p = leaf.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    weights = weights_of(PSFT(), log_p.detach(), log_old)
    assert 0 < int((weights == 0).sum()) < TOKENS
    (found,) = torch.autograd.grad(-(weights * log_p).sum(), leaf)
    torch.testing.assert_close(found, gradient(loss, logits), rtol=0, atol=1e-12)


# Fixed points of one context: data d, reference q, minimisers of the weighted loss

PRIOR = torch.tensor([0.40, 0.27, 0.15, 0.10, 0.06, 0.02], dtype=torch.float64)
DATA = torch.tensor([0.10, 0.45, 0.05, 0.05, 0.05, 0.30], dtype=torch.float64)


def minimiser(rule: TokenRule, steps: int = 3000, rate: float = 0.05) -> Tensor:
    """Tabular softmax: every word a token, met as often as the data has it."""
    logits = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    targets = torch.arange(6)
    frozen = token_columns(
        PRIOR.log()[None].expand(6, 6), torch.eye(6, dtype=torch.float64), targets,
        columns=("mass_above",),
    )  # fmt: skip
    optimizer = torch.optim.Adam([logits], lr=rate)
    for _ in range(steps):
        log_p = logits.log_softmax(0)
        online = TokenColumns(log_p.detach())
        signal = frozen if rule.signal == "reference" else online
        weights = rule.weights(RuleInputs(signal, log_p.detach(), frozen.log_probability))
        optimizer.zero_grad()
        (-(DATA * weights * log_p).sum()).backward()
        optimizer.step()
    return logits.detach().softmax(0)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (SFT(), DATA),
        (PriFTProb(), DATA * PRIOR / (DATA * PRIOR).sum()),
        (PriFTMass(), functional.normalize(DATA * torch.tensor([1, 1, 0, 0, 0, 0]), p=1, dim=0)),
        (DFT(), torch.tensor([0, 1, 0, 0, 0, 0])),
    ],
    ids=lambda value: value.name if isinstance(value, TokenRule) else "",
)
def test_fixed_points(rule: TokenRule, expected: Tensor) -> None:
    found = minimiser(rule, steps=1200)
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=1e-3)


# PriFT-mass


def sorted_nucleus(logits: Tensor, targets: Tensor, tau: float) -> Tensor:
    """Sort the words; keep the target where the mass before its group of ties is at most 1 - tau."""
    p = logits.softmax(-1)
    ranked, order = p.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    kept = []
    for row in range(len(logits)):
        of_target = p[row, targets[row]]
        first = int((ranked[row] == of_target).nonzero()[0])
        assert bool((order[row] == targets[row]).any())
        kept.append(bool(before[row, first] <= 1 - tau + 1e-6))
    return torch.tensor(kept)


@pytest.mark.parametrize("rounded", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tau", [0.3, 0.5, 0.9])
def test_prift_mass_is_a_nucleus(rounded: bool, tau: float) -> None:
    logits = 2 * normal(500, WORDS).float()
    if rounded:
        logits = logits.bfloat16().float()
    targets = words(500)
    columns = token_columns(logits, torch.eye(WORDS), targets, columns=("mass_above", "mass_tied"))
    inputs = RuleInputs(columns, columns.log_probability)
    kept = PriFTMass(tau).weights(inputs).bool()
    assert torch.equal(kept, sorted_nucleus(logits, targets, tau))
    p = logits.softmax(-1)
    own = p.gather(1, targets[:, None])
    at_most = torch.where(p <= own, p, 0).sum(1)
    assert torch.equal(kept, at_most >= tau - 1e-6)
    strict = torch.where(p < own, p, 0).sum(1) + own[:, 0]
    assert torch.equal(PriFTMass(tau, "strict").weights(inputs).bool(), strict >= tau - 1e-6)


def prift_mass_of(
    p: list[float], rule: PriFTMass, dtype: torch.dtype = torch.float64
) -> list[float]:
    """Weight of each word of one distribution."""
    logits = torch.tensor(p, dtype=torch.float64).log().to(dtype).expand(len(p), -1)
    targets = torch.arange(len(p))
    columns = token_columns(
        logits, torch.eye(len(p), dtype=dtype), targets, columns=rule.columns
    )  # fmt: skip
    found: list[float] = rule.weights(RuleInputs(columns, columns.log_probability)).tolist()
    return found


def test_ties_and_the_border_of_prift_mass() -> None:
    # Three tied words of .2 below one of .4: all at or below hold .6, one alone .2.
    p = [0.4, 0.2, 0.2, 0.2]
    assert prift_mass_of(p, PriFTMass(0.5)) == [1, 1, 1, 1]
    assert prift_mass_of(p, PriFTMass(0.5, "strict")) == [1, 0, 0, 0]
    # u = .5 exactly, in every precision and with error of either sign: kept.
    border = [0.5, 0.25, 0.12, 0.08, 0.04, 0.01]
    for dtype in (torch.float32, torch.float64):
        assert prift_mass_of(border, PriFTMass(0.5), dtype) == [1, 1, 0, 0, 0, 0]
    assert prift_mass_of([0.5 + 2e-7, 0.5 - 2e-7], PriFTMass(0.5)) == [1, 1]
    assert prift_mass_of([0.5 + 1e-5, 0.5 - 1e-5], PriFTMass(0.5)) == [1, 0]
    assert prift_mass_of(border, PriFTMass(1.0)) == [1, 0, 0, 0, 0, 0]
    assert prift_mass_of(border, PriFTMass(0.0)) == [1] * 6


# EAFT


def test_eaft_of_a_uniform_top_and_the_two_other_scales() -> None:
    logits = torch.full((1, 50), -30.0, dtype=torch.float64)
    logits[0, 5:25] = 1.0
    columns = token_columns(
        logits, torch.eye(50, dtype=torch.float64), torch.tensor([7]), columns=("top_entropy",)
    )
    inputs = RuleInputs(columns, columns.log_probability)
    assert float(EAFT().weights(inputs)) == pytest.approx(1.0, abs=1e-15)
    assert float(EAFT(divisor=3.0).weights(inputs)) == pytest.approx(0.9986, abs=5e-5)
    assert float(EAFT(divisor=1.0).weights(inputs)) == pytest.approx(2.9957, abs=5e-5)
    assert float(EAFT(divisor=1.0).weights(inputs)) == pytest.approx(math.log(20), abs=1e-14)


def test_eaft_is_a_power_of_the_entropy() -> None:
    columns = token_columns(
        normal(TOKENS, WORDS), torch.eye(WORDS, dtype=torch.float64), words(), top=4,
        columns=("top_entropy",),
    )  # fmt: skip
    inputs = RuleInputs(columns, columns.log_probability)
    base = EAFT(top=4).weights(inputs)
    assert float(base.max()) <= 1 and float(base.min()) >= 0
    torch.testing.assert_close(EAFT(top=4, exponent=2.0).weights(inputs), base.square())


# Rules of the probability


def test_rules_of_the_probability() -> None:
    log_p = torch.tensor([0.9, 0.5, 0.1, 0.01], dtype=torch.float64).log()
    other = torch.zeros(4, dtype=torch.float64)

    def found(rule: TokenRule) -> list[float]:
        return [round(w, 12) for w in weights_of(rule, log_p, other).tolist()]

    assert found(SFT()) == [1, 1, 1, 1]
    assert found(DFT()) == [0.9, 0.5, 0.1, 0.01]
    assert found(Power(2.0)) == [0.81, 0.25, 0.01, 0.0001]
    assert found(Power(0.0)) == [1, 1, 1, 1]
    assert found(ProFit(0.3)) == [1, 1, 0, 0]
    assert found(Threshold(0.2)) == [1, 1, 0, 0]
    assert found(Threshold(0.2, keep="below")) == [0, 0, 1, 1]
    assert found(Threshold(0.2, loss="probability")) == [0.9, 0.5, 0, 0]
    assert found(TALR(tau=2.0)) == [round(math.sqrt(p), 12) for p in (0.9, 0.5, 0.1, 0.01)]
    assert found(TALR(tau=0.5, minimum=0.05)) == [0.81, 0.25, 0.05, 0.05]
    assert found(TALR()) == [1, 1, 1, 1]
    inputs = RuleInputs(TokenColumns(log_p), log_p, mean_loss=torch.tensor(2.0))
    assert torch.equal(TALR().weights(inputs), TALR(tau=2.0).weights(inputs))


# Rules of two distributions


def log_ratios(lengths: list[int], scale: float = 0.2) -> tuple[Tensor, Tensor]:
    size = sum(lengths)
    reference = -normal(size).abs() - 0.1
    return reference + scale * normal(size, seed=1), reference


def test_importance_weights() -> None:
    lengths = [3, 1, 5]
    online, reference = log_ratios(lengths, 2.0)
    ratio = online - reference
    expected = torch.cat(
        [part.mean().exp().clamp(0, 16).expand(len(part)) for part in ratio.split(lengths)]
    )
    torch.testing.assert_close(weights_of(IWSFT(), online, reference, lengths), expected)
    squared = weights_of(IWSFT(scale=2.0), online, reference, lengths)
    torch.testing.assert_close(squared, expected.square().clamp(max=16))
    far = weights_of(IWSFT(), online + 10, reference, lengths)
    assert far.unique().tolist() == [16.0]
    token = weights_of(IWSFTToken(), online, reference, lengths)
    torch.testing.assert_close(token, ratio.exp().clamp(0.2, 1.8))
    assert {0.2, 1.8} <= {round(w, 6) for w in token.tolist()}


def slow_pear(
    d: list[float], kind: str, gamma: float = 0.999, block: int = 4
) -> list[float]:  # fmt: skip
    last = len(d)
    logs = []
    for t in range(1, last + 1):
        if kind == "sequence":
            logs.append(math.fsum(d))
            continue
        end = t if kind == "token" else min(((t - 1) // block + 1) * block, last)
        logs.append((last - end) * math.log(gamma) + math.fsum(d[end:]))
    return [math.exp(min(max(g, -10.0), 5.0)) for g in logs]


@pytest.mark.parametrize(
    ("rule", "kind"),
    [(PEARSequence(), "sequence"), (PEARToken(), "token"), (PEARBlock(), "block")],
    ids=["sequence", "token", "block"],
)
def test_pear_against_a_loop(rule: TokenRule, kind: str) -> None:
    lengths = [9, 1, 4, 26]
    online, reference = log_ratios(lengths)
    d = (online - reference).clamp(-0.08, 0.3)
    expected = [w for part in d.split(lengths) for w in slow_pear(part.tolist(), kind)]
    found = weights_of(rule, online, reference, lengths)
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_pear_identities() -> None:
    lengths = [7, 12]
    online, reference = log_ratios(lengths)
    token = weights_of(PEARToken(), online, reference, lengths)
    one = weights_of(PEARBlock(block=1), online, reference, lengths)
    torch.testing.assert_close(one, token, rtol=0, atol=1e-12)
    assert float(token[6]) == float(token[18]) == 1.0
    # One block over everything has nothing after it; the sequence form is another thing.
    whole = weights_of(PEARBlock(block=100), online, reference, lengths)
    assert whole.tolist() == [1.0] * 19
    assert weights_of(PEARSequence(), online, reference, lengths).unique().numel() == 2
    same = weights_of(PEARToken(), reference, reference, lengths)
    powers = [0.999 ** (n - t) for n in lengths for t in range(1, n + 1)]
    exact = torch.tensor(powers, dtype=torch.float64)
    torch.testing.assert_close(same, exact, rtol=0, atol=1e-12)


def test_pear_clips() -> None:
    online, reference = torch.zeros(400).double(), torch.zeros(400).double()
    # A token never counts for more than its bounds, and a product no more than exp(5) or exp(-10).
    up = weights_of(PEARToken(gamma=1.0), online + 9, reference)
    torch.testing.assert_close(up[-3:], torch.tensor([0.6, 0.3, 0.0]).double().exp())
    assert float(up[0]) == pytest.approx(math.exp(5), rel=1e-12)
    down = weights_of(PEARToken(gamma=1.0), online - 9, reference)
    torch.testing.assert_close(down[-3:], torch.tensor([-0.16, -0.08, 0.0]).double().exp())
    assert float(down[0]) == pytest.approx(math.exp(-10), rel=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Power(-1.0),
        lambda: Power(math.inf),
        lambda: Threshold(1.0),
        lambda: Threshold(0.0, keep="below"),
        lambda: Threshold(keep="between"),  # type: ignore[arg-type]
        lambda: Threshold(loss="mse"),  # type: ignore[arg-type]
        lambda: ProFit(1.0),
        lambda: TALR(tau=0.0),
        lambda: TALR(minimum=2.0),
        lambda: PriFTMass(1.5),
        lambda: PriFTMass(tie="first"),  # type: ignore[arg-type]
        lambda: EAFT(top=1),
        lambda: EAFT(exponent=-1.0),
        lambda: EAFT(divisor=0.0),
        lambda: IWSFT(scale=0.0),
        lambda: IWSFT(ceiling=-1.0),
        lambda: IWSFTToken(low=2.0),
        lambda: PSFT(clip=0.0),
        lambda: PEARSequence(low=0.1),
        lambda: PEARToken(gamma=0.0),
        lambda: PEARBlock(block=0),
        lambda: ASFT(0.0),
        lambda: SFTKL(-1.0),
    ],
)
def test_settings_that_make_no_sense(make: Callable[[], TokenRule]) -> None:
    with pytest.raises(InputError, match=r"expected|Known|Did you mean"):
        make()
