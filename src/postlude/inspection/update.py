"""Update: what tuning did to the weights of a checkpoint, tensor by tensor and matrix by matrix.

For every tensor, with ``dW = W1 - W0`` of the tuned and the base model:

    relative norm    |dW|_F / |W0|_F
    unchanged        share of entries with |dW| <= t, and with |dW| <= t |W0|, for several tolerances t; reinforcement
                     learning was found to leave most entries within 1e-5 of where they were (arXiv:2505.11711)

and for the matrix of every linear layer of the blocks, with the singular values s of dW:

    effective rank   exp(-sum_i p_i ln p_i), p = s / sum(s) (Roy and Vetterli, 2007)
    stable rank      |dW|_F^2 / s_1^2
    rank of a share  the fewest singular values that hold 90 % and 99 % of |dW|_F^2
    above rounding   how many s exceed what rounding alone would give (below)
    intruders        of the ``top`` left singular vectors of W1, how many have a cosine below ``threshold`` with every
                     left singular vector of W0 (arXiv:2410.21228): strong directions that the base model did not have.
                     The definition, and the defaults 10 and 0.5, are those of peft's ``reduce_intruder_dimension``,
                     which takes LoRA adapters only; this takes any two checkpoints.

Weights stored in few bits hide and invent changes: a change below half the distance of neighbouring values is rounded
away, and a low-rank update that is rounded after merging gets a rounding error of full rank. So the median distance of
neighbouring values is reported, and singular values are counted above

    max_i sqrt(sum_j v_ij) + max_j sqrt(sum_i v_ij),  v = distance^2 / 12,

about what independent errors of these variances reach (our choice of bound, after Bandeira and van Handel,
arXiv:1408.6185). The type is the coarsest that holds all values of the tensor, so a bfloat16 checkpoint that was saved
in float32 is recognised.

Tied tensors count once. Arithmetic is fp64. Cost: three singular value decompositions of every matrix, ``rows *
columns * min(rows, columns)`` each, which is hours for a large model on a CPU: name some blocks. Memory: a few fp64
copies of one matrix beside the two models. Needs: two checkpoints of one architecture in floating point.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from postlude.errors import SettingsError
from postlude.inspection.report import Inspection, rounded, table
from postlude.surgery.layers import QuantizedLinear

if TYPE_CHECKING:
    from postlude.inspection.signature import SignatureComparison
    from postlude.runs.checkpoint import Checkpoint
    from postlude.runs.progress import Progress

__all__ = [
    "ABSOLUTE",
    "RELATIVE",
    "Comparison",
    "MatrixUpdate",
    "TensorUpdate",
    "Update",
    "UpdateReport",
    "effective_rank",
    "energy_rank",
    "intruder_cosines",
    "rounding_edge",
    "spacing",
    "stable_rank",
    "stored_dtype",
    "unchanged_shares",
]

# Tolerances on |dW|, and on |dW| / |W0|.
ABSOLUTE = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
RELATIVE = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
# The tolerance of arXiv:2505.11711, which the summary shows.
SHOWN = 1e-5

# Entries worked on at once where a tensor need not be seen whole (embeddings are large).
_AT_ONCE = 1 << 22


def unchanged_shares(
    base: Tensor, tuned: Tensor, absolute: Sequence[float], relative: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Shares of entries with ``|dW| <= t`` and with ``|dW| <= t |W0|``, one a tolerance, fp64."""
    counts = torch.zeros(len(absolute) + len(relative), dtype=torch.float64)
    for before, after in _pieces(base, tuned):
        change, size = (after - before).abs(), before.abs()
        hits = [change <= t for t in absolute] + [change <= t * size for t in relative]
        counts += torch.stack([hit.sum() for hit in hits]).cpu()
    shares = counts / max(base.numel(), 1)
    return shares[: len(absolute)], shares[len(absolute) :]


def effective_rank(values: Tensor) -> float:
    """``exp`` of the entropy of ``values / sum(values)``; NaN where all are zero.

    Args:
        values: ``[k]`` singular values, not negative.
    """
    total = values.sum()
    if not bool(total > 0):
        return math.nan
    return float(torch.special.entr(values / total).sum().exp())


