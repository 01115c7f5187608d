"""What a stage costs: a rule for every command that has one.

``P`` parameters, ``T`` tokens (:mod:`postlude.recipes.sizes`)::

                       operations              bytes held by a rank beside activations    ranks
    inspect            2 P T  a method         of files    T = 32 sequences of 256 tokens one
    quantize           6 P T  calibrating      6 P         the model in fp32, and codes   share batches, or blocks
                       + GPTQ's                + 48 w^2    six matrices of the widest
                                                           input, where GPTQ rounds
                       three passes: record, observe, advance; a method's own search and a branch are not counted
                       + 2 P T a step          where a denoiser samples its own inputs
    tune               6 P T                   16 P        weights, gradients and Adam    share batches; with FSDP2
                                                                                          16 P / ranks
                       4 P T                   4 P         beside an adapter
                       + 2 P' T                + 4 P'      where a reference is run
    tune prior         2 P T                   of files                                   one
    evaluate           2 P T  a model          of files                                   share batches
    generate           2 P    a token          of files                                   one
    attribute build    as its own plan says (``postlude attribute plan``), likewise       share examples
    attribute damage   2 P T  a model          of files                                   one
    sample             2 P T  an evaluation    of files    T = images x patches           one
                       evaluations: steps, twice for heun and for guidance, over the timesteps that blocks are reused
                       for; a model beside it takes its own
    sample calibrate   the same of both models                                            one
    evaluate samples   the same, and the judge is not counted                             one

Text is calibrated on in ``samples`` crops drawn with replacement, so however little there is, ``T = samples x length``;
of a file of inputs as many as there are. Sequences are cut where the command cuts them; ``tune --steps`` takes so many
batches, whatever the data. GPTQ inverts and factorises ``H [in, in]`` (``in^3``) and takes ``2 in^2 out`` operations
for every linear of a Llama-like model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from postlude import registry
from postlude.attribution.plan import Hardware, assumed_shape, plan
from postlude.numerics.weighted_likelihood import COLUMNS
from postlude.quantization.blocks import CHUNKS
from postlude.recipes.sizes import Data, Known, Model, Steps, Unknown, data, model, text_tokens
from postlude.recipes.stage import Stage
from postlude.runs.weights import read_header
from postlude.tuning.weighting import TokenWeighting

__all__ = ["RULES", "Cost", "cost"]

_INSPECTED, _INSPECTED_LENGTH = 32, 256
_CALIBRATED, _CALIBRATED_LENGTH = 128, 512
_TUNED_LENGTH, _BATCH = 2048, 8
_STEPS, _IMAGES, _JUDGED, _RUNS, _IMAGES_OF_A_RUN = 20, 64, 1500, 5, 16
_FP32 = 4
# Parameters below which no shape is assumed.
_SMALLEST = 1e6


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one stage takes.

    Attributes:
        operations: of all ranks; None where nothing is known of them.
        memory: bytes held.
        written: bytes.
        output: what it gives to later stages.
        without: what is not counted.
        shared: whether ranks share the work.
        most: how many ranks can share, 0 for any number.
        divided: bytes of which each rank holds a part, if the run is sharded.
    """

    operations: float | None
    memory: float = 0.0
    written: float = 0.0
    output: Model | Data | Steps | None = None
    without: str = ""
    shared: bool = False
    most: int = 0
    divided: float = 0.0


def cost(stage: Stage, known: Known, ranks: int = 1) -> Cost:
    """The cost of a stage.

    Args:
        stage: of a recipe.
        known: what earlier stages give, by ``${stage}``.
        ranks: that work on it.

    Raises:
        Unknown: there is no rule for the command, or something that it reads is not known.
    """
    rule = RULES.get(stage.command.name)
    if rule is None:
        raise Unknown(f"no forecast for `{stage.command.name}`")
    return rule(stage, known, ranks)


def _inspect(stage: Stage, known: Known, ranks: int) -> Cost:
    found = model(stage.arguments[0], known)
    methods = (
        str(stage.options.get("methods", "outliers,singular-defects,signature")).count(",") + 1
    )
    tokens = _INSPECTED * found.length(_INSPECTED_LENGTH)
    return Cost(2 * found.parameters * tokens * methods, found.bytes)


