"""Postlude: everything that happens to a model after pretraining.

    import postlude as pl
    from postlude.quantization import OffQ

    model = pl.load("path/to/checkpoint")
    reports = pl.inspect(model, ["outliers", "singular-defects"])
    small = pl.quantize(model, OffQ(weights=4, activations=4, kv=4), calibration=texts)
    small.save("out/")

Verbs are functions of this module, nouns are its sub-packages. Importing it loads neither PyTorch nor
transformers: a verb brings what it needs when it is first used. What the import does do is teach
transformers, now or as soon as somebody imports it, to load checkpoints that Postlude quantized.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from postlude import _transformers_hook, errors
from postlude.errors import PostludeError

if TYPE_CHECKING:
    from postlude._front_door import (
        attribute,
        evaluate,
        evaluate_lds,
        evaluate_pose,
        evaluate_retrieval,
        evaluate_samples,
        evaluate_speech,
        explain,
        export,
        fit,
        generate,
        inspect,
        load,
        quantize,
        render,
        run,
        sample,
        sample_calibrate,
        tune,
        tune_prior,
    )

__all__ = [
    "PostludeError",
    "__version__",
    "attribute",
    "errors",
    "evaluate",
    "evaluate_lds",
    "evaluate_pose",
    "evaluate_retrieval",
    "evaluate_samples",
    "evaluate_speech",
    "explain",
    "export",
    "fit",
    "generate",
    "inspect",
    "load",
    "quantize",
    "render",
    "run",
    "sample",
    "sample_calibrate",
    "tune",
    "tune_prior",
]

__version__ = "0.1.0"

_VERBS = tuple(set(__all__) - {"PostludeError", "__version__", "errors"})

_transformers_hook.install()


def __getattr__(name: str) -> object:
    if name not in _VERBS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    verb = getattr(importlib.import_module("postlude._front_door"), name)
    globals()[name] = verb
    return verb


def __dir__() -> list[str]:
    return sorted(__all__)
