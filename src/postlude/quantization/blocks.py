"""Round one block after another, alone or together with the other ranks of torchrun.

A site (the linears that read one tensor) is rounded after those before it in the forward pass. Where its rounding is
shown inputs, ranks run their share of the calibration batches each, and what they gathered is put together; then each
rounds its share of the weights and hands the others what it made.

What is gathered is added up in at most ``CHUNKS`` runs of consecutive batches, and these in their order, whoever ran
them: so any number of ranks adds the same numbers in the same order, and makes the same bits as one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from postlude.numerics.schemes import Scheme
from postlude.numerics.streaming import Statistic
from postlude.quantization.block_reconstruction import Passage
from postlude.quantization.installing import install
from postlude.quantization.quantizer import Quantizer, generator
from postlude.quantization.rounded import Rounded, Seen
from postlude.runs.processes import Processes
from postlude.surgery.anatomy import Anatomy, Block, LinearRef, Site
from postlude.surgery.batches import Calibration, device_of, token_batches
from postlude.surgery.capture import BlockWalk
from postlude.surgery.layers import QuantizedLinear
from postlude.surgery.static_quantizers import switch_static_quantizers

__all__ = ["CHUNKS", "SQUARED", "Rounding", "gathers"]

# More of them let more ranks share calibration data, and let each keep more statistics while they are put together.
CHUNKS = 8
# In the unit of a block: squared error of its weights and their squared norm, see _squared_error.
SQUARED = "squared_error"


def gathers(settings: Quantizer, anatomy: Anatomy) -> bool:
    """Whether what the method gathers of inputs can be put together from parts."""
    return not settings.reconstructs and all(
        isinstance(settings.observes(site), Statistic) for _, site in anatomy.sites()
    )


class Rounding:
    """Rounds the blocks of a model in their order.

    Args:
        model: with everything done that comes before rounding.
        anatomy: of it.
        settings: the method.
        statistics: of the method.
        calibration: what inputs are learned from; None where they are not read.
        processes: that do it together; each calls the same methods in the same order.
        seed: of random choices.

    Attributes:
        walk: stands before the next block with this rank's calibration batches; None where inputs are not read.
        exact: the same in the float model, for methods that train a block against it; else None.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        settings: Quantizer,
        statistics: Mapping[str, Tensor],
        calibration: Calibration | None,
        processes: Processes,
        seed: int,
    ) -> None:
        self.model, self.settings, self.statistics = model, settings, statistics
        self.processes, self.seed = processes, seed
        self.walk: BlockWalk | None = None
        self.exact: BlockWalk | None = None
        if calibration is None:
            return
        count = _count(calibration)
        chunks = _chunks(count, CHUNKS if gathers(settings, anatomy) else 1)
        # The rank of each chunk, and the chunk of each batch of this rank; a rank's batches are consecutive.
        self._owners = [number * processes.size // len(chunks) for number in range(len(chunks))]
        mine = [
            (number, index)
            for number, chunk in enumerate(chunks)
            if self._owners[number] == processes.rank
            for index in chunk
        ]
        self._chunk_of = [number for number, _ in mine]
        share = _share(calibration, [index for _, index in mine])
        self.walk = BlockWalk(model, anatomy, share)
        if settings.reconstructs:
            self.exact = BlockWalk(model, anatomy, share)

    def passage(self, block: Block) -> Passage | None:
        """What a method that trains a block is shown of it."""
        if self.walk is None or self.exact is None:
            return None
        return Passage(self.exact, self.walk, self.exact.outputs(block))

    def round(self, block: Block, passage: Passage | None) -> dict[str, Tensor]:
        """What is stored for a block's linears, by ``path.name``; they are put in place.

        With a walk, sites are done in the order of the forward pass, each seeing the ones before it quantized; with a
        passage, all are done together.
        """
        model, settings = self.model, self.settings
        done: dict[str, Tensor] = {}
        together: Mapping[str, Rounded] = {}
        if passage is not None:
            chance = generator(self.seed, f"reconstruction of block {block.index}")
            together = settings.round_block(model, block, passage, chance)
        squared = torch.zeros(2, dtype=torch.float64)
        for site in block.sites:
            scheme = settings.weight_scheme(site)
            if scheme is None or settings.skips(block, site, self.statistics):
                continue
            role = site.readers[0].role
            weights = [LinearRef(path, role).weight(model) for path in site.modules]
            if together:
                made = [together[path] for path in site.modules]
            else:
                made = self._rounded(site, weights, self._seen(block, site), scheme)
            for path, weight, rounded in zip(site.modules, weights, made, strict=True):
                done |= {f"{path}.{name}": part for name, part in rounded.parts().items()}
                squared += _squared_error(rounded, weight)
                install(model, path, settings, site, rounded)
        if done:
            done[SQUARED] = squared
        return done

    def advance(self, block: Block, passage: Passage | None) -> None:
        """Move on to the next block, after the layers of this one are in place."""
        if self.exact is not None and passage is not None:
            self.exact.advance_to(passage.outputs)
            switch_static_quantizers(self.model.get_submodule(block.name), on=True)
        if self.walk is not None:
            self.walk.advance(block)

    def _seen(self, block: Block, site: Site) -> Seen | None:
        """What the method gathers of what the site's readers multiply: the input after its online transform."""
        if self.walk is None:
            return None
        reader = self.model.get_submodule(site.modules[0])
        transform = reader.transform if isinstance(reader, QuantizedLinear) else None
        parts: dict[int, Seen] = {}

        def begin(index: int) -> None:
            number = self._chunk_of[index]
            if number not in parts:
                if self.processes.size == 1 and len(parts) == 2:
                    _merge(parts)
                parts[number] = self.settings.observes(site)

        def look(x: Tensor) -> None:
            list(parts.values())[-1].update(x if transform is None else transform(x))

        # Q, K and V are rounded by the time their mixture is looked at, so attention need not run again.
        frozen = site.name == "o_in"
        self.walk.observe(block, {site.name: look}, freeze_attention=frozen, before=begin)
        if self.processes.size > 1:
            parts = self._gathered(parts, self.settings.observes(site))
        return _merge(parts)

    def _gathered(self, parts: Mapping[int, Seen], kind: Seen) -> dict[int, Seen]:
        """The parts of all ranks, in order."""
        if not isinstance(kind, Statistic):
            raise TypeError(f"{type(kind).__name__} cannot be put together from the parts of ranks")
        device = device_of(self.model)
        found: dict[int, Seen] = {}
        for number, owner in enumerate(self._owners):
            mine = parts.get(number)
            state = mine.state() if isinstance(mine, Statistic) else {}
            state = self.processes.broadcast(state, owner)
            if mine is None:
                mine = type(kind).from_state({name: one.to(device) for name, one in state.items()})
            found[number] = mine
            if len(found) == 2:
                _merge(found)
        return found

    def _rounded(
        self, site: Site, weights: Sequence[Tensor], seen: Seen | None, scheme: Scheme
    ) -> list[Rounded]:
        """Each rank's share of the weights of a site, and what the others make of theirs."""
        settings, processes = self.settings, self.processes
        if self.walk is None or processes.size == 1:
            return settings.round_site(site, weights, seen, scheme)
        whole = list(range(len(weights)))
        pieces = [[index] for index in whole] if settings.rounds_apart else [whole]
        made: dict[int, Rounded] = {}
        for piece in processes.share(pieces):
            given = [weights[index] for index in piece]
            made |= zip(piece, settings.round_site(site, given, seen, scheme), strict=True)
        for number, piece in enumerate(pieces):
            owner = number % processes.size
            for index in piece:
                mine = made.get(index)
                parts = processes.broadcast({} if mine is None else mine.parts(), owner)
                if mine is None:
                    device = weights[index].device
                    there = {name: one.to(device) for name, one in parts.items()}
                    made[index] = Rounded.from_parts(there, scheme, settings.branch_format)
        return [made[index] for index in whole]


def _count(calibration: Calibration) -> int:
    """How many batches there are."""
    if isinstance(calibration, Tensor):
        return sum(1 for _ in token_batches(calibration))
    return len(calibration)


def _share(calibration: Calibration, batches: Sequence[int]) -> Calibration:
    """Some consecutive batches."""
    if not batches:
        return []
    if isinstance(calibration, Tensor):
        rows = len(next(token_batches(calibration)))
        return calibration[batches[0] * rows : (batches[-1] + 1) * rows]
    return calibration[batches[0] : batches[-1] + 1]


def _chunks(batches: int, most: int) -> list[range]:
    """At most so many runs of consecutive batches, of about the same length."""
    count = min(most, batches)
    edges = [number * batches // count for number in range(count + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]


def _merge(parts: dict[int, Seen]) -> Seen:
    """Everything in one, in the place of the first."""
    first, *rest = parts
    total = parts[first]
    for number in rest:
        part = parts.pop(number)
        if not (isinstance(total, Statistic) and isinstance(part, Statistic)):
            raise TypeError(f"{type(total).__name__} cannot be put together from parts")
        total.merge(part)
    return total


def _squared_error(rounded: Rounded, weight: Tensor) -> Tensor:
    """``[||W - decoded W||^2, ||W||^2]``, fp64 on the CPU."""
    exact = weight.double()
    difference = rounded.decode().double() - exact
    return torch.stack([difference.square().sum(), exact.square().sum()]).cpu()
