"""Every claim once, with little of everything: whether the scripts run, and how long each takes.

``python claims/_quick.py [NAME ...]`` runs ``claims/NAME.py --quick --seeds 1`` of all claims, or of those named, two
at a time with one thread each. The numbers of such a trial say nothing about a paper; ``make claims`` measures.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

__all__ = ["claims"]

FOLDER = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Done:
    """A claim that has run: seconds on the clock and of a core, what it printed, and its exit code."""

    name: str
    seconds: float
    cpu_seconds: float
    printed: str
    code: int

    @property
    def result(self) -> str:
        return "ok" if self.code == 0 else f"exit code {self.code}"


def claims() -> list[str]:
    """The names of all claims."""
    return sorted(file.stem for file in FOLDER.glob("[a-z]*.py"))


def measure(name: str, kept: Path) -> Done:
    """Run one claim in a process of its own, with nothing from an earlier run."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick", "--seeds", "1"]
    started = time.perf_counter()
    log = kept / f"{name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--run", str(kept / name)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=FOLDER.parent,
        )
        # With the time of its parts, which are processes of their own.
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Done(
        name,
        time.perf_counter() - started,
        used.ru_utime + used.ru_stime,
        log.read_text(encoding="utf-8", errors="replace"),
        process.returncode,
    )


def main() -> int:
    """Run them, print a table, and return 1 where one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="all of them otherwise")
    parser.add_argument("--jobs", type=int, default=2, help="at a time (default %(default)s)")
    options = parser.parse_args()
    unknown = set(options.names) - set(claims())
    if unknown:
        parser.error(
            f"no claim is called {', '.join(sorted(unknown))}; there are {', '.join(claims())}"
        )
    began = time.perf_counter()
    found: list[Done] = []
    with (
        tempfile.TemporaryDirectory(prefix="claims-") as folder,
        concurrent.futures.ThreadPoolExecutor(options.jobs) as pool,
    ):
        running = [pool.submit(measure, name, Path(folder)) for name in options.names or claims()]
        for one in concurrent.futures.as_completed(running):
            done = one.result()
            found.append(done)
            print(f"{done.name}: {done.result}, {done.seconds:.0f} s", flush=True)
            if done.code:
                print("\n".join(done.printed.splitlines()[-30:]), flush=True)
    print("\n| claim | result | seconds | CPU seconds |\n| --- | --- | ---: | ---: |")
    for done in sorted(found, key=lambda one: -one.cpu_seconds):
        print(f"| {done.name} | {done.result} | {done.seconds:.0f} | {done.cpu_seconds:.0f} |")
    minutes = (time.perf_counter() - began) / 60
    cores = sum(done.cpu_seconds for done in found) / 60
    print(
        f"\n{len(found)} claims in {minutes:.1f} minutes, {options.jobs} at a time; {cores:.1f} minutes of CPU time."
    )
    return 1 if any(done.code for done in found) else 0


if __name__ == "__main__":
    sys.exit(main())
