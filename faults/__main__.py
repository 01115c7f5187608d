"""Do every fault, print the table, end with 1 if anything failed."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Before PyTorch is imported: children of a process with several threads may hang.
os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)

from faults import full_disk, inputs
from faults.suite import Fault, Trial, Work, all_faults, table

__all__ = ["main"]

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reliability.md"
_BEGIN, _END = "<!-- measured: faults -->", "<!-- end: faults -->"

# Of one fault: seconds of processor time, and outcome and story of every trial.
_Told = dict[str, Any]


def main() -> int:
    """Exit code."""
    options = _options()
    began = time.monotonic()
    wanted = options.only.lower()
    chosen = [one for one in all_faults() if wanted in f"{one.family} {one.name}".lower()]
    chosen.sort(key=lambda one: one.family)
    inputs.warm()
    with tempfile.TemporaryDirectory(prefix="postlude-faults-") as folder:
        found = _shared(chosen, Path(folder), options)
    rows = {
        (one.family, one.name): [Trial(*trial) for trial in told["trials"]]
        for one, told in zip(chosen, found, strict=True)
    }
    lines = [*table(rows), "", _summary(found, options.seed)]
    print("\n".join(lines))
    if options.write:
        write(lines)
    print(f"\n{(time.monotonic() - began) / 60:.1f} minutes.", file=sys.stderr)
    return int(any(map(_failed, found)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--only", default="", help="faults whose kind or name holds this")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn at random")
    parser.add_argument("--times", type=float, default=1.0, help="factor on how often each is done")
    parser.add_argument("--workers", type=int, default=2, help="processes that share the work")
    parser.add_argument(
        "--run", help="a folder to keep results in; what did not fail is not done again"
    )
    parser.add_argument("--write", action="store_true", help=f"store the table in docs/{PAGE.name}")
    parser.add_argument("-v", "--verbose", action="store_true", help="show what every trial said")
    options = parser.parse_args()
    if options.write and (options.only or options.times < 1):
        parser.error("--write stores the whole suite: leave --only and --times out")
    return options


def _shared(chosen: Sequence[Fault], folder: Path, options: argparse.Namespace) -> list[_Told]:
    """What some processes find that share the work: each takes the next fault when it is done with one."""
    kept = Path(options.run) if options.run else folder / "found"
    kept.mkdir(parents=True, exist_ok=True)
    files = [kept / f"{_slug(one)}.json" for one in chosen]
    missing = [number for number, file in enumerate(files) if _failed(_read(file))]
    # The longest first, so that none is left with one of them at the end. A byte is read by one process only.
    take, put = os.pipe()
    os.write(put, bytes(sorted(missing, key=lambda number: -chosen[number].count)))
    os.close(put)
    processes = []
    for rank in range(options.workers):
        process = os.fork()
        if not process:
            code = 1
            try:
                work = Work(folder / str(rank), options.seed)
                inputs.make(work)
                while number := os.read(take, 1):
                    told = _done(chosen[number[0]], work, options.times, options.verbose)
                    files[number[0]].write_text(json.dumps(told))
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        processes.append(process)
    for process in processes:
        os.waitpid(process, 0)
    return [_read(file) for file in files]


def _slug(one: Fault) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{one.family} {one.name}".lower()).strip("-")


def _read(file: Path) -> _Told:
    if file.is_file():
        told: _Told = json.loads(file.read_text())
        return told
    return {"processor": 0.0, "trials": [["FAILED", "the suite itself ended in the middle of it"]]}


def _failed(told: _Told) -> int:
    return sum(outcome == "FAILED" for outcome, _ in told["trials"])


def _done(one: Fault, work: Work, times: float, verbose: bool) -> _Told:
    began, used = time.monotonic(), _processor()
    trials = []
    for trial in _trials(one, work, max(1, round(one.count * times))):
        trials.append(trial)
        if verbose or trial.outcome == "FAILED":
            print(f"  {trial.outcome}: {trial.about}", file=sys.stderr, flush=True)
    failed = sum(trial.outcome == "FAILED" for trial in trials)
    said = f"{len(trials)} times, {failed} failed, {time.monotonic() - began:.1f} s"
    print(f"{one.family}, {one.name}: {said}", file=sys.stderr, flush=True)
    told = [[trial.outcome, trial.about] for trial in trials]
    return {"processor": _processor() - used, "trials": told}


def _processor() -> float:
    """Seconds of processor time of this process and of its children that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _trials(one: Fault, work: Work, count: int) -> Iterator[Trial]:
    try:
        yield from one.trials(work, count)
    except RuntimeError as error:  # what the fault would have been done to fails by itself
        yield Trial("FAILED", str(error))


def _summary(found: Sequence[_Told], seed: int) -> str:
    import torch
    import transformers

    trials = sum(len(told["trials"]) for told in found)
    processor = sum(told["processor"] for told in found) / 60
    today = datetime.datetime.now(datetime.UTC).date()
    return (
        f"{trials} faults, {sum(map(_failed, found))} failed; {processor:.1f} minutes of processor time, shared by two "
        f"processes; seed {seed}, full disks by {full_disk.how()}. `make faults`, {today}, Python "
        f"{platform.python_version()}, PyTorch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.system()} {platform.machine()}."
    )


def write(lines: Sequence[str], page: Path = PAGE) -> None:
    """Put the table between the marks of the page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(_BEGIN)
    _, _, after = rest.partition(_END)
    text = "\n".join([_BEGIN, "", *lines, "", _END])
    page.write_text(before + text + after, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
