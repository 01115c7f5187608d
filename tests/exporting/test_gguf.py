"""GGUF files, read by llama.cpp's package and by transformers."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

import postlude as pl
from postlude.errors import ArchitectureError, DataError, MissingDependencyError, SettingsError
from postlude.exporting.engine import export
from postlude.exporting.gguf import GGUF
from postlude.exporting.gguf_blocks import blocks
from postlude.exporting.gguf_tokenizer import tokenizer_fields
from postlude.numerics.formats import Codebook, Integer
from postlude.numerics.schemes import Granularity, Scheme
from postlude.quantization.engine import quantize
from postlude.quantization.quarot import QuaRot
from postlude.quantization.rtn import RTN
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.selfcheck import in_float32
from postlude.surgery.layers import QuantizedLinear

from .models import checkpoint, logits, rounded

ASYMMETRIC = {"symmetric": False, "range": "zero"}


@pytest.fixture
def make(make_model: Callable[..., Any], tiny_tokenizer: Any) -> Callable[..., Checkpoint]:
    def make(kind: str = "llama", **settings: Any) -> Checkpoint:
        found = checkpoint(make_model, kind, **settings)
        found.tokenizer = tiny_tokenizer
        return found

    return make


def layer_of(scheme: Scheme, width: int = 64) -> QuantizedLinear:
    layer = QuantizedLinear(width, 6, bias=False, weight=scheme)
    weight = torch.randn(6, width, generator=torch.Generator().manual_seed(3))
    layer.store(scheme.encode(weight))
    return layer


SMALL = {"q2_k": "q4_0", "q3_k": "q4_0", "q6_k": "q8_0"}
SMALL_ASYMMETRIC = {"q2_k": "q4_1", "q4_k": "q4_1", "q5_k": "q5_1"}


@pytest.mark.parametrize(
    ("width", "granularity"),
    [
        (64, "channel"),
        (64, "tensor"),
        (64, "32"),
        (128, "64"),
        (512, "channel"),
        (256, "tensor"),
        (512, "256"),
        (512, "128"),
    ],
)
@pytest.mark.parametrize(
    ("format", "type"),
    [
        *zip(map(Integer, range(2, 9)), ["q2_k", "q3_k", "q4_0", "q5_0", "q6_k", "q8_0", "q8_0"], strict=True),
        *((Integer(bits, **ASYMMETRIC), t) for bits, t in enumerate(["q2_k", "q4_k", "q4_k", "q5_k"], 2)),
    ],
)  # fmt: skip
def test_blocks_decode_to_the_same_weights(
    format: Integer, type: str, width: int, granularity: str
) -> None:
    layer = layer_of(Scheme(format, Granularity.parse(granularity)), width)
    if width < 256 or granularity == "128":
        type = (SMALL if format.symmetric else SMALL_ASYMMETRIC).get(type, type)
    theirs = gguf.dequantize(blocks(layer, type), gguf.GGMLQuantizationType[type.upper()])
    ours = layer.dense_weight().numpy()
    if type in ("q4_1", "q5_1"):
        # The offset of a group is rounded to fp16, by less than a hundredth of a step.
        step = layer.scale.float().max()
        assert np.abs(theirs - ours).max() < 0.01 * step
    else:
        assert np.array_equal(theirs, ours)


def read(file: Path) -> tuple[Any, dict[str, Tensor]]:
    reader = gguf.GGUFReader(file)
    tensors = {
        t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy())
        for t in reader.tensors
    }
    return reader, tensors


def by_transformers(file: Path, **unread: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    for key, value in unread.items():
        setattr(config, key, value)
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, config=config, dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_architecture(make: Callable[..., Checkpoint], tmp_path: Path, kind: str) -> None:
    small = rounded(make(kind, rope_parameters={"rope_theta": 500.0, "rope_type": "default"}),
                    Scheme(Integer(4), Granularity("group", 32)))  # fmt: skip
    report = export(small, GGUF(), tmp_path / "a.gguf", check=False)
    assert report["types"] == {"q4_0": 14}
    assert report["bytes"] == (tmp_path / "a.gguf").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
    theirs = by_transformers(tmp_path / "a.gguf", head_dim=8)
    assert theirs.config.rope_parameters["rope_theta"] == 500
    torch.testing.assert_close(logits(theirs), logits(small.model), atol=1e-5, rtol=0)


def test_metadata(make: Callable[..., Checkpoint], tmp_path: Path) -> None:
    export(make(tie_word_embeddings=True), GGUF(), tmp_path / "a.gguf", check=False)
    reader, tensors = read(tmp_path / "a.gguf")

    def field(name: str) -> Any:
        return reader.get_field(name).contents()

    expected = {
        "general.architecture": "llama", "general.file_type": gguf.LlamaFileType.ALL_F32,
        "llama.context_length": 64, "llama.embedding_length": 32, "llama.block_count": 2,
        "llama.feed_forward_length": 64, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8, "llama.rope.dimension_count": 8, "llama.vocab_size": 259,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": True,
    }  # fmt: skip
    assert {name: field(name) for name in expected} == expected
    assert field("llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert "output.weight" not in tensors
    assert tensors["blk.1.ffn_up.weight"].shape == (64, 32)


def test_context_that_is_stretched(make: Callable[..., Checkpoint], tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    original = make(rope_parameters=rope)
    export(original, GGUF(), tmp_path / "a.gguf", check=False)
    factors = read(tmp_path / "a.gguf")[1]["rope_freqs.weight"]
    plain = 500.0 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(plain / factors, original.model.model.rotary_emb.inv_freq)
    assert factors.max() > 1.5
    linear = make(rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0})
    export(linear, GGUF(), tmp_path / "b.gguf", check=False)
    reader, _ = read(tmp_path / "b.gguf")
    assert reader.get_field("llama.rope.scaling.type").contents() == "linear"
    assert reader.get_field("llama.rope.scaling.factor").contents() == 2.0
    with pytest.raises(ArchitectureError, match=r"context by 'dynamic'.*linear and llama3"):
        dynamic = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}
        export(make(rope_parameters=dynamic), GGUF(), tmp_path / "c.gguf", check=False)


def test_biases_and_sliding_window(make: Callable[..., Checkpoint], tmp_path: Path) -> None:
    original = make("llama", attention_bias=True, mlp_bias=True)
    export(original, GGUF(), tmp_path / "a.gguf", check=False)
    theirs = by_transformers(tmp_path / "a.gguf", attention_bias=True, mlp_bias=True)
    torch.testing.assert_close(logits(theirs), logits(original.model), atol=1e-5, rtol=0)
    export(make("mistral", sliding_window=20), GGUF(), tmp_path / "b.gguf", check=False)
    reader, _ = read(tmp_path / "b.gguf")
    assert reader.get_field("llama.context_length").contents() == 20


@pytest.mark.parametrize("type", ["f16", "bf16", "q8_0", "q5_1", "q4_0"])
def test_requantize(make: Callable[..., Checkpoint], tmp_path: Path, type: str) -> None:
    original = make()
    report = export(original, GGUF(requantize=type), tmp_path / "a.gguf", check=False)  # type: ignore[arg-type]
    assert report["types"] == {type: 14}
    _, tensors = read(tmp_path / "a.gguf")
    weight = original.model.model.layers[0].mlp.up_proj.weight
    error = (tensors["blk.0.ffn_up.weight"] - weight).norm() / weight.norm()
    assert error < {"q5_1": 0.05, "q4_0": 0.15}.get(type, 0.01)


def test_floats_of_the_type_asked_for(make: Callable[..., Checkpoint], tmp_path: Path) -> None:
    original = make()
    for parameter in original.model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    assert export(original, GGUF(), tmp_path / "a.gguf", check=False)["floats"] == "bf16"
    theirs = logits(by_transformers(tmp_path / "a.gguf"))
    with in_float32(original.model):
        torch.testing.assert_close(theirs, logits(original.model), atol=1e-5, rtol=0)
    reader, _ = read(tmp_path / "a.gguf")
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    assert (types["token_embd.weight"], types["output_norm.weight"]) == ("BF16", "F32")


@pytest.mark.parametrize(
    ("scheme", "input", "reason"),
    [
        (Scheme(Integer(4), Granularity("group", 16)), None, r"has groups of 16, and a block of GGUF holds 32"),
        (Scheme(Integer(8, **ASYMMETRIC)), None, r"asymmetric 8-bit codes, for which GGUF has no type"),
        (Scheme(Codebook((-1.0, 0.0, 2.0))), None, r"codebook codes, and GGUF has blocks of integers"),
        (Scheme(Integer(4), scale_dtype="float32"), None, r"scales that fp16 does not hold"),
        (Scheme(Integer(8)), Scheme(Integer(8), Granularity("token")), r"llama\.cpp rounds activations its own way"),
    ],
)  # fmt: skip
def test_codes_without_a_type_are_refused(
    make: Callable[..., Checkpoint], tmp_path: Path, scheme: Scheme, input: Scheme, reason: str
) -> None:
    small = rounded(make(), scheme, input)
    with pytest.raises(
        SettingsError, match=r"GGUF cannot hold.*" + reason + r".*requantize=(q8_0|f16)"
    ):
        export(small, GGUF(), tmp_path / "a.gguf", check=False)
    assert list(tmp_path.iterdir()) == []
    report = export(small, GGUF(requantize="q8_0"), tmp_path / "a.gguf", check=False)
    assert report["types"] == {"q8_0": 14}


def test_zero_points_far_outside_the_codes(make: Callable[..., Checkpoint], tmp_path: Path) -> None:
    layer = layer_of(Scheme(Integer(4, symmetric=False, range="free")))
    assert blocks(layer, "q4_1").shape == (6, 40)
    far = QuantizedLinear(64, 6, bias=False, weight=layer.weight_scheme)
    far.store(layer.weight_scheme.encode(torch.rand(6, 64) + 100))
    with pytest.raises(SettingsError, match=r"fp16 moves them by .* steps"):
        blocks(far, "q4_1")


def test_ragged_widths(make: Callable[..., Checkpoint], tmp_path: Path) -> None:
    small = rounded(make(intermediate_size=44), Scheme(Integer(4)))
    with pytest.raises(SettingsError, match=r"down_proj has 44 inputs.*is 1 more like it"):
        export(small, GGUF(), tmp_path / "a.gguf", check=False)
    with pytest.raises(
        SettingsError, match=r"down_proj has 44 inputs, and blocks of q8_0 hold 32.*requantize=f16"
    ):
        export(small, GGUF(requantize="q8_0"), tmp_path / "a.gguf", check=False)
    report = export(small, GGUF(requantize="f32"), tmp_path / "a.gguf", check=False)
    assert report["types"] == {"q4_0": 12, "f32": 2}
    theirs = logits(by_transformers(tmp_path / "a.gguf"))
    torch.testing.assert_close(theirs, logits(small.model), atol=1e-5, rtol=0)


def test_what_it_does_not_know_is_refused(
    make: Callable[..., Checkpoint], make_model: Callable[..., Any], tmp_path: Path, tiny_tokenizer: Any
) -> None:  # fmt: skip
    out = tmp_path / "a.gguf"
    gpt2 = checkpoint(make_model, "gpt2")
    with pytest.raises(
        ArchitectureError, match=r"type 'gpt2'; it knows llama, mistral, qwen2, qwen3"
    ):
        export(gpt2, GGUF(), out)
    with pytest.raises(ArchitectureError, match=r"activation 'gelu', and llama\.cpp's has silu"):
        export(make(hidden_act="gelu"), GGUF(), out)
    with pytest.raises(ArchitectureError, match="uses a sliding window"):
        export(make("qwen2", use_sliding_window=True, sliding_window=8), GGUF(), out)
    rotated = quantize(
        make(), QuaRot(activations=16, kv=16, rounding="nearest"), torch.zeros(2, 8, dtype=torch.long)
    )  # fmt: skip
    with pytest.raises(SettingsError, match=r"quarot transforms the input.*postlude generate"):
        export(rotated, GGUF(), out)
    with pytest.raises(SettingsError, match=r"keys and values are quantized"):
        export(quantize(make(), RTN(activations=16), None), GGUF(), out)
    naked = make()
    naked.tokenizer = None
    with pytest.raises(DataError, match=r"has no tokenizer, and a GGUF file carries one"):
        export(naked, GGUF(), out)
    with pytest.raises(SettingsError, match=r"requantize is 'q4_k'; expected none, f32"):
        GGUF(requantize="q4_k")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=r"floats is 'q8_0'; expected auto"):
        GGUF(floats="q8_0")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_without_the_package(
    make: Callable[..., Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'postlude\[serve-formats\]'"):
        export(make(), GGUF(), tmp_path / "a.gguf")


@pytest.mark.slow
def test_a_fresh_process_reads_it(make: Callable[..., Checkpoint], tmp_path: Path) -> None:
    small = rounded(make("qwen3"), Scheme(Integer(4)))
    assert pl.export(small, "gguf", tmp_path / "a.gguf")["reload_max_difference"] < 1e-5


# The tokenizer


def fields(tokenizer: Any, change: dict[str, Any], size: int = 300) -> dict[str, Any]:
    """Fields of a tokenizer whose description is changed at ``a.b.c``."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    description = json.loads(tokenizer.backend_tokenizer.to_str())
    for path, value in change.items():
        *front, last = path.split(".")
        place = description
        for name in front:
            place = place[name]
        place[last] = value
    backend = Tokenizer.from_str(json.dumps(description))
    changed = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return tokenizer_fields(changed, size)


