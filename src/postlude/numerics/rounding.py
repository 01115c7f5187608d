"""Rounding a weight onto the grid of a scheme: to the nearest value, or so that the output error is small.

Torch layout throughout: a weight is ``[out_features, in_features]``, a row is one output channel.

GPTQ (arXiv:2210.17323) rounds one input column after another and lets the columns not yet rounded make up for
the error, so that ``|| (W - W_q) X ||`` stays small::

    H    = 2/n sum x x^T + damping * mean(diag H) * I          H^-1 = U^T U,  U upper triangular
    q    = round(w_i);   e = (w_i - q) / U_ii;   W[:, i:] -= e U[i, i:]
"""

from __future__ import annotations

import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.schemes import Encoded, ScaleAndZero, Scheme, working

# Weights whose range is searched together: a few such buffers fit a core's cache.
_CLIP_ENTRIES = 2**17

__all__ = ["clip_search", "gptq", "inverse_cholesky", "nearest"]


def nearest(weight: Tensor, scheme: Scheme, *, clip: bool = False) -> Encoded:
    """Round to nearest, optionally with the clip search."""
    return scheme.encode(weight, _parameters(weight, scheme, clip))


def clip_search(
    weight: Tensor, scheme: Scheme, *, power: float = 2.4, lowest: float = 0.21
) -> Tensor:
    """Factor on the range of every group that minimises ``sum |q - w|^power`` (QuaRot, arXiv:2404.00456).

    Args:
        weight: ``[out_features, in_features]``.
        scheme: grid; the search runs over ``1.00, 0.99, ..., lowest``.

    Returns:
        ``[out_features, groups]`` (``[1]`` per tensor).
    """
    if scheme.granularity.kind == "tensor":
        return _clip_rows(weight, scheme, power, lowest)
    # Rows are independent; a few at a time stay in the cache for all factors.
    rows = max(1, _CLIP_ENTRIES // weight.shape[1])
    return torch.cat([_clip_rows(part, scheme, power, lowest) for part in weight.split(rows)])


def _clip_rows(weight: Tensor, scheme: Scheme, power: float, lowest: float) -> Tensor:
    grouped = scheme.granularity.split(working(weight))
    # A short last group must not count the entries that only fill it up.
    counted = torch.ones_like(weight[:1], dtype=grouped.dtype)
    missing = -weight.shape[1] % (scheme.granularity.size or 1)
    counted = scheme.granularity.split(torch.nn.functional.pad(counted, (0, missing)))
    best_error = torch.empty(0)
    best = torch.empty(0)
    for percent in range(100, round(lowest * 100) - 1, -1):
        scale, zero_point = scheme.parameters(weight, percent / 100)
        scale = scale.unsqueeze(-1)
        zero = None if zero_point is None else zero_point.unsqueeze(-1)
        values = scheme.format.decode(scheme.format.encode(grouped, scale, zero), scale, zero)
        difference = values.sub_(grouped).abs_().pow_(power)
        error = (difference.mul_(counted) if missing else difference).sum(-1)
        if percent == 100:
            best_error, best = error, torch.ones_like(error)
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, torch.full_like(best, percent / 100), best)
    return best


def _parameters(weight: Tensor, scheme: Scheme, clip: bool) -> ScaleAndZero:
    return scheme.parameters(weight, clip_search(weight, scheme) if clip else 1.0)


def inverse_cholesky(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular ``U`` with ``(H + damping * mean(diag H) * I)^-1 = U^T U``, in fp64.

    Args:
        hessian: ``[n, n]``, symmetric positive semi-definite.
        damping: fraction of the mean diagonal added to the diagonal.

    Raises:
        SettingsError: the damped matrix is not positive definite.
    """
    damped = hessian.to(torch.float64, copy=True)
    damped.diagonal().add_(damping * damped.diagonal().mean())
    # Factored back to front, H = P P^T with P upper, so that U = P^-1: one factorisation and one solve.
    lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(info) != 0:
        raise SettingsError(
            f"the Hessian of {hessian.shape[0]} inputs is not positive definite with damping {damping}; "
            "raise the damping or calibrate on more text"
        )
    identity = torch.eye(hessian.shape[0], dtype=torch.float64, device=hessian.device)
    upper: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
    return upper


def gptq(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    *,
    damping: float = 0.01,
    block: int = 128,
    act_order: bool = False,
    clip: bool = False,
) -> Encoded:
    """Round column by column, compensating in the columns still to come.

    Scales come from the original row (channel, tensor). With groups they come from the compensated columns at
    the start of each group, or from the original ones under ``act_order``, where a group's columns are not
    visited together. Columns that never saw an input (``H_jj = 0``) are set to zero.

    Args:
        weight: ``[out_features, in_features]``.
        hessian: ``[in_features, in_features]``, any positive multiple of ``sum x x^T``.
        scheme: grid.
        damping: fraction of the mean diagonal.
        block: columns whose updates to the rest are applied together.
        act_order: visit columns by descending ``H_jj``.
        clip: clip search on every range.

    Raises:
        SettingsError: the damped Hessian is not positive definite.
    """
    out_features, in_features = weight.shape
    dead = hessian.diagonal() == 0
    hessian = hessian.clone()
    hessian.diagonal()[dead] = 1
    # Transposed, so that a column is contiguous.
    columns = working(weight).T.contiguous()
    columns[dead] = 0
    scale, zero_point = _parameters(columns.T, scheme, clip)
    group = scheme.granularity.size

    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else None
    if order is not None:
        columns, hessian = columns[order], hessian[order][:, order]
    inverse = inverse_cholesky(hessian, damping).to(columns)

    codes = torch.empty(in_features, out_features, dtype=torch.uint8, device=weight.device)
    scales, zeros = scale, zero_point
    regroup = bool(group) and order is None
    if regroup:
        scales = scale.clone()
        zeros = None if zero_point is None else zero_point.clone()
    for start in range(0, in_features, block):
        stop = min(start + block, in_features)
        chunk = columns[start:stop]
        upper = inverse[start:stop, start:stop]
        errors = torch.empty_like(chunk)
        for local in range(stop - start):
            index = start + local
            if regroup and index % group == 0:
                end = min(index + group, in_features)
                # Columns of this group beyond the block still wait for this block's errors.
                ahead = columns[index:end].clone()
                if end > stop:
                    ahead[stop - index :] -= inverse[start:index, stop:end].T @ errors[:local]
                fresh, fresh_zero = _parameters(ahead.T, scheme, clip)
                scales[:, index // group] = fresh[:, 0]
                if zeros is not None and fresh_zero is not None:
                    zeros[:, index // group] = fresh_zero[:, 0]
            channel = int(order[index]) if order is not None else index
            position = channel // group if group else 0
            column_scale = scales[..., position]
            column_zero = None if zeros is None else zeros[..., position]
            column = chunk[local]
            code = scheme.format.encode(column, column_scale, column_zero)
            codes[channel] = code
            value = scheme.format.decode(code, column_scale, column_zero)
            error = (column - value) / upper[local, local]
            errors[local] = error
            if local + 1 < stop - start:
                chunk[local + 1 :].addr_(upper[local, local + 1 :], error, alpha=-1)
        if stop < in_features:
            columns[stop:].addmm_(inverse[start:stop, stop:].T, errors, alpha=-1)
    return Encoded(
        codes.T.contiguous(),
        scales.to(getattr(torch, scheme.scale_dtype)),
        None if zeros is None else zeros.to(scheme.zero_point_dtype),
        scheme,
    )
