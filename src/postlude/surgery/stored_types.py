"""Buffers that keep the type they are stored in, whatever the model around them is cast to."""

from __future__ import annotations

from typing import Any, Self

from torch import nn

__all__ = ["StoredTypes"]


class StoredTypes(nn.Module):
    """A module whose buffers move with the model and are never cast; its parameters are."""

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in kept.items():
            now = self._buffers[name]
            if before is not None and now is not None and now.dtype != before.dtype:
                self._buffers[name] = before.to(now.device)
        return self
