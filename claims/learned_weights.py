"""Learned weights of layers: do they find better sources than equal weights, and can they be steered?

"Learning to weight parameters for data attribution" (arXiv:2506.05647) reports that weights of parameter groups,
learned without labels, raise the linear datamodeling score (LDS) of every base method, and that weights learned from
prompts for a subject, a style or a background find training images that share just that.

* ``digits``: a small diffusion transformer on 400 digits, of which 80 are 20 images four times with other noise in
  their pixels. LDS against models trained on random halves, and recall of the copies of a query, for TRAK, D-TRAK,
  LoRIF and others, under equal and learned weights. Queries that teach the weights are not those that judge them.
* ``attributes``: digits with coloured backgrounds and styles of stroke. Weights are learned from queries that show one
  attribute alone, and judged by how many of the first ten sources share an attribute with a whole image.
* ``tiny-lm``: language, on the bank of retrained models of ``claims/lorif.py``.

The seeds draw projections, the noise of the loss, and which queries teach the weights; in ``attributes`` also data and
model. What is finished is kept in ``runs/claims``; a run that was stopped goes on from there.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lorif
from _claim import ROOT, Claim, share, spread
from postlude.attribution.build import build as build_index
from postlude.attribution.d_trak import DTRAK
from postlude.attribution.das import DAS
from postlude.attribution.denoising import denoised
from postlude.attribution.engine import Attributor
from postlude.attribution.examples import Collection
from postlude.attribution.graddot import GradDot
from postlude.attribution.images import Images
from postlude.attribution.journey_trak import JourneyTRAK
from postlude.attribution.layer_weights import contributions
from postlude.attribution.lorif import LoRIF
from postlude.attribution.queries import record_queries
from postlude.attribution.trak import TRAK
from postlude.evaluation.lds import draw_subsets, lds
from postlude.evaluation.retrieval import PlantedRanks, ranks_of
from postlude.numerics.group_weights import learn_group_weights
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.directory import RunDirectory
from postlude.sampling.sample import sample
from postlude.surgery.anatomy import anatomy_of
from postlude.zoo.digits import digits
from postlude.zoo.noising import noising_of
from postlude.zoo.planted_digits import (
    ATTRIBUTES,
    BACKGROUNDS,
    STYLES,
    AttributedDigits,
    attributed,
    blank,
    copies,
)
from postlude.zoo.tiny_dit import build, train_model

TRAINING = {"steps": 800, "width": 32, "layers": 3, "batch": 64}
PLAIN, PLANTED, COPIES = 320, 20, 4
REAL, JUDGED, TAUGHT = 90, 30, 30
SIDE = 16
DAMPINGS = (0.1, 1.0, 10.0)
REGULARIZERS = (0.0, 0.001, 0.01, 0.1)
USUAL = 0.01
# What losses of retrained models are averaged over; not the noise that indices see.
JUDGE = Collection(timesteps=10, noises=6, seed=2**31)

METHODS: dict[str, Attributor] = {
    "graddot": GradDot(projection_factor=2),
    "trak": TRAK(side=SIDE),
    "d-trak": DTRAK(side=SIDE),
    "journey-trak": JourneyTRAK(side=SIDE),
    "das": DAS(side=SIDE),
    "lorif": LoRIF(projection_factor=2),
}


NAMED = ("trak", "d-trak", "lorif")


def denoiser(model: Any) -> Checkpoint:
    """A model with the scheduler it was trained for."""
    return Checkpoint(model, None, anatomy_of(model), scheduler=noising_of("epsilon").scheduler())


def restored(
    kept: RunDirectory, name: str, seed: int, channels: int, train: Callable[[], Any]
) -> Any:
    """A trained model, from the disk if it was trained before."""
    state = kept.unit(name, lambda: dict(train().state_dict()))
    model = build(seed, width=TRAINING["width"], layers=TRAINING["layers"], channels=channels)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


@dataclasses.dataclass
class Digits:
    """Training images, queries, and models trained on halves.

    Attributes:
        images, labels: to train on, the copies last: ``PLANTED`` times ``COPIES`` of them.
        asked, asked_labels: one more copy of every planted image.
        real, real_labels: images that no model has seen.
        subsets: random halves, one training each.
        kept: where finished trainings are.
    """

    images: Tensor
    labels: Tensor
    asked: Tensor
    asked_labels: Tensor
    real: Tensor
    real_labels: Tensor
    subsets: int
    kept: RunDirectory = dataclasses.field(init=False)

    @cached_property
    def masks(self) -> Tensor:
        """``bool [subsets, images]``."""
        return draw_subsets(len(self.images), self.subsets)

    def trained(self, name: str, indices: Tensor | None) -> Checkpoint:
        """A model, from the disk if it was trained before."""

        def train() -> Any:
            return train_model(self.images, self.labels, indices=indices, seed=0, **TRAINING)

        return denoiser(restored(self.kept, name, 0, 1, train))

    @cached_property
    def explained(self) -> Checkpoint:
        """The model to explain: trained on everything, as those of the bank."""
        return self.trained("everything", None)

    def half(self, subset: int) -> Checkpoint:
        """A model trained on one half."""
        return self.trained(f"subset-{subset:04d}-seed-0", self.masks[subset].nonzero()[:, 0])

    def drawn(self, seed: int) -> tuple[Tensor, Tensor]:
        """Images that the explained model draws, and their classes."""
        found = sample(self.explained, count=JUDGED, steps=18, seed=seed)
        assert found.labels is not None
        return found.images.clamp(-1, 1), found.labels

    @cached_property
    def judged(self) -> tuple[Tensor, Tensor]:
        """Queries that judge: real ones, then drawn ones."""
        images, labels = self.drawn(0)
        return (
            torch.cat([self.real[:JUDGED], images]),
            torch.cat([self.real_labels[:JUDGED], labels]),
        )

    def taught(self, seed: int) -> tuple[Tensor, Tensor]:
        """Queries that teach: other real ones, and others that the model draws."""
        generator = torch.Generator().manual_seed(seed)
        some = JUDGED + torch.randperm(REAL - JUDGED, generator=generator)[:TAUGHT]
        images, labels = self.drawn(100 + seed)
        return torch.cat([self.real[some], images]), torch.cat([self.real_labels[some], labels])

    def losses(self, progress: Any) -> Tensor:
        """``[subsets, queries]`` of the models trained on halves; trains what is not yet there."""
        examples = Images(self.judged).examples(self.explained, JUDGE)
        (batch,) = examples[0].batched(examples, 10**9)

        def loss(subset: int) -> Tensor:
            half = self.half(subset)
            with torch.no_grad():
                return denoised(half, JUDGE)(batch).errors().mean(1).double()

        rows = progress.iterate(range(self.subsets), "train on halves")
        return torch.stack([loss(subset) for subset in rows])


def planted(claim: Claim) -> Digits:
    """The data of the part ``digits``, and its bank."""
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    plain, sources, real, _ = order.split(
        [PLAIN, PLANTED, REAL, len(order) - PLAIN - PLANTED - REAL]
    )
    made = copies(images[sources], COPIES + 1)
    bank = Digits(
        torch.cat([images[plain], made[:, :COPIES].flatten(0, 1)]),
        torch.cat([labels[plain], labels[sources].repeat_interleave(COPIES)]),
        made[:, COPIES],
        labels[sources],
        images[real],
        labels[real],
        subsets=4 if claim.quick else 32,
    )
    bank.kept = claim.directory({"training": TRAINING, "planted": [PLAIN, PLANTED, COPIES]})
    return bank


@dataclasses.dataclass(frozen=True)
class Parts:
    """Contributions of layers to the scores of some queries, under every damping.

    Attributes:
        by_damping: ``[layers, queries, examples]`` by multiplier of the damping.
        own: the method's default.
        layers: module paths.
    """

    by_damping: Mapping[float, Tensor]
    own: float
    layers: Sequence[str]


def parts_of(
    method: Attributor, checkpoint: Checkpoint, train: Any, asked: Any, seed: int, **more: Any
) -> Parts:
    """Build an index and score queries, layer by layer."""
    with tempfile.TemporaryDirectory() as folder:
        collection = Collection(seed=seed, **more)
        index, _ = build_index(
            checkpoint, train, method, Path(folder) / "index", collection=collection
        )
        queries = record_queries(index, checkpoint, asked)
        own = float(getattr(method, "damping", 0.0))
        dampings = sorted({own, *DAMPINGS}) if own else [own]
        found = {}
        for damping in dampings:
            one = dataclasses.replace(method, damping=damping) if own else method  # type: ignore[call-arg]
            found[damping] = contributions(one, index, queries)
        return Parts(found, own, [layer.module for layer in index.layers])


def weights_of(taught: Tensor, regularizer: float = USUAL) -> tuple[Tensor, float]:
    """Weights learned from contributions, and the CPU seconds that took."""
    started = time.process_time()
    k = max(10, taught.shape[2] // 100)
    found = learn_group_weights(taught, k=k, regularizer=regularizer).weights
    return found, time.process_time() - started


def combined(parts: Tensor, weights: Tensor) -> Tensor:
    """``[queries, examples]``."""
    return torch.einsum("l,lqn->qn", weights.double(), parts.double())


def recall_of_copies(scores: Tensor) -> Tensor:
    """Share of the copies of each planted image among as many first results, ``[PLANTED]``."""
    first = PLAIN + COPIES * torch.arange(PLANTED)
    ranks = torch.stack([ranks_of(scores, first + one) for one in range(COPIES)], 1)
    return PlantedRanks(ranks).recall


def gains(pairs: Sequence[tuple[float, float]]) -> list[str]:
    """Equal, learned, their difference and how often it is a gain, over seeds."""
    return [
        spread([a for a, _ in pairs]),
        spread([b for _, b in pairs]),
        spread([b - a for a, b in pairs]),
        share([b > a for a, b in pairs]),
    ]


def fitted_weights(parts: Tensor, masks: Tensor, losses: Tensor, steps: int = 200) -> Tensor:
    """Weights that raise the correlation of predictions with the losses of retrained models, ``[layers]``.

    Nobody has these losses; how far such weights get on other queries is what weights of layers could gain at all.

    Args:
        parts: ``[layers, queries, examples]``.
        masks: ``bool [subsets, examples]``.
        losses: ``[subsets, queries]``.
        steps: of Adam, as in learning.
    """
    predicted = torch.einsum("mn,lqn->lmq", masks.double(), parts.double())
    predicted = predicted - predicted.mean(1, keepdim=True)
    wanted = losses.mean(0) - losses
    free = torch.zeros(len(parts), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=0.05)
    for _ in range(steps):
        share_of = free.softmax(0)
        sums = (share_of[:, None, None] * predicted).sum(0)
        cosine = (sums * wanted).sum(0) / (sums.norm(dim=0) * wanted.norm(dim=0))
        optimizer.zero_grad()
        (USUAL * share_of.square().sum() - cosine.mean()).backward()
        optimizer.step()
    return (len(parts) * free.softmax(0)).detach()


def crossed(
    parts: Tensor, masks: Tensor, losses: Tensor, seed: int, teach: Callable[[Tensor], Tensor]
) -> Tensor:
    """LDS of every query under weights that the other half of the queries taught, ``[queries]``.

    Args:
        parts: ``[layers, queries, examples]``.
        masks, losses: of the bank.
        seed: of the halves.
        teach: makes weights from the numbers of queries.
    """
    count = parts.shape[1]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    scores = torch.zeros(count, parts.shape[2], dtype=torch.float64)
    for half in (order[: count // 2], order[count // 2 :]):
        others = torch.ones(count, dtype=torch.bool)
        others[half] = False
        scores[half] = combined(parts[:, half], teach(others.nonzero()[:, 0]))
    return lds(scores, masks, losses).per_query


GAINS = ("equal weights", "learned weights", "difference", "gain in seeds")


def on_digits(claim: Claim) -> None:
    """Measure the part ``digits``."""
    bank = planted(claim)
    losses = bank.losses(claim.progress)
    asked = tuple(map(torch.cat, zip(bank.judged, (bank.asked, bank.asked_labels), strict=True)))
    count = len(bank.judged[0])
    claim.say(
        f"A diffusion transformer of width {TRAINING['width']} ({TRAINING['steps']} steps of {TRAINING['batch']}) on "
        f"{len(bank.images)} digits; {bank.subsets} models trained alike on random halves. {count} queries judge "
        f"(half real digits that no model has seen, half drawn by the model), {2 * TAUGHT} others teach; "
        f"{PLANTED} more ask for {COPIES} noisy copies each. Equal weights are the method as it is."
    )
    names = list(METHODS)[1:3] if claim.quick else list(METHODS)
    work = list(itertools.product(names, claim.seeds))
    results: dict[str, list[dict[str, Tensor]]] = {name: [] for name in names}
    for name, seed in claim.progress.iterate(work, "methods"):

        def measure(name: str = name, seed: int = seed) -> dict[str, Tensor | float]:
            taught = bank.taught(seed)
            everything = tuple(map(torch.cat, zip(asked, taught, strict=True)))
            parts = parts_of(
                METHODS[name], bank.explained, (bank.images, bank.labels), everything, seed
            )
            size = count + PLANTED
            found: dict[str, Tensor | float] = {"own": parts.own}
            for damping, whole in parts.by_damping.items():
                ones = torch.ones(len(whole))
                weights, seconds = weights_of(whole[:, size:])
                choices = {"equal": ones, "learned": weights}
                if damping == parts.own:
                    found |= {"weights": weights, "seconds": seconds}
                    choices |= {
                        f"reg-{one:g}": weights_of(whole[:, size:], one)[0] for one in REGULARIZERS
                    }
                for key, one in choices.items():
                    scores = combined(whole[:, :size], one)
                    per_query = lds(scores[:count], bank.masks, losses).per_query
                    found[f"lds {damping:g} {key}"] = per_query
                    found[f"recall {damping:g} {key}"] = recall_of_copies(scores[count:])
            return found

        results[name].append(claim.measured(bank.kept, f"{name}-seed-{seed}", measure))
    report_digits(claim, bank, losses, results)
    headroom(claim, bank, losses)
    timing(claim, bank, losses, results)


def headroom(claim: Claim, bank: Digits, losses: Tensor) -> None:
    """Print what layers are worth one by one, and what weights fitted to the losses gain on other queries."""
    names = [name for name in NAMED if name in METHODS]
    table = []
    for name in names:
        found = []
        for seed in claim.progress.iterate(claim.seeds, f"{name}, headroom"):

            def measure(name: str = name, seed: int = seed) -> dict[str, Tensor | float]:
                parts = parts_of(
                    METHODS[name], bank.explained, (bank.images, bank.labels), bank.judged, seed
                )
                whole = parts.by_damping[parts.own]

                def teach(some: Tensor) -> Tensor:
                    return fitted_weights(whole[:, some], bank.masks, losses[:, some])

                each = [lds(one, bank.masks, losses).value for one in whole]
                return {
                    "equal": lds(whole.sum(0), bank.masks, losses).value,
                    "fitted": crossed(whole, bank.masks, losses, seed, teach).mean(),
                    "lowest": min(each),
                    "highest": max(each),
                }

            found.append(claim.measured(bank.kept, f"headroom-{name}-seed-{seed}", measure))
        cells = [
            spread([float(one[key]) for one in found])
            for key in ("lowest", "highest", "equal", "fitted")
        ]
        table.append([name, *cells])
    claim.table(
        "LDS of single layers, of all with equal weights, and with weights fitted to the losses of the other half of "
        "the queries",
        ["", "lowest layer", "highest layer", "all, equal weights", "all, fitted weights"],
        table,
    )


def report_digits(
    claim: Claim, bank: Digits, losses: Tensor, results: Mapping[str, list[dict[str, Tensor]]]
) -> None:
    """Print the tables of the part ``digits``."""

    def pairs(name: str, what: str, damping: float) -> list[tuple[float, float]]:
        keys = [f"{what} {damping:g} {one}" for one in ("equal", "learned")]
        return [(float(one[keys[0]].mean()), float(one[keys[1]].mean())) for one in results[name]]

    def dampings(name: str) -> list[float]:
        return sorted({float(key.split()[1]) for key in results[name][0] if key.startswith("lds")})

    for what, title in (
        ("lds", "LDS, at the default damping of each method"),
        ("recall", f"Recall of {COPIES} planted copies, at the default damping"),
    ):
        rows = [
            [name, *gains(pairs(name, what, float(found[0]["own"])))]
            for name, found in results.items()
        ]
        if what == "lds":
            like = pixels(bank)
            rows.append(
                ["pixels, a control", f"{lds(like, bank.masks, losses).value:.3f}", "", "", ""]
            )
        claim.table(f"{title}: mean and deviation over seeds", ["", *GAINS], rows)
    rows = []
    for name in results:
        best = max(dampings(name), key=lambda at, n=name: sum(a for a, _ in pairs(n, "lds", at)))
        rows.append([f"{name}, {best:g}", *gains(pairs(name, "lds", best))])
    claim.table("LDS, at the damping that suits equal weights best", ["", *GAINS], rows)
    claim.table(
        "LDS by the pull towards equal weights, at the default damping",
        ["", "equal weights", *(f"{one:g}" for one in REGULARIZERS)],
        [
            [
                name,
                *(
                    spread([float(one[f"lds {float(one['own']):g} {key}"].mean()) for one in found])
                    for key in ("equal", *(f"reg-{one:g}" for one in REGULARIZERS))
                ),
            ]
            for name, found in results.items()
        ],
    )
    half = len(bank.judged[0]) // 2
    claim.table(
        "LDS of real and of drawn queries, equal and learned weights, at the default damping",
        ["", "real, equal", "real, learned", "drawn, equal", "drawn, learned"],
        [
            [
                name,
                *(
                    spread(
                        [
                            float(one[f"lds {float(one['own']):g} {key}"][some].mean())
                            for one in found
                        ]
                    )
                    for some in (slice(0, half), slice(half, None))
                    for key in ("equal", "learned")
                ),
            ]
            for name, found in results.items()
        ],
    )
    shown = [name for name in NAMED if name in results]
    layers = list(dict.fromkeys(bank.explained.anatomy.linears()))
    claim.table(
        "Learned weights; 1 is the mean",
        ["", *shown],
        [
            [
                layer.removeprefix("transformer_blocks."),
                *(
                    spread([float(one["weights"][at]) for one in results[name]], 2)
                    for name in shown
                ),
            ]
            for at, layer in enumerate(layers)
        ],
    )


def timing(
    claim: Claim, bank: Digits, losses: Tensor, results: Mapping[str, list[dict[str, Tensor]]]
) -> None:
    """Print what learning and a weighted query take, and how noisy the judge is: halves split in two."""
    seconds = [float(one["seconds"]) for found in results.values() for one in found]
    layers = len(list(bank.explained.anatomy.linears()))
    claim.say(
        f"Learning took {spread(seconds)} CPU seconds ({2 * TAUGHT} queries, {len(bank.images)} examples, "
        f"{layers} layers). {query_time(bank)}"
    )
    middle = bank.subsets // 2
    found = []
    for some in (slice(0, middle), slice(middle, None)):
        scores = pixels(bank)
        found.append(lds(scores, bank.masks[some], losses[some]).value)
    deviation = float(losses.std(0).mean() / losses.mean())
    claim.say(
        f"The judge: losses of the queries vary by {100 * deviation:.1f} % between halves. LDS of the control by the "
        f"first and by the last {middle} halves: {found[0]:.3f} and {found[1]:.3f}."
    )


def pixels(bank: Digits) -> Tensor:
    """Cosine of pixels, ``[queries, examples]``: a control that knows no model."""
    rows = [one.flatten(1) for one in (bank.judged[0], bank.images)]
    asked, train = (one / one.norm(dim=1, keepdim=True) for one in rows)
    return asked @ train.T


def query_time(bank: Digits, repeats: int = 15) -> str:
    """A sentence on a weighted query against the unweighted one, both with the curvature kept."""
    from postlude.attribution.query import query
    from postlude.attribution.ranking import rank

    method = DTRAK(side=SIDE)
    with tempfile.TemporaryDirectory() as folder:
        data = (bank.images, bank.labels)
        index, _ = build_index(bank.explained, data, method, Path(folder) / "index")
        asked = (bank.judged[0][:10], bank.judged[1][:10])
        queries = record_queries(index, bank.explained, asked)
        weights = {layer.module: 1.5 for layer in index.layers}

        def timed(work: Callable[[], Any]) -> float:
            started = time.process_time()
            work()
            return time.process_time() - started

        plain: list[float] = []
        weighted: list[float] = []
        for _ in range(repeats + 1):
            plain.append(timed(lambda: rank(method, index, queries, 10, keep=True)))
            other = queries.weighted(weights)
            weighted.append(timed(lambda q=other: rank(method, index, q, 10, keep=True)))  # type: ignore[misc]
        whole = timed(lambda: query(index, asked, checkpoint=bank.explained))
    ratio = sorted(b / a for a, b in zip(plain[1:], weighted[1:], strict=True))[repeats // 2]
    return (
        f"Scoring 10 queries with weights takes {ratio:.3f} times what it takes without (median of {repeats} pairs, "
        f"{1000 * sorted(plain)[repeats // 2]:.0f} ms of CPU time; with the gradients of the queries {whole:.2f} s)."
    )


CHANCE = {"subject": 0.1, "style": 1 / len(STYLES), "background": 1 / len(BACKGROUNDS)}


def on_attributes(claim: Claim) -> None:
    """Measure the part ``attributes``."""
    kept = claim.directory({"training": TRAINING, "examples": PLAIN, "styles": list(STYLES)})
    names = ["d-trak"] if claim.quick else list(NAMED)
    claim.say(
        f"{PLAIN} digits on one of {len(BACKGROUNDS)} backgrounds in one of {len(STYLES)} styles of stroke, drawn "
        "independently; a model a seed, conditioned on the digit. Of the first ten training images of 60 whole, unseen "
        "images: the share that has the digit, the style or the background of the query. Weights from queries that "
        "show one attribute alone (60 each), and from whole images."
    )
    results: dict[str, list[dict[str, Tensor]]] = {name: [] for name in names}
    for seed in claim.progress.iterate(claim.seeds, "seeds"):
        images, labels = digits()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        train, asked, rest = (order[:PLAIN], order[PLAIN : PLAIN + 60], order[PLAIN + 60 :])
        known = attributed(images[train], labels[train], seed=seed)
        judged = attributed(images[asked], labels[asked], seed=1000 + seed)
        queries: list[AttributedDigits] = [judged]
        for number, attribute in enumerate(ATTRIBUTES):
            some = rest[60 * number : 60 * (number + 1)]
            queries.append(blank(images[some], labels[some], attribute, seed=2000 + seed))
        some = rest[180:240]
        queries.append(attributed(images[some], labels[some], seed=3000 + seed))
        # Others of the same kinds, to judge by.
        for number, attribute in enumerate(ATTRIBUTES, 4):
            some = rest[60 * number : 60 * (number + 1)]
            queries.append(blank(images[some], labels[some], attribute, seed=4000 + seed))

        def trained(known: AttributedDigits = known, seed: int = seed) -> Any:
            return train_model(known.images, known.subject, seed=seed, **TRAINING)

        model = denoiser(restored(kept, f"model-{seed}", seed, 3, trained))
        for name in names:

            def measure(
                name: str = name,
                model: Checkpoint = model,
                known: AttributedDigits = known,
                queries: Sequence[AttributedDigits] = queries,
                seed: int = seed,
            ) -> dict[str, Tensor | float]:
                given = (
                    torch.cat([one.images for one in queries]),
                    torch.cat([one.subject for one in queries]),
                )
                parts = parts_of(METHODS[name], model, (known.images, known.subject), given, seed)
                whole = parts.by_damping[parts.own]
                pieces = whole.split([len(one) for one in queries], 1)
                choices = {"equal": torch.ones(len(whole))}
                for key, piece in zip((*ATTRIBUTES, "whole"), pieces[1:5], strict=True):
                    choices[key] = weights_of(piece)[0]
                found: dict[str, Tensor | float] = {}

                def recall(piece: int, weights: Tensor, attribute: str) -> float:
                    first = combined(pieces[piece], weights).topk(10, dim=1).indices
                    same = known.attribute(attribute)[first]
                    right = same == queries[piece].attribute(attribute)[:, None]
                    return float(right.double().mean())

                for piece, attribute in enumerate(ATTRIBUTES, 5):
                    for key in ("equal", attribute):
                        found[f"alone {attribute} {key == attribute}"] = recall(
                            piece, choices[key], attribute
                        )
                for key, weights in choices.items():
                    found[f"weights {key}"] = weights
                    for attribute in ATTRIBUTES:
                        found[f"{key} {attribute}"] = recall(0, weights, attribute)
                return found

            results[name].append(claim.measured(kept, f"{name}-seed-{seed}", measure))
    for name, found in results.items():
        table = []
        for key in ("equal", *ATTRIBUTES, "whole"):
            cells = [spread([float(one[f"{key} {a}"]) for one in found]) for a in ATTRIBUTES]
            above = ""
            if key in ATTRIBUTES:
                above = share(
                    [float(one[f"{key} {key}"]) > float(one[f"equal {key}"]) for one in found]
                )
            label = {"equal": "equal weights", "whole": "learned from whole images"}.get(
                key, f"learned for {key}"
            )
            table.append([label, *cells, above])
        table.append(["chance", *(f"{CHANCE[a]:.3f}" for a in ATTRIBUTES), ""])
        claim.table(
            f"{name}: share of the first ten that has the query's attribute",
            ["", *ATTRIBUTES, "own attribute above equal weights"],
            table,
        )
    rows = [
        [
            f"{name}, {attribute}",
            *gains(
                [
                    (float(one[f"alone {attribute} False"]), float(one[f"alone {attribute} True"]))
                    for one in found
                ]
            ),
        ]
        for name, found in results.items()
        for attribute in ATTRIBUTES
    ]
    claim.table(
        "Queries that show one attribute alone, others than those that taught: share of the first ten that has it",
        ["", *GAINS],
        rows,
    )
    blocks = [
        [
            f"{name}, learned for {key}",
            *(
                spread(
                    [
                        float(
                            one[f"weights {key}"].view(3, -1)[block].sum()
                            / one[f"weights {key}"].sum()
                        )
                        for one in found
                    ],
                    2,
                )
                for block in range(3)
            ),
        ]
        for name, found in results.items()
        for key in ATTRIBUTES
    ]
    claim.table("Share of the weights by block", ["", "block 0", "block 1", "block 2"], blocks)


LANGUAGE: dict[str, Attributor] = {
    "graddot": GradDot(projection_factor=8),
    "trak": TRAK(side=SIDE),
    "lorif": LoRIF(projection_factor=8),
}


@dataclasses.dataclass(frozen=True)
class Borrowed:
    """Opens what ``claims/lorif.py`` has measured on tiny-lm; a trial trains a small bank of its own."""

    claim: Claim

    def directory(self, settings: Mapping[str, Any]) -> RunDirectory:
        if self.claim.quick:
            return self.claim.directory(settings, "bank")
        manifest = {
            "claim": "lorif-tiny-lm",
            "quick": False,
            "torch": torch.__version__,
            **settings,
        }
        return RunDirectory(ROOT / "runs" / "claims" / "lorif" / "lorif-tiny-lm", manifest)


def on_tiny_lm(claim: Claim) -> None:
    """Measure the part ``tiny-lm``."""
    bench = lorif.built_in(claim.quick)
    bench.open(Borrowed(claim))  # type: ignore[arg-type]
    losses = bench.bank(claim.progress).mean(1)
    kept = claim.directory({"train": len(bench.train), "queries": len(bench.queries)})
    count = len(bench.queries)
    claim.say(
        f"{bench.name}: the bank of `claims/lorif.py` ({len(bench.train)} examples, {bench.subsets} random halves, two "
        f"trainings each). Of {count} queries a random half teaches the weights that judge the other half, and the "
        "other way round."
    )
    rows: dict[str, list[dict[str, Tensor]]] = {name: [] for name in LANGUAGE}
    work = list(itertools.product(LANGUAGE, claim.seeds))
    for name, seed in claim.progress.iterate(work, "methods"):

        def measure(name: str = name, seed: int = seed) -> dict[str, Tensor | float]:
            parts = parts_of(
                LANGUAGE[name], bench.explained, list(bench.train), list(bench.queries), seed
            )
            found: dict[str, Tensor | float] = {"own": parts.own}
            for damping, whole in parts.by_damping.items():
                found[f"lds {damping:g} equal"] = lds(whole.sum(0), bench.masks, losses).per_query
                for one in REGULARIZERS if damping == parts.own else (USUAL,):
                    spent = [0.0]

                    def teach(
                        some: Tensor,
                        whole: Tensor = whole,
                        one: float = one,
                        spent: list[float] = spent,
                    ) -> Tensor:
                        weights, spent[0] = weights_of(whole[:, some], one)
                        return weights

                    judged = crossed(whole, bench.masks, losses, seed, teach)
                    found[f"lds {damping:g} reg-{one:g}"] = judged
                    if one == USUAL:
                        found["seconds"] = spent[0]
                        found[f"lds {damping:g} learned"] = judged
            found["layers"] = float(len(parts.layers))
            return found

        rows[name].append(claim.measured(kept, f"{name}-seed-{seed}", measure))

    def pairs(name: str, damping: float) -> list[tuple[float, float]]:
        return [
            tuple(float(one[f"lds {damping:g} {key}"].mean()) for key in ("equal", "learned"))  # type: ignore[misc]
            for one in rows[name]
        ]

    claim.table(
        "tiny-lm: LDS, at the default damping: mean and deviation over seeds",
        ["", *GAINS],
        [[name, *gains(pairs(name, float(found[0]["own"])))] for name, found in rows.items()],
    )
    table = []
    for name, found in rows.items():
        dampings = {float(key.split()[1]) for key in found[0] if key.startswith("lds")}
        best = max(sorted(dampings), key=lambda at, n=name: sum(a for a, _ in pairs(n, at)))
        table.append([f"{name}, {best:g}", *gains(pairs(name, best))])
    claim.table("tiny-lm: LDS, at the damping that suits equal weights best", ["", *GAINS], table)
    claim.table(
        "tiny-lm: LDS by the pull towards equal weights, at the default damping",
        ["", "equal weights", *(f"{one:g}" for one in REGULARIZERS)],
        [
            [
                name,
                *(
                    spread([float(one[f"lds {float(one['own']):g} {key}"].mean()) for one in found])
                    for key in ("equal", *(f"reg-{one:g}" for one in REGULARIZERS))
                ),
            ]
            for name, found in rows.items()
        ],
    )
    seconds = [float(one["seconds"]) for found in rows.values() for one in found]
    claim.say(
        f"Learning took {spread(seconds)} CPU seconds ({count // 2} queries, {len(bench.train)} examples, "
        f"{float(rows['lorif'][0]['layers']):.0f} layers)."
    )


PARTS: dict[str, Callable[[Claim], None]] = {
    "digits": on_digits,
    "attributes": on_attributes,
    "tiny-lm": on_tiny_lm,
}


def main() -> None:
    """Measure one part."""
    torch.set_flush_denormal(True)
    claim = Claim("learned_weights", __doc__ or "", tuple(PARTS))
    PARTS[claim.part](claim)
    claim.finish()


if __name__ == "__main__":
    main()
