"""What the demonstration does, and how the same is asked for on a command line and in Python."""

from __future__ import annotations

import dataclasses
import json
import shlex

from postlude import registry
from postlude.quantization.engine import Quantizer

__all__ = ["KEPT", "Plan", "built_in"]

# The method whose checkpoint stays.
KEPT = "offq"
_HELD_OUT = 64_000  # letters


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the demonstration does.

    Attributes:
        model: the float checkpoint.
        calibration, held_out: texts; what is measured is measured on the second.
        prompt: what every model is asked to continue.
        methods: names of quantize methods.
        inspections: names of inspections.
        bits: of weights, activations, and keys and values.
        activation_group: channels of a token that share a scale, the same for every method.
        samples, length: calibration sequences, and tokens of each.
        max_length: tokens of a window of held-out text.
        error_windows: windows on which errors inside the model are measured.
        new_tokens: length of the continuations.
    """

    model: str
    calibration: str
    held_out: str
    prompt: str
    methods: tuple[str, ...] = ("rtn", "smoothquant", "gptq", "quarot", "offq")
    inspections: tuple[str, ...] = ("outliers", "singular-defects", "signature")
    bits: tuple[int, int, int] = (4, 4, 4)
    activation_group: int = 64
    samples: int = 64
    length: int = 256
    max_length: int = 256
    error_windows: int = 8
    new_tokens: int = 40

    def settings(self, name: str) -> Quantizer:
        """The settings of one method."""
        weights, activations, kv = self.bits
        settings: Quantizer = registry.find("quantize", name).settings(
            weights=weights, activations=activations, kv=kv, activation_group=self.activation_group
        )
        return settings

    @property
    def bits_word(self) -> str:
        """As ``--bits`` takes it."""
        return "w{}a{}kv{}".format(*self.bits)

    def commands(self, seed: int) -> list[str]:
        """What to type in the demonstration's directory to get the same numbers."""
        model = shlex.quote(self.model)
        calibration, measured = "text/calibration.txt", "text/held_out.txt"
        measured += f" --max-length {self.max_length}"
        lines = [
            f"postlude inspect {model} --text {calibration} --dtype float32 --seed {seed}",
            f"postlude evaluate {model} --text {measured} --dtype float32",
        ]
        for method in self.methods:
            words = [
                f"postlude quantize {model} --method {method} --bits {self.bits_word}",
                f"--activation-group {self.activation_group}",
            ]
            if self.settings(method).needs_calibration:
                words.append(
                    f"--calibration {calibration} --samples {self.samples} --length {self.length}"
                )
            lines.append(" ".join([*words, f"--seed {seed} -o again/{method}"]))
            lines.append(
                f"postlude evaluate again/{method} --text {measured} --reference {model} --dtype float32"
            )
        return lines

    def python(self, seed: int) -> str:
        """The same for one method, in Python."""
        name = KEPT if KEPT in self.methods else self.methods[-1]
        kind = type(self.settings(name)).__name__
        weights, activations, kv = self.bits
        group = self.activation_group
        model, inspections = json.dumps(self.model), json.dumps(self.inspections)
        return f"""\
import postlude as pl
from postlude.quantization import {kind}

float_model = pl.load({model}, dtype="float32")
reports = pl.inspect(
    float_model,
    {inspections},
    text="text/calibration.txt",
    seed={seed},
)

pl.quantize(
    {model},
    {kind}(weights={weights}, activations={activations}, kv={kv}, activation_group={group}),
    calibration="text/calibration.txt",
    samples={self.samples},
    length={self.length},
    seed={seed},
    out="again/{name}",
)
small = pl.load("again/{name}", dtype="float32")
result = pl.evaluate(
    small, "text/held_out.txt", reference=float_model, max_length={self.max_length}
)
print(result)
"""


def built_in() -> Plan:
    """Of the model that comes with Postlude, on its own text."""
    from postlude.zoo import tiny_lm

    return Plan(
        model="zoo:tiny-lm",
        calibration=tiny_lm.calibration_text(),
        # A third of it: enough to tell the methods apart, in a minute on two cores.
        held_out=tiny_lm.held_out_text()[:_HELD_OUT],
        prompt="Return a list of",
    )
