"""SMN: does it fit pictures better than SIREN, WIRE and Gauss, and are the product and the amplitudes what does it?

arXiv:2602.16337 reports 41.40 dB on 24 Kodak pictures of 768 x 512 with 264 thousand parameters, against 40.24 for
WIRE, 37.90 for Gauss and 33.65 for SIREN after 5,000 steps on whole pictures; a sum in the place of the product 40.25;
fixed amplitudes 8 dB below learnable ones; 32.98 dB against 29.06 for SIREN on radiance fields.

Here: Kodak pictures, their middle 512 x 512 averaged down to 128 and 256 pixels a side, networks with as many real
numbers a pixel as the paper's (0.67; a complex number is two), the same steps, pixels of a step and schedule for all, a
rate for each found by a search of its own. A fresh network for every picture, PSNR on the pixel grid. The seed draws
the weights and the pixels of every step.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from _claim import ROOT, Claim, share, spread
from postlude.runs.directory import RunDirectory
from postlude.signals.picture import Picture, evaluate, fit
from postlude.signals.radiance import evaluate_field, fit_field
from postlude.signals.training import Training
from postlude.zoo.smn.networks import build, settings_for, width_for
from postlude.zoo.smn.radiance import Field, cameras

PARTS = ("learning-rates", "pictures", "oscillators", "field", "larger", "longer")
# Of three, the second is for the search alone.
KODAK = ("kodak_01", "kodak_05", "kodak_23")
BUNDLED = ("astronaut", "coffee", "chelsea")
# Of SMN; with them every network has 0.67 numbers a pixel, as 264,195 have on 768 x 512.
WIDTHS = {128: 52, 256: 104}
BATCH, STEPS, LARGER, LONGER = 2048, 1000, 400, 2000


@dataclasses.dataclass(frozen=True)
class Network:
    """A row of a table: a network, and what the search may choose for it.

    Attributes:
        name: a row of ``NETWORKS``.
        tried: rates, each with settings of the network.
        fixed: settings that are no choice.
    """

    name: str
    tried: tuple[tuple[float, Mapping[str, Any]], ...] = ()
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _tried(*rates: float, **values: Any) -> tuple[tuple[float, Mapping[str, Any]], ...]:
    return tuple((rate, values) for rate in rates)


NETWORKS = {
    "SMN (code)": Network("smn", _tried(1e-2, 2e-2, 4e-2)),
    "SMN (paper)": Network("smn", _tried(1e-3, 5e-3, 2e-2), {"variant": "paper"}),
    "SIREN": Network("siren", _tried(5e-4, 1e-3, 2e-3)),
    "WIRE": Network(
        "wire",
        (*_tried(5e-4, 1e-3, 3e-3), *_tried(1e-3, 3e-3, omega=10.0, scale=5.0)),
    ),
    "Gauss": Network(
        "gauss",
        (
            *_tried(3e-4, 1e-3, scale=30.0),
            *_tried(1e-3, 3e-3, scale=10.0),
            *_tried(1e-3, 3e-3, scale=5.0),
        ),
    ),
    "ReLU + PE": Network("relu-pe", _tried(3e-3, 6e-3, 1e-2, 2e-2)),
}
OSCILLATORS = {
    "sum": {"combine": "sum"},
    "fixed amplitudes": {"learnable": False},
    "1 oscillator (8)": {"frequencies": (8.0,)},
    "2 oscillators (8, 40)": {"frequencies": (8.0, 40.0)},
}
SMN = "SMN (code)"
FIELD_WIDTH, FIELD_SIZE, FIELD_SAMPLES, FIELD_BATCH, FIELD_STEPS = 48, 32, 32, 4096, 500
FIELDS = {
    "PE + SMN": Network("smn", _tried(5e-4, 2e-3), {"variant": "field"}),
    "PE + SIREN": Network("siren", _tried(5e-4, 2e-3, omega=30.0)),
}


def picture(name: str, side: int) -> Picture:
    """The middle square of a picture, averaged down to ``side`` pixels."""
    from PIL import Image

    image = Image.open(_folder() / f"{name}.png") if name in KODAK else _bundled(name)
    left, top = ((size - 512) // 2 for size in image.size)
    square = image.convert("RGB").crop((left, top, left + 512, top + 512))
    raw = bytearray(square.resize((side, side), Image.Resampling.BOX).tobytes())
    return Picture(torch.frombuffer(raw, dtype=torch.uint8).reshape(side, side, 3))


def _bundled(name: str) -> Any:
    """A photograph that comes with scikit-image, at least 512 pixels a side."""
    import skimage.data
    from PIL import Image

    image = Image.fromarray(getattr(skimage.data, name)())
    factor = max(1, 512 / min(image.size))
    return image.resize(tuple(round(size * factor) for size in image.size))


def _folder() -> Path:
    return Path(os.environ.get("POSTLUDE_DATA", ROOT.parent / "shared" / "data")) / "vision"


def names() -> tuple[str, ...]:
    """The Kodak pictures; those of scikit-image where they are absent; none where neither is there."""
    if all((_folder() / f"{name}.png").is_file() for name in KODAK):
        return KODAK
    return BUNDLED if importlib.util.find_spec("skimage") else ()


def steps(claim: Claim) -> int:
    """Of a whole measurement."""
    return 20 if claim.quick else STEPS


def field_steps(claim: Claim) -> int:
    """Of a whole measurement of a field."""
    return 20 if claim.quick else FIELD_STEPS


def measure(
    network: str,
    values: Mapping[str, Any],
    rate: float,
    name: str,
    side: int,
    seed: int,
    count: int,
) -> dict[str, Tensor | float]:
    """Fit one network to one picture."""
    width = width_for(network, settings_for("smn", {"width": WIDTHS[side]}).numbers, **values)
    model = build(settings_for(network, {"width": width, **values}), seed)
    seen = picture(name, side)
    losses = fit(model, seen, Training(count, rate, BATCH), seed=seed)
    return {
        "psnr": evaluate(model, seen),
        "losses": torch.tensor(losses),
        "width": float(width),
        "numbers": float(sum(p.numel() for p in model.parameters())),
    }


def measure_field(
    network: str, values: Mapping[str, Any], rate: float, seed: int, count: int
) -> dict[str, Tensor | float]:
    """Fit one field to 24 views and look at it from 6 others."""
    ends = {"in_features": Field.in_features(), "out_features": 5}
    budget = settings_for("smn", {"width": FIELD_WIDTH, "variant": "field", **ends}).numbers
    width = width_for(network, budget, **ends, **values)
    field = Field(build(settings_for(network, {"width": width, **ends, **values}), seed))
    training = Training(count, rate, FIELD_BATCH)
    fit_field(field, cameras(24, FIELD_SIZE), training, samples=FIELD_SAMPLES, seed=seed)
    return {
        "psnr": evaluate_field(field, cameras(6, FIELD_SIZE, turn=0.5)),
        "width": float(width),
        "numbers": float(sum(p.numel() for p in field.parameters())),
    }


def searches(claim: Claim, label: str) -> RunDirectory:
    """Where the search keeps what it found; every part reads it and makes what is missing."""
    if label in FIELDS:
        settings = {"steps": field_steps(claim) // 2, "batch": FIELD_BATCH, "ends": "softplus"}
        return claim.directory(settings, "smn-search-field")
    settings = {"steps": steps(claim) // 2, "batch": BATCH, "picture": names()[1]}
    return claim.directory(settings, "smn-search")


def searched(claim: Claim, label: str, network: Network) -> dict[tuple[float, str], float]:
    """PSNR of every rate and setting that was tried, at half the steps, with a seed that is not measured."""
    kept, half = searches(claim, label), steps(claim) // 2
    found: dict[tuple[float, str], float] = {}

    def attempt(rate: float, values: Mapping[str, Any]) -> Mapping[str, Tensor | float]:
        both = {**network.fixed, **values}
        if label in FIELDS:
            return measure_field(network.name, both, rate, 1000, field_steps(claim) // 2)
        return measure(network.name, both, rate, names()[1], 128, 1000, half)

    for rate, values in network.tried:
        words = ", ".join(f"{key} {value:g}" for key, value in values.items())
        unit = f"{_unit(label)}-{rate:g}" + "".join(f"-{value:g}" for value in values.values())
        one = claim.measured(kept, unit, functools.partial(attempt, rate, values))
        found[rate, words] = float(one["psnr"])
        claim.progress.log(f"{unit}: {found[rate, words]:.2f} dB")
    return found


def best(claim: Claim, label: str, network: Network) -> tuple[float, dict[str, Any]]:
    """The rate and settings with which a network is measured."""
    found = list(searched(claim, label, network).values())
    rate, values = network.tried[found.index(max(found))]
    return rate, {**network.fixed, **values}


def _unit(label: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in label)


def show_searches(claim: Claim) -> None:
    """Every rate that was tried."""
    rows = []
    for label, network in claim.progress.iterate({**NETWORKS, **FIELDS}.items(), "search"):
        found = searched(claim, label, network)
        top = max(found.values())
        cells = [
            f"{'**' if value == top else ''}{rate:g}{f' ({words})' if words else ''}: {value:.2f}"
            f"{'**' if value == top else ''}"
            for (rate, words), value in found.items()
        ]
        rows.append([label, ", ".join(cells)])
    claim.table(
        f"PSNR in dB by learning rate, after {steps(claim) // 2} steps ({names()[1]}, 128 pixels) and "
        f"{FIELD_STEPS // 2} (field)",
        ["", "rate: PSNR"],
        rows,
    )


Rows = Mapping[str, tuple[str, float, Mapping[str, Any]]]
Fits = dict[str, dict[str, list[dict[str, Tensor]]]]


def fitted(claim: Claim, rows: Rows, side: int, chosen: Sequence[str], count: int) -> Fits:
    """Every row on every picture with every seed: ``[row][picture][seed]``."""
    # All parts share what they measure: the whole SMN stands in more than one table.
    kept = claim.directory({"batch": BATCH}, "smn-fits")
    found: Fits = {}
    work = [(name, seed, row) for seed in claim.seeds for name in chosen for row in rows]
    for name, seed, row in claim.progress.iterate(work, f"{side} pixels, {count} steps"):
        network, rate, values = rows[row]
        shape = "".join(f"-{value:g}" for value in values.values() if isinstance(value, float))
        one = claim.measured(
            kept,
            f"{_unit(row)}-{rate:g}{shape}-{name}-{side}-{count}-{seed}",
            functools.partial(measure, network, values, rate, name, side, seed, count),
        )
        claim.progress.log(
            f"{row}, {name}, {side} pixels, seed {seed}: {float(one['psnr']):.2f} dB"
        )
        found.setdefault(row, {}).setdefault(name, []).append(one)
    return found


def show_pictures(claim: Claim, found: Fits, side: int, title: str, count: int) -> None:
    """A row a network, a column a picture, and the mean over pictures of every seed."""
    columns_of = list(next(iter(found.values())))
    rows = []
    for row, by_picture in found.items():
        first = by_picture[columns_of[0]][0]
        columns = [[float(one["psnr"]) for one in by_picture[name]] for name in columns_of]
        means = [sum(values) / len(values) for values in zip(*columns, strict=True)]
        cells = [spread(values, 4) for values in columns]
        if len(columns_of) > 1:
            cells.append(spread(means, 4))
        rows.append(
            [row, f"{float(first['width']):.0f}", f"{float(first['numbers']):,.0f}", *cells]
        )
    mean = ["mean"] if len(columns_of) > 1 else []
    claim.table(
        f"{title}, {side} x {side} pixels, {count} steps of {BATCH} pixels, PSNR in dB",
        ["", "width", "numbers", *columns_of, *mean],
        rows,
    )


def beats(found: Fits, first: str, second: str) -> str:
    """In how many fits of the same picture and seed the first is ahead."""
    pairs = [
        float(one["psnr"]) > float(other["psnr"])
        for name in found[first]
        for one, other in zip(found[first][name], found[second][name], strict=True)
    ]
    return f"{first} is ahead of {second} in {share(pairs)} fits"


def compared(
    claim: Claim, labels: Sequence[str], side: int, chosen: Sequence[str], count: int, title: str
) -> None:
    """Networks at the rates that were found for them, at equal numbers and steps."""
    rows: dict[str, tuple[str, float, Mapping[str, Any]]] = {
        label: (NETWORKS[label].name, *best(claim, label, NETWORKS[label])) for label in labels
    }
    found = fitted(claim, rows, side, chosen, count)
    show_pictures(claim, found, side, title, count)
    claim.say("; ".join(beats(found, SMN, other) for other in labels if other != SMN) + ".")


def pictures(claim: Claim) -> None:
    """Every network on two pictures."""
    title = "Networks with equally many real numbers"
    compared(claim, list(NETWORKS), 128, (names()[0], names()[2]), steps(claim), title)


def larger(claim: Claim) -> None:
    """Every network on one picture of four times as many pixels."""
    count = 2 if claim.quick else LARGER
    compared(claim, list(NETWORKS), 256, names()[2:], count, "A larger picture")


def longer(claim: Claim) -> None:
    """Whether the order changes with time."""
    count = 2 * steps(claim) if claim.quick else LONGER
    compared(claim, [SMN, "SIREN"], 128, names()[2:], count, "More steps")


def oscillators(claim: Claim) -> None:
    """Parts of SMN taken away, one at a time, at the rate of the whole one."""
    rate, values = best(claim, SMN, NETWORKS[SMN])
    rows: dict[str, tuple[str, float, Mapping[str, Any]]] = {SMN: ("smn", rate, values)}
    rows |= {label: ("smn", rate, {**values, **changed}) for label, changed in OSCILLATORS.items()}
    found = fitted(claim, rows, 128, (names()[0], names()[2]), steps(claim))
    show_pictures(claim, found, 128, "Parts of SMN", steps(claim))
    claim.say("; ".join(beats(found, SMN, label) for label in OSCILLATORS) + ".")


def field(claim: Claim) -> None:
    """Views that were not learned from."""
    rows = {label: (n.name, *best(claim, label, n)) for label, n in FIELDS.items()}
    count = field_steps(claim)
    kept = claim.directory({"steps": count, "batch": FIELD_BATCH, "rows": _plain(rows)})
    table = []
    for label, (network, rate, values) in rows.items():
        found = [
            claim.measured(
                kept,
                f"{_unit(label)}-{seed}",
                functools.partial(measure_field, network, values, rate, seed, count),
            )
            for seed in claim.progress.iterate(claim.seeds, label)
        ]
        cells = f"{float(found[0]['width']):.0f}", f"{float(found[0]['numbers']):,.0f}"
        table.append([label, *cells, spread([float(one["psnr"]) for one in found], 4)])
    claim.table(
        f"Radiance fields, 24 views of {FIELD_SIZE} x {FIELD_SIZE}, {count} steps of "
        f"{FIELD_BATCH // FIELD_SAMPLES} rays with {FIELD_SAMPLES} samples, PSNR in dB on 6 other views",
        ["", "width", "numbers", "PSNR"],
        table,
    )


def _plain(rows: Rows) -> dict[str, Any]:
    return {label: [name, rate, dict(values)] for label, (name, rate, values) in rows.items()}


MEASURES = dict(
    zip(PARTS, (show_searches, pictures, oscillators, field, larger, longer), strict=True)
)


def main() -> None:
    """Measure one part."""
    claim = Claim("smn", __doc__ or "", PARTS, seeds=3)
    torch.set_num_threads(1)
    if not names():
        claim.say(f"Skipped: no Kodak pictures at {_folder()} (POSTLUDE_DATA) and no scikit-image.")
        return
    MEASURES[claim.part](claim)
    claim.finish()


if __name__ == "__main__":
    main()
