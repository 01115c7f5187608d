"""Checkpoints in the layouts of other libraries, written code by code from their documentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["awq", "decoded", "gptq", "rewrite"]


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def gptq(
    codes: Tensor, zeros: Tensor, scale: Tensor, g_idx: Tensor, bits: int, minus: int
) -> dict[str, Tensor]:
    """``codes [out, in]``, ``zeros`` and ``scale [out, groups]``; ``minus`` is subtracted from whole words."""
    out, width = codes.shape
    per = 32 // bits
    qweight = torch.zeros(width // per, out, dtype=torch.int32)
    for row in range(width // per):
        for column in range(out):
            word = sum(int(codes[column, row * per + i]) << (bits * i) for i in range(per))
            qweight[row, column] = _signed(word)
    groups = zeros.shape[1]
    qzeros = torch.zeros(groups, out // per, dtype=torch.int32)
    ones = sum(minus << (bits * i) for i in range(per))
    for group in range(groups):
        for column in range(out // per):
            word = sum(int(zeros[column * per + i, group]) << (bits * i) for i in range(per))
            qzeros[group, column] = _signed((word - ones) % 2**32)
    return {
        "qweight": qweight,
        "qzeros": qzeros,
        "scales": scale.T.contiguous(),
        "g_idx": g_idx.int(),
    }


def awq(codes: Tensor, zeros: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """``codes [out, in]``, ``zeros`` and ``scale [out, groups]``."""

    def packed(table: Tensor) -> Tensor:
        words = torch.zeros(table.shape[0], table.shape[1] // 8, dtype=torch.int32)
        for row in range(table.shape[0]):
            for column in range(table.shape[1] // 8):
                word = 0
                for place, offset in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                    word |= int(table[row, column * 8 + offset]) << (4 * place)
                words[row, column] = _signed(word)
        return words

    return {"qweight": packed(codes.T), "qzeros": packed(zeros.T), "scales": scale.T.contiguous()}


def decoded(codes: Tensor, zeros: Tensor, scale: Tensor, g_idx: Tensor) -> Tensor:
    """``[out, in]``: ``scale[o, g] (code - zero[o, g])``."""
    groups = g_idx.long()
    return scale.float()[:, groups] * (codes.float() - zeros.float()[:, groups])


def rewrite(source: Path, out: Path, quantization: dict[str, Any], layer: Any) -> Path:
    """Copy a float checkpoint, every linear of its blocks replaced by ``layer(path, weight)``'s tensors."""
    out.mkdir()
    tensors = load_file(source / "model.safetensors")
    made = {}
    for name, tensor in tensors.items():
        path = name.removesuffix(".weight")
        if ".layers." in name and name.endswith("_proj.weight"):
            made |= {f"{path}.{part}": value for part, value in layer(path, tensor).items()}
        else:
            made[name] = tensor
    save_file(made, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    for file in source.glob("token*"):
        (out / file.name).write_bytes(file.read_bytes())
    return out
