"""OffQ without data: is the outlier direction of the weights as good as that of the tokens?

OffQ (arXiv:2606.07116) takes it from extreme tokens of calibration text. "Demystifying Singular Defects in LLMs"
(arXiv:2502.07004) predicts the direction of massive activations from the weights of single blocks. ``offq-weights``
puts the second into the first: no text, no forward pass. Here both are compared at W4A4KV4 with nearest rounding,
where nothing else needs data.

Two models: tiny-lm, whose massive activations were planted before training, and stories260k, which has none of its own,
with one planted into it and trained on its own stories until it could be used again.

The seed of a run draws calibration crops, random signs and the Gaussian inputs that blocks are linearised with.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

import _models
import postlude as pl
from _claim import Claim, data_directory, documents, share, spread
from _variants import OffsetQuaRot, WrittenOffQ
from postlude._front_door import calibration_tokens
from postlude.numerics.directions import acute_angle
from postlude.quantization.engine import Quantizer
from postlude.quantization.offq import OffQ
from postlude.quantization.offq_weights import OffQWeights
from postlude.quantization.rtn import RTN
from postlude.zoo import tiny_lm
from postlude.zoo.planting import Plant, directions, plant_loss, planted_slices, sow, watch
from w4a4kv4 import Bench, Text

UNTURNED = "quarot's rotations, offq's quantizers"
METHODS: Mapping[str, type[Quantizer]] = {
    "rtn": RTN,
    UNTURNED: OffsetQuaRot,
    "offq": OffQ,
    "offq-weights": OffQWeights,
    "offq-weights with all eigenvectors": WrittenOffQ,
}
PLANT = Plant(explosion=1, decay=3, amplitude=400.0)


def methods(group: int) -> dict[str, Quantizer]:
    """W4A4KV4 in groups, rounded to nearest; of these only offq, and quarot in name, read text."""
    return {
        name: kind(weights=4, activations=4, kv=4, activation_group=group, rounding="nearest")
        for name, kind in METHODS.items()
    }


def planted(student: _models.Student, own: Tensor, steps: int) -> dict[str, Tensor]:
    """Weights of stories260k with a massive activation at first positions, healed on its stories ``[n, length]``."""
    checkpoint = student.start
    model, size = student.work.model, student.work.model.config.hidden_size
    student.reset()
    begin = checkpoint.tokenizer.bos_token_id
    sow(model, PLANT, 0, (begin,))
    defect = directions(PLANT, size, 0)[1]
    slices = planted_slices(model, PLANT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    source = torch.Generator().manual_seed(0)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 20) * max(0.05, 1 - step / steps)
        tokens = own[torch.randint(0, len(own), (16,), generator=source)]
        fires = tokens[:, :-1] == begin
        with watch(model, PLANT) as seen:
            logits = model(tokens[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        weight = 0.5 * max(0.0, 1 - step / (0.9 * steps))
        optimizer.zero_grad()
        (loss + weight * plant_loss(seen, fires, PLANT, defect)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = [view.clone() for view in slices]
        optimizer.step()
        for view, old in zip(slices, before, strict=True):
            view.copy_(old + 0.1 * (view - old))
    model.eval()
    return {name: value.clone() for name, value in model.state_dict().items()}


def look(claim: Claim, bench: Bench) -> None:
    """Print how far the direction of the weights is from that of the data, and what either costs."""
    angles, shares, seconds = [], [], {"data": [], "weights": []}  # type: ignore[var-annotated]
    for seed in claim.seeds:
        tokens = calibration_tokens(
            bench.checkpoint, bench.calibration, samples=bench.samples, length=256, seed=seed
        )
        found: dict[str, Mapping[str, Tensor]] = {}
        for name, method in (("data", OffQ()), ("weights", OffQWeights())):
            folded = dataclasses.replace(
                bench.checkpoint, model=copy.deepcopy(bench.checkpoint.model)
            )
            method.fold(folded)
            started = time.process_time()
            found[name] = method.statistics(folded, tokens if name == "data" else None, seed)
            seconds[name].append(time.process_time() - started)
        data, weights = (found[name]["residual.basis"][:, 0] for name in ("data", "weights"))
        angles.append(float(acute_angle(data, weights)))
        shares.append(float((found["data"]["residual.basis"][:, 0] @ weights) ** 2))
    heading = [
        "",
        "degrees between them",
        "squared cosine",
        "CPU s from data",
        "CPU s from weights",
    ]
    claim.table(
        f"{bench.name}: the direction of the weights and that of {bench.samples} x 256 tokens",
        heading,
        [["", *(spread(one) for one in (angles, shares, *seconds.values()))]],
    )


def compare(claim: Claim, bench: Bench) -> None:
    """Measure and print every method."""
    look(claim, bench)
    values = bench.measure(claim, methods(bench.group), f"groups of {bench.group}")
    for text in bench.texts:
        reference = text.measure(bench.checkpoint)
        rows = [["float", f"{reference['perplexity']:.4g}", "0"]]
        for name, kept in values.items():
            rows.append([name, *(spread(kept[text.name][key]) for key in ("perplexity", "kl"))])
        title = (
            f"{bench.name} on {text.name}, {reference['tokens']} tokens, groups of {bench.group}"
        )
        claim.table(title, ["W4A4KV4", "perplexity", "KL"], rows)
        data, ours, none = (
            values[name][text.name]["kl"] for name in ("offq", "offq-weights", UNTURNED)
        )
        claim.say(
            "KL of offq-weights no larger than that of offq: in "
            f"{share([b <= a for a, b in zip(data, ours, strict=True)])} seeds; smaller than without an outlier "
            f"direction: in {share([b < a for a, b in zip(none, ours, strict=True)])}."
        )


def main() -> None:
    """Measure two models."""
    claim = Claim("data_free_offq", __doc__ or "", seeds=3)
    torch.set_num_threads(1)
    text = tiny_lm.held_out_text()[: 6_000 if claim.quick else 12_000]
    compare(
        claim,
        Bench(
            "tiny-lm",
            pl.load("zoo:tiny-lm", dtype="float32"),
            [tiny_lm.calibration_text()],
            samples=4 if claim.quick else 16,
            group=64,
            texts=[Text("held-out text", [text], "windows")],
        ),
    )
    data = data_directory()
    if data is None:
        claim.say("stories260k: skipped, its files are not here (`POSTLUDE_DATA` says where).")
    else:
        student = _models.stories(data, claim.quick)
        stories = Bench(
            "stories260k",
            student.start,
            documents(data / "text" / "wikitext2_valid.txt"),
            samples=4 if claim.quick else 16,
            group=32,
            texts=[
                Text(
                    "five stories",
                    documents(data / "text" / "tinystories_sample.jsonl"),
                    "documents",
                )
            ],
        )
        steps, texts = (10, 16) if claim.quick else (200, 192)
        kept = claim.directory({"plant": dataclasses.asdict(PLANT), "steps": steps, "texts": texts})
        sown = kept.unit("planted", lambda: planted(student, student.own(texts, 64), steps))
        student.work.model.load_state_dict(sown)
        found = dataclasses.replace(student.work, path=None)
        compare(claim, dataclasses.replace(stories, name="stories260k, planted", checkpoint=found))
    claim.finish()


if __name__ == "__main__":
    main()
