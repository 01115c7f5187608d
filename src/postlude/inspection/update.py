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
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from postlude.errors import SettingsError
from postlude.inspection.update_report import (
    ABSOLUTE,
    RELATIVE,
    MatrixUpdate,
    TensorUpdate,
    UpdateReport,
)
from postlude.numerics.weight_change import (
    change_norms,
    change_spectrum,
    effective_rank,
    energy_rank,
    intruder_cosines,
    rounding_edge,
    spacing,
    stable_rank,
    stored_dtype,
    unchanged_shares,
)
from postlude.surgery.layers import QuantizedLinear

if TYPE_CHECKING:
    from postlude.runs.checkpoint import Checkpoint
    from postlude.runs.progress import Progress

__all__ = ["Update"]

# Entries of a tensor that its median spacing is taken of, about.
_SAMPLED = 1 << 22


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
        if bool((after != before).any()):
            values = change_spectrum(before, after)
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
    norm, base_norm, largest = change_norms(before, after)
    dtype = stored_dtype(after)
    # A median over a part is close enough to a median over a large tensor.
    sample = after.reshape(-1)[:: max(1, after.numel() // _SAMPLED)]
    return TensorUpdate(
        name=name,
        block=block,
        shape=tuple(after.shape),
        dtype=str(dtype).removeprefix("torch."),
        norm=norm,
        base_norm=base_norm,
        largest=largest,
        unchanged=tuple(absolute.tolist()),
        unchanged_relative=tuple(relative.tolist()),
        spacing=float(spacing(sample, dtype).median()),
    )
