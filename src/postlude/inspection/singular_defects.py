"""Singular defects: where massive activations are made and unmade, predicted from the weights alone.

In a large language model a few tokens (the first one, some delimiters) have hidden states of enormous norm, all in the
same direction. They appear in one *explosion* block and vanish in one *decay* block. Replacing attention and
feed-forward layer of block ``l`` by linear maps of a single token (the attention softmax of one token is 1; the
feed-forward layer is fitted by least squares on Gaussian inputs),

    A = Wt_O rep_kv(Wt_V) diag(gamma_in)       F = Wt_D B diag(gamma_post)
    M = (I + F)(I + A)                         Delta = M - I

the leading left singular vector ``u_0`` of ``M`` is that direction at the explosion and the decay block and points
anywhere else, near 90 degrees away, in all others. The decay block has an eigenvector of ``Delta`` there with a
negative eigenvalue.

Source: arXiv:2502.07004 (poster and official code). What is decided here:

* ``M`` of a LayerNorm model also centres: ``diag(gamma) (I - 1 1^T / D)`` (as SINDER does, arXiv:2407.16826).
* Massive hidden states are found without a table of thresholds: :mod:`postlude.inspection.empirical`.
* Explosion: the first block after which the largest norm is over 10 times what it was and massive; failing that, the
  first with a massive state behind it whose ``u_0`` is within 20 degrees of the direction.
* Decay: the last block after which the largest norm is under a tenth of a massive one before it; failing that, the
  last after the explosion that has massive states before it, ``u_0`` within 20 degrees, and ``d . Delta d < 0``.

Layers are numbered from 0. The last hidden state is the input of the final norm, without which the decay in a last
block would be invisible.

Cost for every block: about ``6 samples hidden_size product_size`` operations and three singular value decompositions;
then see :mod:`postlude.inspection.explosion`. Memory: a dozen ``[hidden_size, hidden_size]`` matrices. Needs: text.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor

from postlude.errors import SettingsError
from postlude.inspection.empirical import EmpiricalDirection, empirical_direction
from postlude.inspection.explosion_path import ExplosionPath, explosion_path
from postlude.inspection.report import Inspection, place, rounded, table
from postlude.numerics.directions import (
    EigenPair,
    SingularDirections,
    acute_angle,
    leading_singular_directions,
    nearest_eigenpair,
    unit,
)
from postlude.numerics.massive import decay_layer, explosion_layer
from postlude.registry import method
from postlude.surgery.probes import BlockApproximation, approximate_block

if TYPE_CHECKING:
    from postlude.runs.checkpoint import Checkpoint
    from postlude.runs.progress import Progress

__all__ = [
    "Found",
    "LayerDefect",
    "SingularDefects",
    "SingularDefectsReport",
    "layer_defect",
]

# Below this angle, in degrees, a block's leading direction counts as the direction of the massive activations.
ALIGNED = 20.0
KEPT_VALUES = 8


class Found(NamedTuple):
    """A layer, and what told it.

    Attributes:
        layer: block index, or None.
        rule: ``norm`` (a jump of the largest norm), ``angle`` (an aligned leading direction), ``given``, or None.
    """

    layer: int | None
    rule: str | None


@dataclasses.dataclass(frozen=True)
class LayerDefect:
    """The linear picture of one block.

    Attributes:
        layer: block index.
        angle: acute angle of ``u_0`` of ``M`` to the empirical direction, in degrees.
        gain: ``d . Delta d`` for the unit empirical direction ``d``: negative where the block takes it away.
        whole: leading singular directions of ``M``; ``left[:, 0]`` is ``u_0``, ``right[:, 0]`` is ``v_0``.
        attention: those of ``I + A``.
        feed_forward: those of ``I + F``.
    """

    layer: int
    angle: float
    gain: float
    whole: SingularDirections
    attention: SingularDirections
    feed_forward: SingularDirections


@dataclasses.dataclass(frozen=True)
class SingularDefectsReport(Inspection):
    """What :class:`SingularDefects` found.

    Attributes:
        samples: sequences of text.
        length: tokens of each.
        direction: the empirical direction of the massive activations, and the norms of all hidden states.
        layers: the linear picture of every block.
        explosion: where they appear.
        decay: where they vanish.
        eigenpairs: of ``Delta`` at those two blocks, the one nearest to the direction.
        path: how tokens come to explode; None without an explosion block, or if it was not asked for.
    """

    method: ClassVar[str] = "singular-defects"
    samples: int
    length: int
    direction: EmpiricalDirection
    layers: tuple[LayerDefect, ...]
    explosion: Found
    decay: Found
    eigenpairs: dict[int, EigenPair]
    path: ExplosionPath | None

    @property
    def explosion_layers(self) -> tuple[int, ...]:
        """The explosion block, if there is one."""
        return () if self.explosion.layer is None else (self.explosion.layer,)

    @property
    def decay_layers(self) -> tuple[int, ...]:
        """The decay block, if there is one."""
        return () if self.decay.layer is None else (self.decay.layer,)

    def _layer(self, found: Found) -> dict[str, Any]:
        values: dict[str, Any] = {"layer": found.layer, "rule": found.rule}
        if found.layer is not None:
            pair = self.eigenpairs[found.layer]
            values["angle_degrees"] = self.layers[found.layer].angle
            values["eigenvalue"] = pair.value
            values["eigenvector_angle_degrees"] = pair.angle
        return values

    def to_dict(self) -> dict[str, Any]:
        """See :meth:`Inspection.to_dict`."""
        direction = self.direction
        norms, states = direction.norms.flatten(1), direction.mask.flatten(1).sum(1)
        return rounded(
            {
                "method": self.method,
                "samples": self.samples,
                "length": self.length,
                "massive": direction.massive,
                "explosion": self._layer(self.explosion),
                "decay": self._layer(self.decay),
                "norms": [
                    {
                        "layer": row - 1,
                        "max_norm": float(norms[row].max()),
                        "median_norm": float(norms[row].median()),
                        "states": int(states[row]),
                    }
                    for row in range(len(norms))
                ],
                "layers": [
                    {
                        "layer": layer.layer,
                        "angle_degrees": layer.angle,
                        "gain": layer.gain,
                        "singular_values": layer.whole.values,
                        "attention_singular_values": layer.attention.values,
                        "feed_forward_singular_values": layer.feed_forward.values,
                    }
                    for layer in self.layers
                ],
                "direction": direction.to_dict(),
                "explosion_path": None
                if self.path is None
                else self.path.to_dict(direction.threshold),
            }
        )

    def summary(self) -> str:
        """See :meth:`Inspection.summary`."""
        norms = self.direction.norms.flatten(1)
        rows = [
            (
                layer.layer,
                float(norms[layer.layer + 1].max()),
                float(norms[layer.layer + 1].median()),
                layer.angle,
                float(layer.whole.values[0]),
                float(layer.whole.values[1]),
                layer.gain,
                " ".join(
                    name
                    for name, found in (("explosion", self.explosion), ("decay", self.decay))
                    if found.layer == layer.layer
                ),
            )
            for layer in self.layers
        ]
        header = ("block", "max norm", "median norm", "angle", "s0", "s1", "gain", "")
        return "\n".join([*self._sentences(), "", table(header, rows)])

    def _sentences(self) -> list[str]:
        direction = self.direction
        if not direction.massive:
            return [
                f"No massive activations in {self.samples} x {self.length} tokens: no norm is above 10 times the "
                "median of its layer. Angles are to the direction of the largest hidden states instead."
            ]
        lines = [
            f"{direction.states} massive hidden states, norm above {direction.threshold:.4g}, "
            f"{direction.spread:.2f} degrees apart on average; {direction.initial_share:.0%} at position 0."
        ]
        for name, found in (("explosion", self.explosion), ("decay", self.decay)):
            if found.layer is None:
                lines.append(f"No {name} block found.")
                continue
            pair = self.eigenpairs[found.layer]
            lines.append(
                f"{name.capitalize()} in {place(found.layer)} (by {found.rule}): predicted direction "
                f"{self.layers[found.layer].angle:.2f} degrees away; nearest eigenvector {pair.angle:.2f} degrees "
                f"away, eigenvalue {pair.value:.3g}."
            )
        if self.path is not None:
            lines += self.path.sentences(direction.threshold)
        return lines


def layer_defect(layer: int, block: BlockApproximation, direction: Tensor) -> LayerDefect:
    """Compare a block's leading directions with the empirical one, ``[hidden_size]``."""
    count = min(KEPT_VALUES, len(direction))
    whole = leading_singular_directions(block.whole, count)
    along = unit(direction).to(block.attention.device)
    return LayerDefect(
        layer,
        angle=float(acute_angle(whole.left[:, 0], along)),
        gain=float(along @ block.change @ along),
        whole=whole,
        attention=leading_singular_directions(block.with_attention, count),
        feed_forward=leading_singular_directions(block.with_feed_forward, count),
    )


