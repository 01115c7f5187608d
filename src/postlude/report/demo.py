"""The demonstration: inspect the built-in model, quantize it by five methods, measure each, write a page.

    out/report.html      what was found, for a person
    out/results.json     every number of it
    out/offq/            one of the quantized models, to be loaded again
    out/text/            the calibration and the held-out text, so that the printed commands can be repeated

Everything goes through the public verbs, by the same calls as the printed commands. A method is measured on the
checkpoint it saved, loaded again. Finished steps are kept beside ``out`` (``.NAME.run``) until everything is
written: a demonstration that was killed resumes from them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import postlude
from postlude import registry
from postlude.errors import DataError
from postlude.evaluation.size import size_of
from postlude.report import page
from postlude.report.demo_plan import KEPT, Plan, built_in
from postlude.report.environment import environment
from postlude.report.stream_error import StreamError
from postlude.runs.atomic import atomic_directory, check_replaceable
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.directory import RunDirectory
from postlude.runs.documents import calibration_windows, encode
from postlude.runs.progress import Progress
from postlude.surgery.layers import QuantizedLinear

__all__ = ["Verbs", "demo"]

_MARKER = "results.json"


@dataclasses.dataclass(frozen=True)
class Verbs:
    """The public functions that the demonstration goes through, which are a layer above this one."""

    load: Callable[..., Checkpoint]
    inspect: Callable[..., dict[str, Any]]
    quantize: Callable[..., Checkpoint]
    evaluate: Callable[..., dict[str, Any]]


def demo(
    verbs: Verbs,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
    plan: Plan | None = None,
) -> dict[str, Any]:
    """Run the demonstration and write its report.

    Args:
        verbs: the front door.
        out: the directory to make.
        seed: of every random choice.
        overwrite: replace an earlier demonstration.
        progress: where to show it; bars on the standard error, where that is a terminal, when None.
        plan: what to do, if not the usual.

    Returns:
        ``report``, ``results``, ``checkpoint`` (paths), ``seconds``, and ``methods``: a row of numbers each.

    Raises:
        OutputExistsError: ``out`` exists and ``overwrite`` is False, or it is no earlier demonstration.
    """
    target = Path(os.path.realpath(out))
    check_replaceable(target, overwrite, _MARKER)
    started = time.perf_counter()
    with progress or Progress(show=True) as shown:
        store = target.with_name(f".{target.name}.run")
        run = _Run(verbs, plan or built_in(), seed, store, shown)
        results = run.results()
        if plan is None:
            results["command"] = f"postlude demo --seed {seed} -o demo"
        results["seconds"] = time.perf_counter() - started
        with atomic_directory(target, overwrite, _MARKER) as directory:
            run.move_into(directory)
            text = json.dumps(results, ensure_ascii=False, allow_nan=False, indent=1)
            (directory / _MARKER).write_text(text + "\n", encoding="utf-8")
            (directory / "report.html").write_text(page.render(results), encoding="utf-8")
        run.forget()
    return {
        "report": str(target / "report.html"),
        "results": str(target / _MARKER),
        "checkpoint": str(target / KEPT),
        "seconds": results["seconds"],
        "methods": [{key: row.get(key) for key in _SUMMARY} for row in results["methods"]],
    }


_SUMMARY = ("name", "perplexity", "kl", "top1_agreement", "bytes", "bits_per_weight", "seconds")


class _Run:
    """One demonstration: its models, and what is finished.

    Args:
        verbs: the front door.
        plan: what to do.
        seed: of every random choice.
        directory: where finished steps are kept.
        progress: where to show it.
    """

    def __init__(
        self, verbs: Verbs, plan: Plan, seed: int, directory: Path, progress: Progress
    ) -> None:
        self._verbs, self._plan, self._seed, self._progress = verbs, plan, seed, progress
        # As it is stored, to be quantized; in fp32, to be measured.
        self._stored = self._verbs.load(plan.model)
        self._float = self._verbs.load(plan.model, dtype="float32")
        if self._float.tokenizer is None:
            raise DataError(f"{plan.model} has no tokenizer, so there is nothing to demonstrate on")
        self._store = RunDirectory(directory, self._manifest(), overwrite=True)
        self._models = directory / "models"
        self._texts = directory / "text"
        self._texts.mkdir(exist_ok=True)
        self._calibration = self._texts / "calibration.txt"
        self._calibration.write_text(plan.calibration, encoding="utf-8")
        self._held_out = self._texts / "held_out.txt"
        self._held_out.write_text(plan.held_out, encoding="utf-8")
        self._tokens = _windows(self._float, plan)
        self._stream = StreamError(self._float, self._tokens)

    def results(self) -> dict[str, Any]:
        """Everything that the page shows."""
        plan, model = self._plan, self._float
        steps: list[tuple[str, Callable[[], Any]]] = [
            ("inspect", self._inspect),
            ("float", self._measure_float),
            *((method, lambda method=method: self._measure(method)) for method in plan.methods),
        ]
        found = {
            step: self._remember(step, compute)
            for step, compute in self._progress.iterate(steps, "demo")
        }
        weights = sum(p.numel() for p in model.model.parameters())
        return {
            "format": 1,
            "title": f"{_short(plan.model)} in {plan.bits_word.upper()}",
            "model": {
                "name": _short(plan.model),
                "architecture": type(model.model).__name__,
                "parameters": weights,
                "blocks": len(model.anatomy.blocks),
                "hidden_size": model.anatomy.hidden_size,
                "vocabulary": len(model.tokenizer),
                "context": model.context,
                "stored_dtype": str(self._stored.model.dtype).removeprefix("torch."),
            },
            "settings": {
                "bits": dict(zip(("weights", "activations", "kv"), plan.bits, strict=True)),
                "activation_group": plan.activation_group,
                "samples": plan.samples,
                "length": plan.length,
                "max_length": plan.max_length,
                "error_windows": len(self._tokens),
                "seed": self._seed,
            },
            "inspections": found["inspect"],
            "methods": [found["float"], *(found[method] for method in plan.methods)],
            "prompt": plan.prompt,
            "commands": plan.commands(self._seed),
            "python": plan.python(self._seed),
            "environment": environment(),
        }

    def move_into(self, directory: Path) -> None:
        """Put the files of the demonstration into its directory."""
        kept = self._models / KEPT
        if kept.is_dir():
            shutil.copytree(kept, directory / KEPT)
        shutil.copytree(self._texts, directory / self._texts.name)

    def forget(self) -> None:
        """Remove the finished steps."""
        shutil.rmtree(self._store.path)

    def _manifest(self) -> dict[str, Any]:
        plan = self._plan
        texts = ("calibration", "held_out")
        return {
            "postlude": postlude.__version__,
            "verb": "demo",
            "plan": {
                name: hashlib.sha256(value.encode()).hexdigest() if name in texts else value
                for name, value in dataclasses.asdict(plan).items()
            },
            "settings": [dataclasses.asdict(plan.settings(name)) for name in plan.methods],
            "model": self._stored.fingerprint(),
            "device": self._float.model.device.type,
            "seed": self._seed,
        }

    def _remember(self, step: str, compute: Callable[[], Any]) -> Any:
        """The value of a step, in the types of JSON: read if the step is finished, else computed and stored."""

        def tensors() -> Mapping[str, Tensor]:
            text = json.dumps(_plain(compute()), allow_nan=False)
            return {"json": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}

        return json.loads(bytes(self._store.unit(step, tensors)["json"].tolist()))

    def _inspect(self) -> dict[str, Any]:
        reports = self._verbs.inspect(
            self._float,
            self._plan.inspections,
            text=self._calibration,
            seed=self._seed,
            progress=self._progress,
        )
        return {name: report.to_dict() for name, report in reports.items()}

    def _measure_float(self) -> dict[str, Any]:
        result = self._verbs.evaluate(
            self._float,
            self._held_out,
            max_length=self._plan.max_length,
            progress=self._progress,
        )
        return {
            "name": "float",
            "baseline": True,
            "summary": "The model as it was trained.",
            **_chosen(result),
            **size_of(self._stored),
            **self._continue(self._float),
        }

    def _measure(self, name: str) -> dict[str, Any]:
        plan, info = self._plan, registry.find("quantize", name)
        path = self._models / name
        started = time.perf_counter()
        self._verbs.quantize(
            self._stored,
            plan.settings(name),
            calibration=self._calibration,
            samples=plan.samples,
            length=plan.length,
            seed=self._seed,
            out=path,
            overwrite=True,
            progress=self._progress,
        )
        seconds = time.perf_counter() - started
        small = self._verbs.load(path, dtype="float32")
        result = self._verbs.evaluate(
            small,
            self._held_out,
            reference=self._float,
            max_length=plan.max_length,
            progress=self._progress,
        )
        row = {
            "name": name,
            "baseline": False,
            "summary": info.summary,
            "paper": info.paper,
            **_chosen(result),
            "bits_per_activation": _bits_per_activation(small),
            "seconds": seconds,
            "layer_error": self._stream.of(small),
            **self._continue(small),
        }
        if name != KEPT:
            shutil.rmtree(path)
        return row

    def _continue(self, checkpoint: Checkpoint) -> dict[str, Any]:
        ids = torch.tensor([encode(checkpoint.tokenizer, self._plan.prompt)])
        ids = ids.to(checkpoint.model.device)
        with torch.no_grad():
            output = checkpoint.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self._plan.new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        new = output[0, ids.shape[1] :].tolist()
        text = checkpoint.tokenizer.decode(new, skip_special_tokens=True)
        return {"continuation": text, "continuation_tokens": new}


def _chosen(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of an evaluation."""
    names = ("loss", "perplexity", "tokens", "kl", "top1_agreement", "bytes", "bits_per_weight")
    return {name: result[name] for name in names if name in result}


def _plain(value: Any) -> Any:
    """``value`` with what JSON cannot write, infinity and NaN, as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _windows(checkpoint: Checkpoint, plan: Plan) -> Tensor:
    """``[error_windows, max_length]`` tokens of held-out text, every second window starting with BOS."""
    length = min(plan.max_length, checkpoint.context)
    return calibration_windows(
        checkpoint.tokenizer,
        [plan.held_out],
        plan.error_windows,
        length,
        seed=0,
        context=checkpoint.context,
    )


def _short(model: str) -> str:
    """A model as a reader knows it: without the folders that it happens to lie in."""
    return model.removeprefix("zoo:") if model.startswith("zoo:") else Path(model).name


def _bits_per_activation(checkpoint: Checkpoint) -> float | None:
    """Bits of one entry of what the linears read, scales and zero points included; None if they read floats."""
    bits = width = 0.0
    for _, site in checkpoint.anatomy.sites():
        layer = checkpoint.model.get_submodule(site.modules[0])
        if isinstance(layer, QuantizedLinear) and layer.input_scheme is not None:
            bits += layer.input_scheme.effective_bits(site.width) * site.width
            width += site.width
    return bits / width if width else None
