from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from postlude.errors import CheckpointError, NonFiniteError
from postlude.runs import weights
from postlude.runs.checksums import SUMS, write_sums
from postlude.runs.loading import load
from postlude.runs.weights import check_weights, read_header, weight_files


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(3, 4)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(5)}, tmp_path / "model-00002-of-00002.safetensors")
    write_index(
        tmp_path,
        {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    )
    return tmp_path


def write_index(directory: Path, weight_map: object) -> None:
    file = directory / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": weight_map}))


def test_files_are_found(sharded: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [f.name for f in weight_files(sharded)] == names
    # As transformers does, a single file goes before an index.
    save_file({"a": torch.ones(2)}, sharded / "model.safetensors")
    assert [f.name for f in weight_files(sharded)] == ["model.safetensors"]


def test_a_header_names_the_tensors(sharded: Path) -> None:
    header = read_header(sharded / "model-00001-of-00002.safetensors")
    assert header["a"]["shape"] == [3, 4] and header["a"]["dtype"] == "F32"


@pytest.mark.parametrize("cut", [4, 40, 1])
def test_a_truncated_file_is_named_with_both_sizes(sharded: Path, cut: int) -> None:
    file = sharded / "model-00002-of-00002.safetensors"
    whole = file.read_bytes()
    # Inside the length, inside the header, inside the data.
    keep = {4: 4, 40: 40, 1: len(whole) - 1}[cut]
    file.write_bytes(whole[:keep])
    with pytest.raises(CheckpointError) as caught:
        weight_files(sharded)
    assert str(file) in str(caught.value) and f"{keep}" in str(caught.value)
    if cut == 1:
        assert f"expected {len(whole)} bytes by its header, found {keep}" in str(caught.value)


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    header = json.dumps({"a": {"dtype": "F32"}}).encode()
    for content in (
        b"version https://git-lfs.github.com/spec/v1",
        struct.pack("<Q", 5) + b"{nope",
        struct.pack("<Q", len(header)) + header,
        b"",
    ):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            weight_files(tmp_path)


def test_bytes_beyond_the_header_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3)}, file)
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        weight_files(tmp_path)


def test_pickle_only_weights_are_refused_with_the_conversion(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError) as caught:
        weight_files(tmp_path)
    message = str(caught.value)
    assert "pytorch_model.bin" in message and "run any code" in message
    assert "use_safetensors=False" in message and "save_pretrained" in message


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adapter_config.json", "adapter"),
        ("model.gguf", "model.gguf"),
        ("other.safetensors", "other.safetensors"),
        ("README.md", "holds no weights"),
    ],
)
def test_other_directories_are_named(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=said):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/x.safetensors", "..", "a\\b", ""])
def test_an_index_cannot_point_outside(sharded: Path, name: str) -> None:
    write_index(sharded, {"a": name})
    with pytest.raises(CheckpointError, match="not inside the checkpoint"):
        weight_files(sharded)


def test_missing_shards_and_tensors_are_named(sharded: Path) -> None:
    first = "model-00001-of-00002.safetensors"
    write_index(sharded, {"a": first, "c": "model-00003.safetensors"})
    with pytest.raises(CheckpointError, match=r"lacks 1 of the 2 .* model-00003\.safetensors"):
        weight_files(sharded)
    write_index(sharded, {"a": first, "c": first})
    with pytest.raises(CheckpointError, match="do not hold: c"):
        weight_files(sharded)
    write_index(sharded, [])
    with pytest.raises(CheckpointError, match="no weight_map"):
        weight_files(sharded)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_that_is_not_finite_is_named(
    tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    bad = torch.ones(6, 4)
    bad[3, 2] = value
    file = tmp_path / "model.safetensors"
    save_file(
        {"fine": torch.ones(3), "codes": torch.arange(4), "layer.weight": bad.to(dtype)}, file
    )
    with pytest.raises(NonFiniteError, match=r"'layer\.weight'.* holds 1 NaN or infinite .* of 24"):
        check_weights([file])


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_BYTES_AT_ONCE", 40)
    tensor = torch.arange(7 * 4.0).reshape(7, 4)
    scalar = torch.tensor(1.0)
    file = tmp_path / "model.safetensors"
    save_file({"t": tensor, "s": scalar, "empty": torch.zeros(0, 3)}, file)
    check_weights([file])
    tensor[6, 3] = float("nan")
    save_file({"t": tensor}, file)
    with pytest.raises(NonFiniteError, match="1 NaN or infinite values of 28"):
        check_weights([file])


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"shape": [10**9]}, r"F32 \[1000000000\], has 48 bytes"),
        ({"shape": [-3, -4]}, r"has the shape \[-3, -4\]"),
        ({"shape": ["many"]}, "has the shape"),
        ({"dtype": "F31"}, "of the unknown type 'F31'"),
        ({"data_offsets": [48, 0]}, "has -48 bytes"),
        ({"data_offsets": [4, 52]}, "'a' leaves a gap before it|is truncated"),
    ],
)
def test_a_header_that_cannot_be_is_refused(
    tmp_path: Path, entry: dict[str, object], said: str
) -> None:
    file = tmp_path / "model.safetensors"
    header = {"a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48], **entry}}
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(48))
    with pytest.raises(CheckpointError, match=said):
        read_header(file)


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    one = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    raw = json.dumps({"a": one, "b": {**one, "data_offsets": [2, 6]}}).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(6))
    with pytest.raises(CheckpointError, match="'b' overlaps another tensor"):
        read_header(file)


def test_the_weights_are_read_once_for_both(sharded: Path) -> None:
    files = weight_files(sharded)
    check_weights(files)  # there are no checksums
    write_sums(sharded)
    check_weights(files)
    save_file({"a": torch.tensor([1.0, float("nan")])}, files[0])
    with pytest.raises(CheckpointError, match=r"model-00001.* is damaged: .*SHA256SUMS"):
        check_weights(files)
    # As it was written, but not finite: said once it is known that no other file is damaged.
    write_sums(sharded)
    with pytest.raises(NonFiniteError, match="'a'"):
        check_weights(files)
    raw = bytearray(files[1].read_bytes())
    raw[-1] ^= 1
    files[1].write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"model-00002.* is damaged"):
        check_weights(files)


def test_every_byte_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_BYTES_AT_ONCE", 16)
    file = tmp_path / "model.safetensors"
    tensors = {"a": torch.ones(7), "codes": torch.arange(9, dtype=torch.uint8), "s": torch.ones(())}
    save_file({**tensors, "empty": torch.zeros(0, 3)}, file, metadata={"format": "pt"})
    write_sums(tmp_path)
    check_weights([file])
    whole = file.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    # In the metadata, which no reader looks at, and in every tensor.
    for place in (whole.index(b'"pt"') + 1, header, header + 27, header + 28, len(whole) - 2):
        raw = bytearray(whole)
        raw[place] ^= 1
        file.write_bytes(raw)
        with pytest.raises(CheckpointError, match="is damaged: its SHA-256"):
            check_weights([file])


def test_what_postlude_writes_has_checksums(tiny_llama_dir: Path, tmp_path: Path) -> None:
    load(tiny_llama_dir).save(tmp_path / "out")
    assert (tmp_path / "out" / SUMS).is_file()
    file = tmp_path / "out" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match="is damaged: its SHA-256"):
        load(tmp_path / "out")
    (tmp_path / "out" / SUMS).unlink()
    load(tmp_path / "out")