@method(
    "inspect",
    "singular-defects",
    family="singular defects",
    paper="arXiv:2502.07004",
    needs=("text",),
)
@dataclasses.dataclass(frozen=True)
class SingularDefects:
    """Where massive activations appear and vanish, in which direction, and for which tokens.

    Attributes:
        samples: Gaussian inputs of the least squares, for every block.
        threshold: norm above which a hidden state is massive; None finds one.
        explosion: the explosion block, from 0; None finds it.
        decay: the decay block, from 0; None finds it.
        paths: whether to follow how tokens come to explode, which runs the whole vocabulary.
        random_directions: random embeddings tried there.
        prompt: what the exploding tokens are put behind to check them.
        top: exploding tokens named.
    """

    samples: int = 100_000
    threshold: float | None = None
    explosion: int | None = None
    decay: int | None = None
    paths: bool = True
    random_directions: int = 1000
    prompt: str = "I am"
    top: int = 8

    def __post_init__(self) -> None:
        for name in ("samples", "random_directions", "top"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name}={getattr(self, name)}: expected 1 or more.")
        if self.threshold is not None and not self.threshold > 0:
            raise SettingsError(
                f"threshold={self.threshold}: give a positive norm, or none to have one found."
            )

    def inspect(
        self,
        checkpoint: Checkpoint,
        tokens: Tensor | None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> SingularDefectsReport:
        """Look for singular defects with the help of ``tokens`` ``[samples, length]``.

        Args:
            checkpoint: the model.
            tokens: token ids.
            seed: of the Gaussian inputs, the random embeddings and the tokens put before others.
            progress: where to show how far it is.

        Raises:
            DataError: no tokens, or some that the model cannot read, or no state above a given threshold.
            SettingsError: a block that does not exist, or fewer samples than the hidden size.
            ArchitectureError: layers without plain weights, for example of a quantized model.
        """
        anatomy = checkpoint.language
        for name in ("explosion", "decay"):
            index = getattr(self, name)
            if index is not None and not 0 <= index < len(anatomy.blocks):
                raise SettingsError(
                    f"{name}={index}: this model has blocks 0 to {len(anatomy.blocks) - 1}."
                )
        direction = empirical_direction(checkpoint, tokens, self.threshold, seed, progress)
        blocks = anatomy.blocks
        layers = tuple(
            layer_defect(
                block.index, self._approximate(checkpoint, block.index, seed), direction.vector
            )
            for block in (progress.iterate(blocks, "singular defects") if progress else blocks)
        )
        explosion = self._explosion(direction, layers)
        decay = self._decay(direction, layers, explosion)
        eigenpairs = {
            layer: nearest_eigenpair(
                self._approximate(checkpoint, layer, seed).change.cpu(), direction.vector
            )
            for layer in (explosion.layer, decay.layer)
            if layer is not None
        }
        path = None
        if self.paths and explosion.layer is not None and tokens is not None:
            path = explosion_path(
                checkpoint,
                tokens,
                explosion.layer,
                self._approximate(checkpoint, explosion.layer, seed).feed_forward,
                prompt=self.prompt,
                top=self.top,
                random_directions=self.random_directions,
                seed=seed,
            )
        return SingularDefectsReport(
            samples=direction.norms.shape[1],
            length=direction.norms.shape[2],
            direction=direction,
            layers=layers,
            explosion=explosion,
            decay=decay,
            eigenpairs=eigenpairs,
            path=path,
        )

    def _approximate(self, checkpoint: Checkpoint, layer: int, seed: int) -> BlockApproximation:
        block = checkpoint.language.blocks[layer]
        return approximate_block(checkpoint.model, checkpoint.language, block, self.samples, seed)

    def _explosion(self, direction: EmpiricalDirection, layers: tuple[LayerDefect, ...]) -> Found:
        if self.explosion is not None:
            return Found(self.explosion, "given")
        if not direction.massive:
            return Found(None, None)
        norms, mask = direction.norms.flatten(1), direction.mask.flatten(1)
        jump = explosion_layer(norms, mask)
        if jump is not None:
            return Found(jump, "norm")
        after = mask.any(1)[1:].tolist()
        aligned = [layer.layer for layer in layers if layer.angle < ALIGNED and after[layer.layer]]
        return Found(aligned[0], "angle") if aligned else Found(None, None)

    def _decay(
        self, direction: EmpiricalDirection, layers: tuple[LayerDefect, ...], explosion: Found
    ) -> Found:
        if self.decay is not None:
            return Found(self.decay, "given")
        if not direction.massive:
            return Found(None, None)
        norms, mask = direction.norms.flatten(1), direction.mask.flatten(1)
        drop = decay_layer(norms, mask)
        if drop is not None:
            return Found(drop, "norm")
        before = mask.any(1)[:-1].tolist()
        first = -1 if explosion.layer is None else explosion.layer
        aligned = [
            layer.layer
            for layer in layers
            if layer.layer > first
            and layer.angle < ALIGNED
            and layer.gain < 0
            and before[layer.layer]
        ]
        return Found(aligned[-1], "angle") if aligned else Found(None, None)
