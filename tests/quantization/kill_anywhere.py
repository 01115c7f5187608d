"""Kill ``postlude quantize`` at chosen steps of its work with the file system.

Run as ``python kill_anywhere.py COUNT OUT WORDS...``: the command line ``WORDS -o OUT.whole`` runs undisturbed, and
its steps are counted. Then, for ``COUNT`` of them (``all``, or that many at random), ``WORDS -o OUT`` runs in a child
that is sent SIGKILL right before that step, and once more unharmed. If there is an ``OUT.before``, a copy of it is
there whenever a run starts. What is found is printed, one JSON object a line.

A fork needs no second import of PyTorch, which is where the time of a real kill goes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS = ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir", "link", "open")


def contents(directory: Path) -> dict[str, str] | None:
    if not directory.is_dir():
        return None
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.iterdir())
    }


def command(words: list[str]) -> int:
    from postlude.cli import run

    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return run(words)


def child(words: list[str], kill_at: int | None, counted: int) -> int:
    """Exit code of the command, or minus the signal that ended it."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    seen = 0

    def counting(call: Callable[..., Any], write_only: bool) -> Callable[..., Any]:
        def counted_call(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            if not write_only or args[1] & (os.O_WRONLY | os.O_RDWR):
                seen += 1
                if seen == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counted_call

    for name in STEPS:
        setattr(os, name, counting(getattr(os, name), name == "open"))
    code = 1
    try:
        code = command(words)
    finally:
        os.write(counted, f"{seen}\n".encode())
        os._exit(code)


def main() -> None:
    count, out, words = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    import torch

    torch.set_num_threads(1)
    from postlude import _front_door, registry  # noqa: F401

    registry.available()
    # Everything that a run imports, once for all children.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    command([*words, "-o", f"{out}.warm"])
    shutil.rmtree(f"{out}.warm")
    whole, before = Path(f"{out}.whole"), Path(f"{out}.before")
    read, write = os.pipe()
    code = child([*words, "-o", str(whole)], None, write)
    steps = int(os.read(read, 100))
    print(json.dumps({"code": code, "steps": steps, "files": contents(whole)}), flush=True)
    chosen = range(1, steps + 1)
    if count != "all":
        chosen = sorted(random.sample(chosen, int(count)))

    words += ["-o", str(out)]
    for step in chosen:
        for path in out.parent.glob(f"*{out.name}*"):
            if path not in (before, whole):
                shutil.rmtree(path)
        if before.is_dir():
            shutil.copytree(before, out)
        killed = child(words, step, write)
        after_kill = contents(out)
        code = child(words, None, write)
        os.read(read, 100)
        kept = (before, whole, out)
        left = sorted(p.name for p in out.parent.glob(f"*{out.name}*") if p not in kept)
        record = {"step": step, "killed": killed, "after_kill": after_kill, "code": code}
        print(json.dumps({**record, "files": contents(out), "left": left}), flush=True)


if __name__ == "__main__":
    main()
