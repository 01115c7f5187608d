"""What every registered quantizer must do. Nothing is listed by hand: a new method is tested by being there."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import postlude as pl
from postlude import registry
from postlude.errors import DataError, InputError, SettingsError
from postlude.evaluation.size import size_of
from postlude.quantization.engine import FLOAT, Quantizer, quantize
from postlude.registry import MethodInfo
from postlude.runs.directory import RunDirectory
from postlude.surgery.anatomy import anatomy_of
from postlude.surgery.layers import QuantizedLinear

from .bench import ARCHITECTURES, Bench, divergence, few, marked

# Those for other models are in test_quantizers_beyond_language.
METHODS = [
    info
    for info in registry.available("quantize")
    if "language" in info.settings.kinds  # type: ignore[attr-defined]
]
each_method = pytest.mark.parametrize(
    "info", [pytest.param(info, id=info.name, marks=marked(info)) for info in METHODS]
)


def each_method_in_turn(names: str, cases: Sequence[Any], everyday: int) -> pytest.MarkDecorator:
    """Every method in some of the cases, other ones for each, so that all cases are met; the rest is slow."""
    params = []
    for number, info in enumerate(METHODS):
        for place, case in enumerate(cases):
            values = case if isinstance(case, tuple) else (case,)
            words = [info.name, *(str(value).removeprefix("torch.") for value in values)]
            now = (place - number * everyday) % len(cases) < everyday
            marks = marked(info) if now else [pytest.mark.slow]
            params.append(pytest.param(info, *values, id="-".join(words), marks=marks))
    return pytest.mark.parametrize(f"info, {names}", params)


each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
NOTHING = {"weights": FLOAT, "activations": FLOAT, "kv": FLOAT}
FOUR = {"weights": 4, "activations": 4, "kv": 4}
EIGHT = {"weights": 8, "activations": 8, "kv": 8}


def linears(checkpoint: Any) -> dict[str, nn.Module]:
    return {path: checkpoint.model.get_submodule(path) for path in checkpoint.anatomy.linears()}


def states_equal(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def norms_in_fp64(model: nn.Module) -> None:
    """transformers' RMSNorm computes in fp32 whatever it is given; torch's does not."""
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and not isinstance(module, nn.RMSNorm):
            norm = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight.data.copy_(module.weight.data)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, norm)


# The function of the model


@each_architecture
@each_method
def test_rewrites_alone_leave_logits_equal(
    bench: Bench, info: MethodInfo, architecture: str
) -> None:
    """Statistics and rewrites, no rounding. A massive activation of 600 makes fp32 itself coarse, so in fp64."""
    checkpoint = bench.copy(architecture)
    checkpoint.model.double()
    norms_in_fp64(checkpoint.model)
    expected = bench.logits_of(checkpoint)
    settings = info.settings()
    settings.fold(checkpoint)
    statistics = settings.statistics(checkpoint, bench.tokens, 0)
    settings.rewrite(checkpoint, statistics, 0)
    torch.testing.assert_close(bench.logits_of(checkpoint), expected, atol=1e-7, rtol=0)


@each_method
def test_sixteen_bits_everywhere_change_nothing_or_are_refused(
    bench: Bench, info: MethodInfo
) -> None:
    try:
        checkpoint = bench.quantized(info, **NOTHING)
    except SettingsError as error:
        assert info.name in str(error)
        assert "16 bits" in str(error)
        return
    torch.testing.assert_close(bench.logits_of(checkpoint), bench.logits(), atol=1e-4, rtol=0)


@each_method_in_turn("architecture", ["llama", "qwen2", "gpt2"], everyday=1)
def test_more_bits_are_closer(bench: Bench, info: MethodInfo, architecture: str) -> None:
    reference = bench.logits(architecture)
    changes: dict[str, Any] = {"group": "channel", "clip": False}
    if "branch" in info.options:
        changes["branch"] = "16"  # its bits are not those that grow here
    errors = [
        divergence(
            reference,
            bench.logits_of(bench.quantized(info, architecture, **bits, **changes)),
        )
        for bits in (FOUR, EIGHT)
    ]
    assert errors[1].mean() < errors[0].mean() / 4
    assert errors[1].median() < 1e-4


@each_method
def test_eight_bit_weights_and_activations_are_close(bench: Bench, info: MethodInfo) -> None:
    checkpoint = bench.quantized(info, weights=8, activations=8, kv=FLOAT, group="channel")
    errors = divergence(bench.logits(), bench.logits_of(checkpoint))
    assert errors.mean() < 1e-3


@each_method
def test_defaults_and_ragged_groups(bench: Bench, info: MethodInfo) -> None:
    """172 = 5 x 32 + 12: the last group of every row is short."""
    assert torch.isfinite(bench.logits_of(bench.quantized(info))).all()
    checkpoint = bench.quantized(info, **FOUR, group=32, activation_group=32, clip=False)
    errors = divergence(bench.logits(), bench.logits_of(checkpoint))
    assert errors.mean() < 0.1
    down = checkpoint.model.get_submodule("model.layers.2.mlp.down_proj")
    assert down.scale.shape == (64, 6)


@each_dtype
@each_method
def test_a_model_keeps_its_type(bench: Bench, info: MethodInfo, dtype: torch.dtype) -> None:
    checkpoint = bench.quantized(info, "qwen2", dtype, **FOUR, clip=False)
    logits = bench.logits_of(checkpoint)
    assert logits.dtype == dtype
    assert divergence(bench.logits("qwen2", dtype), logits).mean() < 0.1


# Saving


def loaded(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).eval()


@each_method_in_turn(
    "architecture, dtype",
    [
        *((name, torch.float32) for name in ARCHITECTURES),
        ("qwen2", torch.bfloat16),
        ("gpt2", torch.bfloat16),
    ],
    everyday=3,
)
def test_saved_and_loaded_is_bit_equal(
    bench: Bench, info: MethodInfo, architecture: str, dtype: torch.dtype
) -> None:
    made = bench.quantized(info, architecture, dtype, **FOUR, clip=False)
    model = loaded(bench.saved(info, architecture, dtype, **FOUR, clip=False))
    assert states_equal(model, made.model)
    with torch.no_grad():
        logits = model(bench.tokens, use_cache=False).logits
    assert torch.equal(logits, bench.logits_of(made))


@each_method
def test_postlude_loads_what_it_saved(bench: Bench, info: MethodInfo) -> None:
    made = bench.quantized(info, **FOUR, clip=False)
    again = pl.load(bench.saved(info, **FOUR, clip=False))
    assert torch.equal(bench.logits_of(again), bench.logits_of(made))
    assert (
        again.tokenizer("a small boat")["input_ids"] == bench.tokenizer("a small boat")["input_ids"]
    )
    with pytest.raises(SettingsError, match="already quantized"):
        pl.quantize(again, info.settings(), calibration=[bench.text], length=24)


def test_loaded_in_a_process_of_its_own(bench: Bench) -> None:
    """With nothing but ``import postlude`` before transformers."""
    info = registry.find("quantize", "offq")
    directory = bench.saved(info, **FOUR, clip=False)
    script = f"""
        import postlude, torch
        from transformers import AutoModelForCausalLM
        torch.set_num_threads(1)
        model = AutoModelForCausalLM.from_pretrained({str(directory)!r})
        tokens = torch.tensor({bench.tokens.tolist()})
        with torch.no_grad():
            torch.save(model(tokens, use_cache=False).logits, {str(directory.parent / "logits.pt")!r})
        model.generate(tokens[:1, :8], max_new_tokens=4, do_sample=False)
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    logits = torch.load(directory.parent / "logits.pt")
    assert torch.equal(logits, bench.logits_of(bench.quantized(info, **FOUR, clip=False)))


