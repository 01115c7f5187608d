"""Do every fault, print the table, end with 1 if anything failed."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# Before PyTorch is imported: children of a process with several threads may hang.
os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)

from faults import bit_flips, full_disk, hostile, inputs, kills, truncated  # noqa: E402
from faults.suite import FAULTS, Fault, Trial, Work, table  # noqa: E402

__all__ = ["main"]


def main() -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--only", default="", help="faults whose kind or name holds this")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn at random")
    parser.add_argument("--times", type=float, default=1.0, help="factor on how often each is done")
    parser.add_argument(
        "--write", action="store_true", help="store the table in docs/reliability.md"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show what every trial said")
    options = parser.parse_args()
    began = time.monotonic()
    chosen = [one for one in FAULTS if options.only.lower() in f"{one.family} {one.name}".lower()]
    found: dict[tuple[str, str], list[Trial]] = {}
    with tempfile.TemporaryDirectory(prefix="postlude-faults-") as folder:
        work = Work(Path(folder), options.seed)
        inputs.warm()
        inputs.make(work)
        for one in chosen:
            at = time.monotonic()
            count = max(1, round(one.count * options.times))
            trials = found.setdefault((one.family, one.name), [])
            for trial in _done(one, work, count):
                trials.append(trial)
                if options.verbose or trial.outcome == "FAILED":
                    print(f"  {trial.outcome}: {trial.about}", file=sys.stderr, flush=True)
            bad = sum(trial.outcome == "FAILED" for trial in trials)
            line = f"{one.family}, {one.name}: {len(trials)} times, {bad} failed, {time.monotonic() - at:.1f} s"
            print(line, file=sys.stderr, flush=True)
    print("\n".join(table(found)))
    failed = sum(trial.outcome == "FAILED" for trials in found.values() for trial in trials)
    print(f"\n{failed} failed, {time.monotonic() - began:.0f} s.")
    return 1 if failed else 0


def _done(one: Fault, work: Work, count: int) -> Iterator[Trial]:
    try:
        yield from one.trials(work, count)
    except RuntimeError as error:  # what the fault would have been done to fails by itself
        yield Trial("FAILED", str(error))


if __name__ == "__main__":
    sys.exit(main())