def _quantize(stage: Stage, known: Known, ranks: int) -> Cost:
    found = model(stage.arguments[0], known)
    tokens = _calibration_tokens(stage, found)
    bits = _weight_bits(str(stage.options.get("bits", "w4")))
    # Codes, and a sixteenth more for scales; what is untied, or stored beside them, makes it more.
    left = found.outside * found.bytes / max(found.parameters, 1)
    inside = (found.parameters - found.outside) * bits / 8 * (1 + 1 / 16)
    written = min(found.bytes, left + inside)
    operations, memory = 6 * found.parameters * tokens, 6 * found.parameters
    if tokens and found.kind == "diffusion" and "calibration" not in stage.options:
        operations += 2 * found.parameters * tokens * _STEPS
    if "gptq" in (stage.options.get("method"), stage.options.get("rounding")):
        more, held = _gptq(found.parameters)
        operations, memory = operations + more, memory + held
    return Cost(
        operations,
        memory,
        written,
        dataclasses.replace(found, bytes=written),
        "at least: a search of the method's own is not counted",
        shared=True,
        most=CHUNKS if tokens else 0,
    )


def _calibration_tokens(stage: Stage, found: Model) -> float:
    given = stage.options.get("calibration")
    samples = stage.options.get("samples", _CALIBRATED)
    if given is None:
        if found.kind != "diffusion" or not _learns(str(stage.options["method"])):
            return 0.0
    elif Path(str(given)).suffix == ".safetensors" and Path(str(given)).is_file():
        samples = max((one["shape"][0] for one in read_header(Path(given)).values()), default=0)
    if found.patches:
        return float(samples * found.patches)
    return float(samples * stage.options.get("length", found.length(_CALIBRATED_LENGTH)))


def _learns(method: str) -> bool:
    settings = registry.find("quantize", method).settings()
    return bool(settings.needs_calibration)


def _gptq(parameters: float) -> tuple[float, float]:
    """Operations of the rounding itself, and bytes of second moments, in a model of the shape of a Llama."""
    if parameters < _SMALLEST:
        return 0.0, 0.0
    layers = assumed_shape(parameters).layers
    operations = sum(
        one.count * (one.in_features**3 + 2 * one.in_features**2 * one.out_features)
        for one in layers
    )
    widest = max(one.in_features for one in layers)
    return float(operations), 6.0 * 8 * widest**2


def _weight_bits(text: str) -> int:
    digits = text.lower().partition("w")[2]
    number = "".join(digit for digit in digits[:2] if digit.isdigit())
    return int(number) if number else 16


def _tune(stage: Stage, known: Known, ranks: int) -> Cost:
    options = stage.options
    if options.get("objective") == "grpo":
        raise Unknown("no forecast of rewards: how long the answers are is not known before")
    found = model(stage.arguments[0], known)
    if found.kind == "audio":
        raise Unknown("no forecast of recordings: how long they are is not read")
    longest = options.get("max-length", found.length(_TUNED_LENGTH))
    examples = data(stage.arguments[1], known, longest)
    tokens = examples.tokens * options.get("epochs", 1)
    if "steps" in options:
        rows = options["steps"] * options.get("batch-size", _BATCH) * options.get("accumulate", 1)
        # Every rank takes a batch of its own at every step.
        tokens = ranks * rows * (longest if options.get("packing") else examples.mean)
    reference = _frozen(stage, known, found)
    adapter = "adapter" in options
    trained = (_FP32 if adapter else 4 * _FP32) * found.parameters
    beside = 0.0 if adapter and "reference" not in options else _FP32 * reference
    return Cost(
        ((4 if adapter else 6) * found.parameters + 2 * reference) * tokens,
        trained + beside,
        found.bytes if adapter else 3 * _FP32 * found.parameters + found.bytes,
        found,
        shared=True,
        divided=0.0 if adapter else trained,
    )


def _frozen(stage: Stage, known: Known, found: Model) -> float:
    """Parameters of the frozen model that runs beside the one in training; 0 where none does."""
    options = stage.options
    runs = options.get("objective") == "dpo"
    if not runs and "prior" not in options:
        rule = registry.find("tune", str(options.get("weights", "sft"))).settings()
        runs = TokenWeighting(rule, options.get("signal")).needs_reference_model
    if not runs:
        return 0.0
    return (
        model(options["reference"], known).parameters
        if "reference" in options
        else found.parameters
    )


def _prior(stage: Stage, known: Known, ranks: int) -> Cost:
    found = model(stage.arguments[0], known)
    longest = stage.options.get("max-length", found.length(_TUNED_LENGTH))
    tokens = data(stage.arguments[1], known, longest).tokens
    return Cost(2 * found.parameters * tokens, found.bytes, tokens * _FP32 * (len(COLUMNS) + 1))


def _evaluate(stage: Stage, known: Known, ranks: int) -> Cost:
    judged = _with_reference(stage, known, "reference")
    tokens = text_tokens(stage.options.get("text"), known)
    return Cost(_passes(judged, tokens), _bytes(judged), shared=True)


def _generate(stage: Stage, known: Known, ranks: int) -> Cost:
    found = model(stage.arguments[0], known)
    return Cost(2 * found.parameters * stage.options.get("max-new-tokens", 50), found.bytes)


