"""The verbs. Each loads what it is given, calls one noun, and hands the result back.

A verb's file, and with it the noun behind it, is imported when the verb is first asked for.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from postlude._front_door.attributing import (
        attribute,
        attribution_learn_weights,
        attribution_query,
        attribution_verify,
    )
    from postlude._front_door.calibrating import sample_calibrate
    from postlude._front_door.demonstrating import demo
    from postlude._front_door.evaluating import evaluate, evaluate_lds, evaluate_retrieval
    from postlude._front_door.exporting import export
    from postlude._front_door.generating import generate
    from postlude._front_door.inspecting import compare, inspect, kernels
    from postlude._front_door.judging_poses import evaluate_pose
    from postlude._front_door.judging_samples import evaluate_samples
    from postlude._front_door.judging_speech import evaluate_speech, explain
    from postlude._front_door.opening import load
    from postlude._front_door.planning import attribution_plan
    from postlude._front_door.quantizing import quantize
    from postlude._front_door.running import forecast, report, run
    from postlude._front_door.sampling import sample
    from postlude._front_door.selecting import attribution_damage, attribution_select
    from postlude._front_door.signals import fit, render
    from postlude._front_door.text import built_in_text, calibration_tokens
    from postlude._front_door.tuning import tune, tune_prior

__all__ = [
    "Rehearsed",
    "attribute",
    "attribution_damage",
    "attribution_learn_weights",
    "attribution_plan",
    "attribution_query",
    "attribution_select",
    "attribution_verify",
    "built_in_text",
    "calibration_tokens",
    "compare",
    "demo",
    "evaluate",
    "evaluate_lds",
    "evaluate_pose",
    "evaluate_retrieval",
    "evaluate_samples",
    "evaluate_speech",
    "explain",
    "export",
    "fit",
    "forecast",
    "generate",
    "inspect",
    "kernels",
    "load",
    "quantize",
    "rehearsal",
    "render",
    "report",
    "run",
    "sample",
    "sample_calibrate",
    "tune",
    "tune_prior",
]

_FILES = {
    "attribute": "attributing",
    "attribution_damage": "selecting",
    "attribution_learn_weights": "attributing",
    "attribution_plan": "planning",
    "attribution_query": "attributing",
    "attribution_select": "selecting",
    "attribution_verify": "attributing",
    "built_in_text": "text",
    "calibration_tokens": "text",
    "compare": "inspecting",
    "demo": "demonstrating",
    "evaluate": "evaluating",
    "evaluate_lds": "evaluating",
    "evaluate_pose": "judging_poses",
    "evaluate_retrieval": "evaluating",
    "evaluate_samples": "judging_samples",
    "evaluate_speech": "judging_speech",
    "explain": "judging_speech",
    "export": "exporting",
    "fit": "signals",
    "forecast": "running",
    "generate": "generating",
    "inspect": "inspecting",
    "kernels": "inspecting",
    "load": "opening",
    "quantize": "quantizing",
    "render": "signals",
    "report": "running",
    "run": "running",
    "sample": "sampling",
    "sample_calibrate": "calibrating",
    "tune": "tuning",
    "tune_prior": "tuning",
}


def __getattr__(name: str) -> object:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    verb = getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
    globals()[name] = verb
    return verb


class Rehearsed(Exception):
    """A verb was reached, in a :func:`rehearsal`."""


@contextlib.contextmanager
def rehearsal() -> Iterator[None]:
    """Verbs raise :class:`Rehearsed` meanwhile: what comes before them is done, such as to read a command line."""
    kept = {name: globals()[name] for name in _FILES if name in globals()}
    globals().update(dict.fromkeys(_FILES, _rehearsed))
    try:
        yield
    finally:
        for name in _FILES:
            del globals()[name]
        globals().update(kept)


def _rehearsed(*_: Any, **__: Any) -> NoReturn:
    raise Rehearsed
