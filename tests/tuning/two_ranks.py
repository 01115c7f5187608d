"""Runs on every rank of torchrun: ``two_ranks.py CHECKPOINT DATA OUT RULE KEY=VALUE ...`` trains once for each rule."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from postlude import registry
from postlude.runs.loading import load
from postlude.tuning.objective import TuneRun
from postlude.tuning.run import main_process, tune
from postlude.tuning.supervised import objective_of


def main(checkpoint: str, data: str, out: str, run: str, rules: str) -> None:
    torch.set_num_threads(1)
    for rule, settings in json.loads(rules).items():
        goal = objective_of(registry.find("tune", rule).settings(**settings))
        tune(
            load(checkpoint, device="cpu"),
            data,
            goal,
            TuneRun(**json.loads(run)),
            out=Path(out) / rule,
        )
    if main_process():
        print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
