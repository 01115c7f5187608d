"""What every registered token weight must do. Nothing is listed by hand: a new rule is tested by being there."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from postlude import registry
from postlude.errors import InputError
from postlude.numerics.weighted_likelihood import Head, TokenColumns, token_columns
from postlude.registry import MethodInfo
from postlude.tuning.likelihood_rules import SFT
from postlude.tuning.weighting import (
    SIGNALS,
    StepStatistics,
    TargetTokens,
    TokenRule,
    TokenWeighting,
)

METHODS = [
    info for info in registry.available("tune") if issubclass(info.settings, TokenRule)
]  # fmt: skip
each_method = pytest.mark.parametrize("info", METHODS, ids=lambda info: info.name)

LENGTHS = (9, 5, 12, 7)  # of the examples, their prompts included
PROMPT = 3


class Example(NamedTuple):
    ids: Tensor
    labels: Tensor


@pytest.fixture(scope="module")
def models(make_model: Callable[..., Any]) -> tuple[Any, Any]:
    """In training, and its frozen reference."""
    return make_model("llama").double(), make_model("llama", seed=1).double()


@pytest.fixture(scope="module")
def examples(models: tuple[Any, Any]) -> list[Example]:
    """Every second token is the model's favourite: some rules keep nothing else."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in LENGTHS:
        ids = torch.randint(3, 259, (length,), generator=generator)
        for index in range(PROMPT + 1, length, 2):
            ids[index] = models[0](input_ids=ids[None, :index]).logits[0, -1].argmax()
        labels = ids.clone()
        labels[:PROMPT] = -100
        found.append(Example(ids, labels))
    return found


class Batch(NamedTuple):
    """What a model is run on."""

    ids: Tensor
    labels: Tensor
    positions: Tensor
    attention: Tensor | None

    @property
    def tokens(self) -> TargetTokens:
        return TargetTokens.from_labels(self.labels, self.positions)


def padded(examples: list[Example], side: str) -> Batch:
    width = max(len(example.ids) for example in examples) + 2
    shape = (len(examples), width)
    ids, labels = torch.full(shape, 5), torch.full(shape, -100)
    attention, positions = torch.zeros(shape, dtype=torch.int64), torch.ones(shape).long()
    for row, example in enumerate(examples):
        n = len(example.ids)
        place = slice(0, n) if side == "right" else slice(width - n, width)
        ids[row, place], labels[row, place] = example.ids, example.labels
        attention[row, place], positions[row, place] = 1, torch.arange(n)
    return Batch(ids, labels, positions, attention)


def packed(examples: list[Example]) -> Batch:
    positions = torch.cat([torch.arange(len(example.ids)) for example in examples])
    ids = torch.cat([example.ids for example in examples])
    # The first token of an example is labelled too: a packed row must not learn it from the example before.
    labels = torch.cat([example.labels for example in examples]).clone()
    labels[positions == 0] = ids[positions == 0]
    return Batch(ids[None], labels[None], positions[None], None)


LAYOUTS: dict[str, Callable[[list[Example]], list[Batch]]] = {
    "padded right": lambda examples: [padded(examples, "right")],
    "padded left": lambda examples: [padded(examples, "left")],
    "packed": lambda examples: [packed(examples)],
    "two micro-batches": lambda examples: [
        padded(examples[:1], "right"),
        packed(examples[1:]),
    ],
    "four micro-batches": lambda examples: [packed([example]) for example in examples],
}


def states(model: Any, batch: Batch) -> Tensor:
    given = {} if batch.attention is None else {"attention_mask": batch.attention}
    hidden: Tensor = model.model(
        input_ids=batch.ids, position_ids=batch.positions, use_cache=False, **given
    ).last_hidden_state
    return TargetTokens.align(hidden)


def reference_of(weighting: TokenWeighting, model: Any, batch: Batch) -> Head | TokenColumns | None:
    if not weighting.needs_reference:
        return None
    with torch.no_grad():
        head = Head(states(model, batch), model.lm_head.weight)
        if weighting.needs_reference_model:
            return head
        targets = batch.tokens.targets.clamp(min=0)
        return token_columns(
            *head[:2], targets, columns=weighting.reference_columns, top=weighting.rule.top
        )


class Step(NamedTuple):
    statistics: StepStatistics
    gradients: dict[str, Tensor]
    weights: Tensor


