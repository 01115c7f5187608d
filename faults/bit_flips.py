"""One bit flipped at a random place of a file: noticed, made again, or without effect; where it cannot be, it is said.

Three kinds of files. What Postlude keeps for itself (shards of indexes, units, states, records of recipes) is known by
its hash: reading it again after a flip must give the same result. What it hands over with checksums beside must be
refused. What others wrote, without a checksum, can only be checked for what can be wrong about it: its structure, and
NaN or infinity.
"""

from __future__ import annotations

import os
import shutil
import signal
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from faults.kills import build_words, quantize_words, results, run_words, tune_words
from faults.suite import (
    UNPROTECTED,
    Trial,
    Work,
    command,
    contents,
    ended,
    fault,
    fork,
    harm,
    judge_damage,
)

_FAMILY = "one bit flipped"


def flip(file: Path, bit: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def read(
    work: Work,
    name: str,
    source: Path,
    file: str,
    words: Callable[[Path], Sequence[object]],
    count: int,
    part: Callable[[Path], tuple[int, int]] | None = None,
    advice: str | None = None,
) -> Iterator[Trial]:
    """Flip bits of a file that a command reads.

    Args:
        work: of the suite.
        name: of the row.
        source: the input that holds the file; a copy of it is damaged.
        file: within it; "" if it is the file.
        words: the command on a copy.
        count: how many bits, each in a copy of its own.
        part: first byte and the byte after the last that may be hit; of the whole file otherwise.
        advice: what the message must hold; the name of the file otherwise.
    """
    places = work.random(f"flip {name}")
    folder = work.fresh()
    copy = folder / source.name

    def fresh() -> None:
        work.fresh()
        shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)

    fresh()
    whole = command(words(copy))
    if whole.code:
        raise RuntimeError(f"{name}: {whole.shown()}")
    damaged = copy / file if file else copy
    start, stop = part(damaged) if part else (0, damaged.stat().st_size)
    for _ in range(count):
        fresh()
        bit = places.randrange(8 * start, 8 * stop)
        flip(damaged, bit)
        before = contents(folder)
        done = command(words(copy))
        at = f"bit {bit % 8} of byte {bit // 8}"
        kept = contents(folder) == before
        yield judge_damage(work, name, done, whole, kept, at, advice or damaged.name)


def again(
    work: Work,
    name: str,
    words: Callable[[Path], Sequence[object]],
    damaged: Callable[[Path], list[Path]],
    count: int,
    kept: Callable[[Path], object] = lambda _: None,
) -> Iterator[Trial]:
    """Flip bits of what a command keeps of its work, and start it again.

    Args:
        work: of the suite.
        name: of the row.
        words: the command with its output.
        damaged: the files of which one is hit.
        count: how many bits.
        kept: leaves the folder as a kill would; nothing for an output that is completed by running again.
    """
    places = work.random(f"flip {name}")
    folder = work.fresh()
    out = folder / "out"
    first = command(words(out))
    if first.code:
        raise RuntimeError(f"{name}: {first.shown()}")
    expected = results(out)
    kept(folder)
    template = work.path / "template"
    shutil.rmtree(template, ignore_errors=True)
    shutil.move(folder, template)
    for _ in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)
        file = places.choice(damaged(folder))
        bit = places.randrange(8 * file.stat().st_size)
        flip(file, bit)
        done = command(words(out))
        at = f"bit {bit % 8} of byte {bit // 8} of {file.relative_to(folder)}"
        wrong = harm(work, done)
        if done.code == 0 and not wrong:
            if results(out) == expected:
                yield Trial("same bits", f"{at}: {done.message}")
                continue
            wrong.append("another result")
        elif done.code != 2:
            wrong.append(f"exit code {done.code}")
        elif file.name not in done.message:
            wrong.append(f"the message lacks {file.name!r}")
        if wrong:
            yield Trial("FAILED", f"{at}: {'; '.join(wrong)}: {done.shown()}")
        else:
            yield Trial("refused", f"{at}: {done.message}")


def _until(work: Work, words: Sequence[object], there: Callable[[], bool]) -> None:
    """Start a command, and kill it once something is there."""
    process = fork(words, work.path / "log")
    while not there():
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    ended(process, work.path / "log")


def _header(file: Path) -> tuple[int, int]:
    with open(file, "rb") as stream:
        return 0, 8 + int(struct.unpack("<Q", stream.read(8))[0])


def _data(file: Path) -> tuple[int, int]:
    return _header(file)[1], file.stat().st_size


def _evaluate(work: Work) -> Callable[[Path], list[object]]:
    return lambda model: ["evaluate", model, "--text", work.inputs / "text.txt", "--json"]


def _plain(name: str) -> str:
    """A row of files that nothing vouches for."""
    UNPROTECTED.add(name)
    return name


