"""What every claim shares: seeds, spread, tables, and its section of ``docs/claims.md``.

A claim is a script: ``python claims/NAME.py`` measures and prints Markdown on the standard output, progress goes to the
standard error, and ``--write`` also puts what was printed into ``docs/claims.md`` between the markers of its section.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postlude.runs.atomic import atomic_write
from postlude.runs.directory import RunDirectory
from postlude.runs.documents import read_documents
from postlude.runs.progress import Progress

__all__ = ["Claim", "data_directory", "documents", "share", "spread"]

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "claims.md"
SEEDS = 5
_SECONDS = "_cpu_seconds"


class Claim:
    """One run of a claim's script.

    Args:
        name: of the script and of its section.
        description: the script's docstring.
        parts: what the script can measure, one at a time; each part has a section of its own, called ``NAME-PART``.
        seeds: how many a whole measurement has.

    Attributes:
        seeds: what to repeat the measurement with.
        quick: whether this is only a trial of the script, with less of everything.
        part: which of the parts was asked for.
        progress: where to show how far it is.
    """

    def __init__(
        self, name: str, description: str, parts: Sequence[str] = (), seeds: int = SEEDS
    ) -> None:
        self._whole = seeds
        options = self._options(description, name, parts)
        self.quick: bool = options.quick
        self.part: str = options.part if parts else ""
        self.name = f"{name}-{self.part}" if self.part else name
        self._command = f"python claims/{name}.py" + (f" --part {self.part}" if self.part else "")
        self._run: Path = options.run
        self._earlier = 0.0
        self.seeds = range(2 if options.quick and options.seeds == seeds else options.seeds)
        self.progress = Progress(show=True)
        self._write: bool = options.write
        self._started = time.perf_counter()
        self._printed: list[str] = []

    def _options(self, description: str, name: str, parts: Sequence[str]) -> argparse.Namespace:
        parser = argparse.ArgumentParser(description=description.split("\n", 1)[0])
        parser.add_argument(
            "--seeds", type=int, default=self._whole, help="how many (default %(default)s)"
        )
        parser.add_argument(
            "--quick", action="store_true", help="try the script: less of everything"
        )
        parser.add_argument(
            "--write", action="store_true", help=f"store the result in {PAGE.relative_to(ROOT)}"
        )
        parser.add_argument(
            "--run",
            type=Path,
            default=Path("runs", "claims", name),
            help="where finished measurements are kept, if the script keeps them (default %(default)s)",
        )
        if parts:
            parser.add_argument(
                "--part", choices=parts, help="what to measure (default: one part after the other)"
            )
        options = parser.parse_args()
        if options.seeds < 1:
            parser.error(f"--seeds {options.seeds}: expected 1 or more")
        if options.write and (options.quick or options.seeds < self._whole):
            parser.error(
                f"--write stores whole measurements, of {self._whole} seeds or more without --quick"
            )
        if parts and options.part is None:
            for part in parts:
                subprocess.run([sys.executable, *sys.argv, "--part", part], check=True)
            sys.exit()
        return options

    def directory(self, settings: Mapping[str, Any], name: str = "") -> RunDirectory:
        """Where finished measurements of this section are kept; ``settings`` decide whether they are the same ones.

        Sections that share measurements give a ``name`` of their own.
        """
        name = name or self.name
        manifest = {"claim": name, "quick": self.quick, "torch": torch.__version__, **settings}
        folder = f"{name}-quick" if self.quick else name
        return RunDirectory(self._run / folder, manifest)

    def measured(
        self, kept: RunDirectory, name: str, measure: Callable[[], Mapping[str, Tensor | float]]
    ) -> dict[str, Tensor]:
        """What ``measure`` returns, from the disk if an earlier run of the script already measured it."""
        spent = 0.0

        def timed() -> dict[str, Tensor]:
            nonlocal spent
            started = time.process_time()
            # Numbers keep their precision.
            found = {
                key: value
                if isinstance(value, Tensor)
                else torch.tensor(value, dtype=torch.float64)
                for key, value in measure().items()
            }
            spent = time.process_time() - started
            return {**found, _SECONDS: torch.tensor(spent)}

        found = kept.unit(name, timed)
        self._earlier += float(found.pop(_SECONDS)) - spent
        return found

    def say(self, text: str) -> None:
        """Print a paragraph."""
        self._printed.append(text)
        print(text, end="\n\n", flush=True)

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print a Markdown table under a title; the first column is text, the others are numbers."""
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        self.say(f"**{title}**\n\n{body}")

    def finish(self) -> None:
        """Say what the measurement took and how to repeat it; store it if that was asked for."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        # Of a script that was stopped and run again, only the CPU time adds up to that of one run.
        wall = (time.perf_counter() - self._started) / 60
        self.say(
            f"`{self._command}`: {len(self.seeds)} seeds, "
            f"{(used.ru_utime + used.ru_stime + self._earlier) / 60:.1f} minutes of CPU time "
            f"({'' if self._earlier > 1 else f'{wall:.1f} of wall time, '}{torch.get_num_threads()} threads, "
            f"{used.ru_maxrss / 2**20:.1f} GiB), Python {platform.python_version()}, torch {torch.__version__}."
        )
        if self._write:
            self._store()

    def _store(self) -> None:
        page = PAGE.read_text(encoding="utf-8")
        begin, end = f"<!-- measured: {self.name} -->\n", f"<!-- end: {self.name} -->\n"
        if page.count(begin) != 1 or page.count(end) != 1:
            sys.exit(
                f"{PAGE} has no section between {begin.strip()} and {end.strip()}: add the two lines"
            )
        before, rest = page.split(begin)
        after = rest.split(end)[1]
        measured = "\n\n".join(self._printed)
        with atomic_write(PAGE) as path:
            path.write_text(f"{before}{begin}\n{measured}\n\n{end}{after}", encoding="utf-8")


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds; one number where all values are the same.

    The deviation has two digits and the mean as many decimals, at least ``digits`` significant ones.
    """
    mean = math.fsum(values) / len(values)
    if min(values) == max(values):
        return f"{values[0]:.{_places(values[0], digits)}f}"
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    places = max(_places(mean, digits), _places(deviation, 2))
    return f"{mean:.{places}f} ± {deviation:.{places}f}"


def share(flags: Sequence[bool]) -> str:
    """``4 of 5``."""
    return f"{sum(flags)} of {len(flags)}"


def _places(value: float, digits: int) -> int:
    if not value or not math.isfinite(value):
        return 0
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))


def data_directory() -> Path | None:
    """The real checkpoint and texts that are not part of this project: ``POSTLUDE_DATA``, or ``../shared/data``."""
    found = Path(os.environ.get("POSTLUDE_DATA", ROOT.parent / "shared" / "data"))
    return found if (found / "stories260k").is_dir() else None


def documents(path: Path, characters: int | None = None) -> list[str]:
    """Documents of a text file, the first one cut at a number of characters."""
    found = read_documents(path)
    return found if characters is None else [found[0][:characters]]
