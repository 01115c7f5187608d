"""FastPose-ViT: is the apparent rotation the right thing to learn from a crop?

FastPose-ViT (arXiv:2512.09792) trains a vision transformer on square crops of a spacecraft. It has the network predict
the rotation that a camera would see that looks straight at the body, and turns that by the direction of the predicted
translation; predicting the camera's own rotation from the same crop is said to leave an error of about the angle
between the two. Here both targets are learned by the same network from the same rendered pictures, and judged on 500
others; also without any network, by taking the true apparent rotation for the camera's.

A seed draws the pictures, the weights and the order of training. Finished trainings are kept in ``runs/claims``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import cache

import torch
from torch import Tensor

from _claim import ROOT, Claim, share, spread
from postlude.zoo.fastpose_vit.data import PoseData
from postlude.zoo.fastpose_vit.drawing import draw_axes
from postlude.zoo.fastpose_vit.making import make
from postlude.zoo.fastpose_vit.metrics import PoseErrors, pose_errors
from postlude.zoo.fastpose_vit.network import Backbone, build
from postlude.zoo.fastpose_vit.rotation import angle_between, apparent_rotation
from postlude.zoo.fastpose_vit.spacecraft import own_spacecraft
from postlude.zoo.fastpose_vit.training import Training, fit, predict

TARGETS = {"apparent": "apparent rotation", "camera": "camera's rotation"}
ATTITUDES = 60.0
EDGES = (3.0, 10.0, 20.0, 30.0, 40.5)
PICTURE = ROOT / "docs" / "fastpose.png"


@cache
def pictures(seed: int, train: int, test: int) -> tuple[PoseData, PoseData]:
    """A set to learn from, and one to be judged on."""
    whole = make(own_spacecraft(), train + test, seed, attitudes=ATTITUDES)
    return whole.take(slice(0, train)), whole.take(slice(train, None))


def main() -> None:
    """Train, judge, print."""
    claim = Claim("fastpose", __doc__ or "", seeds=3)
    counts = (300, 60) if claim.quick else (4000, 500)
    training = dataclasses.replace(Training(), epochs=1 if claim.quick else 12)
    kept = claim.directory(
        {"counts": counts, "training": dataclasses.asdict(training), "attitudes": ATTITUDES}
    )
    errors: dict[str, list[PoseErrors]] = {target: [] for target in TARGETS}
    tilts, shown = [], None
    for seed in claim.seeds:
        train, test = pictures(seed, *counts)
        for target in TARGETS:

            def measure(
                target: str = target,
                train: PoseData = train,
                test: PoseData = test,
                seed: int = seed,
            ) -> dict[str, Tensor]:
                model = build(Backbone(), seed, target=target)  # type: ignore[arg-type]
                fit(model, train, training, seed, log=claim.progress.log)
                translation, rotation = predict(model, test)
                return {"translation": translation, "rotation": rotation}

            found = claim.measured(kept, f"{target}-{seed}", measure)
            errors[target].append(
                pose_errors(
                    found["translation"], found["rotation"], test.translations, test.rotations
                )
            )
            if target == "apparent" and shown is None:
                shown = (test, found)
        apparent = apparent_rotation(test.rotations, test.translations)
        tilts.append(math.degrees(float(angle_between(apparent, test.rotations).mean())))
    report(claim, errors, tilts)
    if shown is not None and not claim.quick:
        test, found = shown
        sheet = draw_axes(
            test.take(slice(0, 12)), found["rotation"][:12], found["translation"][:12], columns=6
        )
        sheet.quantize(64).save(PICTURE, optimize=True)
    claim.finish()


def report(claim: Claim, errors: dict[str, list[PoseErrors]], tilts: list[float]) -> None:
    """The two tables."""
    rows = []
    for target, name in TARGETS.items():
        found = errors[target]
        rows.append(
            (
                name,
                spread([math.degrees(float(e.rotation.mean())) for e in found]),
                spread([math.degrees(float(e.rotation.median())) for e in found]),
                spread([float(e.relative_translation.mean()) for e in found]),
                spread([e.score() for e in found]),
            )
        )
    rows.append(("apparent rotation taken for the camera's, no network", spread(tilts), "", "", ""))
    claim.table(
        "Errors on 500 pictures",
        ("learned", "E_R mean, degrees", "E_R median", "e_t", "score"),
        rows,
    )
    below = [
        float(a.rotation.mean()) < float(b.rotation.mean())
        for a, b in zip(errors["apparent"], errors["camera"], strict=True)
    ]
    claim.say(f"The apparent rotation gives the smaller mean E_R in {share(below)} seeds.")
    rows = []
    for low, high in itertools.pairwise(EDGES):
        cells = [f"{low:.0f} to {high:.0f} m"]
        for target in TARGETS:
            parts = [
                e.rotation[(e.distance >= low) & (e.distance < high)].mean().rad2deg().item()
                for e in errors[target]
            ]
            cells.append(spread(parts))
        near = [
            e.translation[(e.distance >= low) & (e.distance < high)].mean().item()
            for e in errors["apparent"]
        ]
        rows.append((*cells, spread(near)))
    claim.table(
        "By distance",
        ("distance", *(f"E_R, {name}" for name in TARGETS.values()), "E_t in metres, apparent"),
        rows,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    main()
