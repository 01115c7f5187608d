"""What two ranks of torchrun gain over one, verb by verb.

    python benchmarks/ranks.py [--verbs evaluate,quantize,build,tune]

Each verb runs on one process and on two, which meet as those of ``torchrun --standalone`` do, with one thread each.
Work is the processor time of the slowest rank without that of importing and loading, so that other programs on the
machine do not count; what ranks wait for each other is in the wall time only. Ratios are one rank over two.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ZOO = Path(__file__).parents[1] / "src" / "postlude" / "zoo" / "checkpoints" / "tiny-lm"
MODEL = "zoo:tiny-lm"


def run(words: list[str], size: int) -> tuple[float, float, str]:
    """Wall seconds, processor seconds of the slowest rank, and what the first rank said on the standard error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = time.perf_counter()
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(size):
            environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            if size > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            with open(Path(folder) / str(rank), "w") as errors:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "postlude", *words],
                        env=environment,
                        stdout=subprocess.DEVNULL,
                        stderr=errors,
                    )
                )
        used = []
        for process in processes:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            used.append(usage.ru_utime + usage.ru_stime)
        said = (Path(folder) / "0").read_text()
        if any(process.returncode for process in processes):
            raise SystemExit(f"{' '.join(words)} on {size}: {said}")
    return time.perf_counter() - started, max(used), said


def verbs(folder: Path) -> dict[str, list[list[str]]]:
    """The command on one rank and on two, which differ in the batch of a rank."""
    text = (ZOO / "held_out.txt").read_text()
    small, large, data = folder / "small.txt", folder / "large.txt", folder / "data.jsonl"
    small.write_text(text[:4000])
    large.write_text(text[:120_000])
    rows = [{"text": text[200 * n : 200 * n + 400]} for n in range(400)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = folder / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in rows[:128]))
    rounded = ["quantize", MODEL, "-m", "gptq", "--bits", "w4", "--calibration", str(large)]
    rounded += ["--samples", "64", "--length", "512", "--no-check", "--overwrite", "-o"]
    plain = ["quantize", MODEL, "-m", "rtn", "--bits", "w4", "--set", "clip=true", "--no-check"]
    indexed = ["attribute", "build", MODEL, str(data), "--shard-examples", "25", "--overwrite"]
    tuned = ["tune", MODEL, str(few), "--overwrite"]
    return {
        "load": [["evaluate", MODEL, "--text", str(small)]] * 2,
        "evaluate": [["evaluate", MODEL, "--text", str(large)]] * 2,
        "quantize rtn, clip search": [[*plain, "--overwrite", "-o", str(folder / "r")]] * 2,
        "quantize gptq": [[*rounded, str(folder / "q")]] * 2,
        "attribute build": [[*indexed, "-o", str(folder / "i")]] * 2,
        "tune": [
            [*tuned, "--batch-size", "8", "-o", str(folder / "t1")],
            [*tuned, "--batch-size", "4", "-o", str(folder / "t2")],
        ],
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--verbs", help="comma-separated; all by default")
    chosen = parser.parse_args().verbs
    with tempfile.TemporaryDirectory() as folder:
        jobs = verbs(Path(folder))
        _, base, _ = run(jobs.pop("load")[0], 1)
        print(f"importing and loading: {base:.1f} s of processor time on every rank\n")
        print("| verb | one rank, s of work | two ranks, s of work | ratio | ratio of wall times |")
        print("| --- | --- | --- | --- | --- |", flush=True)
        for name, (one, two) in jobs.items():
            if chosen and name.split()[0] not in chosen.replace("build", "attribute").split(","):
                continue
            wall, work, _ = run(one, 1)
            wall_two, work_two, said = run(two, 2)
            ratio = (work - base) / (work_two - base)
            print(
                f"| {name} | {work - base:.1f} | {work_two - base:.1f} | {ratio:.2f} | "
                f"{wall / wall_two:.2f} |",
                flush=True,
            )
            for line in said.splitlines():
                if "exchanged" in line:
                    print(f"\n{name}: {line}\n", flush=True)


if __name__ == "__main__":
    main()
