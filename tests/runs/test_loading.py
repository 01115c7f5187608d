from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from postlude.errors import (
    ArchitectureError,
    CheckpointError,
    NonFiniteError,
    SettingsError,
    UnknownNameError,
)
from postlude.runs.loading import load, resolve


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_checkpoint_loads_as_transformers_loads_it(
    tiny_llama_dir: Path, make_model: Callable[..., Any]
) -> None:
    checkpoint = load(tiny_llama_dir)
    ids = torch.arange(3, 30)[None]
    device = checkpoint.model.device
    expected = make_model().to(device)(ids.to(device)).logits
    assert torch.equal(checkpoint.model(ids.to(device)).logits, expected)
    assert checkpoint.path == tiny_llama_dir and checkpoint.context == 64
    assert checkpoint.anatomy.hidden_size == 32
    assert checkpoint.tokenizer("a")["input_ids"][0] == 1
    assert not checkpoint.model.training


def test_nothing_is_printed(tiny_llama_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(tiny_llama_dir)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_dtype_and_device(make_checkpoint: Callable[..., Path]) -> None:
    directory = make_checkpoint("llama", dtype="bfloat16")
    assert load(directory, device="cpu").model.dtype == torch.bfloat16
    assert load(directory, dtype="float32").model.dtype == torch.float32
    assert load(directory, dtype=torch.float64).model.dtype == torch.float64
    with pytest.raises(SettingsError, match="dtype is 'int4'; expected auto"):
        load(directory, dtype="int4")
    with pytest.raises(SettingsError, match="device 'warp'"):
        load(directory, device="warp")


def test_the_generation_configuration_is_kept(tiny_llama_copy: Path) -> None:
    file = tiny_llama_copy / "generation_config.json"
    file.write_text(json.dumps({"max_new_tokens": 7, "repetition_penalty": 1.5}))
    generation = load(tiny_llama_copy).model.generation_config
    assert generation.max_new_tokens == 7 and generation.repetition_penalty == 1.5


def test_sharded_checkpoints_load(tmp_path: Path, make_model: Callable[..., Any]) -> None:
    model = make_model("qwen2", tie_word_embeddings=False)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    checkpoint = load(tmp_path, device="cpu")
    assert checkpoint.tokenizer is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.model.state_dict()[name], tensor)


def test_more_layers_than_tensors_are_refused_before_they_are_made(tiny_llama_copy: Path) -> None:
    edit_config(tiny_llama_copy, num_hidden_layers=10**9)
    with pytest.raises(
        CheckpointError, match=r"1,000,000,000 layers \(num_hidden_layers\), .* tensors"
    ):
        load(tiny_llama_copy)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, tiny_llama_dir: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no directory .*meta/llama.* downloads nothing"):
        load("meta/llama")
    with pytest.raises(CheckpointError, match="is a file; expected a checkpoint directory"):
        load(tiny_llama_dir / "config.json")
    with pytest.raises(CheckpointError, match=r"it has no config\.json"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter"):
        load(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="diffusers pipeline"):
        load(tmp_path)
    for content, said in [("{", "not valid JSON"), ("[]", "JSON list"), ("{}", "model_type")]:
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=said) as caught:
            load(tmp_path)
        assert caught.value.exit_code == 2


def test_an_unknown_architecture_is_refused_before_weights_are_read(tiny_llama_copy: Path) -> None:
    edit_config(tiny_llama_copy, model_type="mamba")
    (tiny_llama_copy / "model.safetensors").write_bytes(b"")
    with pytest.raises(ArchitectureError, match=r"mamba.*llama"):
        load(tiny_llama_copy)


def test_other_quantized_formats_are_refused(tiny_llama_copy: Path) -> None:
    edit_config(tiny_llama_copy, quantization_config={"quant_method": "bitsandbytes", "bits": 4})
    with pytest.raises(CheckpointError, match=r"already quantized by 'bitsandbytes'.*float"):
        load(tiny_llama_copy)


def test_pickle_only_weights_are_refused(tiny_llama_copy: Path) -> None:
    (tiny_llama_copy / "model.safetensors").rename(tiny_llama_copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="save_pretrained"):
        load(tiny_llama_copy)


def test_the_conversion_that_is_advised_works(tmp_path: Path, tiny_llama_copy: Path) -> None:
    state = load_file(tiny_llama_copy / "model.safetensors")
    torch.save(state, tiny_llama_copy / "pytorch_model.bin")
    (tiny_llama_copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        load(tiny_llama_copy)
    command = next(line for line in str(caught.value).splitlines() if "python -c" in line)
    program = command.strip().removeprefix('python -c "').removesuffix('"')
    exec(program, {})
    converted = load(f"{tiny_llama_copy}-safetensors", device="cpu").model.state_dict()
    assert all(torch.equal(converted[name], tensor) for name, tensor in state.items())


def test_a_truncated_file_is_refused_with_its_sizes(tiny_llama_copy: Path) -> None:
    file = tiny_llama_copy / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    said = rf"model\.safetensors is truncated: expected {len(content)} .* {len(content) - 100}\."
    with pytest.raises(CheckpointError, match=said):
        load(tiny_llama_copy)


def test_weights_that_are_not_finite_are_named(tiny_llama_copy: Path) -> None:
    file = tiny_llama_copy / "model.safetensors"
    state = load_file(file)
    state["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tiny_llama_copy)


def test_missing_weights_are_not_drawn_at_random(tiny_llama_copy: Path) -> None:
    file = tiny_llama_copy / "model.safetensors"
    state = load_file(file)
    del state["model.layers.0.mlp.up_proj.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights .*layers\.0\.mlp\.up_proj"):
        load(tiny_llama_copy)


def test_weights_of_another_shape_are_refused(tiny_llama_copy: Path) -> None:
    edit_config(tiny_llama_copy, intermediate_size=40)
    with pytest.raises(
        CheckpointError,
        match=r"safetensors holds model.layers.0.mlp.\w+.weight \[.* asks for \[.*40",
    ):
        load(tiny_llama_copy)


def test_a_configuration_that_its_own_class_refuses_is_refused(tiny_llama_copy: Path) -> None:
    edit_config(tiny_llama_copy, num_attention_heads=10**9)
    with pytest.raises(CheckpointError, match=r"(?s)transformers .* cannot load .* not a multiple"):
        load(tiny_llama_copy)


def test_a_broken_tokenizer_is_refused(tiny_llama_copy: Path) -> None:
    (tiny_llama_copy / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer"):
        load(tiny_llama_copy)


def test_zoo_names() -> None:
    from postlude.zoo import checkpoint_path

    assert resolve("zoo:tiny-lm") == checkpoint_path("tiny-lm")
    with pytest.raises(UnknownNameError, match="tiny-lm"):
        load("zoo:tiny-ml")
