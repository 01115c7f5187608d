"""Pickles in the place of tensors, headers that lie about their file, and weights that are no numbers."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.hostile.case import (
    FAMILY,
    Case,
    Payload,
    changed,
    copied_model,
    evaluating,
    pickled,
    tried,
)
from faults.kills import build_words
from faults.suite import Trial, Words, Work, fault


def tensors_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_raw_header(file: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    """Write a safetensors file; ``length`` is what it says of its header."""
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


@fault(FAMILY, "a pickle in the place of tensors", everyday=True)
def pickles(work: Work, count: int) -> Iterator[Trial]:
    """Under the name of a safetensors file, in its place, and beside it."""

    def renamed(work: Work, folder: Path) -> Words:
        model = copied_model(work, folder)
        (model / "model.safetensors").write_bytes(pickled(work))
        return evaluating(work, model)

    def alone(name: str) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            model = copied_model(work, folder)
            (model / "model.safetensors").unlink()
            (model / name).write_bytes(pickled(work))
            return evaluating(work, model)

        return make

    def beside(work: Work, folder: Path) -> Words:
        model = copied_model(work, folder)
        for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt"):
            (model / name).write_bytes(pickled(work))
        return evaluating(work, model)

    def adapter(work: Work, folder: Path) -> Words:
        model = folder / "adapter"
        model.mkdir()
        config = {"base_model_name_or_path": str(work.inputs / "model"), "peft_type": "LORA"}
        changed(model / "adapter_config.json", **config)
        (model / "adapter_model.bin").write_bytes(pickled(work))
        return evaluating(work, model)

    def drift(work: Work, folder: Path) -> Words:
        (folder / "drift.safetensors").write_bytes(pickled(work))
        return [
            "sample",
            "zoo:tiny-dit",
            "--drift",
            folder / "drift.safetensors",
            "-o",
            folder / "x.safetensors",
        ]

    def conditions(work: Work, folder: Path) -> Words:
        (folder / "c.safetensors").write_bytes(pickled(work))
        return [
            "sample",
            "zoo:tiny-dit",
            "--conditions",
            folder / "c.safetensors",
            "-o",
            folder / "x.safetensors",
        ]

    def layer_weights(work: Work, folder: Path) -> Words:
        index = work.made("index", lambda out: build_words(work, out))
        (folder / "w.safetensors").write_bytes(pickled(work))
        words = [
            "attribute",
            "query",
            index,
            "Once",
            "--no-keep",
            "--weights",
            folder / "w.safetensors",
        ]
        return words

    def arrays(work: Work, folder: Path) -> Words:
        import numpy

        numpy.savez(folder / "x.npz", images=numpy.array([Payload(work.sentinel)], dtype=object))
        return [
            "attribute",
            "build",
            "zoo:tiny-dit",
            folder / "x.npz",
            "--method",
            "d-trak",
            "-o",
            folder / "i",
        ]

    safe = "not a safetensors file"
    yield from tried(
        work,
        [
            Case("named model.safetensors", renamed, safe),
            Case("pytorch_model.bin alone", alone("pytorch_model.bin"), "only as pickle files"),
            Case("model.pt alone", alone("model.pt"), "only as pickle files"),
            Case("beside the weights", beside, None),
            Case("as an adapter", adapter, "adapter"),
            Case("as drift statistics", drift, safe),
            Case("as conditions", conditions, r"c\.safetensors"),
            Case("as weights of layers", layer_weights, r"w\.safetensors"),
            Case("in a .npz", arrays, r"x\.npz cannot be read"),
        ],
    )


def _headers() -> list[Case]:
    def with_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            model = copied_model(work, folder)
            header, data = tensors_of(model / "model.safetensors")
            changed = change(header)
            raw = changed if isinstance(changed, bytes) else json.dumps(changed or header).encode()
            with_raw_header(model / "model.safetensors", raw, data)
            return evaluating(work, model)

        return make

    def of_length(length: int) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            model = copied_model(work, folder)
            header, data = tensors_of(model / "model.safetensors")
            with_raw_header(model / "model.safetensors", json.dumps(header).encode(), data, length)
            return evaluating(work, model)

        return make

    def first(header: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = next(v for k, v in sorted(header.items()) if k != "__metadata__")
        return found

    def shape(value: Any) -> Callable[[dict[str, Any]], None]:
        return lambda header: first(header).update(shape=value)

    def offsets(value: Any) -> Callable[[dict[str, Any]], None]:
        return lambda header: first(header).update(data_offsets=value)

    def overlapping(header: dict[str, Any]) -> None:
        names = sorted(k for k in header if k != "__metadata__")
        last = max((n for n in names), key=lambda n: header[n]["data_offsets"][1])
        twin = next(n for n in names if n != last and header[n]["shape"] == header[last]["shape"])
        header[twin]["data_offsets"] = header[last]["data_offsets"]

    def many(header: dict[str, Any]) -> bytes:
        entries = ",".join(
            f'"t{n}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for n in range(400_000)
        )
        return ("{" + entries + "}").encode()

    billion = 10**9
    return [
        Case("a billion elements", with_header(shape([billion])), "model.safetensors"),
        Case("a billion times a billion", with_header(shape([billion] * 3)), "model.safetensors"),
        Case("2^64 elements", with_header(shape([2**32, 2**32])), "model.safetensors"),
        Case("a negative size", with_header(shape([-1, -64])), "model.safetensors"),
        Case("sizes that are words", with_header(shape(["many"])), "model.safetensors"),
        Case("an end beyond the file", with_header(offsets([0, 10**15])), "model.safetensors"),
        Case("a start after the end", with_header(offsets([64, 0])), "model.safetensors"),
        Case("a negative start", with_header(offsets([-64, 64])), "model.safetensors"),
        Case("tensors that overlap", with_header(overlapping), "model.safetensors"),
        Case(
            "no types", with_header(lambda h: first(h).pop("dtype") and None), "model.safetensors"
        ),
        Case(
            "an unknown type",
            with_header(lambda h: first(h).update(dtype="F31")),
            "model.safetensors",
        ),
        Case("a list for a header", with_header(lambda _: b"[1, 2]"), "model.safetensors"),
        Case("a deep header", with_header(lambda _: b"[" * 200_000), "model.safetensors"),
        Case("400 000 empty tensors", with_header(many), "model"),
        Case("a header longer than the file", of_length(2**26), "model.safetensors"),
        Case("a header of 2^63 bytes", of_length(2**63), "model.safetensors"),
    ]


@fault(FAMILY, "headers of safetensors", everyday=True)
def headers(work: Work, count: int) -> Iterator[Trial]:
    """Sizes and places that are not those of the file."""
    yield from tried(work, _headers())


@fault(FAMILY, "NaN and infinity among the weights", everyday=True)
def not_finite(work: Work, count: int) -> Iterator[Trial]:
    """One value of one tensor."""

    def put(value: float) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            from safetensors.torch import load_file, save_file

            model = copied_model(work, folder)
            tensors = load_file(model / "model.safetensors")
            next(iter(tensors.values())).view(-1)[7] = value
            save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
            return evaluating(work, model)

        return make

    says = "holds 1 NaN or infinite values"
    values = {"NaN": float("nan"), "infinity": float("inf"), "minus infinity": float("-inf")}
    yield from tried(work, [Case(name, put(value), says) for name, value in values.items()])
