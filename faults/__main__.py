"""Do every fault, print the table, end with 1 if anything failed."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

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

Found = Mapping[tuple[str, str], Sequence[Trial]]


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
    lines = [
        *table(found),
        "",
        _summary(found, time.monotonic() - began, options.seed),
    ]
    print("\n".join(lines))
    if options.write:
        write(lines)
    return int(any(one.outcome == "FAILED" for trials in found.values() for one in trials))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--only", default="", help="faults whose kind or name holds this")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn at random")
    parser.add_argument("--times", type=float, default=1.0, help="factor on how often each is done")
    parser.add_argument("--workers", type=int, default=2, help="processes that share the work")
    parser.add_argument("--write", action="store_true", help=f"store the table in docs/{PAGE.name}")
    parser.add_argument("-v", "--verbose", action="store_true", help="show what every trial said")
    options = parser.parse_args()
    if options.write and (options.only or options.times < 1):
        parser.error("--write stores the whole suite: leave --only and --times out")
    return options


def _shared(chosen: Sequence[Fault], folder: Path, options: argparse.Namespace) -> Found:
    """What some processes find that share the work: each takes the next fault when it is done with one."""
    # The longest first, so that none is left with one of them at the end. A byte is read by one process only.
    order = sorted(range(len(chosen)), key=lambda number: -chosen[number].count)
    take, put = os.pipe()
    os.write(put, bytes(order))
    os.close(put)
    processes = []
    for rank in range(options.workers):
        process = os.fork()
        if not process:
            code = 1
            try:
                _work(chosen, folder / str(rank), take, options)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        processes.append(process)
    for process in processes:
        os.waitpid(process, 0)
    found: dict[tuple[str, str], list[Trial]] = {}
    for number, one in enumerate(chosen):
        told = folder / f"{number}.json"
        lost = [["FAILED", "the suite itself ended in the middle of it"]]
        trials = json.loads(told.read_text()) if told.is_file() else lost
        found[one.family, one.name] = [Trial(*trial) for trial in trials]
    return found


def _work(chosen: Sequence[Fault], folder: Path, take: int, options: argparse.Namespace) -> None:
    work = Work(folder, options.seed)
    inputs.make(work)
    while number := os.read(take, 1):
        trials = _done(chosen[number[0]], work, options.times, options.verbose)
        told = [[one.outcome, one.about] for one in trials]
        (folder.parent / f"{number[0]}.json").write_text(json.dumps(told))


def _done(one: Fault, work: Work, times: float, verbose: bool) -> list[Trial]:
    began = time.monotonic()
    trials = []
    for trial in _trials(one, work, max(1, round(one.count * times))):
        trials.append(trial)
        if verbose or trial.outcome == "FAILED":
            print(f"  {trial.outcome}: {trial.about}", file=sys.stderr, flush=True)
    failed = sum(trial.outcome == "FAILED" for trial in trials)
    said = f"{len(trials)} times, {failed} failed, {time.monotonic() - began:.1f} s"
    print(f"{one.family}, {one.name}: {said}", file=sys.stderr, flush=True)
    return trials


def _trials(one: Fault, work: Work, count: int) -> Iterator[Trial]:
    try:
        yield from one.trials(work, count)
    except RuntimeError as error:  # what the fault would have been done to fails by itself
        yield Trial("FAILED", str(error))


def _summary(found: Found, seconds: float, seed: int) -> str:
    import torch
    import transformers

    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    processor = sum(one.ru_utime + one.ru_stime for one in used)
    trials = sum(map(len, found.values()))
    failed = sum(one.outcome == "FAILED" for given in found.values() for one in given)
    today = datetime.datetime.now(datetime.UTC).date()
    return (
        f"{trials} faults, {failed} failed, in {seconds / 60:.1f} minutes ({processor / 60:.1f} of processor time); "
        f"seed {seed}, full disks by {full_disk.how()}. `make faults`, {today}, Python {platform.python_version()}, "
        f"PyTorch {torch.__version__}, transformers {transformers.__version__}, {platform.system()} "
        f"{platform.machine()}."
    )


def write(lines: Sequence[str], page: Path = PAGE) -> None:
    """Put the table between the marks of the page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(_BEGIN)
    _, _, after = rest.partition(_END)
    text = "\n".join([_BEGIN, "", *lines, "", _END])
    page.write_text(before + text + after, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