def step(
    weighting: TokenWeighting,
    models: tuple[Any, Any],
    batches: list[Batch],
    previous: StepStatistics | None = None,
) -> Step:
    """One optimiser step as the module's docstring has it."""
    online, frozen = models
    online.zero_grad()
    items = sum(int(batch.tokens.mask.sum()) for batch in batches)
    results = []
    for batch in batches:
        result = weighting(
            states(online, batch), online.lm_head.weight, batch.tokens,
            reference=reference_of(weighting, frozen, batch), num_items=items, previous=previous,
        )  # fmt: skip
        result.loss.backward()
        results.append(result)
    statistics = functools.reduce(
        lambda one, other: one + other, [result.statistics for result in results]
    )  # fmt: skip
    scale = statistics.gradient_scale if weighting.rescales else 1
    gradients = {name: p.grad * scale for name, p in online.named_parameters()}
    return Step(statistics, gradients, torch.cat([result.weights for result in results]))


def signals(rule: TokenRule) -> list[TokenWeighting]:
    """The rule with every signal that it takes."""
    found = []
    for signal in SIGNALS:
        try:
            found.append(TokenWeighting(rule, signal))
        except InputError:
            continue
    return found


def assert_equal(one: Step, other: Step) -> None:
    torch.testing.assert_close(one.statistics.loss, other.statistics.loss, rtol=0, atol=1e-6)
    torch.testing.assert_close(one.statistics.values, other.statistics.values, rtol=1e-6, atol=1e-6)
    for name, gradient in one.gradients.items():
        torch.testing.assert_close(gradient, other.gradients[name], rtol=1e-6, atol=1e-6)


# The loss of a step


@each_method
def test_the_layout_of_a_batch_changes_nothing(
    info: MethodInfo, models: tuple[Any, Any], examples: list[Example]
) -> None:
    """Padding on either side, packing, accumulation: the same loss, statistics and gradients."""
    weighting = TokenWeighting(info.settings())
    start = step(weighting, models, [packed(examples)])
    first: Step | None = None
    for batches in LAYOUTS.values():
        found = step(weighting, models, batches(examples), start.statistics)
        first = first or found
        assert_equal(first, found)
    assert first is not None and not first.statistics.empty


@each_method
def test_weights_of_one_are_plain_sft(
    info: MethodInfo, models: tuple[Any, Any], examples: list[Example]
) -> None:
    """A model is its own reference, so that a divergence adds nothing."""
    batches = [padded(examples, "right")]
    plain = step(TokenWeighting(SFT()), models, batches)
    one = TokenWeighting(info.settings(), floor=1.0, ceil=1.0)
    found = step(one, (models[0], models[0]), batches)
    assert torch.equal(found.weights, torch.ones_like(found.weights))
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-9, atol=1e-12)


@each_method
def test_every_signal(info: MethodInfo, models: tuple[Any, Any], examples: list[Example]) -> None:
    """Cached columns are as good as the reference beside it, and the reference is left alone."""
    before = {name: value.clone() for name, value in models[1].state_dict().items()}
    models[1].zero_grad()
    found = {
        weighting.signal: step(weighting, models, [packed(examples)])
        for weighting in signals(info.settings())
    }
    assert found
    if "cached" in found:
        assert_equal(found["reference"], found["cached"])
    assert all(parameter.grad is None for parameter in models[1].parameters())
    assert all(torch.equal(value, before[name]) for name, value in models[1].state_dict().items())


# The weights


