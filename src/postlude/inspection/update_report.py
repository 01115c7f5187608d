"""What :mod:`postlude.inspection.update` found, for one tensor, one matrix and two checkpoints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from postlude.errors import SettingsError
from postlude.inspection.report import Inspection, rounded, table

if TYPE_CHECKING:
    from postlude.inspection.update import Update

__all__ = ["ABSOLUTE", "RELATIVE", "MatrixUpdate", "TensorUpdate", "UpdateReport"]

# Tolerances on |dW|, and on |dW| / |W0|.
ABSOLUTE = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
RELATIVE = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
# The tolerance of arXiv:2505.11711, which the summary shows.
SHOWN = 1e-5


@dataclasses.dataclass(frozen=True)
class TensorUpdate:
    """What happened to one parameter.

    Attributes:
        name: of the parameter.
        block: index of the block it belongs to; None outside the blocks.
        shape: of the tensor.
        dtype: see :func:`postlude.numerics.weight_change.stored_dtype`, of the tuned tensor.
        norm: |dW|_F.
        base_norm: |W0|_F.
        largest: max |dW|.
        unchanged: shares for the absolute tolerances.
        unchanged_relative: shares for the relative ones.
        spacing: median distance of neighbouring values of ``dtype`` at the tuned values.
    """

    name: str
    block: int | None
    shape: tuple[int, ...]
    dtype: str
    norm: float
    base_norm: float
    largest: float
    unchanged: tuple[float, ...]
    unchanged_relative: tuple[float, ...]
    spacing: float

    @property
    def entries(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def relative_norm(self) -> float:
        """|dW|_F / |W0|_F; NaN for a tensor of zeros."""
        return self.norm / self.base_norm if self.base_norm else math.nan


@dataclasses.dataclass(frozen=True)
class MatrixUpdate:
    """The singular values of one linear layer's change, and the new directions in it.

    Attributes:
        block, role, module: which linear.
        shape: ``(out_features, in_features)``.
        effective_rank, stable_rank: see :mod:`postlude.inspection.update`; NaN where nothing changed.
        rank_90, rank_99: singular values that hold this share of the energy.
        above_rounding: singular values above what rounding alone gives.
        cosines: of the top left singular vectors, the largest |cosine| with one of the base matrix.
        intruders: how many of them are below the threshold.
    """

    block: int
    role: str
    module: str
    shape: tuple[int, int]
    effective_rank: float
    stable_rank: float
    rank_90: int
    rank_99: int
    above_rounding: int
    cosines: tuple[float, ...]
    intruders: int

    @property
    def changed(self) -> bool:
        """Whether any entry differs."""
        return self.rank_99 > 0


@dataclasses.dataclass(frozen=True)
class UpdateReport(Inspection):
    """What tuning changed between two checkpoints.

    Attributes:
        base, tuned: their names.
        settings: how it was measured.
        tensors: every parameter of both, tied ones once; empty where the two cannot be subtracted.
        matrices: the linears of the blocks that were asked for.
        left_out: parameters that only one has, or that differ in shape, with the reason.
        absent: why there is no update; None where there is one.
    """

    method: ClassVar[str] = "update"
    base: str
    tuned: str
    settings: Update
    tensors: tuple[TensorUpdate, ...] = ()
    matrices: tuple[MatrixUpdate, ...] = ()
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    absent: str | None = None

    @property
    def entries(self) -> int:
        """Entries compared."""
        return sum(tensor.entries for tensor in self.tensors)

    def unchanged(self, tolerance: float, tensors: Sequence[TensorUpdate] | None = None) -> float:
        """Share of entries with ``|dW| <= tolerance`` over some tensors, all when None.

        Raises:
            SettingsError: a tolerance that was not measured.
        """
        if tolerance not in ABSOLUTE:
            raise SettingsError(
                f"tolerance {tolerance}: measured were {', '.join(map(str, ABSOLUTE))}"
            )
        chosen = self.tensors if tensors is None else tensors
        return _mean_share(chosen, [t.unchanged[ABSOLUTE.index(tolerance)] for t in chosen])

    def to_dict(self) -> dict[str, Any]:
        """See :meth:`Inspection.to_dict`."""
        head = {
            "method": self.method,
            "base": self.base,
            "tuned": self.tuned,
            "absent": self.absent,
        }
        if self.absent is not None:
            return head
        considered = sum(len(matrix.cosines) for matrix in self.matrices)
        return rounded(
            {
                **head,
                "entries": self.entries,
                "relative_norm": _relative_norm(self.tensors),
                "tolerances": ABSOLUTE,
                "unchanged": [self.unchanged(t) for t in ABSOLUTE],
                "relative_tolerances": RELATIVE,
                "unchanged_relative": [
                    _mean_share(self.tensors, [t.unchanged_relative[i] for t in self.tensors])
                    for i in range(len(RELATIVE))
                ],
                "effective_rank": _mean([m.effective_rank for m in self.matrices if m.changed]),
                "intruders": sum(matrix.intruders for matrix in self.matrices),
                "intruder_candidates": considered,
                "intruder_top": self.settings.top,
                "intruder_threshold": self.settings.threshold,
                "blocks": self.blocks(),
                "tensors": [
                    {**dataclasses.asdict(tensor), "relative_norm": tensor.relative_norm}
                    for tensor in self.tensors
                ],
                "matrices": [dataclasses.asdict(matrix) for matrix in self.matrices],
                "left_out": dict(self.left_out),
            }
        )

    def blocks(self) -> list[dict[str, Any]]:
        """One row a block, and one (``block`` None) for what is outside: shares of all entries, ranks as means over the
        matrices that changed."""
        rows = []
        for index in sorted({t.block for t in self.tensors}, key=lambda b: (b is None, b or 0)):
            tensors = [tensor for tensor in self.tensors if tensor.block == index]
            matrices = [matrix for matrix in self.matrices if matrix.block == index]
            changed = [matrix for matrix in matrices if matrix.changed]
            rows.append(
                {
                    "block": index,
                    "entries": sum(tensor.entries for tensor in tensors),
                    "relative_norm": _relative_norm(tensors),
                    "unchanged": self.unchanged(SHOWN, tensors),
                    "effective_rank": _mean([m.effective_rank for m in changed]),
                    "stable_rank": _mean([m.stable_rank for m in changed]),
                    "rank_90": _mean([m.rank_90 for m in changed]),
                    "rank_99": _mean([m.rank_99 for m in changed]),
                    "above_rounding": _mean([m.above_rounding for m in changed]),
                    "intruders": sum(m.intruders for m in matrices) if matrices else None,
                    "intruder_candidates": sum(len(m.cosines) for m in matrices),
                }
            )
        return rows

    def summary(self) -> str:
        """See :meth:`Inspection.summary`."""
        title = f"Update from {self.base} to {self.tuned}"
        if self.absent is not None:
            return f"{title}: none. {self.absent}"
        sizes = [min(matrix.shape) for matrix in self.matrices]
        lines = [
            f"{title}: |dW| / |W| = {_relative_norm(self.tensors):.4g} over {self.entries:,} entries; "
            f"{self.unchanged(0.0):.2%} are equal, {self.unchanged(SHOWN):.2%} within {SHOWN:g}."
        ]
        if self.matrices:
            lines[0] += (
                f" Ranks are means over the changed linears of a block (full: {min(sizes)} to {max(sizes)}); "
                f"intruders are those of the first {self.settings.top} left singular vectors whose cosine with each of "
                f"the base model's is below {self.settings.threshold:g}."
            )
        rows = [
            (
                "others" if row["block"] is None else str(row["block"]),
                row["relative_norm"],
                f"{row['unchanged']:.2%}",
                row["effective_rank"],
                row["stable_rank"],
                row["rank_90"],
                row["rank_99"],
                row["above_rounding"],
                "-"
                if row["intruders"] is None
                else f"{row['intruders']} of {row['intruder_candidates']}",
            )
            for row in self.blocks()
        ]
        header = (
            "block",
            "|dW|/|W|",
            f"within {SHOWN:g}",
            "effective rank",
            "stable rank",
            "90%",
            "99%",
            "above rounding",
            "intruders",
        )
        lines += ["", table(header, rows)]
        coarse = [t for t in self.tensors if t.dtype in ("bfloat16", "float16") and t.norm > 0]
        if coarse:
            widest = max(coarse, key=lambda tensor: tensor.entries)
            lines += [
                "",
                f"Stored in {widest.dtype}: neighbouring values of {widest.name} are {widest.spacing:.2g} apart "
                "(median), so smaller changes show as none and rounding adds a change of full rank. Read "
                "“within” and the ranks with that in mind, or compare float32 weights.",
            ]
        if self.left_out:
            lines += [
                "",
                f"Not compared: {'; '.join(f'{n}: {why}' for n, why in self.left_out.items())}.",
            ]
        return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _mean_share(tensors: Sequence[TensorUpdate], shares: Sequence[float]) -> float:
    entries = sum(tensor.entries for tensor in tensors)
    total = sum(share * tensor.entries for share, tensor in zip(shares, tensors, strict=True))
    return total / entries if entries else math.nan


def _relative_norm(tensors: Sequence[TensorUpdate]) -> float:
    base = math.sqrt(sum(tensor.base_norm**2 for tensor in tensors))
    return math.sqrt(sum(tensor.norm**2 for tensor in tensors)) / base if base else math.nan
