"""Files of every kind that is read, cut off: nothing, one byte, a half, and all but the last byte of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from faults.kills import build_words, quantize_words
from faults.suite import UNPROTECTED, Trial, Words, Work, command, contents, fault, judge_damage

_FAMILY = "cut off"


def cut(
    work: Work,
    name: str,
    source: Path,
    file: str,
    words: Callable[[Path], Words],
    says: str | None = None,
    beside: Sequence[Path] = (),
) -> Iterator[Trial]:
    """Cut off a file that a command reads.

    Args:
        work: of the suite.
        name: of the row.
        source: the input that holds the file; a copy of it is cut.
        file: within it; "" if it is the file.
        words: the command on a copy.
        says: a pattern that its message must hold; the name of the file otherwise.
        beside: what lies beside the input and is copied with it.
    """
    folder = work.fresh()
    copy = folder / source.name

    def fresh() -> Path:
        work.fresh()
        for one in (source, *beside):
            target = folder / one.name
            shutil.copytree(one, target) if one.is_dir() else shutil.copy(one, target)
        return copy / file if file else copy

    size = fresh().stat().st_size
    whole = command(words(copy))
    if whole.code:
        raise RuntimeError(f"{name}: {whole.shown()}")
    for kept in sorted({0, 1, size // 2, size - 1}):
        damaged = fresh()
        os.truncate(damaged, kept)
        before = contents(folder)
        done = command(words(copy))
        at = f"{kept} of {size} bytes"
        same = contents(folder) == before
        yield judge_damage(work, name, done, whole, same, at, says or damaged.name)


def _evaluate(work: Work) -> Callable[[Path], Words]:
    return lambda model: ["evaluate", model, "--text", work.inputs / "text.txt", "--json"]


def _sample(work: Work, model: object, *more: object) -> Words:
    out = work.fresh("other") / "x.safetensors"
    return [
        "sample",
        model,
        "--count",
        "1",
        "--steps",
        "2",
        "--sampler",
        "euler",
        "-o",
        out,
        *more,
        "--json",
    ]


def _open(name: str) -> str:
    UNPROTECTED.add(name)
    return name


# A text that ends earlier is a text, and a list of lines with fewer lines is a list.
_TEXT = _open("text, `.txt`")
_LINES = _open("examples, `.jsonl`")


@fault(_FAMILY, "`model.safetensors`", everyday=True)
def weights(work: Work, count: int) -> Iterator[Trial]:
    """Of a float checkpoint, and of one that Postlude quantized."""
    yield from cut(work, "weights", work.inputs / "model", "model.safetensors", _evaluate(work))
    small = work.made("small", lambda out: quantize_words(work, out))
    yield from cut(work, "packed weights", small, "model.safetensors", _evaluate(work))


@fault(_FAMILY, "`config.json`, `generation_config.json`")
def config(work: Work, count: int) -> Iterator[Trial]:
    """Of a checkpoint."""
    for name in ("config.json", "generation_config.json"):
        yield from cut(work, name, work.inputs / "model", name, _evaluate(work), r"config")


@fault(_FAMILY, "`tokenizer.json`, `tokenizer_config.json`")
def tokenizer(work: Work, count: int) -> Iterator[Trial]:
    """Of a checkpoint."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        yield from cut(work, name, work.inputs / "model", name, _evaluate(work), r"tokenizer")


@fault(_FAMILY, "a list of shards, `model.safetensors.index.json`")
def shards(work: Work, count: int) -> Iterator[Trial]:
    """Of a checkpoint in several files."""
    from transformers import AutoModelForCausalLM

    from postlude.runs.quiet import quiet_transformers

    source = work.path / "made" / "sharded"
    if not source.is_dir():
        shutil.copytree(work.inputs / "model", source)
        (source / "model.safetensors").unlink()
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                work.inputs / "model", local_files_only=True
            )
            model.save_pretrained(source, max_shard_size="100KB")
    yield from cut(work, "shards", source, "model.safetensors.index.json", _evaluate(work))


@fault(_FAMILY, _TEXT)
def text(work: Work, count: int) -> Iterator[Trial]:
    """Also in the middle of a character."""
    source = work.path / "made" / "accents.txt"
    source.parent.mkdir(exist_ok=True)
    source.write_text("Où êtes-vous allés cet été, là-bas? " * 20 + "é", encoding="utf-8")
    model = work.inputs / "model"
    says = r"accents\.txt|The text has \d+ tokens"

    def words(one: Path) -> Words:
        return ["evaluate", model, "--text", one, "--json"]

    yield from cut(work, _TEXT, source, "", words, says)


@fault(_FAMILY, _LINES)
def lines(work: Work, count: int) -> Iterator[Trial]:
    """Read by `tune prior` and `attribute plan`."""
    model = work.inputs / "model"
    data = work.inputs / "train.jsonl"

    def prior(one: Path) -> Words:
        return ["tune", "prior", model, one, "-o", work.fresh("other") / "prior", "--json"]

    def plan(one: Path) -> Words:
        return [
            "attribute",
            "build",
            model,
            one,
            "--max-length",
            "32",
            "-o",
            work.fresh("other") / "index",
        ]

    yield from cut(work, _LINES, data, "", prior)
    yield from cut(work, _LINES, data, "", plan)