def stable_rank(values: Tensor) -> float:
    """``sum(values^2) / max(values)^2``; NaN where all are zero."""
    largest = values.max()
    if not bool(largest > 0):
        return math.nan
    return float((values / largest).square().sum())


def energy_rank(values: Tensor, share: float) -> int:
    """The fewest singular values whose squares hold ``share`` of the sum of squares; 0 where all are zero."""
    energy = values.sort(descending=True).values.square().cumsum(0)
    if not bool(energy[-1] > 0):
        return 0
    # A share that is met up to rounding is met.
    return int((energy < share * energy[-1] * (1 - 1e-12)).sum()) + 1


def intruder_cosines(base: Tensor, tuned: Tensor, top: int) -> Tensor:
    """Of each of the ``top`` left singular vectors of ``tuned``, the largest |cosine| with one of ``base``.

    Args:
        base, tuned: ``[rows, columns]``, fp64.
        top: how many; fewer where there are fewer.

    Returns:
        ``[min(top, rows, columns)]``, in the order of the singular values.
    """
    before, after = _left_vectors(base), _left_vectors(tuned)[:, :top]
    return (after.T @ before).abs().amax(1)


def stored_dtype(tensor: Tensor) -> torch.dtype:
    """The coarsest of bfloat16, float16, float32 and the tensor's own type that holds every value exactly."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if all(torch.equal(part.to(dtype).to(part.dtype), part) for part in _parts(tensor)):
            return dtype
    return tensor.dtype


def spacing(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of each value to the next larger magnitude that ``dtype`` has, fp64, same shape."""
    info = torch.finfo(dtype)
    size = torch.exp2(torch.frexp(tensor.double()).exponent.double() - 1)
    return size.where(tensor != 0, 0.0).clamp(min=info.smallest_normal) * info.eps


def rounding_edge(tensor: Tensor, dtype: torch.dtype) -> float:
    """What the largest singular value of the rounding errors of ``tensor``, stored in ``dtype``, does not exceed.

    Args:
        tensor: ``[rows, columns]``, fp64.
    """
    variance = spacing(tensor, dtype).square() / 12
    return float(variance.sum(1).max().sqrt() + variance.sum(0).max().sqrt())


@dataclasses.dataclass(frozen=True)
class TensorUpdate:
    """What happened to one parameter.

    Attributes:
        name: of the parameter.
        block: index of the block it belongs to; None outside the blocks.
        shape: of the tensor.
        dtype: see :func:`stored_dtype`, of the tuned tensor.
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
        effective_rank, stable_rank: see the top of this file; NaN where nothing changed.
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
        tensors: every parameter of both, tied ones once; empty where the two cannot be subtracted.
        matrices: the linears of the blocks that were asked for.
        left_out: parameters that only one has, or that differ in shape, with the reason.
        absent: why there is no update; None where there is one.
        settings: how it was measured.
    """

    method: ClassVar[str] = "update"
    base: str
    tuned: str
    tensors: tuple[TensorUpdate, ...] = ()
    matrices: tuple[MatrixUpdate, ...] = ()
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    absent: str | None = None
    settings: Update = dataclasses.field(default_factory=lambda: Update())

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


