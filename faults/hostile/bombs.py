"""Small files that ask for endless time or memory."""

from __future__ import annotations

import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.hostile.case import (
    FAMILY,
    Case,
    changed,
    copied_model,
    evaluating,
    tried,
)
from faults.kills import build_words
from faults.suite import Trial, Words, Work, fault

_DEEP = 200_000


@fault(FAMILY, "YAML of a recipe", everyday=True)
def yaml(work: Work, count: int) -> Iterator[Trial]:
    """Tags that build objects, anchors that multiply, depth without end."""

    def recipe(text: str, *more: str) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            (folder / "recipe.yaml").write_text(text.replace("SENTINEL", str(work.sentinel)))
            values = [one.replace("SENTINEL", str(work.sentinel)) for one in more]
            return ["run", folder / "recipe.yaml", "-o", folder / "run", *values]

        return make

    call = '!!python/object/apply:os.system ["touch SENTINEL"]'
    laughs = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(12)
    )
    stages = "stages:\n  a: {inspect: zoo:tiny-lm}\n"
    variable = "variables: {x: 1}\n" + stages
    lists = "variables: {x: " + "[" * _DEEP + "]" * _DEEP + "}\n" + stages
    yield from tried(
        work,
        [
            Case("an object as a stage", recipe(f"stages:\n  a: {call}\n"), r"recipe\.yaml"),
            Case(
                "an object as a value",
                recipe(f"variables: {{x: {call}}}\n{stages}"),
                r"recipe\.yaml",
            ),
            Case("an object as a name", recipe(f"? {call}\n: 1\n"), r"recipe\.yaml"),
            Case("an object by --set", recipe(variable, "--set", f"x={call}"), "x"),
            Case("a module", recipe("stages: !!python/module:antigravity\n"), r"recipe\.yaml"),
            Case("anchors that multiply", recipe(laughs + stages), r"recipe\.yaml"),
            Case("an anchor within itself", recipe("stages: &a {a: *a}\n"), r"recipe\.yaml"),
            Case("lists in lists", recipe(lists), r"recipe\.yaml"),
            Case("mappings in mappings", recipe("{a: " * 20_000), r"recipe\.yaml"),
            Case("a list by --set", recipe(variable, "--set", "x=" + "[" * 50_000), "x"),
            Case("bytes that are no text", recipe("stages: \x00\x01\n"), r"recipe\.yaml"),
        ],
    )


@fault(FAMILY, "JSON in JSON in JSON", everyday=True)
def json_bombs(work: Work, count: int) -> Iterator[Trial]:
    """Two hundred thousand levels, in every kind of file."""
    deep = "[" * _DEEP + "]" * _DEEP

    def beside(name: str, text: str) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            model = copied_model(work, folder)
            (model / name).write_text(text)
            return evaluating(work, model)

        return make

    def rows(verb: tuple[str, ...], *more: str) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            (folder / "rows.jsonl").write_text('{"text": ' + deep + "}\n")
            return [
                *verb,
                work.inputs / "model",
                folder / "rows.jsonl",
                *more,
                "-o",
                folder / "out",
            ]

        return make

    def evaluated(work: Work, folder: Path) -> Words:
        (folder / "rows.jsonl").write_text('{"text": ' + deep + "}\n")
        return ["evaluate", work.inputs / "model", "--text", folder / "rows.jsonl"]

    def index(work: Work, folder: Path) -> Words:
        source = work.made("index", lambda out: build_words(work, out))
        copy = Path(shutil.copytree(source, folder / "index"))
        (copy / "manifest.json").write_text(deep)
        return ["attribute", "query", copy, "Once", "--no-keep"]

    def network(work: Work, folder: Path) -> Words:
        (folder / "x.inr").mkdir()
        (folder / "x.inr" / "config.json").write_text(deep)
        return ["render", folder / "x.inr", "-o", folder / "x.png"]

    def adapter(work: Work, folder: Path) -> Words:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_config.json").write_text(deep)
        return evaluating(work, folder / "adapter")

    def run_directory(work: Work, folder: Path) -> Words:
        (folder / "kept").mkdir()
        (folder / "kept" / "manifest.json").write_text(deep)
        words = [
            "quantize",
            work.inputs / "model",
            "--no-check",
            "--run",
            folder / "kept",
            "-o",
            folder / "out",
        ]
        return words

    def prior(work: Work, folder: Path) -> Words:
        source = work.made(
            "prior",
            lambda out: [
                "tune",
                "prior",
                work.inputs / "model",
                work.inputs / "train.jsonl",
                "-o",
                out,
            ],
        )
        copy = Path(shutil.copytree(source, folder / "prior"))
        manifest = next(one for one in copy.iterdir() if one.suffix == ".json")
        manifest.write_text(deep)
        words = [
            "tune",
            work.inputs / "model",
            work.inputs / "train.jsonl",
            "--weights",
            "prift-mass",
            "--prior",
        ]
        return [*words, copy, "--steps", "1", "-o", folder / "out"]

    def pictures(work: Work, folder: Path) -> Words:
        images = Path(shutil.copytree(work.inputs / "images", folder / "images"))
        (images / "labels.jsonl").write_text(deep + "\n")
        return [
            "attribute",
            "build",
            "zoo:tiny-dit",
            images,
            "--method",
            "d-trak",
            "-o",
            folder / "i",
        ]

    yield from tried(
        work,
        [
            Case("config.json", beside("config.json", deep), "config.json"),
            Case("tokenizer.json", beside("tokenizer.json", deep), "tokenizer"),
            Case("tokenizer_config.json", beside("tokenizer_config.json", deep), "tokenizer"),
            Case("generation_config.json", beside("generation_config.json", deep), "model"),
            Case("text to evaluate", evaluated, "line 1"),
            Case("data to tune on", rows(("tune",)), "line 1"),
            Case("data to attribute to", rows(("attribute", "build")), "line 1"),
            Case("the manifest of an index", index, "manifest.json"),
            Case("a picture in a network", network, "config.json"),
            Case("an adapter", adapter, "adapter_config.json"),
            Case("the manifest of a run", run_directory, "manifest.json"),
            Case("a prior", prior, "damaged"),
            Case("labels of pictures", pictures, "line 1"),
        ],
    )


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


