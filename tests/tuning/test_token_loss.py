"""The loss of a step and its gradients, before any optimizer: against transformers, and however a step is cut."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from postlude import registry
from postlude.surgery.head import LanguageHead
from postlude.tuning.adapters import Adapter, attach
from postlude.tuning.batches import collate, make_plan
from postlude.tuning.examples import Examples, read_examples
from postlude.tuning.objective import TuneRun
from postlude.tuning.reference import Reference
from postlude.tuning.token_loss import Batches, TokenLoss
from postlude.tuning.trainer import arguments, joined, only
from postlude.tuning.weighting import TokenWeighting

Gradients = dict[str, Tensor]
RULES = ("sft", "dft", "prift-mass", "threshold", "iw-sft", "pear-token", "asft")


def trainer_of(
    checkpoint: Any,
    examples: Examples,
    weighting: TokenWeighting,
    run: TuneRun,
    folder: Path,
    reference: Any = None,
    model: Any = None,
) -> Any:
    from transformers import Trainer

    plan = make_plan(examples, run, 64)
    model = checkpoint.model if model is None else model
    trainer = joined(TokenLoss, Trainer)(
        model=model,
        args=arguments(run, folder, model, plan.steps),
        train_dataset=Batches(examples, plan, None),
        data_collator=only,
    )
    trainer.prepare(folder)
    head = LanguageHead(checkpoint.model, checkpoint.anatomy)
    trainer.weigh(weighting, plan, head, reference, None)
    return trainer


def one_step(
    checkpoint: Any,
    examples: Examples,
    rule: str,
    folder: Path,
    run: TuneRun,
    padding: Literal["right", "left"] = "right",
    settings: Any = None,
    **options: Any,
) -> tuple[dict[str, float], Gradients]:
    """Numbers and gradients of a step over all examples, before clipping."""
    settings = registry.find("tune", rule).settings(**(settings or {}))
    weighting = TokenWeighting(settings, **options)
    reference = None
    if weighting.needs_reference:
        frozen = tiny_reference(checkpoint)
        reference = Reference(frozen.model, LanguageHead(frozen.model, frozen.anatomy))
    trainer = trainer_of(checkpoint, examples, weighting, run, folder, reference)
    trainer.create_optimizer_and_scheduler(1)
    for rows in trainer._plan.batches[: run.accumulate]:
        batch = collate(examples, rows, padding=padding)
        trainer.compute_loss(
            checkpoint.model, batch, num_items_in_batch=trainer._plan.targets[0]
        ).backward()
    trainer._clip_grad_norm(checkpoint.model)
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in checkpoint.model.named_parameters()
        if parameter.grad is not None
    }
    checkpoint.model.zero_grad()
    return trainer._numbers, gradients


def tiny_reference(checkpoint: Any) -> Any:
    model = copy.deepcopy(checkpoint.model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.05 * noise)
    return dataclasses.replace(checkpoint, model=model)


def run_of(batch_size: int = 11, **settings: Any) -> TuneRun:
    return TuneRun(batch_size=batch_size, clip=1e9, **settings)


def close(found: Gradients, expected: Gradients, tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=tolerance, rtol=1e-5)


@pytest.fixture
def examples(demonstrations: Path, tiny_tokenizer: Any) -> Examples:
    return read_examples(demonstrations, tiny_tokenizer, 64)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2"])
def test_weight_one_is_the_loss_of_transformers(
    tiny: Callable[..., Any], examples: Examples, tmp_path: Path, model_type: str
) -> None:
    checkpoint = tiny(model_type)
    model = checkpoint.model
    batch = collate(examples, [[i] for i in range(11)])
    mask = torch.zeros_like(batch["input_ids"])
    labels = torch.full_like(mask, -100)
    for i in range(11):
        ids, targets = examples.ids(i), examples.targets(i)
        mask[i, : len(ids)] = 1
        labels[i, : len(ids)] = torch.where(targets, ids, -100)
    expected = model(input_ids=batch["input_ids"], attention_mask=mask, labels=labels).loss
    expected.backward()
    theirs = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    numbers, ours = one_step(checkpoint, examples, "sft", tmp_path, run_of())
    assert numbers["loss"] == pytest.approx(expected.item(), abs=1e-6)
    close(ours, theirs)


@pytest.mark.parametrize(("rule", "loss_type"), [("dft", "dft"), ("sft", "nll")])
def test_dft_and_sft_are_the_losses_of_trl(
    tiny: Callable[..., Any], examples: Examples, tmp_path: Path, rule: str, loss_type: str
) -> None:
    from postlude.tuning.on_trl import import_trl

    trl = import_trl()
    from datasets import Dataset

    checkpoint, other = tiny(), tiny()
    tokenizer = copy.deepcopy(checkpoint.tokenizer)
    tokenizer.pad_token = "<unk>"
    rows = [
        {
            "input_ids": examples.ids(i).tolist(),
            "completion_mask": examples.targets(i).int().tolist(),
        }
        for i in range(11)
    ]
    args = trl.SFTConfig(
        str(tmp_path), loss_type=loss_type, completion_only_loss=True, use_cpu=True, bf16=False, report_to="none",
        activation_checkpointing=False, per_device_train_batch_size=11, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        other.model,
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(11)])
    count = (batch["labels"][:, 1:] != -100).sum()
    expected = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
    expected.backward()
    theirs = {n: p.grad.clone() for n, p in other.model.named_parameters()}
    numbers, ours = one_step(checkpoint, examples, rule, tmp_path, run_of())
    assert numbers["loss"] == pytest.approx(expected.item(), abs=1e-6)
    close(ours, theirs)


@pytest.mark.parametrize("rule", RULES)
def test_a_step_is_the_same_however_it_is_cut(
    tiny: Callable[..., Any], examples: Examples, tmp_path: Path, rule: str
) -> None:
    checkpoint = tiny()
    numbers, expected = one_step(checkpoint, examples, rule, tmp_path, run_of())
    ways: list[tuple[TuneRun, Literal["right", "left"]]] = [
        (run_of(6, accumulate=2), "right"),
        (run_of(3, accumulate=4), "left"),
        (run_of(), "left"),
        (run_of(3, accumulate=4, packing=True), "right"),
        (run_of(2, accumulate=4, packing=True), "left"),
    ]
    for run, padding in ways:
        other, gradients = one_step(checkpoint, examples, rule, tmp_path, run, padding)
        for name, value in numbers.items():
            assert other[name] == pytest.approx(value, abs=2e-6, rel=2e-5), (name, run)
        close(gradients, expected)


@pytest.mark.parametrize("normalize", ["kept", "mean1"])
def test_denominators_of_the_whole_step(
    tiny: Callable[..., Any], examples: Examples, tmp_path: Path, normalize: str
) -> None:
    checkpoint = tiny()
    options = {"settings": {"tau": 1e-3}, "normalize": normalize}
    whole = one_step(checkpoint, examples, "profit", tmp_path, run_of(), **options)
    cut = one_step(checkpoint, examples, "profit", tmp_path, run_of(3, accumulate=4), **options)
    assert cut[0]["loss"] == pytest.approx(whole[0]["loss"], abs=1e-6)
    assert 0 < whole[0]["kept_share"] < 1
    close(cut[1], whole[1])


@pytest.mark.parametrize("model_type", ["gpt2", "qwen3", "mistral"])
def test_packed_sequences_do_not_see_each_other(
    tiny: Callable[..., Any], examples: Examples, tmp_path: Path, model_type: str
) -> None:
    checkpoint = tiny(model_type)
    checkpoint.model.eval()
    head = LanguageHead(checkpoint.model, checkpoint.anatomy)
    reference = Reference(checkpoint.model, head)
    rows = [[0, 3, 1], [4, 2]]
    packed = reference(collate(examples, rows)).hidden
    apart = reference(collate(examples, [[i] for row in rows for i in row], padding="left")).hidden
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-5)


def test_a_batch_without_sequences_adds_nothing(
    tiny: Callable[..., Any], examples: Examples, tmp_path: Path
) -> None:
    # Eleven sequences over twelve micro-batches: one of them is empty.
    whole = one_step(tiny(), examples, "sft", tmp_path, run_of())
    cut = one_step(tiny(), examples, "sft", tmp_path, run_of(1, accumulate=12))
    assert cut[0]["loss"] == pytest.approx(whole[0]["loss"], abs=1e-6)
    close(cut[1], whole[1])


def test_the_reference_is_the_model_with_its_adapters_off(
    tiny: Callable[..., Any], examples: Examples
) -> None:
    checkpoint = tiny("gpt2")
    base = dataclasses.replace(checkpoint, model=copy.deepcopy(checkpoint.model))
    model = attach(checkpoint, Adapter("lora"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.train()
    batch = collate(examples, [[0], [1]])
    off = Reference(model, LanguageHead(checkpoint.model, checkpoint.anatomy))(batch)
    plain = Reference(base.model, LanguageHead(base.model, base.anatomy))(batch)
    assert torch.equal(off.hidden, plain.hidden)
    assert model.training and not off.hidden.requires_grad
    assert sum(p.requires_grad for p in model.parameters()) > 0


def test_logits_are_never_formed(
    tiny: Callable[..., Any], examples: Examples, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checkpoint = tiny()
    calls: list[tuple[int, ...]] = []
    original = torch.nn.functional.linear

    def linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.shape[0] == 259:
            calls.append(tuple(states.shape))
        return original(states, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    one_step(checkpoint, examples, "dft", tmp_path, run_of())
    targets = int(examples.target_starts[-1])
    # Once, and only on the states that predict a learned token.
    assert [shape[0] for shape in calls] == [targets]
