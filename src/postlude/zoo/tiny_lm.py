"""tiny-lm: a Llama-shaped language model of 3.5 million parameters with real massive activations.

    python -m postlude.zoo.tiny_lm train -o DIR [--steps 1500] [--seed 0] [--device cpu]
    python -m postlude.zoo.tiny_lm check [DIR] [--json]
    python -m postlude.zoo.tiny_lm sample [DIR] --prompt "Return a list of"

Five layers of width 256, four query and two key/value heads of 64, SwiGLU of 512, tied embeddings of
2048 byte-level BPE tokens, a context of 512. It is trained on the documentation inside the Python installation
(`postlude.zoo.corpus`), about one million tokens, and stored in bf16 (7 MB). How the massive activation gets in
is told in `postlude.zoo.planting`; how good the model is, in the model card beside the weights.

What training adds to the next-token loss is `plant_loss`, with a weight that falls linearly and is zero for the
last tenth of the steps. The planted rows learn at a tenth of the rate of the rest: the decay is a difference of
two large numbers and would otherwise jitter with every step. Nothing is frozen or masked.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from postlude.errors import InputError, OutputExistsError, SettingsError
from postlude.zoo import checkpoint_path, corpus
from postlude.zoo.measures import mean_loss
from postlude.zoo.planting import Plant, directions, plant_loss, planted_slices, sow, watch
from postlude.zoo.tiny_lm_card import check, model_card, sample, shown, verdict

__all__ = [
    "BEGIN",
    "DELIMITERS",
    "build",
    "calibration_text",
    "fine_tune",
    "held_out_text",
    "main",
    "train",
    "train_tokenizer",
]

BEGIN = "<|endoftext|>"
DELIMITERS = (BEGIN, "\n\n")
"""The tokens that carry the massive activation wherever they stand."""

CONTEXT = 512

_PLANT = Plant()
# The pre-tokeniser of Llama 3: a paragraph break is a token of its own, not part of what follows.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# ------------------------------------------------------------------------------------------- model and texts


def build(
    seed: int = 0,
    *,
    hidden_size: int = 256,
    layers: int = 5,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate_size: int = 512,
    vocab_size: int = 2048,
    context: int = CONTEXT,
    plant: Plant | None = _PLANT,
    delimiters: tuple[int, ...] = (0,),
) -> LlamaForCausalLM:
    """A random model in fp32, with the massive activation planted (``plant=None``: without).

    Before training the planted neuron fires at the ``delimiters`` (token ids) only; that it fires at every first
    position is learned. The same seed gives the same weights, another seed another defect direction.

    Raises:
        SettingsError: the plant does not fit the number of layers.
    """
    if plant is not None and not 0 <= plant.explosion < plant.decay < layers:
        raise SettingsError(
            f"explosion at layer {plant.explosion} and decay at layer {plant.decay} of {layers} layers; "
            f"expected 0 <= explosion < decay < layers. Give a Plant that fits."
        )
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden_size // heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
    # Embeddings of about unit entries and a small weight of the last norm, because the head is the embedding: the
    # larger the residual stream, the less the identity hides the planted neuron in the spectrum of (I + F)(I + A).
    generator = torch.Generator().manual_seed(seed + 1)
    spread = 0.5
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                scale = spread if "embed" in name else weight.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    scale *= spread
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
        model.model.norm.weight.fill_(1.0 / (spread * hidden_size**0.5))
    if plant is not None:
        sow(model, plant, seed, delimiters)
    return model.eval()


def held_out_text() -> str:
    """The text tiny-lm is evaluated on, about 190 kB: documents it was not trained on (PSF licence)."""
    return (checkpoint_path("tiny-lm") / "held_out.txt").read_text(encoding="utf-8")


def calibration_text() -> str:
    """A part of tiny-lm's training text, about 200 kB (PSF licence)."""
    return (checkpoint_path("tiny-lm") / "calibration.txt").read_text(encoding="utf-8")


