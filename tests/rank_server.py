"""Runs command lines of Postlude on several ranks, in forks of one process that has imported everything once.

A job is a line of JSON on the standard input::

    {"argv": ["evaluate", ...], "size": 2, "environment": {}, "kill": {"rank": 1, "step": 7}, "threads": 1}

With ``kill`` that rank is sent SIGKILL right before its ``step``-th write to the file system, with ``stop`` in its
place SIGSTOP, and with ``fail`` it finds the disk full. With
``"after": {"rank": 1, "calls": 5, "of": "postlude.quantization.blocks:Rounding.round"}`` it is killed at the end of
the fifth call of that method. With ``"shard": true`` accelerate cuts the model that is trained (FSDP2).

The answer is a line of JSON: exit codes (minus the signal), standard output and error of each rank, seconds, and how
many steps each took. The ranks meet as those of ``torchrun --standalone`` do, but nobody stops the others when one
ends, so that what they notice by themselves can be seen.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
FAULTS = (*SIGNALS, "fail")
STEPS = ("mkdir", "fsync", "rename", "replace", "unlink", "open")


def interrupt(fault: str, at: int, seen: list[int]) -> None:
    """Let something happen before the ``at``-th step of work with the file system, and count these steps."""

    def wrap(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if name != "open" or args[1] & (os.O_WRONLY | os.O_RDWR):
                seen[0] += 1
                if seen[0] == at and fault == "fail":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if seen[0] == at:
                    os.kill(os.getpid(), SIGNALS[fault])
            return call(*args, **kwargs)

        return counted

    for name in STEPS:
        setattr(os, name, wrap(getattr(os, name), name))


def kill_after(calls: int, of: str) -> None:
    """End this process by SIGKILL at the end of so many calls of a method."""
    module, _, path = of.partition(":")
    owner, _, name = path.partition(".")
    kind = getattr(importlib.import_module(module), owner)
    original = getattr(kind, name)
    left = [calls]

    def called(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(kind, name, called)


def shard() -> None:
    """Let accelerate cut models over ranks (FSDP2) as its configuration would, and on a CPU, which it does not."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    }
    from accelerate import state

    kinds = {kind.name: kind for kind in state.DistributedType}
    state.DistributedType = types.SimpleNamespace(**kinds | {"MULTI_GPU": kinds["MULTI_CPU"]})


def child(job: dict[str, Any], rank: int, port: int, folder: Path) -> None:
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), stream)
    size = job["size"]
    if size > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    os.environ |= job.get("environment", {})
    seen = [0]
    faults = [name for name in FAULTS if job.get(name, {}).get("rank") == rank]
    interrupt(*((faults[0], job[faults[0]]["step"]) if faults else ("", 0)), seen)
    if job.get("shard"):
        shard()
    if job.get("after", {}).get("rank") == rank:
        kill_after(job["after"]["calls"], job["after"]["of"])
    from postlude.cli import run

    code = 1
    try:
        code = run(job["argv"])
    except BaseException:  # noqa: BLE001 - what a traceback would go to
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        (folder / f"steps{rank}").write_text(str(seen[0]))
        os._exit(code)


def serve(job: dict[str, Any]) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.monotonic()
        processes = []
        for rank in range(job["size"]):
            process = os.fork()
            if not process:
                child(job, rank, port, folder)
            processes.append(process)
        codes: dict[int, int] = {}
        seconds: dict[int, float] = {}
        limit = job.get("limit", 250)
        while len(codes) < len(processes):
            for rank, process in enumerate(processes):
                if rank in codes:
                    continue
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    seconds[rank] = time.monotonic() - started
            stopped = job.get("stop", {}).get("rank")
            late = time.monotonic() - started > limit
            if late or set(range(job["size"])) - set(codes) == {stopped}:
                for rank, process in enumerate(processes):
                    if rank not in codes:
                        os.kill(process, signal.SIGKILL)
            time.sleep(0.01)

        def read(kind: str) -> list[str]:
            files = [folder / f"{kind}{rank}" for rank in range(job["size"])]
            return [file.read_text() if file.is_file() else "" for file in files]

        return {
            "codes": [codes[rank] for rank in range(job["size"])],
            "seconds": [seconds[rank] for rank in range(job["size"])],
            "out": read("out"),
            "err": read("err"),
            "steps": [int(text or 0) for text in read("steps")],
        }


def main() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    answers = os.dup(1)
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    import accelerate  # noqa: F401
    import transformers  # noqa: F401
    from transformers import Trainer  # noqa: F401

    import postlude._front_door
    import postlude.cli  # noqa: F401
    from postlude import registry

    registry.available()
    with contextlib.suppress(BrokenPipeError):
        os.write(answers, b'"ready"\n')
        for line in sys.stdin:
            os.write(answers, (json.dumps(serve(json.loads(line))) + "\n").encode())


if __name__ == "__main__":
    main()
