"""``python -m postlude.zoo.degraded_speech``: make clips of speech with known damage, and questions about them."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from postlude.errors import DataError, OutputExistsError, PostludeError, SettingsError
from postlude.runs.atomic import atomic_write
from postlude.runs.audio import write_wav
from postlude.runs.clips import LABELS
from postlude.runs.progress import Progress
from postlude.zoo.degraded_speech.making import Maker
from postlude.zoo.degraded_speech.voices import Digits, Espeak, Source, Toy, find_digits
from postlude.zoo.speech_answers import answer_pair, calibration_pairs

__all__ = ["left_out", "main", "make_sets", "speakers"]

_ABOUT = "about.json"
_UNFINISHED = "labels.part"
_TEST = 0.2
_NO_ESPEAK = "there is no espeak-ng on this machine: apt-get install espeak-ng"
_NO_DIGITS = "there is no fsdd_recordings.tar.gz in POSTLUDE_DATA: give --digits PATH"
_NOWHERE = (
    "there is no espeak-ng on this machine and no fsdd_recordings.tar.gz in POSTLUDE_DATA: apt-get install espeak-ng, "
    "give --digits PATH, or take --source toy, whose syllables are nobody's"
)


def speakers(choice: str, digits: Path | None = None) -> list[Source]:
    """Who speaks, by the options."""
    where = digits or find_digits()
    if choice == "toy":
        return [Toy()]
    if choice == "digits" or (choice == "both" and where is None):
        if where is None:
            raise DataError(
                "there is no fsdd_recordings.tar.gz in POSTLUDE_DATA; give --digits PATH, the archive or a folder of it"
            )
        return [Digits(where)]
    if choice == "espeak":
        return [Espeak()]
    if choice == "both":
        return [Espeak(), Digits(where or "")]
    found: list[Source] = [Espeak()] if Espeak.available() else []
    if where is not None:
        found.append(Digits(where))
    if not found:
        raise DataError(_NOWHERE)
    return found


def left_out(sources: Sequence[Source], digits: Path | None = None) -> list[str]:
    """Speakers that a set does without, why, and how to have them."""
    there = {
        Espeak.name: None if Espeak.available() else _NO_ESPEAK,
        Digits.name: None if digits or find_digits() else _NO_DIGITS,
    }
    names = {source.name for source in sources}
    return [
        f"{name} ({missing or f'here: --source {name}, or both for both'})"
        for name, missing in there.items()
        if name not in names
    ]


def make_sets(
    out: Path,
    count: int,
    seed: int,
    sources: Sequence[Source],
    *,
    codecs: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write ``out/train`` and ``out/test``; what an earlier run with the same settings has made is kept.

    Args:
        out: folder of the sets.
        count: clips in all, one in five for testing.
        seed: of every draw.
        sources: who speaks.
        codecs: whether distortions include a codec.
        progress: display to count in.

    Raises:
        SettingsError: fewer than 5 clips.
        OutputExistsError: the folder holds something else.
    """
    if count < 5:
        raise SettingsError(f"--n is {count}; expected 5 clips or more, for two sets")
    names = [source.name for source in sources]
    about = {"n": count, "seed": seed, "sources": names, "codecs": codecs}
    _begin(out, about)
    maker = Maker(sources, seed, codecs)
    parts = {"test": round(count * _TEST)}
    parts = {"train": count - parts["test"], **parts}
    with progress or Progress(show=False) as display:
        task = display.task("clips", count)
        for split, size in parts.items():
            _make_set(out / split, split, size, maker, task.advance)
        task.close()
    return {"out": str(out), **about, **parts}


