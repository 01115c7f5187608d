"""Attention for generating on a CPU in bfloat16, where PyTorch's own is slow.

``scaled_dot_product_attention`` repacks all keys and values for its blocked kernel at every call, also for a single
query. Two matrix products do the same work in a tenth of the time for one query over 512 keys, and in a third for
512 queries when products over keys that the causal mask hides are left out (see docs/benchmarks.md).

Arithmetic of transformers' ``eager`` attention: scores are rounded to bfloat16, the softmax is computed in fp32 and
rounded. Heads that share keys are one taller matrix; nothing is repeated.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["product_attention", "takes"]

# Queries at once: the scores of a block stay in the cache.
_BLOCK = 64


def takes(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Whether :func:`product_attention` is meant for this call.

    Args:
        query: ``[batch, heads, queries, size]``.
        key: ``[batch, shared heads, keys, size]``.
        mask: of the scores; only None is taken.
        causal: whether query ``i`` sees keys up to ``i`` only; a single query sees all.
    """
    return (
        mask is None
        and query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and not torch.is_grad_enabled()
        and query.shape[1] % key.shape[1] == 0
        and (query.shape[2] == 1 or (causal and query.shape[2] == key.shape[2]))
    )


def product_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """``softmax(scaling Q K^T) V`` of one query, or causally of as many as there are keys.

    Args:
        query: ``[batch, heads, queries, size]``.
        key, value: ``[batch, shared heads, keys, size]``; the sizes may differ.
        scaling: factor of the scores.

    Returns:
        ``[batch, queries, heads, value size]``.
    """
    batch, heads, count, size = query.shape
    shared = key.shape[1]
    query = (query * scaling).reshape(batch * shared, heads // shared, count, size)
    keys = key.flatten(0, 1).transpose(1, 2)
    values = value.flatten(0, 1)
    out = query.new_empty(batch, count, heads, value.shape[-1])
    step = min(_BLOCK, count)
    hidden = query.new_full((step, step), float("-inf")).triu_(1) if count > 1 else None
    for start in range(0, count, step):
        stop = min(start + step, count)
        seen = keys.shape[2] if count == 1 else stop
        scores = torch.bmm(query[:, :, start:stop].flatten(1, 2), keys[:, :, :seen])
        if hidden is not None:
            tall = scores.unflatten(1, (-1, stop - start))
            tall[..., start:] += hidden[: stop - start, : stop - start]
        mixed = torch.bmm(torch.softmax(scores, -1), values[:, :seen])
        mixed = mixed.view(batch, heads, stop - start, -1)
        out[:, start:stop] = mixed.transpose(1, 2)
    return out