@fault(FAMILY, "pictures and arrays of enormous size")
def pictures(work: Work, count: int) -> Iterator[Trial]:
    """A hundred bytes that say they are billions of pixels."""

    def fit(width: int, height: int) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            (folder / "bomb.png").write_bytes(_png(width, height))
            return [
                "fit",
                folder / "bomb.png",
                "--width",
                "16",
                "--steps",
                "1",
                "-o",
                folder / "x.inr",
            ]

        return make

    def calibrated(work: Work, folder: Path) -> Words:
        images = Path(shutil.copytree(work.inputs / "images", folder / "images"))
        (images / "bomb.png").write_bytes(_png(60_000, 60_000))
        return [
            "quantize", work.inputs / "vit", "--method", "repq-vit", "--bits", "w8a8", "--calibration", images,
            "--samples", "5", "--no-check", "-o", folder / "small",
        ]  # fmt: skip

    def attributed(work: Work, folder: Path) -> Words:
        (folder / "images").mkdir()
        (folder / "images" / "bomb.png").write_bytes(_png(60_000, 60_000))
        return [
            "attribute",
            "build",
            "zoo:tiny-dit",
            folder / "images",
            "--method",
            "d-trak",
            "-o",
            folder / "i",
        ]

    def array(work: Work, folder: Path) -> Words:
        import io
        import zipfile

        import numpy

        head = io.BytesIO()
        described = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 1000, 1000)}
        numpy.lib.format.write_array_header_1_0(head, described)
        with zipfile.ZipFile(folder / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("images.npy", head.getvalue() + b"\0" * 1000)
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

    yield from tried(
        work,
        [
            Case("fitted, 3.6 billion pixels", fit(60_000, 60_000), "60000 x 60000 pixels"),
            Case("fitted, 10^18 pixels", fit(2**31 - 1, 2**31 - 1), "2147483647 pixels"),
            Case("to calibrate on", calibrated, r"bomb\.png"),
            Case("to attribute to", attributed, r"bomb\.png"),
            Case("an array of 10^12 bytes", array, r"x\.npz"),
        ],
    )


@fault(FAMILY, "sizes in `config.json`")
def sizes(work: Work, count: int) -> Iterator[Trial]:
    """A model of billions, said of weights of some kilobytes."""

    def config(**values: int) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            model = copied_model(work, folder)
            changed(model / "config.json", **values)
            return evaluating(work, model)

        return make

    names = (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "vocab_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    yield from tried(work, [Case(name, config(**{name: 10**9}), ".") for name in names])