def split(regex: str) -> dict[str, Any]:
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }  # fmt: skip


def test_names_of_regular_expressions(tiny_tokenizer: Any) -> None:
    from postlude.exporting.gguf_tokenizer import _LLAMA3, _QWEN2

    assert fields(tiny_tokenizer, {})["add_tokenizer_pre"] == "gpt-2"
    llama3 = {"pre_tokenizer": split(_LLAMA3)}
    assert fields(tiny_tokenizer, llama3)["add_tokenizer_pre"] == "smaug-bpe"
    whole = {**llama3, "model.ignore_merges": True}
    assert fields(tiny_tokenizer, whole)["add_tokenizer_pre"] == "llama-bpe"
    qwen = {"pre_tokenizer": split(_QWEN2), "normalizer": {"type": "NFC"}}
    assert fields(tiny_tokenizer, qwen)["add_tokenizer_pre"] == "qwen2"
    for unknown in (split(r"\s+"), {"type": "Whitespace"}, None):
        with pytest.raises(
            DataError, match=r"has no name of llama\.cpp for.*Found: .*known: ByteLevel"
        ):
            fields(tiny_tokenizer, {"pre_tokenizer": unknown})
    with pytest.raises(DataError, match="normalizes text by Lowercase"):
        fields(tiny_tokenizer, {"normalizer": {"type": "Lowercase"}})