@dataclasses.dataclass(frozen=True)
class Update:
    """Measures the update between two checkpoints.

    Attributes:
        top: left singular vectors of a tuned matrix that are looked at for intruders.
        threshold: cosine below which one is an intruder.
        layers: blocks whose singular values are computed; None for all.
    """

    top: int = 10
    threshold: float = 0.5
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.top < 1:
            raise SettingsError(f"top is a number of singular vectors, at least 1; got {self.top}")
        if not 0 < self.threshold <= 1:
            raise SettingsError(
                f"threshold is a cosine above 0 and at most 1, got {self.threshold}"
            )

    def compare(
        self,
        base: Checkpoint,
        tuned: Checkpoint,
        names: tuple[str, str] = ("base", "tuned"),
        progress: Progress | None = None,
    ) -> UpdateReport:
        """The update from ``base`` to ``tuned``; a report that says why where there is none.

        Raises:
            SettingsError: blocks that the models do not have.
        """
        empty = UpdateReport(*names, settings=self)
        chosen = self._blocks(len(base.anatomy.blocks))
        reason = _cannot_subtract(base, tuned, names)
        if reason is not None:
            return dataclasses.replace(empty, absent=reason)
        pairs, left_out = _paired(base.model, tuned.model, names)
        block_names = [(block.index, f"{block.name}.") for block in base.anatomy.blocks]
        tensors = tuple(
            _tensor_update(
                name,
                next((index for index, start in block_names if name.startswith(start)), None),
                before,
                after,
            )
            for name, (before, after) in pairs.items()
        )
        linears = [
            (block.index, reader)
            for block in base.anatomy.blocks
            if block.index in chosen
            for site in block.sites
            for reader in site.readers
        ]
        steps = linears if progress is None else progress.iterate(linears, "singular values")
        matrices = tuple(
            self._matrix_update(
                index,
                reader.role,
                reader.module,
                reader.weight(base.model).double(),
                reader.weight(tuned.model).to(reader.weight(base.model).device).double(),
            )
            for index, reader in steps
        )
        return dataclasses.replace(empty, tensors=tensors, matrices=matrices, left_out=left_out)

    def _blocks(self, number: int) -> set[int]:
        chosen = set(range(number)) if self.layers is None else set(self.layers)
        unknown = sorted(chosen - set(range(number)))
        if unknown:
            raise SettingsError(
                f"There is no block {', '.join(map(str, unknown))}: this model has blocks 0 to {number - 1}."
            )
        return chosen

    def _matrix_update(
        self, block: int, role: str, module: str, before: Tensor, after: Tensor
    ) -> MatrixUpdate:
        rows, columns = before.shape
        difference = after - before
        if bool(difference.any()):
            values = torch.linalg.svdvals(_tall(difference))
            cosines = intruder_cosines(before, after, self.top)
            edge = rounding_edge(after, stored_dtype(after))
        else:
            values, edge = torch.zeros(min(rows, columns), dtype=torch.float64), 0.0
            cosines = torch.ones(min(self.top, rows, columns), dtype=torch.float64)
        return MatrixUpdate(
            block=block,
            role=role,
            module=module,
            shape=(rows, columns),
            effective_rank=effective_rank(values),
            stable_rank=stable_rank(values),
            rank_90=energy_rank(values, 0.9),
            rank_99=energy_rank(values, 0.99),
            above_rounding=int((values > edge).sum()),
            cosines=tuple(cosines.tolist()),
            intruders=int((cosines < self.threshold).sum()),
        )