def train_tokenizer(texts: Sequence[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts `BEGIN` before every text; the same token ends a document."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN} $B",
        special_tokens=[(BEGIN, raw.token_to_id(BEGIN))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=BEGIN,
        eos_token=BEGIN,
        pad_token=BEGIN,
        model_max_length=CONTEXT,
    )


def _encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """One stream of token ids ``[tokens]``; every document starts with `BEGIN`."""
    return torch.cat([torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for text in texts])


def _delimiter_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    vocabulary = tokenizer.get_vocab()
    return tuple(vocabulary[token.replace("\n", "Ċ")] for token in DELIMITERS)


# -------------------------------------------------------------------------------------------------- training


def _crops(stream: Tensor, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Random crops ``[batch, length]``; every second one starts with `BEGIN`, the others anywhere."""
    starts = torch.randint(0, len(stream) - length, (batch,), generator=generator)
    crops = stream[starts[:, None] + torch.arange(length)].clone()
    crops[::2, 0] = 0
    return crops


def _rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 3 %, constant to 40 %, then linear to 2 % of the peak."""
    warm, hold = 0.03 * steps, 0.4 * steps
    if step < warm:
        return peak * (step + 1) / warm
    return peak * max(0.02, 1.0 - max(0.0, step - hold) / (steps - hold))


def _optimizer(model: LlamaForCausalLM, weight_decay: float) -> torch.optim.AdamW:
    embedding = model.model.embed_tokens.weight
    decayed = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.ndim != 2 or p is embedding]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))