def test_tokens_beyond_the_tokenizer_are_unused(tiny_tokenizer: Any) -> None:
    found = fields(tiny_tokenizer, {}, 262)
    assert found["add_token_list"][:3] == ["<unk>", "<s>", "</s>"]
    assert found["add_token_list"][259:] == ["[PAD259]", "[PAD260]", "[PAD261]"]
    assert found["add_token_types"][1:3] == [3, 3]
    assert found["add_token_types"][258:] == [1, 5, 5, 5]
    with pytest.raises(DataError, match=r"has a token \d+.*embedding 100 rows"):
        fields(tiny_tokenizer, {}, 100)


def test_sentencepiece_scores(stories_dir: Path) -> None:
    """The rule of llama.cpp (join the neighbours whose union scores highest) gives the tokenizer's own tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories_dir)
    found = tokenizer_fields(tokenizer, 512)
    assert found["add_tokenizer_model"] == "llama"
    assert found["add_add_space_prefix"] is True
    assert (found["add_add_bos_token"], found["add_add_eos_token"]) == (True, False)
    tokens, scores = found["add_token_list"], found["add_token_scores"]
    index = {token: place for place, token in enumerate(tokens)}
    text = "Once upon a time, there was a little girl named Lily. She saw 3 r\u00e9d caf\u00e9s\nand  more."
    pieces = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        joins = [
            (scores[index[a + b]], -place)
            for place, (a, b) in enumerate(itertools.pairwise(pieces))
            if a + b in index
        ]
        if not joins:
            break
        place = -max(joins)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    ids = [
        number
        for piece in pieces
        for number in (
            [index[piece]] if piece in index else [index[f"<0x{b:02X}>"] for b in piece.encode()]
        )
    ]
    assert [1, *ids] == tokenizer(text)["input_ids"]


def test_tokenizers_without_a_counterpart(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"a Slow has no tokenizer\.json"):
        tokenizer_fields(type("Slow", (), {})(), 9)
    with pytest.raises(DataError, match=r"end_of_word_suffix = '</w>'"):
        fields(tiny_tokenizer, {"model.end_of_word_suffix": "</w>"})
    with pytest.raises(DataError, match=r"lacks 256 of the 256"):
        fields(tiny_tokenizer, {"model.byte_fallback": True})