def _begin(out: Path, about: dict[str, Any]) -> None:
    """Open a new folder, or one that the same settings began."""
    file = out / _ABOUT
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found != about:
            raise OutputExistsError(
                f"{out} holds clips made with {found}, and {about} is asked for; choose another folder or remove it"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputExistsError(f"{out} holds something else; choose another folder or remove it")
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as path:
        path.write_text(json.dumps(about) + "\n", encoding="utf-8")


def _make_set(folder: Path, split: str, size: int, maker: Maker, advance: Any) -> None:
    if (folder / LABELS).is_file():
        advance(size)
        return
    (folder / "wav").mkdir(parents=True, exist_ok=True)
    unfinished = folder / _UNFINISHED
    rows = list(_finished(unfinished))
    advance(len(rows))
    # Written anew: a kill may have left half a line at its end.
    with atomic_write(unfinished) as path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with unfinished.open("a", encoding="utf-8") as file:
        for index in range(len(rows), size):
            samples, row = maker.make(split, index)
            write_wav(folder / "wav" / f"{row['id']}.wav", samples.astype("float32"))
            file.write(json.dumps(row) + "\n")
            file.flush()
            rows.append(row)
            advance()
    _write_questions(folder, rows)
    # The labels last: a folder with labels is whole.
    _write_lines(folder / LABELS, rows)
    os.unlink(unfinished)


def _finished(file: Path) -> Iterator[dict[str, Any]]:
    """Rows that an earlier run has written, up to the first that is not whole."""
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8").split("\n")[:-1]:
        yield json.loads(line)


def _write_questions(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """What a model is tuned on.

    A question about one score; the question about everything, answered by the scores, by everything, and not at all.
    """
    short, scored, long, open_ = [], [], [], []
    for row in rows:
        audio = {"audio": f"wav/{row['id']}.wav"}
        for _, asked, answer in calibration_pairs(row):
            short.append({**audio, "prompt": asked, "completion": answer})
        asked, answer = answer_pair(row)
        long.append({**audio, "prompt": asked, "completion": answer})
        scored.append({**audio, "prompt": asked, "completion": answer.partition(" |")[0]})
        told = {name: row[name] for name in row if name not in ("words", "artifacts")}
        open_.append({**audio, "prompt": asked, **told})
    files = {"calibration": short, "scores": scored, "answers": long, "reinforce": open_}
    for name, lines in files.items():
        _write_lines(folder / f"{name}.jsonl", lines)


def _write_lines(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    with atomic_write(file) as path:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m postlude.zoo.degraded_speech", description=__doc__
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("data", help="make clips with known damage: train and test")
    command.add_argument(
        "--n",
        type=int,
        default=1200,
        help="clips in all, a fifth for testing (default %(default)s)",
    )
    command.add_argument(
        "--source",
        choices=("auto", "espeak", "digits", "both", "toy"),
        default="auto",
        help="who speaks: espeak-ng, people reading digits, both in turns, a toy voice; auto (default): what is there",
    )
    command.add_argument(
        "--digits",
        type=Path,
        help="fsdd_recordings.tar.gz or a folder of its recordings (default: audio/ of POSTLUDE_DATA)",
    )
    command.add_argument(
        "--codecs", action="store_true", help="distort with the GSM codec too; needs sox"
    )
    command.add_argument(
        "-o", "--out", type=Path, required=True, help="folder of the sets; goes on where it stopped"
    )
    command.add_argument(
        "--seed", type=int, default=0, help="of every random choice (default %(default)s)"
    )
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        sources = speakers(options.source, options.digits)
        result = make_sets(
            options.out,
            options.n,
            options.seed,
            sources,
            codecs=options.codecs,
            progress=Progress(show=True),
        )
    except PostludeError as error:
        print(f"postlude: {error}", file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps(result))
        return 0
    lines = [f"{name}: {value}" for name, value in result.items() if name != "sources"]
    lines.append(f"speakers: {', '.join(result['sources'])}")
    lines += [f"left out: {one}" for one in left_out(sources, options.digits)]
    print("\n".join([*lines, "", *_next(options.out)]))
    return 0


def _next(out: Path) -> list[str]:
    """What to do with the sets."""
    train, test = (shlex.quote(str(out / split)) for split in ("train", "test"))
    return [
        "Next, a small model that hears, and its calibration (docs/speech.md goes on from there):",
        "  python -m postlude.zoo.audio_llm make -o random/ --seed 0",
        f"  postlude tune random/ {train}/scores.jsonl -o calibrated/ --steps 1000 --batch-size 16 "
        "--learning-rate 1e-3 --warmup 0.05",
        f"  postlude evaluate speech calibrated/ --data {test}",
    ]


if __name__ == "__main__":
    sys.exit(main())