@each_method_in_turn("architecture", ["llama", "mistral", "gpt2"], everyday=1)
def test_generate_keeps_packed_keys_and_values(
    bench: Bench, info: MethodInfo, architecture: str
) -> None:
    changes: dict[str, Any] = {**FOUR, "clip": False}
    if info.settings().activation_group == "tensor":
        # Such a scale depends on the whole batch, so a step and a whole pass differ by nature.
        changes["activation_group"] = "token"
    model = loaded(bench.saved(info, architecture, torch.float32, **changes))
    prompt, new = bench.tokens[:2, :10], 6
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    out = model.generate(prompt, return_dict_in_generate=True, **options)
    assert out.sequences.shape == (2, 10 + new)
    # The last token is chosen and never read.
    heads = anatomy_of(model).blocks[0].heads
    kept = 2 * heads.key_value * (10 + new - 1)
    for index, layer in enumerate(out.past_key_values.layers):
        schemes = model.get_submodule(
            anatomy_of(model).blocks[index].attention
        ).key_values.schemes()
        assert all(scheme.format.code_bits == 4 for scheme in schemes)
        scale_bytes = [2 + scheme.format.zero_point_bits // 8 for scheme in schemes]
        codes = heads.size * 4 // 8
        assert layer.stored_bytes() == sum(kept * (codes + extra) for extra in scale_bytes)
    # Reading the cache is the same as running over everything again.
    with torch.no_grad():
        for step in range(10, 10 + new):
            again = model(out.sequences[:, :step], use_cache=False).logits[:, -1].log_softmax(-1)
            chosen = again.gather(-1, out.sequences[:, step, None])[:, 0]
            # Roundings of the arithmetic may turn into other codes, so near ties may go either way.
            assert (chosen > again.amax(-1) - 0.1).all()


# Size


@each_dtype
@each_method
def test_reported_size_is_what_is_on_the_disk(
    bench: Bench, info: MethodInfo, dtype: torch.dtype
) -> None:
    directory = bench.saved(info, "qwen2", dtype, **FOUR, clip=False)
    checkpoint = pl.load(directory)
    size = size_of(checkpoint)
    files = list(directory.glob("*.safetensors"))
    assert size["bytes"] == sum(file.stat().st_size for file in files)
    tensors = {name: t for file in files for name, t in load_file(file).items()}
    bits = weights = 0
    for path in checkpoint.anatomy.linears():
        original = bench.model("qwen2", dtype).model.get_submodule(path)
        weights += original.weight.numel()
        stored = [t for name, t in tensors.items() if name.startswith(f"{path}.")]
        stored = [t for t in stored if t is not tensors.get(f"{path}.bias")]
        assert stored
        bits += sum(8 * t.numel() * t.element_size() for t in stored)
    assert size["bits_per_weight"] == pytest.approx(bits / weights, rel=1e-12)
    held = sum(t.numel() * t.element_size() for t in checkpoint.model.state_dict().values())
    assert held == sum(t.numel() * t.element_size() for t in tensors.values())


@each_architecture
@each_method
def test_no_linear_is_left_out_silently(bench: Bench, info: MethodInfo, architecture: str) -> None:
    directory = bench.saved(info, architecture, torch.float32, **FOUR, clip=False)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    made_by = config["made_by"]
    assert made_by["method"] == info.name
    assert made_by["settings"]["weights"] == 4
    found = linears(bench.quantized(info, architecture, torch.float32, **FOUR, clip=False))
    rounded = {
        path
        for path, module in found.items()
        if isinstance(module, QuantizedLinear)
        and module.weight_scheme is not None
        and module.input_scheme is not None
    }
    assert sorted(found.keys() - rounded) == made_by["kept"]
    assert len(rounded) >= len(found) / 2


# Randomness and interruption


@each_method
def test_same_seed_same_bits(bench: Bench, info: MethodInfo) -> None:
    first = bench.quantized(info, **FOUR, clip=False)
    again = bench.quantize_afresh(info, **FOUR, clip=False)
    assert states_equal(first.model, again.model)
    other = bench.quantize_afresh(info, seed=1, **FOUR, clip=False)
    assert divergence(bench.logits(), bench.logits_of(other)).mean() < 0.1


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stored", [False, True], ids=["before", "after"])
@each_method
def test_stopped_and_resumed_ends_with_the_same_files(
    bench: Bench,
    info: MethodInfo,
    stored: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped in the third block, before or after it was written down."""
    whole = bench.saved(info, **FOUR, clip=False)
    unit = RunDirectory.unit
    made: list[str] = []

    def stopping(
        self: RunDirectory, name: str, compute: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        if name == "block-0002" and stored:
            unit(self, name, compute)
        if name == "block-0002":
            raise Stopped
        return unit(self, name, compute)

    def counting(
        self: RunDirectory, name: str, compute: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        def noted() -> Mapping[str, Tensor]:
            made.append(name)
            return compute()

        return unit(self, name, noted)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "unit", stopping)
        with pytest.raises(Stopped):
            bench.quantize_afresh(info, out=out, **FOUR, clip=False)
    assert not out.exists()
    monkeypatch.setattr(RunDirectory, "unit", counting)
    bench.quantize_afresh(info, out=out, **FOUR, clip=False)
    assert made == [f"block-{index:04d}" for index in range(3 if stored else 2, 5)]
    names = sorted(file.name for file in whole.iterdir())
    assert sorted(file.name for file in out.iterdir()) == names
    for name in names:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@each_method
def test_the_given_model_is_not_touched(bench: Bench, info: MethodInfo) -> None:
    before = bench.copy()
    bench.quantize_afresh(info, **FOUR, clip=False)
    assert states_equal(before.model, bench.model().model)
    assert torch.equal(bench.logits_of(bench.model()), bench.logits())


# What is refused

BAD = {
    "weights": [1, 9, 0, -4, 3.5, "4", None, True],
    "activations": [1, 9, 7.0],
    "kv": [1, 12, "8"],
    "group": ["token", "row", 0, -8, 1.5],
    "activation_group": ["channel", "row", 0, -8],
    "rounding": ["stochastic"],
    "damping": [0.0, -1.0, math.nan, math.inf],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in BAD.items() for value in values],
    ids=lambda x: str(x),
)
@each_method
def test_bad_settings_are_refused(info: MethodInfo, name: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        info.settings(**{name: value})
    message = str(caught.value)
    assert str(value) in message  # found
    assert name in message.replace("--", "")
    assert any(word in message for word in ("to 8", "tensor", "nearest", "positive"))  # expected


@each_method
def test_bad_settings_of_its_own_are_refused(info: MethodInfo) -> None:
    """Whatever a method adds: numbers below zero and not a number, words that mean nothing."""
    hints = typing.get_type_hints(info.settings)
    base = {field.name for field in dataclasses.fields(Quantizer)}
    for field in dataclasses.fields(info.settings):
        if field.name in base or hints[field.name] is bool:
            continue
        bad: list[Any] = ["nonsense"] if hints[field.name] is str else [-1, -0.5, math.nan]
        for value in bad:
            with pytest.raises(InputError) as caught:
                info.settings(**{field.name: value})
            assert str(value) in str(caught.value), field.name
            assert field.name.split("_")[0] in str(caught.value), field.name


@each_method
def test_missing_calibration_is_refused(bench: Bench, info: MethodInfo) -> None:
    settings = info.settings(**few(info))
    if not settings.needs_calibration:
        pl.quantize(bench.model(), settings)
        return
    with pytest.raises(DataError, match=f"{info.name} learns from calibration text"):
        pl.quantize(bench.model(), settings)


@each_method
def test_settings_are_frozen_and_documented(info: MethodInfo) -> None:
    assert issubclass(info.settings, Quantizer)
    assert info.summary.endswith(".")
    assert info.family
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.settings().weights = 3
    json.dumps(dataclasses.asdict(info.settings()))
    assert quantize.__doc__
