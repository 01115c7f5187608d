"""Build an index undisturbed, killed at chosen steps of its work with the file system, and with two processes.

Run as ``python interrupted.py MODEL DATA OUT COUNT``. A build runs whole, and its steps are counted. For ``COUNT`` of
them, at random, a build runs in a child that is sent SIGKILL right before that step, and once more unharmed. At last
two processes share a build, as ``torchrun`` starts them. What is found is printed, one JSON object a line.

Forks need no second import of PyTorch, which is where the time of a real kill goes.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

STEPS = ("mkdir", "fsync", "rename", "replace", "unlink", "open")


def contents(directory: Path) -> dict[str, str]:
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def fork(work: Callable[[], None], environment: Mapping[str, str] | None = None) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.environ.update(environment or {})
        work()
        code = 0
    finally:
        os._exit(code)


def ended(process: int) -> int:
    """Exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def counting(kill_at: int | None, counted: int, build: Callable[[], None]) -> Callable[[], None]:
    def work() -> None:
        seen = 0

        def wrap(call: Callable[..., Any], name: str) -> Callable[..., Any]:
            def counted_call(*args: Any, **kwargs: Any) -> Any:
                nonlocal seen
                if name != "open" or args[1] & (os.O_WRONLY | os.O_RDWR):
                    seen += 1
                    if seen == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return counted_call

        for name in STEPS:
            setattr(os, name, wrap(getattr(os, name), name))
        build()
        os.write(counted, f"{seen}\n".encode())

    return work


def main() -> None:
    model, data, out, count = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    import torch

    torch.set_num_threads(1)
    from postlude import registry
    from postlude.attribution.build import build
    from postlude.attribution.examples import Collection
    from postlude.attribution.lorif import LoRIF
    from postlude.runs.loading import load

    registry.available()
    opened = load(model)
    collection = Collection(shard_examples=4, tokens_per_batch=120)

    def into(path: Path) -> Callable[[], None]:
        def work() -> None:
            build(opened, data, LoRIF(format="int8"), path, collection=collection)

        return work

    read, write = os.pipe()
    whole = out / "whole"
    code = ended(fork(counting(None, write, into(whole))))
    steps = int(os.read(read, 100))
    print(json.dumps({"code": code, "steps": steps, "files": contents(whole)}), flush=True)
    for step in sorted(random.sample(range(1, steps + 1), count)):
        path = out / "killed"
        shutil.rmtree(path, ignore_errors=True)
        killed = ended(fork(counting(step, write, into(path))))
        shards = len([name for name in contents(path) if name.endswith("safetensors")])
        code = ended(fork(into(path)))
        record = {"step": step, "killed": killed, "shards": shards, "code": code}
        print(json.dumps({**record, "files": contents(path)}), flush=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    path = out / "shared"
    pair = [fork(into(path), {**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    codes = [ended(process) for process in pair]
    print(json.dumps({"codes": codes, "files": contents(path)}), flush=True)


if __name__ == "__main__":
    main()
