"""Whole runs: what they leave behind, and what they do when something goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from postlude import registry
from postlude.cli import run as command_line
from postlude.errors import (
    DataError,
    NonFiniteError,
    OutputExistsError,
    RunDirectoryError,
    SettingsError,
    VerificationError,
)
from postlude.runs.loading import load
from postlude.tuning.adapters import Adapter, load_adapter
from postlude.tuning.examples import read_examples
from postlude.tuning.merging import logits
from postlude.tuning.objective import TuneRun
from postlude.tuning.prior import compute_prior
from postlude.tuning.reference import cast
from postlude.tuning.run import tune
from postlude.tuning.supervised import objective_of

RUN = TuneRun(batch_size=4, learning_rate=1e-3, max_length=64)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def settings(name: str, **values: Any) -> Any:
    return registry.find("tune", name).settings(**values)


def test_a_run_from_start_to_output(
    tiny_llama_dir: Path, demonstrations: Path, tmp_path: Path
) -> None:
    checkpoint = load(tiny_llama_dir, device="cpu")
    before = checkpoint.fingerprint()
    out = tmp_path / "tuned"
    tuned = tune(checkpoint, demonstrations, objective_of("dft"), RUN, out=out)
    assert checkpoint.fingerprint() == before  # a copy was trained
    assert [p.name for p in tmp_path.iterdir()] == ["tuned"]
    result = tuned.result
    assert (result["rule"], result["steps"], result["merged"], result["skipped_steps"]) == (
        "dft",
        3,
        False,
        0,
    )
    assert result["response_tokens"] == result["data"]["response_tokens"]
    assert 0 < result["effective_tokens"] < result["response_tokens"]
    assert 0 < result["eos_share"] < 1 and result["tokens_per_second"] > 0
    assert result["reload_difference"] <= 1e-6
    stored = json.loads((out / "tune.json").read_text())
    assert stored["result"]["loss"] == result["loss"]
    rows = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    assert rows == tuned.log
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["epoch"] == 1.0
    again = load(out, device="cpu")
    assert again.tokenizer is not None and again.model.config.use_cache
    assert not equal(weights(out), weights(tiny_llama_dir))
    with pytest.raises(OutputExistsError):
        tune(checkpoint, demonstrations, objective_of("dft"), RUN, out=out)
    with pytest.raises(OutputExistsError, match=r"holds no tune\.json"):
        tune(
            checkpoint,
            demonstrations,
            objective_of("dft"),
            RUN,
            out=demonstrations.parent,
            overwrite=True,
        )


def test_same_seed_same_bits_and_global_state_untouched(
    tiny: Callable[..., Any], demonstrations: Path
) -> None:
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first, second, other = (
        tune(tiny("gpt2"), demonstrations, objective_of("sft"), run)
        for run in (RUN, RUN, TuneRun(batch_size=4, learning_rate=1e-3, max_length=64, seed=1))
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    for a, b in zip(first.log, second.log, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {
            k: v for k, v in b.items() if k != "seconds"
        }
    assert equal(first.checkpoint.model.state_dict(), second.checkpoint.model.state_dict())
    assert first.result["loss"] != other.result["loss"]


def test_16_bit_checkpoints_are_trained_in_32_and_stored_in_16(
    make_model: Callable[..., Any], tiny: Callable[..., Any], demonstrations: Path, tmp_path: Path
) -> None:
    checkpoint, wide = tiny(), tiny()
    cast(checkpoint.model, torch.bfloat16)
    cast(cast(wide.model, torch.bfloat16), torch.float32)
    tuned = tune(
        checkpoint, demonstrations, objective_of("sft"), RUN, out=tmp_path / "out"
    ).checkpoint
    trained = tune(wide, demonstrations, objective_of("sft"), RUN).checkpoint
    stored = weights(tmp_path / "out")
    assert tuned.model.dtype == torch.bfloat16
    # Rounded once, at the end.
    for name, parameter in trained.model.named_parameters():
        assert torch.equal(stored[name], parameter.to(torch.bfloat16)), name
    # Rotary frequencies are no parameters and stay exact.
    exact = make_model().model.rotary_emb.inv_freq
    assert torch.equal(tuned.model.model.rotary_emb.inv_freq, exact)
    same = tune(wide, demonstrations, objective_of("sft"), RUN, dtype=torch.bfloat16)
    assert same.checkpoint.model.dtype == torch.bfloat16 and same.result["loss"] > 0


@pytest.mark.parametrize("rule", ["prift-mass", "iw-sft"])
def test_the_three_references_are_one(
    tiny_llama_dir: Path, demonstrations: Path, tmp_path: Path, rule: str
) -> None:
    """A second checkpoint, a stored prior and the model itself: the same log."""
    checkpoint = load(tiny_llama_dir, device="cpu")
    examples = read_examples(demonstrations, checkpoint.tokenizer, 64)
    compute_prior(checkpoint, examples, tmp_path / "prior", max_length=64)
    reference = load(tiny_llama_dir, device="cpu")
    before = reference.fingerprint()
    runs = [
        tune(checkpoint, demonstrations, objective_of(rule), RUN),
        tune(checkpoint, demonstrations, objective_of(rule), RUN, reference=reference),
        tune(checkpoint, demonstrations, objective_of(rule, prior=tmp_path / "prior"), RUN),
    ]  # fmt: skip
    for other in runs[1:]:
        for row, expected in zip(other.log, runs[0].log, strict=True):
            for name in ("loss", "mean_weight", "kept_share"):
                assert row[name] == pytest.approx(expected[name], abs=2e-6)
    assert 0 < runs[0].result["kept_share"] <= 1
    # The frozen reference stays as it was, gets no gradient and is not in the output.
    assert reference.fingerprint() == before
    assert all(parameter.grad is None for parameter in reference.model.parameters())
    names = set(checkpoint.model.state_dict())
    assert all(set(one.checkpoint.model.state_dict()) == names for one in runs)


def test_a_prior_of_another_reference(
    make_checkpoint: Callable[..., Path], tiny_llama_dir: Path, demonstrations: Path, tmp_path: Path
) -> None:
    start, other = (
        load(tiny_llama_dir, device="cpu"),
        load(make_checkpoint("llama", seed=3), device="cpu"),
    )
    examples = read_examples(demonstrations, other.tokenizer, 64)
    compute_prior(other, examples, tmp_path / "prior", max_length=64)
    goal = objective_of("prift-prob", prior=tmp_path / "prior")
    with pytest.raises(
        DataError, match=r"(?s)the reference model: computed with .*pass that as --reference"
    ) as caught:
        tune(start, demonstrations, goal, RUN, out=tmp_path / "out")
    assert str(other.path) in str(caught.value)
    assert not (tmp_path / ".out.run").exists()
    tune(start, demonstrations, goal, RUN, reference=other)
    with pytest.raises(DataError, match="data, truncation"):
        tune(start, demonstrations, goal, TuneRun(max_length=20), reference=other)


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("lora", Adapter(rank=4)),
        ("few layers", Adapter(rank=2, alpha=8, target=("q_proj", "v_proj"), settings={"use_dora": True})),
        ("loha", Adapter("loha", rank=2)),
        ("ia3", Adapter("ia3")),
        ("oft", Adapter("oft", settings={"r": 0, "oft_block_size": 4})),
    ],
)  # fmt: skip
def test_adapters(
    tiny_llama_dir: Path, demonstrations: Path, tmp_path: Path, name: str, adapter: Adapter
) -> None:
    checkpoint = load(tiny_llama_dir, device="cpu")
    alone = tune(
        checkpoint, demonstrations, objective_of("dft"), RUN, adapter=adapter, out=tmp_path / "a"
    )
    merged = tune(
        checkpoint, demonstrations, objective_of("dft"), RUN, adapter=adapter, merge=True, out=tmp_path / "m"
    )  # fmt: skip
    assert alone.result["trained_parameters"] == merged.result["trained_parameters"] > 0
    assert alone.result["trained_parameters"] < 20_000
    assert alone.result["reload_difference"] <= 1e-6 and merged.result["reload_difference"] <= 1e-6
    assert merged.result["merge_difference"] <= 1e-4
    assert alone.result["loss"] == pytest.approx(merged.result["loss"], abs=1e-6)
    ids = torch.arange(3, 30)[None]
    on = logits(alone.checkpoint.model, [ids[0]])[0]
    for other in (load(tmp_path / "m", device="cpu"), load_adapter(tmp_path / "a", device="cpu")):
        found = logits(other.model, [ids[0]])[0]
        torch.testing.assert_close(found, on, atol=1e-4 * float(on.abs().max()), rtol=0)
    start = logits(checkpoint.model, [ids[0]])[0]
    assert not torch.equal(start, on)


def test_an_adapter_with_the_reference_off(tiny_llama_dir: Path, demonstrations: Path) -> None:
    checkpoint = load(tiny_llama_dir, device="cpu")
    own = tune(checkpoint, demonstrations, objective_of("prift-prob"), RUN, adapter=Adapter(rank=2))
    given = tune(
        checkpoint, demonstrations, objective_of("prift-prob"), RUN, adapter=Adapter(rank=2),
        reference=load(tiny_llama_dir, device="cpu"),
    )  # fmt: skip
    for row, expected in zip(own.log, given.log, strict=True):
        assert row["loss"] == expected["loss"]


def test_a_step_without_weight_is_left_out(tiny: Callable[..., Any], demonstrations: Path) -> None:
    checkpoint = tiny()
    tuned = tune(checkpoint, demonstrations, objective_of(settings("profit", tau=0.999)), RUN)
    assert tuned.result["skipped_steps"] == 3 and tuned.result["loss"] == 0
    # Neither weight decay nor momentum moved anything.
    assert equal(tuned.checkpoint.model.state_dict(), checkpoint.model.state_dict())


def test_a_loss_that_is_not_finite(
    tiny: Callable[..., Any], demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from postlude.tuning import token_loss

    original, calls = token_loss.TokenLoss.compute_loss, []

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        loss = original(self, *args, **kwargs)
        if len(calls) == 3:
            self._sums.values[2] = float("nan")
        return loss

    monkeypatch.setattr(token_loss.TokenLoss, "compute_loss", failing)
    with pytest.raises(NonFiniteError, match=r"Step 3 of 3 has a loss of nan") as caught:
        tune(tiny(), demonstrations, objective_of("sft"), RUN, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.run" / "states" / "step-2" / "tensors.safetensors").is_file()
    place = tmp_path / ".out.run" / "model-before"
    assert str(place) in str(caught.value)
    kept = load(place, device="cpu")
    two = tune(
        tiny(),
        demonstrations,
        objective_of("sft"),
        TuneRun(batch_size=4, learning_rate=1e-3, max_length=64),
    )
    assert not equal(kept.model.state_dict(), two.checkpoint.model.state_dict())
    # The same command again goes on from there.
    calls.extend([1] * 9)
    done = tune(tiny(), demonstrations, objective_of("sft"), RUN, out=tmp_path / "out")
    assert done.result["steps"] == 3
    assert equal(done.checkpoint.model.state_dict(), two.checkpoint.model.state_dict())
    assert not (tmp_path / ".out.run").exists()


def test_a_loss_that_is_not_finite_at_once(tiny: Callable[..., Any], demonstrations: Path) -> None:
    checkpoint = tiny()
    with torch.no_grad():
        checkpoint.model.model.layers[0].mlp.up_proj.weight.mul_(1e38)
    with pytest.raises(NonFiniteError, match=r"Step 1 of 3 has a .* Nothing was learned before it"):
        tune(checkpoint, demonstrations, objective_of("sft"), RUN)


def test_a_saved_model_that_is_another_one_does_not_appear(
    tiny: Callable[..., Any], demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from postlude.tuning import output

    other = tiny(seed=4)
    monkeypatch.setattr(output, "load", lambda *args, **kwargs: other)
    with pytest.raises(VerificationError, match="What was saved, loaded again, is another model"):
        tune(tiny(), demonstrations, objective_of("sft"), RUN, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"goal": "sftt"}, "No tune method named 'sftt'"),
        ({"goal": settings}, "takes the name or the settings of a token rule"),
        ({"goal": "sft", "signal": "reference"}, "reads no probability, so it has no signal"),
        ({"goal": "prift-mass", "signal": "cached"}, "is that of a stored prior"),
        ({"goal": "dft", "prior": "p"}, "so a prior has no use"),
        ({"goal": "asft", "prior": "p"}, "whole distribution"),
        ({"goal": "dpo", "signal": "online"}, "signal belong to supervised tuning"),
    ],
)
def test_objectives_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises((SettingsError, ValueError), match=message):
        objective_of(**change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": True}, "There is no adapter to merge"),
        ({"adapter": Adapter("loras")}, "No adapter named 'loras'. Did you mean 'lora'"),
        ({"adapter": Adapter("prompt_tuning")}, "puts tokens of its own before the text"),
        ({"adapter": Adapter("ia3", rank=4)}, "the adapter ia3 has no rank"),
        ({"adapter": Adapter(settings={"dropout": 1})}, "No setting of the adapter lora named 'dropout'.*lora_dropout"),
        ({"adapter": Adapter(target="nothing")}, "peft cannot put the adapter lora on this LlamaForCausalLM"),
        ({"adapter": Adapter(target="lm_head")}, "The head lm_head is a .*Leave the head out"),
        ({"run": TuneRun(max_length=65)}, "max_length is 65, but the model takes at most 64"),
    ],
)  # fmt: skip
def test_runs_that_are_refused(
    tiny_llama_dir: Path,
    demonstrations: Path,
    tmp_path: Path,
    options: dict[str, Any],
    message: str,
) -> None:
    given = {"run": RUN, **options}
    checkpoint = load(tiny_llama_dir, device="cpu")
    with pytest.raises((SettingsError, ValueError), match=message):
        tune(checkpoint, demonstrations, objective_of("sft"), out=tmp_path / "out", **given)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_a_model_without_a_directory(
    tiny: Callable[..., Any], demonstrations: Path, tmp_path: Path
) -> None:
    goal, adapter = objective_of("sft"), Adapter(rank=2)
    with pytest.raises(SettingsError, match="has no directory of its own"):
        tune(tiny(), demonstrations, goal, RUN, adapter=adapter, out=tmp_path / "out")
    tune(tiny(), demonstrations, goal, RUN, adapter=adapter, merge=True, out=tmp_path / "out")
    assert load(tmp_path / "out", device="cpu").model.config.vocab_size == 259


def test_a_reference_with_another_vocabulary(
    tiny: Callable[..., Any], demonstrations: Path
) -> None:
    with pytest.raises(SettingsError, match="vocabulary of 300 words and the model one of 259"):
        tune(
            tiny(), demonstrations, objective_of("prift-prob"), RUN, reference=tiny(vocab_size=300)
        )


def test_quantized_models_are_refused(tiny: Callable[..., Any], demonstrations: Path) -> None:
    from postlude.quantization import RTN
    from postlude.quantization.engine import quantize

    small = quantize(tiny(), RTN(), None, seed=0)
    with pytest.raises(SettingsError, match=r"is quantized .* Tune the float model"):
        tune(small, demonstrations, objective_of("sft"), RUN)


def in_process(capsys: pytest.CaptureFixture[str], words: list[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert command_line(words) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "options", [("--weights", "talr"), ("--adapter", "lora", "--set", "lora_dropout=0.2")]
)
def test_a_killed_run_resumes_bit_equal(
    tiny_llama_dir: Path,
    demonstrations: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [
        "tune",
        str(tiny_llama_dir),
        str(demonstrations),
        *options,
        "--device",
        "cpu",
        "--json",
    ]
    words += [
        "--max-length",
        "64",
        "--learning-rate",
        "1e-3",
        "--batch-size",
        "2",
        "--epochs",
        "60",
    ]
    words += ["--save-every", "3"]
    steps, states = 360, tmp_path / ".out.run" / "states"
    command = [sys.executable, "-m", "postlude", *words, "-o", str(tmp_path / "out")]
    with subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        while process.poll() is None and not any(
            int(path.name[5:]) >= 30 for path in states.glob("step-*")
        ):
            time.sleep(0.01)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    done = [int(path.name[5:]) for path in states.glob("step-*")]
    assert done and max(done) < steps
    assert not [p for p in states.rglob("*") if p.suffix in (".pt", ".pth", ".bin", ".pkl")]
    result = in_process(capsys, [*words, "-o", str(tmp_path / "out")])
    whole = in_process(capsys, [*words, "-o", str(tmp_path / "whole")])
    for name in ("loss", "final_loss", "effective_tokens"):
        assert result[name] == whole[name]
    assert result["steps"] == whole["steps"] == steps
    name = "adapter_model" if "--adapter" in options else "model"
    files = [tmp_path / out / f"{name}.safetensors" for out in ("out", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
    for row, expected in zip(log_of(tmp_path / "out"), log_of(tmp_path / "whole"), strict=True):
        assert row["loss"] == expected["loss"] and row["step"] == expected["step"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_a_run_of_something_else_is_not_resumed(
    tiny: Callable[..., Any], demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from postlude.tuning import trainer

    original = trainer.Resumable._write_row

    def interrupted(self: Any, step: int) -> None:
        original(self, step)
        if step == 3:
            raise KeyboardInterrupt

    goal = objective_of("sft", save_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Resumable, "_write_row", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(tiny(), demonstrations, goal, RUN, out=tmp_path / "out")
    assert (tmp_path / ".out.run" / "states" / "step-2").is_dir()
    other = TuneRun(batch_size=4, learning_rate=2e-3, max_length=64)
    with pytest.raises(RunDirectoryError, match="belongs to another run") as caught:
        tune(tiny(), demonstrations, goal, other, out=tmp_path / "out")
    message = str(caught.value)
    assert "the kept run has run.learning_rate 0.001, this one asks for 0.002" in message
    assert "--run" not in message
    fresh = tune(tiny(), demonstrations, goal, other, out=tmp_path / "out", overwrite=True)
    alone = tune(tiny(), demonstrations, goal, other)
    assert equal(fresh.checkpoint.model.state_dict(), alone.checkpoint.model.state_dict())


def test_resuming_in_this_process(
    tiny: Callable[..., Any], demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of dropout, of the optimizer and of a rule that remembers a step comes back."""
    from postlude.tuning import trainer

    run = TuneRun(batch_size=2, accumulate=2, learning_rate=1e-3, max_length=64, epochs=2)
    goal = objective_of("talr", save_every=2)
    whole = tune(tiny("gpt2"), demonstrations, goal, run)
    original = trainer.Resumable._write_row

    def interrupted(self: Any, step: int) -> None:
        original(self, step)
        if step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Resumable, "_write_row", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(tiny("gpt2"), demonstrations, goal, run, out=tmp_path / "out")
    resumed = tune(tiny("gpt2"), demonstrations, goal, run, out=tmp_path / "out")
    assert [row["loss"] for row in resumed.log] == [row["loss"] for row in whole.log]
    assert equal(resumed.checkpoint.model.state_dict(), whole.checkpoint.model.state_dict())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_have_the_loss_of_one(
    tiny_llama_dir: Path, demonstrations: Path, tmp_path: Path
) -> None:
    """Eleven sequences do not divide by two ranks of two, and one of the rules rescales gradients."""
    rules: dict[str, dict[str, Any]] = {"dft": {}, "threshold": {"cut": 0.001}, "prift-mass": {}}
    run: dict[str, Any] = {"epochs": 3, "max_length": 64, "learning_rate": 1e-3, "batch_size": 2}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += [
        str(Path(__file__).parent / "two_ranks.py"),
        str(tiny_llama_dir),
        str(demonstrations),
    ]
    command += [str(tmp_path), json.dumps(run), json.dumps(rules)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 1
    for rule, values in rules.items():
        one = tune(
            load(tiny_llama_dir, device="cpu"),
            demonstrations,
            objective_of(settings(rule, **values)),
            TuneRun(**{**run, "batch_size": 4}),
        )
        rows = log_of(tmp_path / rule)
        assert len(rows) == 9
        for row, expected in zip(rows, one.log, strict=True):
            for name in ("loss", "mean_weight", "effective_tokens", "tokens", "gradient_norm"):
                assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), (rule, name)
        for name, tensor in weights(tmp_path / rule).items():
            expected = one.checkpoint.model.state_dict()[name]
            torch.testing.assert_close(tensor, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("keep", [False, True])
def test_ends_that_weigh_nothing_are_told(
    tiny: Callable[..., Any], demonstrations: Path, keep: bool
) -> None:
    from postlude.tuning.supervised import _ends_unlearned

    checkpoint = tiny("gpt2")
    examples = read_examples(demonstrations, checkpoint.tokenizer, 64)
    ends = (checkpoint.tokenizer.eos_token_id,)
    numbers = {"mean_weight": 0.5, "eos_share": 0.1 if keep else 1e-9}
    assert _ends_unlearned(numbers, examples, ends) is not keep
    assert not _ends_unlearned(numbers, examples, ())