@dataclasses.dataclass(frozen=True)
class Comparison(Inspection):
    """How checkpoints are related: the angles between their signatures, and what was changed from the first.

    Attributes:
        signatures: see :class:`postlude.inspection.signature.SignatureComparison`.
        updates: from the first checkpoint to every other.
    """

    method: ClassVar[str] = "compare"
    signatures: SignatureComparison
    updates: tuple[UpdateReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """See :meth:`Inspection.to_dict`."""
        return {
            **self.signatures.to_dict(),
            "updates": [update.to_dict() for update in self.updates],
        }

    def summary(self) -> str:
        """See :meth:`Inspection.summary`."""
        return "\n\n".join(
            [self.signatures.summary(), *(update.summary() for update in self.updates)]
        )


def _cannot_subtract(base: Checkpoint, tuned: Checkpoint, names: tuple[str, str]) -> str | None:
    for name, checkpoint in zip(names, (base, tuned), strict=True):
        if any(isinstance(module, QuantizedLinear) for module in checkpoint.model.modules()):
            return (
                f"{name} is quantized: a difference of its weights would be their rounding, and for methods that "
                "rotate or rescale a change of basis, not an update. Compare the float checkpoint it was made from."
            )
    first, second = base.anatomy, tuned.anatomy
    if first.family != second.family:
        return (
            f"{names[0]} is a {first.family} and {names[1]} a {second.family}: their weights do not stand for the "
            "same things."
        )
    if len(first.blocks) != len(second.blocks):
        return (
            f"{names[0]} has {len(first.blocks)} blocks and {names[1]} has {len(second.blocks)}: expected a model "
            "and one tuned from it."
        )
    for one, other in zip(_linears(first), _linears(second), strict=True):
        shapes = [
            tuple(ref.weight(model).shape)
            for ref, model in ((one, base.model), (other, tuned.model))
        ]
        if shapes[0] != shapes[1]:
            return (
                f"{one.module} is {_by(shapes[0])} in {names[0]} and {_by(shapes[1])} in {names[1]}: expected a "
                "model and one tuned from it."
            )
    return None


def _linears(anatomy: Any) -> list[Any]:
    return [reader for _, site in anatomy.sites() for reader in site.readers]


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _paired(
    base: nn.Module, tuned: nn.Module, names: tuple[str, str]
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, str]]:
    """Parameters of both models by name, those that are tied in both once; and what has no partner, with the reason."""
    before, after = (
        {name: value.data for name, value in model.named_parameters(remove_duplicate=False)}
        for model in (base, tuned)
    )
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    left_out: dict[str, str] = {}
    seen: set[tuple[int, int]] = set()
    for name in [*before, *(name for name in after if name not in before)]:
        if name not in before or name not in after:
            left_out[name] = f"only in {names[0] if name in before else names[1]}"
        elif before[name].shape != after[name].shape:
            shapes = _by(before[name].shape), _by(after[name].shape)
            left_out[name] = f"{shapes[0]} in {names[0]}, {shapes[1]} in {names[1]}"
        else:
            pair = before[name].data_ptr(), after[name].data_ptr()
            if pair not in seen:
                seen.add(pair)
                pairs[name] = before[name], after[name]
    return pairs, left_out


def _tensor_update(name: str, block: int | None, before: Tensor, after: Tensor) -> TensorUpdate:
    absolute, relative = unchanged_shares(before, after, ABSOLUTE, RELATIVE)
    square = base_square = largest = 0.0
    for first, second in _pieces(before, after):
        change = second - first
        square += float(change.square().sum())
        base_square += float(first.square().sum())
        largest = max(largest, float(change.abs().max()))
    dtype = stored_dtype(after)
    # A median over a part is close enough to a median over a large tensor.
    sample = after.reshape(-1)[:: max(1, after.numel() // _AT_ONCE)]
    return TensorUpdate(
        name=name,
        block=block,
        shape=tuple(after.shape),
        dtype=str(dtype).removeprefix("torch."),
        norm=math.sqrt(square),
        base_norm=math.sqrt(base_square),
        largest=largest,
        unchanged=tuple(absolute.tolist()),
        unchanged_relative=tuple(relative.tolist()),
        spacing=float(spacing(sample, dtype).median()),
    )


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _AT_ONCE):
        yield flat[start : start + _AT_ONCE]


def _pieces(base: Tensor, tuned: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both tensors in fp64 on one device, some entries at a time."""
    for before, after in zip(_parts(base), _parts(tuned), strict=True):
        yield before.double(), after.to(before.device).double()


def _tall(matrix: Tensor) -> Tensor:
    # LAPACK decomposes a tall matrix many times faster than the same one lying.
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def _left_vectors(matrix: Tensor) -> Tensor:
    """Columns, ``[rows, min(rows, columns)]``, by falling singular value."""
    left, _, right = torch.linalg.svd(_tall(matrix), full_matrices=False)
    return left if matrix.shape[0] >= matrix.shape[1] else right.T


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _mean_share(tensors: Sequence[TensorUpdate], shares: Sequence[float]) -> float:
    entries = sum(tensor.entries for tensor in tensors)
    total = sum(share * tensor.entries for share, tensor in zip(shares, tensors, strict=True))
    return total / entries if entries else math.nan


def _relative_norm(tensors: Sequence[TensorUpdate]) -> float:
    base = math.sqrt(sum(tensor.base_norm**2 for tensor in tensors))
    return math.sqrt(sum(tensor.norm**2 for tensor in tensors)) / base if base else math.nan
