from collections.abc import Callable
from typing import Any

import pytest
import torch

from postlude.errors import NonFiniteError
from postlude.runs.rollouts import log_probabilities, read_prompts, sample_answers

END = 3


@pytest.fixture
def prompts() -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def answers_of(model: Any, prompts: Any, seed: int = 0, **settings: Any) -> Any:
    with torch.no_grad():
        prefix = read_prompts(model, prompts).repeated(4)
    generator = torch.Generator().manual_seed(seed)
    given = {"max_new_tokens": 8, **settings}
    return sample_answers(model, prefix, {END}, generator=generator, **given)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_log_probabilities_and_gradients_are_those_of_reading_each_answer_with_its_prompt(
    make_model: Callable[..., Any], prompts: Any, model_type: str
) -> None:
    model = make_model(model_type).eval()
    answers = answers_of(model, prompts)
    found, entropy = log_probabilities(
        model, read_prompts(model, prompts).repeated(4), answers, temperature=0.7
    )
    weights = torch.rand(found.shape, generator=torch.Generator().manual_seed(1)) * answers.mask
    (found * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for row, ids in enumerate(answers.ids()):
        prompt = prompts["input_ids"][row // 4][prompts["attention_mask"][row // 4] == 1]
        whole = torch.cat([prompt, torch.tensor(ids)])[None]
        logits = model(input_ids=whole).logits[0, len(prompt) - 1 : -1] / 0.7
        every = torch.log_softmax(logits, -1)
        expected = every.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        assert torch.allclose(found[row, : len(ids)], expected, atol=1e-5)
        assert torch.allclose(entropy[row, : len(ids)], -(every.exp() * every).sum(-1), atol=1e-5)
        (expected * weights[row, : len(ids)]).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, atol=2e-5), name


def test_answers_end_once_and_repeat_by_seed(make_model: Callable[..., Any], prompts: Any) -> None:
    model = make_model().eval()
    answers = answers_of(model, prompts, temperature=3.0, max_new_tokens=40)
    assert (
        answers.tokens == answers_of(model, prompts, temperature=3.0, max_new_tokens=40).tokens
    ).all()
    other = answers_of(model, prompts, 1, temperature=3.0, max_new_tokens=40)
    assert other.tokens.shape != answers.tokens.shape or (other.tokens != answers.tokens).any()
    for ids, ended in zip(answers.ids(), answers.ended.tolist(), strict=True):
        assert END not in ids[:-1]
        assert ended == (ids[-1] == END)


def test_the_most_probable_token(make_model: Callable[..., Any], prompts: Any) -> None:
    model = make_model().eval()
    answers = answers_of(model, prompts, temperature=0.0)
    expected = model.generate(
        **prompts, do_sample=False, max_new_tokens=8, eos_token_id=END, pad_token_id=0
    )[:, 9:]
    for row, ids in enumerate(answers.ids()):
        assert ids == expected[row // 4].tolist()[: len(ids)]


def test_logits_that_are_no_numbers(make_model: Callable[..., Any], prompts: Any) -> None:
    model = make_model().eval()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        answers_of(model, prompts)