@fault(_FAMILY, "a picture, `.png`")
def picture(work: Work, count: int) -> Iterator[Trial]:
    """Fitted, and among the pictures that a vision model is calibrated on."""

    def fit(one: Path) -> Words:
        return ["fit", one, "--width", "16", "--steps", "2", "-o", work.fresh("other") / "x.inr"]

    def quantize(folder: Path) -> Words:
        return [
            "quantize", work.inputs / "vit", "--method", "repq-vit", "--bits", "w8a8", "--calibration", folder,
            "--samples", "4", "--no-check", "-o", work.fresh("other") / "small", "--json",
        ]  # fmt: skip

    yield from cut(work, "picture", work.inputs / "picture.png", "", fit)
    yield from cut(work, "pictures", work.inputs / "images", "2.png", quantize)


@fault(_FAMILY, "pictures in a `.npz`")
def arrays(work: Work, count: int) -> Iterator[Trial]:
    """Whose training examples a denoiser is asked for."""
    import numpy

    source = work.path / "made" / "images.npz"
    source.parent.mkdir(exist_ok=True)
    draw = numpy.random.default_rng(work.seed)
    numpy.savez(source, images=draw.integers(0, 256, (2, 28, 28), dtype=numpy.uint8), labels=[1, 2])

    def words(one: Path) -> Words:
        def read() -> object:
            from postlude.attribution.data import open_data

            return len(open_data(one, "diffusion"))

        return read

    yield from cut(work, "arrays", source, "", words)


@fault(_FAMILY, "a recording, `.wav`")
def recording(work: Work, count: int) -> Iterator[Trial]:
    """16 kHz, mono."""
    import math
    import struct
    import wave

    source = work.path / "made" / "tone.wav"
    source.parent.mkdir(exist_ok=True)
    with wave.open(str(source), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        tone = [int(9000 * math.sin(n / 7)) for n in range(8000)]
        file.writeframes(struct.pack("<8000h", *tone))

    def words(one: Path) -> Words:
        def read() -> object:
            from postlude.runs.audio import read_wav

            return read_wav(one).duration

        return read

    yield from cut(work, "recording", source, "", words)


@fault(_FAMILY, "a picture in a network, `.inr`")
def network(work: Work, count: int) -> Iterator[Trial]:
    """Its settings and its weights."""
    picture = work.inputs / "picture.png"
    source = work.made(
        "x.inr", lambda out: ["fit", picture, "--width", "16", "--steps", "2", "-o", out]
    )

    def render(one: Path) -> Words:
        return ["render", one, "-o", work.fresh("other") / "x.png", "--json"]

    for file in sorted(source.iterdir()):
        yield from cut(work, file.name, source, file.name, render)


@fault(_FAMILY, "drift statistics of a sampler")
def drift(work: Work, count: int) -> Iterator[Trial]:
    """Of the built-in diffusion model against itself."""
    model = "zoo:tiny-dit"
    source = work.made(
        "drift.safetensors",
        lambda out: [
            "sample", "calibrate", model, "--reference", model, "--runs", "2", "--batch", "2", "--steps", "2",
            "--sampler", "euler", "-o", out,
        ],
    )  # fmt: skip

    yield from cut(work, "drift", source, "", lambda one: _sample(work, model, "--drift", one))


@fault(_FAMILY, "a prior for `tune`")
def prior(work: Work, count: int) -> Iterator[Trial]:
    """Its manifest and its columns."""
    model, data = work.inputs / "model", work.inputs / "train.jsonl"
    source = work.made("prior", lambda out: ["tune", "prior", model, data, "-o", out])

    def tune(one: Path) -> Words:
        return [
            "tune", model, data, "--weights", "prift-mass", "--prior", one, "--steps", "1", "--batch-size", "2",
            "-o", work.fresh("other") / "tuned", "--json",
        ]  # fmt: skip

    for file in sorted(source.iterdir()):
        yield from cut(work, file.name, source, file.name, tune)


@fault(_FAMILY, "an index: manifest, list, a shard")
def index(work: Work, count: int) -> Iterator[Trial]:
    """Asked for the examples behind a text."""
    source = work.made("index", lambda out: build_words(work, out))

    def query(one: Path) -> Words:
        return ["attribute", "query", one, "Once upon a time", "--no-keep", "--json"]

    shard = sorted((source / "shards").iterdir())[1]
    for file in ("manifest.json", "shards.json", f"shards/{shard.name}"):
        yield from cut(work, file, source, file, query)


@fault(_FAMILY, "an adapter: its settings and its weights")
def adapter(work: Work, count: int) -> Iterator[Trial]:
    """Merged into its model when it is loaded."""
    source = work.made(
        "adapter",
        lambda out: [
            "tune", work.inputs / "model", work.inputs / "train.jsonl", "--adapter", "lora", "--steps", "1",
            "--batch-size", "2", "-o", out,
        ],
    )  # fmt: skip
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        yield from cut(work, file, source, file, _evaluate(work), r"adapter")


@fault(_FAMILY, "a diffusion pipeline: index, settings, weights")
def pipeline(work: Work, count: int) -> Iterator[Trial]:
    """Of the built-in model."""
    from postlude.runs.loading import resolve

    source = resolve("zoo:tiny-dit")
    for file in (
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ):
        yield from cut(work, file, source, file, lambda one: _sample(work, one))


@fault(_FAMILY, "a recipe")
def recipe(work: Work, count: int) -> Iterator[Trial]:
    """Checked without running it."""
    given = {"model": "model", "data": "train.jsonl", "text": "text.txt"}
    values = [
        word for name, file in given.items() for word in ("--set", f"{name}={work.inputs / file}")
    ]

    def plan(one: Path) -> Words:
        return ["run", one, "--dry-run", *values]

    yield from cut(work, _LINES, work.inputs / "recipe.yaml", "", plan)
