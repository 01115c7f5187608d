"""What Postlude costs before it does anything: the size of its wheel, and the time of an import and of ``--help``.

    python benchmarks/footprint.py [--repeat 15]

The wheel is built from this checkout (``pip wheel . --no-deps``, which fetches the build backend) and its parts are
shown as they are inside: compressed. Times are CPU seconds of fresh processes, the least of the repetitions, which
other work on the machine does not stretch, beside a Python that does nothing. Bytecode is kept in a folder of this
run, as an installation keeps it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STARTS = {
    "python": ("-c", "pass"),
    "import postlude": ("-c", "import postlude"),
    "postlude --help": ("-m", "postlude", "--help"),
    "postlude quantize --help": ("-m", "postlude", "quantize", "--help"),
    "postlude methods": ("-m", "postlude", "methods"),
}


def cpu_seconds(arguments: tuple[str, ...], environment: dict[str, str]) -> float:
    """Of one fresh process."""
    process = subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"python {' '.join(arguments)} ended with {process.returncode}")
    return used.ru_utime + used.ru_stime


def starts(repeat: int) -> None:
    """Print the table of times."""
    print("| start | CPU seconds | without Python's own |\n| --- | ---: | ---: |")
    with tempfile.TemporaryDirectory() as kept:
        environment = {
            **os.environ,
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONPYCACHEPREFIX": kept,
            "OMP_NUM_THREADS": "1",
        }
        own = 0.0
        for name, arguments in STARTS.items():
            # The first one compiles.
            found = min([cpu_seconds(arguments, environment) for _ in range(repeat + 1)][1:])
            own = own or found
            print(f"| {name} | {found:.3f} | {found - own:.3f} |", flush=True)


def wheel() -> None:
    """Build it and print the table of its parts."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "-q", "-w", folder]
        subprocess.run(command, check=True)
        (built,) = Path(folder).glob("*.whl")
        parts: Counter[str] = Counter()
        whole: Counter[str] = Counter()
        with zipfile.ZipFile(built) as archive:
            for entry in archive.infolist():
                words = entry.filename.split("/")
                if words[0] != "postlude":
                    name = "metadata"
                elif "checkpoints" in words:
                    name = "/".join(words[1:4])
                else:
                    name = words[1] if len(words) > 2 else "modules beside the packages"
                parts[name] += entry.compress_size
                whole[name] += entry.file_size
        print(f"{built.name}: {built.stat().st_size:,} bytes\n")
        print(
            "| part | bytes in the wheel | share | bytes unpacked |\n| --- | ---: | ---: | ---: |"
        )
        total = sum(parts.values())
        for name, size in parts.most_common(8):
            print(f"| `{name}` | {size:,} | {size / total:.0%} | {whole[name]:,} |")
        rest = total - sum(size for _, size in parts.most_common(8))
        others = sum(whole[name] for name, _ in parts.most_common()[8:])
        print(f"| everything else | {rest:,} | {rest / total:.0%} | {others:,} |\n")


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--repeat", type=int, default=15, help="processes a time is the least of")
    options = parser.parse_args()
    wheel()
    starts(options.repeat)


if __name__ == "__main__":
    main()
