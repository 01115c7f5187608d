"""LoRaQ: in the bytes of SVDQuant's 16-bit branch, is a low-bit branch of more rank better?

LoRaQ (arXiv:2604.18117) fits a low-rank branch to a 4-bit weight by gradient descent, without data, quantizes the
branch itself, and reports, for PixArt-Sigma and SANA, to be better than SVDQuant (arXiv:2411.05007) in as many bytes
with branches of W8A8, W6A6 and W4A8. Here tiny-dit and tiny-lm are quantized to W4A4, tiny-dit also to W3A4, in groups
of 64 weights and 64 activations. The branch of SVDQuant has rank 8 on tiny-dit, whose matrices are 64 wide, and 32 on
tiny-lm (256); every other branch has the largest rank whose bytes, scales and ragged groups counted, are no more.

Between the two methods lie three differences, so three more rows: SVDQuant without one lower factor for Q, K and V
(tiny-dit only); LoRaQ with a 16-bit branch of the same rank (only the fit differs); the low-bit branch without descent,
by one SVD. And one, at W4A4 on tiny-dit, that is data-free no more: LoRaQ after the smoothing of SVDQuant.

A seed draws the calibration data of SVDQuant and of that row, on tiny-dit also the noise of the samples; LoRaQ has
otherwise neither data nor anything random. The output error is that of all rounded linears, each given the float
model's inputs on held-out data: ``sqrt(sum ||y - y_q||^2 / sum ||y||^2)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import postlude as pl
from _claim import Claim, share, spread
from postlude.evaluation.perplexity import evaluate
from postlude.evaluation.samples import judge_samples
from postlude.quantization.engine import Quantizer
from postlude.quantization.loraq import LoRaQ
from postlude.quantization.rtn import RTN
from postlude.quantization.svdquant import SVDQuant
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.directory import RunDirectory
from postlude.zoo import tiny_lm
from postlude.zoo.digits import digits
from postlude.zoo.noising import NOISINGS

Numbers = dict[str, Tensor]
OURS = ("loraq, W8A8 branch", "loraq, W6A6 branch", "loraq, W4A8 branch")
PEER = "svdquant"
SMOOTH = "loraq, W8A8 branch, smoothed"


def methods(bits: int, rank: int, steps: int) -> dict[str, Quantizer]:
    """Every row of a table, by name."""
    equal = {"weights": bits, "activations": 4, "kv": 16, "bytes_as": f"svdquant:{rank}"}

    def loraq(branch: str, iterations: int = steps) -> LoRaQ:
        return LoRaQ(**equal, branch=branch, iterations=iterations)

    return {
        "rtn": RTN(weights=bits, activations=4, kv=16, group=64, activation_group=64),
        PEER: SVDQuant(**equal),
        "svdquant, no factor shared": SVDQuant(**equal, share=False),
        "loraq, 16-bit branch": loraq("16"),
        "W8A8 branch by one SVD": loraq("w8a8", 0),
        **{name: loraq(name.split()[1].lower()) for name in OURS},
        SMOOTH: LoRaQ(**equal, branch="w8a8", iterations=steps, smooth=True),
    }


class Bench(ABC):
    """A float model, what calibrates it and what it is measured on.

    Attributes:
        name: of the model.
        rank: of SVDQuant's branch.
        bits: of weights.
        without: rows that are left out, for time.
        columns: what is measured, by name in the units, with the heading and whether more is better.
    """

    name: str
    rank: int
    bits: tuple[int, ...]
    without: tuple[str, ...]
    columns: ClassVar[Mapping[str, tuple[str, bool]]]
    checkpoint: Checkpoint

    @abstractmethod
    def quantize(self, method: Quantizer, seed: int) -> Checkpoint:
        """With calibration data of that seed."""

    @abstractmethod
    def batch(self) -> dict[str, Tensor]:
        """Held-out inputs of the model."""

    @abstractmethod
    def judge(self, small: Checkpoint, seed: int) -> Mapping[str, Tensor | float]:
        """What the model as a whole does."""

    def inputs(self) -> dict[str, Tensor]:
        """What every rounded linear of the float model reads."""
        found: dict[str, Tensor] = {}

        def look(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            return lambda _, arguments: found.update({path: arguments[0]})

        model = self.checkpoint.model
        handles = [
            model.get_submodule(path).register_forward_pre_hook(look(path))
            for path in self.checkpoint.anatomy.linears()
        ]
        with torch.no_grad():
            model(**self.batch())
        for handle in handles:
            handle.remove()
        return found

    @torch.no_grad()
    def output_error(self, small: Checkpoint, inputs: Mapping[str, Tensor]) -> float:
        """Of all linears together."""
        wrong = whole = 0.0
        for path, x in inputs.items():
            exact = self.checkpoint.model.get_submodule(path)(x)
            wrong += float((small.model.get_submodule(path)(x) - exact).square().sum())
            whole += float(exact.square().sum())
        return (wrong / whole) ** 0.5


class Denoiser(Bench):
    """tiny-dit: samples are compared with the float model's from the same noise."""

    name, rank, bits = "tiny-dit", 8, (4, 3)
    without = ()
    columns: ClassVar = {
        "psnr": ("PSNR to the float samples, dB", True),
        "frechet": ("Frechet distance", False),
        "accuracy": ("class accuracy", True),
    }

    def __init__(self, quick: bool) -> None:
        self.checkpoint = pl.load("zoo:tiny-dit", dtype="float32")
        self.count = 40 if quick else 300
        self._float: dict[int, Tensor] = {}

    def quantize(self, method: Quantizer, seed: int) -> Checkpoint:
        return pl.quantize(self.checkpoint, method, seed=seed)

    def batch(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(10**6)
        images, labels = digits()
        images, labels = images[:256], labels[:256]
        noising = NOISINGS["epsilon"]
        sigma = noising.draw(len(images), generator)
        noise = torch.randn(images.shape, generator=generator)
        noised, _ = noising.noised(images, noise, sigma)
        return {
            "hidden_states": noised,
            "timestep": noising.timesteps(sigma),
            "class_labels": labels,
        }

    def draw(self, checkpoint: Checkpoint, seed: int) -> Tensor:
        """Images; 20 steps of Euler."""
        from postlude.sampling.sample import sample

        return sample(checkpoint, count=self.count, sampler="euler", seed=seed).images

    def judge(self, small: Checkpoint, seed: int) -> Mapping[str, Tensor | float]:
        if seed not in self._float:
            self._float[seed] = self.draw(self.checkpoint, seed)
        images = self.draw(small, seed)
        labels = torch.arange(self.count) % 10
        found = judge_samples(images, labels, reference=self._float[seed])
        return {
            "psnr": found["psnr_db"],
            "frechet": found["frechet"],
            "frechet_float": found["frechet_reference"],
            "accuracy": found["class_accuracy"],
            "accuracy_float": found["class_accuracy_reference"],
        }


class Language(Bench):
    """tiny-lm on text it was not trained on."""

    name, rank, bits = "tiny-lm", 32, (4,)
    without = ("svdquant, no factor shared", SMOOTH)
    columns: ClassVar = {
        "perplexity": ("perplexity", False),
        "kl": ("KL to the float model", False),
    }

    def __init__(self, quick: bool) -> None:
        self.checkpoint = pl.load("zoo:tiny-lm", dtype="float32")
        self.text = tiny_lm.held_out_text()[: 4_000 if quick else 16_000]
        plain = evaluate(self.checkpoint, [self.text], protocol="windows", max_length=256)
        self._perplexity = plain["perplexity"]

    def quantize(self, method: Quantizer, seed: int) -> Checkpoint:
        text = [tiny_lm.calibration_text()]
        return pl.quantize(
            self.checkpoint, method, calibration=text, samples=16, length=256, seed=seed
        )

    def batch(self) -> dict[str, Tensor]:
        ids = self.checkpoint.tokenizer(self.text)["input_ids"][:512]
        return {"input_ids": torch.tensor(ids).view(2, 256)}

    def judge(self, small: Checkpoint, seed: int) -> Mapping[str, Tensor | float]:
        found = evaluate(
            small, [self.text], protocol="windows", max_length=256, reference=self.checkpoint
        )
        return {
            "perplexity": found["perplexity"],
            "kl": found["kl"],
            "perplexity_float": self._perplexity,
        }


BENCHES: dict[str, type[Bench]] = {"tiny-dit": Denoiser, "tiny-lm": Language}


def one(bench: Bench, method: Quantizer, seed: int, samples: range) -> dict[str, Tensor | float]:
    """Quantize with one seed and measure with each of ``samples``."""
    small = bench.quantize(method, seed)
    made_by = small.made_by()
    branch = made_by.get("branch", {})
    found: dict[str, Tensor | float] = {
        "weight_error": made_by["weight_error"],
        "output_error": bench.output_error(small, bench.inputs()),
        "bytes": float(branch.get("bytes", 0)),
        "rank": float(max(map(int, branch.get("layers_of_rank", {"0": 0})))),
    }
    judged = [bench.judge(small, sample) for sample in samples]
    for key in judged[0]:
        found[key] = torch.tensor([float(each[key]) for each in judged], dtype=torch.float64)
    return found


def measure(claim: Claim, bench: Bench, bits: int, kept: RunDirectory) -> dict[str, Numbers]:
    """Every row, its values over seeds."""
    found: dict[str, Numbers] = {}
    rows = methods(bits, bench.rank, 20 if claim.quick else 300)
    for name in bench.without:
        del rows[name]
    if bits < 4:
        rows.pop(SMOOTH, None)
    runs = [
        (name, seed)
        for name, method in rows.items()
        for seed in (claim.seeds if method.needs_calibration else claim.seeds[:1])
    ]
    parts: dict[str, list[Numbers]] = {}
    for name, seed in claim.progress.iterate(runs, f"{bench.name}, W{bits}A4", len(runs)):
        method = rows[name]
        drawn = isinstance(bench, Denoiser)
        # What has no calibration data is made once, and judged on the noise of every seed.
        samples = range(seed, seed + 1)
        if drawn and not method.needs_calibration:
            samples = claim.seeds
        unit = f"w{bits}-{name.replace(', ', '-').replace(' ', '-')}-{seed}"
        parts.setdefault(name, []).append(
            claim.measured(
                kept,
                unit,
                lambda method=method, seed=seed, samples=samples: one(bench, method, seed, samples),
            )
        )
    for name, values in parts.items():
        found[name] = {key: torch.cat([v[key].reshape(-1) for v in values]) for key in values[0]}
    return found


def report(claim: Claim, bench: Bench, bits: int, found: dict[str, Numbers]) -> None:
    """One table, and what it says of the claim."""
    rows = []
    for name, values in found.items():
        cells = [spread(values[key].tolist()) for key in bench.columns]
        rank, size = int(values["rank"][0]), int(values["bytes"][0])
        errors = [spread(values[key].tolist()) for key in ("weight_error", "output_error")]
        rows.append([name, str(rank or ""), f"{size:,}" if size else "", *errors, *cells])
    first = next(iter(found.values()))
    plain = [f"{key}_float" for key in bench.columns]
    floats = [spread(first[key].tolist()) if key in first else "" for key in plain]
    rows.insert(0, ["float", "", "", "0", "0", *floats])
    header = ["", "rank", "bytes of all branches", "weight error", "output error"]
    header += [heading for heading, _ in bench.columns.values()]
    claim.table(f"{bench.name} at W{bits}A4", header, rows)
    verdicts = []
    better = {"weight_error": ("weight error", False), "output_error": ("output error", False)}
    for key, (heading, more) in {**better, **bench.columns}.items():
        ahead = [wins(found[name][key], found[PEER][key], more) for name in OURS]
        words = ", ".join(share(one) for one in ahead)
        verdicts.append(f"{heading.split(',')[0]} {words}")
    claim.say(
        f"Better than SVDQuant in as many bytes, W8A8, W6A6, W4A8, seeds: {'; '.join(verdicts)}."
    )


def wins(ours: Tensor, theirs: Tensor, more: bool) -> list[bool]:
    """Seed by seed; one value stands for all seeds."""
    ours, theirs = torch.broadcast_tensors(ours, theirs)
    return [
        (a > b) if more else (a < b) for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)
    ]


def main() -> None:
    """Measure one model."""
    claim = Claim("loraq", __doc__ or "", parts=tuple(BENCHES))
    bench = BENCHES[claim.part](claim.quick)
    kept = claim.directory({"rank": bench.rank, "group": 64, "steps": 20 if claim.quick else 300})
    for bits in bench.bits:
        report(claim, bench, bits, measure(claim, bench, bits, kept))
    claim.finish()


if __name__ == "__main__":
    main()