class Toy(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    tokens: TargetTokens
    prior: Head

    def reference(
        self, weighting: TokenWeighting, shift: float = 0.0
    ) -> Head | TokenColumns | None:
        prior = self.prior._replace(bias=self.bias + shift)
        if not weighting.needs_reference:
            return None
        if weighting.needs_reference_model:
            return prior
        return token_columns(
            *prior[:2], self.tokens.targets, prior.bias, weighting.reference_columns,
            weighting.rule.top,
        )  # fmt: skip


def toy(scale: float = 1.0) -> Toy:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    targets = torch.randint(0, 40, (20,), generator=generator)
    tokens = TargetTokens(targets, torch.ones(20, dtype=torch.bool), torch.arange(20) // 7)
    return Toy(
        normal(20, 6), normal(40, 6), normal(40), tokens, Head(normal(20, 4), normal(40, 4))
    )  # fmt: skip


@each_method
def test_a_constant_added_to_all_logits_changes_nothing(info: MethodInfo) -> None:
    one = toy()
    for weighting in signals(info.settings()):
        found = [
            weighting(
                one.hidden, one.weight, one.tokens, bias=one.bias + shift,
                reference=one.reference(weighting, shift),
            )
            for shift in (0.0, 3.0)
        ]  # fmt: skip
        torch.testing.assert_close(found[0].weights, found[1].weights, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found[0].loss, found[1].loss, rtol=1e-9, atol=1e-12)


@each_method
def test_weights_are_constants_of_the_gradient(info: MethodInfo) -> None:
    """The gradient is that of a fixed weight, whatever the weight was read from."""
    one = toy()
    for weighting in signals(info.settings()):
        hidden, weight = one.hidden.clone().requires_grad_(), one.weight.clone().requires_grad_()
        reference = one.reference(weighting)
        result = weighting(hidden, weight, one.tokens, bias=one.bias, reference=reference)
        assert not result.weights.requires_grad and not result.statistics.values.requires_grad
        assert bool((result.weights >= 0).all())
        log_p = torch.nn.functional.linear(hidden, weight, one.bias).log_softmax(-1)
        each = log_p.gather(1, one.tokens.targets[:, None])[:, 0]
        expected = -(result.weights * each).mean()
        if isinstance(reference, Head):
            log_q = torch.nn.functional.linear(*reference).log_softmax(-1)
            kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
            expected = expected + weighting.rule.divergence * kl
        torch.testing.assert_close(result.loss, expected, rtol=0, atol=1e-12)
        for got, wanted in zip(
            torch.autograd.grad(result.loss, (hidden, weight)),
            torch.autograd.grad(expected, (hidden, weight)),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@each_method
def test_distributions_without_any_doubt(info: MethodInfo) -> None:
    """Probabilities of 0 and 1, online and in the reference: every number stays finite."""
    one = toy(scale=60.0)
    for weighting in signals(info.settings()):
        hidden = one.hidden.float().requires_grad_()
        prior = Head(*(part.float() for part in one.prior[:2]))
        reference: Head | TokenColumns | None = None
        if weighting.needs_reference:
            reference = prior
            if not weighting.needs_reference_model:
                reference = token_columns(
                    *prior[:2], one.tokens.targets, None, weighting.reference_columns,
                    weighting.rule.top,
                )  # fmt: skip
        result = weighting(hidden, one.weight.float(), one.tokens, reference=reference)
        result.loss.backward()
        assert bool(result.weights.isfinite().all()) and bool(result.loss.isfinite())
        assert hidden.grad is not None and bool(hidden.grad.isfinite().all())


@each_method
def test_a_batch_without_a_response(info: MethodInfo) -> None:
    one = toy()
    nothing = dataclasses.replace(one.tokens, mask=torch.zeros_like(one.tokens.mask))
    for weighting in signals(info.settings()):
        hidden = one.hidden.clone().requires_grad_()
        result = weighting(
            hidden, one.weight, nothing, bias=one.bias, reference=one.reference(weighting)
        )
        result.loss.backward()
        assert float(result.loss.detach()) == 0 and result.statistics.empty
        assert hidden.grad is not None and not hidden.grad.any()


@each_method
def test_one_sequence_does_not_change_another(info: MethodInfo) -> None:
    """Its weights, that is; alone or in company."""
    one = toy()
    weighting = TokenWeighting(info.settings())
    together = weighting(
        one.hidden, one.weight, one.tokens, bias=one.bias, reference=one.reference(weighting)
    ).weights
    for sequence in one.tokens.sequence.unique():
        mine = one.tokens.sequence == sequence
        part = dataclasses.replace(one.tokens, mask=mine)
        alone = weighting(
            one.hidden, one.weight, part, bias=one.bias, reference=one.reference(weighting)
        ).weights
        torch.testing.assert_close(alone, together[mine], rtol=1e-9, atol=1e-12)


# Settings


@each_method
def test_settings_that_make_no_sense_are_refused(info: MethodInfo) -> None:
    hints = typing.get_type_hints(info.settings)
    for field in dataclasses.fields(info.settings):
        hint = hints[field.name]
        kinds = typing.get_args(hint) or (hint,)
        bad: object = "neither" if isinstance(kinds[0], str) else float("nan")
        if int in kinds and float not in kinds:
            bad = -1
        with pytest.raises(InputError) as refused:
            info.settings(**{field.name: bad})
        assert str(bad) in str(refused.value)


@each_method
def test_what_a_rule_declares(info: MethodInfo) -> None:
    rule = info.settings()
    assert rule.name == info.name and info.family == "token weights" and info.summary
    assert inspect.getdoc(inspect.getmodule(info.settings))
    reads = rule.compares or rule.divergence > 0 or rule.signal == "reference"
    assert ("reference" in info.needs) == reads
    assert rule.signal in SIGNALS and rule.denominator in ("tokens", "kept")