def _export(stage: Stage, known: Known, ranks: int) -> Cost:
    found = model(stage.arguments[0], known)
    return Cost(0.0, 8 * found.parameters, found.bytes)


def _build(stage: Stage, known: Known, ranks: int) -> Cost:
    found = model(stage.arguments[0], known)
    examples = data(stage.arguments[1], known, _length(stage, found))
    if found.parameters < _SMALLEST:
        why = "no forecast of an index of a model of less than a million parameters"
        return Cost(None, output=examples, without=why)
    planned = plan(
        assumed_shape(found.parameters),
        Hardware("counted", 1.0, 1.0, 1.0, 1.0, 1.0),
        examples=max(1, round(examples.examples)),
        tokens=max(1.0, examples.mean),
    )
    parts = ("gradients", "projection", "outer", "factorisation")
    operations = sum(planned.flops[part] for part in parts)
    # What is selected by asking it are examples of these.
    return Cost(operations, found.bytes, planned.bytes["index"], examples, shared=True)


def _select(stage: Stage, known: Known, ranks: int) -> Cost:
    """Only what comes out of it: what asking costs is decided by the index."""
    index = known.get(str(stage.arguments[0]))
    chosen = None
    if isinstance(index, Data):
        top = min(stage.options["top"], index.examples)
        chosen = index.taken(index.examples - top if stage.options.get("drop") else top)
    return Cost(None, output=chosen, without=f"no forecast for `{stage.command.name}`")


def _damage(stage: Stage, known: Known, ranks: int) -> Cost:
    compared = _with_reference(stage, known, "reference")
    texts = data(stage.arguments[1], known, _length(stage, compared[0]))
    chosen = texts.taken(min(stage.options["top"], texts.examples))
    return Cost(
        _passes(compared, texts.tokens), _bytes(compared), chosen.tokens * _FP32, output=chosen
    )


def _length(stage: Stage, found: Model) -> float:
    """Tokens at which an example is cut; of those that attribution commands read."""
    return stage.options.get("max-length") or found.context or math.inf


def _sample(stage: Stage, known: Known, ranks: int) -> Cost:
    drawn = _with_reference(stage, known, "compare")
    count = stage.options.get("count", _IMAGES)
    written = count * drawn[0].values * _FP32 * len(drawn)
    return Cost(_drawing(stage, known, drawn, count), _bytes(drawn), written)


def _judge_samples(stage: Stage, known: Known, ranks: int) -> Cost:
    drawn = _with_reference(stage, known, "reference")
    count = stage.options.get("count", _JUDGED)
    return Cost(_drawing(stage, known, drawn, count), _bytes(drawn))


def _calibrate(stage: Stage, known: Known, ranks: int) -> Cost:
    drawn = _with_reference(stage, known, "reference")
    count = stage.options.get("runs", _RUNS) * stage.options.get("batch", _IMAGES_OF_A_RUN)
    steps = Steps(stage.options.get("steps", _STEPS))
    return Cost(_drawing(stage, known, drawn, count), _bytes(drawn), output=steps)


def _drawing(stage: Stage, known: Known, drawn: list[Model], count: int) -> float:
    """Operations of drawing so many images from each of these models; blocks of the first may be reused."""
    options = stage.options
    drift = known.get(str(options.get("drift")))
    steps = options.get("steps", drift.count if isinstance(drift, Steps) else _STEPS)
    twice = (2 if options.get("sampler") == "heun" else 1) * (
        2 if options.get("guidance", 1.0) != 1.0 else 1
    )
    tokens = [count * one.patches for one in drawn]
    if not all(tokens):
        raise Unknown("the configuration of the model does not say how large its images are")
    reuse = (options.get("reuse", 1), *([1] * (len(drawn) - 1)))
    return sum(
        2 * one.parameters * number * steps * twice / every
        for one, number, every in zip(drawn, tokens, reuse, strict=True)
    )


def _with_reference(stage: Stage, known: Known, option: str) -> list[Model]:
    """The model, and the one beside it where there is one."""
    named = [stage.arguments[0]]
    if option in stage.options:
        named.append(stage.options[option])
    return [model(one, known) for one in named]


def _passes(models: list[Model], tokens: float) -> float:
    return sum(2 * one.parameters * tokens for one in models)


def _bytes(models: list[Model]) -> float:
    return sum(one.bytes for one in models)


RULES: Mapping[str, Callable[[Stage, Known, int], Cost]] = {
    "inspect": _inspect,
    "quantize": _quantize,
    "tune": _tune,
    "tune prior": _prior,
    "evaluate": _evaluate,
    "evaluate samples": _judge_samples,
    "generate": _generate,
    "export": _export,
    "attribute build": _build,
    "attribute damage": _damage,
    "attribute select": _select,
    "sample": _sample,
    "sample calibrate": _calibrate,
}
