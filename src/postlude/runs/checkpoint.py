"""A model together with what is needed to work on it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from postlude.errors import ArchitectureError
from postlude.runs.atomic import atomic_directory
from postlude.runs.checksums import finish_weights
from postlude.runs.pipeline import INDEX, Pipeline, denoiser_files, write_denoiser
from postlude.runs.quiet import quiet_transformers
from postlude.runs.selfcheck import RELOAD, Reload, compare_outputs, compare_reload
from postlude.runs.weights import weight_files
from postlude.surgery.anatomy import Anatomy, Kind, LanguageAnatomy

__all__ = ["MARKERS", "Checkpoint"]

# A directory with one of these files is a checkpoint.
MARKERS = ("config.json", INDEX)
_INSTEAD = {
    "diffusion": ". `postlude sample` draws its images, `postlude evaluate samples` judges them",
    "vision": ". `postlude evaluate pose` judges one that reads poses, `postlude export --to onnx` writes any",
}


@dataclass
class Checkpoint:
    """A loaded model, its anatomy, and what feeds it.

    Attributes:
        model: a causal language model, an audio language model or a vision model of transformers, or a denoiser of
            diffusers.
        tokenizer: None where the checkpoint has none; then nothing that needs text can be done.
        anatomy: where the parts of ``model`` are.
        path: the directory it was loaded from or saved to; None while ``model`` exists only in
            memory.
        reload: what a fresh process made of the files when it was last saved with ``check``.
        scheduler: of a denoiser, the scheduler of diffusers it was trained for; None where it came alone.
        processor: of a vision model, the image processor of transformers; of an audio language model the processor
            that holds its feature extractor and its tokenizer; None where the checkpoint has none.
        pipeline: of a denoiser, the pipeline that it is a part of; None where it came alone.
    """

    model: Any
    tokenizer: Any
    anatomy: Anatomy
    path: Path | None = None
    reload: Reload | None = None
    scheduler: Any = None
    processor: Any = None
    pipeline: Pipeline | None = None

    @property
    def kind(self) -> Kind:
        """``language``, ``diffusion``, ``vision`` or ``audio``."""
        return self.anatomy.kind

    @property
    def reads_tokens(self) -> bool:
        """Whether there is a language model: alone, or in an audio language model."""
        return isinstance(self.anatomy, LanguageAnatomy)

    @property
    def language(self) -> LanguageAnatomy:
        """The anatomy of a language model, or of the one in an audio language model.

        Raises:
            ArchitectureError: the model is of another kind.
        """
        if not isinstance(self.anatomy, LanguageAnatomy):
            name = f"{self.path or 'this checkpoint'} is a {self.kind} model"
            raise ArchitectureError(
                f"{name} ({self.anatomy.family}); this works on language models only{_INSTEAD.get(self.kind, '')}"
            )
        return self.anatomy

    @property
    def context(self) -> int:
        """The longest sequence, in tokens, that a language model was made for."""
        return self.language.context

    def save(
        self, out: str | os.PathLike[str], overwrite: bool = False, check: bool = False
    ) -> Path:
        """Write a Hugging Face directory that transformers loads after ``import postlude``.

        A denoiser is written in the layout of diffusers, with its scheduler and the other parts of its pipeline;
        a quantized one is read again by :func:`postlude.load` only. The directory appears by a rename once
        everything in it is on the disk: a kill leaves the old one, or none. A quantized model keeps its packed
        codes.

        Args:
            out: the directory.
            overwrite: replace a checkpoint that is already there.
            check: have a fresh process load the files, and compare its output with that of the model in memory,
                before the directory appears. Takes seconds, and the memory of a second model.

        Raises:
            OutputExistsError: ``out`` exists and ``overwrite`` is False, or ``out`` is no checkpoint.
            VerificationError: the files, read again, are another model; the directory does not appear.
        """
        with atomic_directory(out, overwrite, marker=MARKERS) as directory:
            self.write(directory)
            if check:
                self.reload = self._read_again(directory, os.fspath(out))
        self.path = Path(out).resolve()
        return self.path

    def write(self, directory: Path) -> None:
        """Write the files of :meth:`save` into a directory that is there."""
        if self.kind == "diffusion":
            write_denoiser(directory, self.model, self.scheduler, self.pipeline)
            return
        with quiet_transformers():
            self.model.save_pretrained(directory)
        for part in (self.tokenizer, self.processor):
            if part is not None:
                part.save_pretrained(directory)
        finish_weights(directory, "config.json")

    def _read_again(self, directory: Path, name: str) -> Reload:
        wide = self.model.dtype not in (torch.float16, torch.bfloat16)
        dtype = str(self.model.dtype).removeprefix("torch.") if wide else "float32"
        arguments = [str(directory), dtype, str(self.model.device)]
        if not self.reads_tokens:
            return compare_outputs(self.model, self.anatomy, arguments, what=name)
        return compare_reload(self.model, self.language, RELOAD, arguments, what=name)

    def files(self) -> list[Path]:
        """The weight files of the directory it was loaded from or saved to; none while it is in memory only."""
        if self.path is None:
            return []
        return denoiser_files(self.path) if self.kind == "diffusion" else weight_files(self.path)

    def made_by(self) -> dict[str, Any]:
        """Of a quantized model: ``method``, ``settings``, ``seed``, ``kept`` and more; empty for a float one."""
        config = getattr(self.model.config, "quantization_config", None)
        if config is None:
            return {}
        made: dict[str, Any] = config["made_by"] if isinstance(config, dict) else config.made_by
        return made

    def fingerprint(self) -> str:
        """SHA-256 over the configuration, and names, types, shapes and bytes of parameters and buffers."""
        config = self.model.config
        config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        for key in ("_name_or_path", "transformers_version"):  # say nothing about the model
            config.pop(key, None)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()