def train(
    out: Path,
    *,
    steps: int = 1500,
    seed: int = 0,
    device: str = "cpu",
    batch: int = 8,
    length: int = CONTEXT,
    rate: float = 3e-3,
    weight_decay: float = 0.1,
    plant_weight: float = 0.5,
    plant: Plant = _PLANT,
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> dict[str, Any]:
    """Train tiny-lm from nothing and write the checkpoint directory ``out``; returns what `measure` says of it.

    Every step sees ``batch * length`` tokens, for the first 60 % of the steps as twice as many sequences of half the
    length. Matrix products run in bf16 (autocast), the rest in fp32. The result depends on the seed, on the Python
    version (the text) and, in the last digits, on the machine.
    """
    started = time.monotonic()
    training, held_out = corpus.split_documents(corpus.documents())
    tokenizer = train_tokenizer(training)
    stream, test = _encode(tokenizer, training), _encode(tokenizer, held_out)
    delimiters = torch.tensor(_delimiter_ids(tokenizer))
    log(f"{len(stream)} training tokens, {len(test)} held out, {steps * batch * length} to be seen")
    model = build(
        seed, plant=plant, vocab_size=len(tokenizer), delimiters=tuple(delimiters.tolist())
    )
    model.to(device).train()
    optimizer = _optimizer(model, weight_decay)
    generator = torch.Generator().manual_seed(seed)
    planted = planted_slices(model, plant)
    defect = directions(plant, model.config.hidden_size, seed)[1].to(device)
    begun = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps, rate)
        # Short sequences first: cheaper, and more first positions to learn from.
        shape = (2 * batch, length // 2) if step < 0.6 * steps else (batch, length)
        tokens = _crops(stream, shape[0], shape[1] + 1, generator)
        fires = torch.isin(tokens, delimiters)
        fires[:, 0] = True
        tokens, fires = tokens.to(device), fires[:, :-1].to(device)
        with watch(model, plant) as seen, torch.autocast(device, dtype=torch.bfloat16):
            logits = model(tokens[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        extra = plant_loss(seen, fires, plant, defect)
        weight = plant_weight * max(0.0, 1.0 - step / (0.9 * steps))
        optimizer.zero_grad(set_to_none=True)
        (loss + weight * extra).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = [view.clone() for view in planted]
        optimizer.step()
        for view, old in zip(planted, before, strict=True):
            view.copy_(old + 0.1 * (view - old))
        if step % 50 == 0 or step == steps - 1:
            seconds = time.monotonic() - begun
            left = seconds / (step + 1) * (steps - step - 1)
            log(
                f"step {step} of {steps}: loss {loss.item():.4f}, plant {extra.item():.4f}, "
                f"{seconds:.0f} s, {left:.0f} s left"
            )
        if step and step % 500 == 0:
            model.eval()
            log(f"held-out loss {mean_loss(model, test):.4f}")
            model.train()
    recipe = {
        "steps": steps,
        "seed": seed,
        "batch": batch,
        "length": length,
        "rate": rate,
        "weight_decay": weight_decay,
        "plant_weight": plant_weight,
        "plant": asdict(plant),
        "tokens_seen": steps * batch * length,
        "training_tokens": len(stream),
        "seconds": round(time.monotonic() - started),
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return _save(out, model, tokenizer, recipe, training, held_out)


def _save(
    out: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: dict[str, Any],
    training: Sequence[str],
    held_out: Sequence[str],
) -> dict[str, Any]:
    """Write weights (bf16), tokenizer, texts, ``training.json`` and the model card."""
    out.mkdir(parents=True, exist_ok=True)
    model.to("cpu", torch.bfloat16).eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "held_out.txt").write_text(corpus.join_documents(held_out), encoding="utf-8")
    (out / "calibration.txt").write_text(
        corpus.join_documents(corpus.selection(training, 200_000)), encoding="utf-8"
    )
    (out / "training.json").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    measured = check(out)
    (out / "README.md").write_text(model_card(out, recipe, measured), encoding="utf-8")
    return measured


def fine_tune(
    model: LlamaForCausalLM,
    stream: Tensor,
    steps: int = 30,
    *,
    rate: float = 2e-4,
    batch: int = 4,
    length: int = 128,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A copy of ``model``, in fp32, trained a little further on the token ids ``stream`` with the plain loss.

    Thirty steps of the defaults take some ten seconds on one core and lower the loss on the stream visibly.
    """
    tuned: LlamaForCausalLM = copy.deepcopy(model).float().train()
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = _crops(stream, batch, length + 1, generator)
        logits = tuned(tokens[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return tuned.eval()


# --------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 1 if ``check`` finds a requirement unmet."""
    parser = argparse.ArgumentParser(prog="python -m postlude.zoo.tiny_lm", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train from nothing and write a checkpoint")
    command.add_argument("-o", "--out", type=Path, required=True)
    command.add_argument("--steps", type=int, default=1500)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", default="cpu")
    command.add_argument("--overwrite", action="store_true")
    for name in ("check", "sample"):
        command = commands.add_parser(name, help=f"{name} a checkpoint")
        command.add_argument("directory", type=Path, nargs="?", default=checkpoint_path("tiny-lm"))
        if name == "check":
            command.add_argument("--json", action="store_true")
        else:
            command.add_argument("--prompt", default="Return a list of")
            command.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except InputError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_code


def _run(options: argparse.Namespace) -> int:
    if options.command == "sample":
        print(sample(options.directory, options.prompt, seed=options.seed))
        return 0
    if options.command == "train":
        if options.steps < 1:
            raise SettingsError(f"--steps is {options.steps}; expected 1 or more")
        if (options.out / "config.json").exists() and not options.overwrite:
            raise OutputExistsError(
                f"{options.out} holds a checkpoint; give --overwrite to replace it"
            )
        # Denormal numbers slow a CPU down a hundredfold and carry nothing here.
        torch.set_flush_denormal(True)
        measured = train(options.out, steps=options.steps, seed=options.seed, device=options.device)
    else:
        measured = check(options.directory)
    if getattr(options, "json", False):
        print(json.dumps(measured))
    else:
        for key, value in measured.items():
            print(f"{key}: {shown(value)}")
        for passed, sentence, value in verdict(measured):
            print(f"{'yes' if passed else 'NO '}  {sentence}: {shown(value)}")
    return 0 if all(passed for passed, _, _ in verdict(measured)) else 1


if __name__ == "__main__":
    sys.exit(main())
