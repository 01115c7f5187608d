"""A model together with what is needed to work on it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from postlude.runs.atomic import atomic_directory
from postlude.runs.quiet import quiet_transformers
from postlude.runs.selfcheck import RELOAD, Reload, compare_reload
from postlude.surgery.anatomy import Anatomy

__all__ = ["Checkpoint"]


@dataclass
class Checkpoint:
    """A loaded model, its tokenizer and its anatomy.

    Attributes:
        model: a transformers causal language model.
        tokenizer: None where the checkpoint has none; then nothing that needs text can be done.
        anatomy: where the parts of ``model`` are.
        path: the directory it was loaded from or saved to; None while ``model`` exists only in
            memory.
        reload: what a fresh process made of the files when it was last saved with ``check``.
    """

    model: Any
    tokenizer: Any
    anatomy: Anatomy
    path: Path | None = None
    reload: Reload | None = None

    @property
    def context(self) -> int:
        """The longest sequence, in tokens, that the model was made for."""
        return self.anatomy.context

    def save(
        self, out: str | os.PathLike[str], overwrite: bool = False, check: bool = False
    ) -> Path:
        """Write a Hugging Face directory that transformers loads after ``import postlude``.

        The directory appears by a rename once everything in it is on the disk: a kill leaves the old one, or
        none. A quantized model keeps its packed codes.

        Args:
            out: the directory.
            overwrite: replace a checkpoint that is already there.
            check: have a fresh process load the files, and compare its logits with those of the model in memory,
                before the directory appears. Takes seconds, and the memory of a second model.

        Raises:
            OutputExistsError: ``out`` exists and ``overwrite`` is False, or ``out`` is no checkpoint.
            VerificationError: the files, read again, are another model; the directory does not appear.
        """
        with atomic_directory(out, overwrite, marker="config.json") as directory:
            self.write(directory)
            if check:
                self.reload = self._read_again(directory, os.fspath(out))
        self.path = Path(out).resolve()
        return self.path

    def write(self, directory: Path) -> None:
        """Write the files of :meth:`save` into a directory that is there."""
        with quiet_transformers():
            self.model.save_pretrained(directory)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)
        for file in directory.glob("*.safetensors"):
            # The library writes weights for their owner alone; give them the permissions of the rest.
            shutil.copymode(directory / "config.json", file)

    def _read_again(self, directory: Path, name: str) -> Reload:
        wide = self.model.dtype not in (torch.float16, torch.bfloat16)
        dtype = str(self.model.dtype).removeprefix("torch.") if wide else "float32"
        arguments = [str(directory), dtype, str(self.model.device)]
        return compare_reload(self.model, self.anatomy, RELOAD, arguments, what=name)

    def fingerprint(self) -> str:
        """SHA-256 over the configuration, and names, types, shapes and bytes of parameters and buffers."""
        config = self.model.config.to_dict()
        for key in ("_name_or_path", "transformers_version"):  # say nothing about the model
            config.pop(key, None)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()