_HEADER = "header of `model.safetensors`"
_FOREIGN = _plain("weights that came without checksums")
_OWN = "weights that Postlude wrote"
_CONFIG = _plain("`config.json` of a checkpoint")
_TOKENS = _plain("`tokenizer.json`")


@fault(_FAMILY, _HEADER, 24, everyday=True)
def header(work: Work, count: int) -> Iterator[Trial]:
    """Of a checkpoint of somebody else."""
    source = work.inputs / "model"
    # A flip in the name of a tensor leaves a whole file without that tensor.
    says = r"model\.safetensors|lacks \d+ weights"
    words = _evaluate(work)
    yield from read(work, _HEADER, source, "model.safetensors", words, count, _header, says)


@fault(_FAMILY, _FOREIGN, 16)
def foreign(work: Work, count: int) -> Iterator[Trial]:
    """Of a checkpoint of somebody else."""
    source = work.inputs / "model"
    yield from read(work, _FOREIGN, source, "model.safetensors", _evaluate(work), count, _data)


@fault(_FAMILY, _OWN, 24, everyday=True)
def own(work: Work, count: int) -> Iterator[Trial]:
    """Packed codes, scales and the rest."""
    source = work.made("small", lambda out: quantize_words(work, out))
    yield from read(work, _OWN, source, "model.safetensors", _evaluate(work), count, _data)


@fault(_FAMILY, _CONFIG, 16)
def config(work: Work, count: int) -> Iterator[Trial]:
    """A number in it may become another number."""
    source = work.inputs / "model"
    # A longer context, for one, asks for more text.
    says = r"config\.json|inputs|model|trial|tokens"
    yield from read(work, _CONFIG, source, "config.json", _evaluate(work), count, advice=says)


@fault(_FAMILY, _TOKENS, 16)
def tokens(work: Work, count: int) -> Iterator[Trial]:
    """A letter in it may become another letter."""
    source = work.inputs / "model"
    says = r"tokenizer"
    yield from read(work, _TOKENS, source, "tokenizer.json", _evaluate(work), count, advice=says)


@fault(_FAMILY, "an index: shards, list and manifest, read by `attribute verify`", 24)
def index(work: Work, count: int) -> Iterator[Trial]:
    """Every byte of it is hashed."""
    source = work.made("index", lambda out: build_words(work, out))
    files = [str(one.relative_to(source)) for one in sorted(source.rglob("*")) if one.is_file()]
    places = work.random("index files")
    for _ in range(count):
        file = places.choice(files)
        name = f"index {file} {places.random()}"
        yield from read(
            work,
            name,
            source,
            file,
            lambda one: ["attribute", "verify", one, "--json"],
            1,
            advice=".",
        )


@fault(_FAMILY, "an index, built again", 10)
def index_again(work: Work, count: int) -> Iterator[Trial]:
    """The damaged shard alone is made anew."""

    def files(folder: Path) -> list[Path]:
        return sorted((folder / "out" / "shards").iterdir())

    yield from again(work, "index again", lambda out: build_words(work, out), files, count)


@fault(_FAMILY, "units of a killed `quantize`", 10)
def units(work: Work, count: int) -> Iterator[Trial]:
    """The output is not there yet."""

    def words(out: Path) -> list[object]:
        return [*quantize_words(work, out), "--run", out.parent / "kept"]

    def files(folder: Path) -> list[Path]:
        return sorted(one for one in (folder / "kept").rglob("*") if one.is_file())

    yield from again(
        work, "units", words, files, count, lambda folder: shutil.rmtree(folder / "out")
    )


@fault(_FAMILY, "the state of a killed `tune`", 8)
def states(work: Work, count: int) -> Iterator[Trial]:
    """A damaged state is not gone on from."""

    def words(out: Path) -> list[object]:
        return tune_words(work, out)

    def killed(folder: Path) -> None:
        shutil.rmtree(folder / "out")
        states = folder / ".out.run" / "states"
        # Any state but the first: the next one replaces it.
        _until(work, words(folder / "out"), lambda: any(states.glob("step-?*/trainer_state.json")))

    def files(folder: Path) -> list[Path]:
        return sorted(one for one in (folder / ".out.run").glob("states/step-*/*") if one.is_file())

    yield from again(work, "states", words, files, count, killed)


@fault(_FAMILY, "records and outputs of a recipe's stages", 12)
def stages(work: Work, count: int) -> Iterator[Trial]:
    """A stage whose record or output is damaged is run again."""

    def files(folder: Path) -> list[Path]:
        return sorted(
            one
            for one in (folder / "out").rglob("*")
            if one.is_file() and one.suffix != ".html" and "shards" not in one.parts
        )

    yield from again(work, "recipe", lambda out: run_words(work, out), files, count)
