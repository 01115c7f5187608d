"""audio-llm: an audio language model of one million parameters, in the shape of Audio Flamingo 3.

    python -m postlude.zoo.audio_llm make -o DIR [--seed 0]

transformers' ``AudioFlamingo3ForConditionalGeneration`` with random weights: 64 mel bands, an encoder of width 128
that gives one embedding for 80 ms, a projector, and a causal decoder of width 128 with a vocabulary for questions and
answers about speech (`postlude.zoo.speech_answers`). What serves the published models serves it.

Whisper's features have a frame every 10 ms and its encoder divides time by 4. Here frames are 20 ms apart (windows of
25 ms), so that time is divided by 8 in all, at half the cost. A window is 4 s; longer recordings take several.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from postlude.errors import InputError, OutputExistsError, SettingsError
from postlude.zoo.speech_answers import (
    ALL,
    LONG_QUESTION,
    PARTS,
    SCORES,
    Assessment,
    Finding,
    phrase,
    question,
    write,
)

__all__ = ["build", "build_processor", "main", "make"]

RATE = 16_000
MEL_BANDS = 64
WINDOW = 4  # seconds
HOP = 320  # samples
_LONGEST = 30  # seconds
_AUDIO, _END, _PAD = "<sound>", "<|end|>", "<|pad|>"
_TURNS = ("<|user|>", "<|assistant|>", "<|system|>")
_TYPES = {
    "noise": ("white", "pink", "hum", "babble", "click"),
    "dist": ("clipping", "crush", "band limit", "codec", "clip", "band", "dropout"),
    "pause": ("",),
}
_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}<sound>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# A word with the blank before it and the equals sign behind it, or a single digit, blank or sign.
_PIECES = r" ?[A-Za-z]+=?| ?\||[^A-Za-z]"


def _texts() -> Iterator[str]:
    """What the vocabulary is made for: the questions, and answers of every kind."""
    draw = random.Random(0)
    for dimension in ALL:
        yield question(dimension)
    yield LONG_QUESTION
    for number in range(400):
        start = draw.randrange(40) / 10
        times = ((start, start + draw.randrange(1, 20) / 10),)
        findings = {
            part.key: Finding(draw.choice(_TYPES[part.key]), times) if number % 3 else Finding()
            for part in PARTS
        }
        yield write(Assessment({one.key: draw.randint(1, 5) for one in SCORES}, findings))
        for part in PARTS:
            yield phrase(part, findings[part.key])


def build_processor(window: int = WINDOW, mel_bands: int = MEL_BANDS) -> Any:
    """The ``AudioFlamingo3Processor`` of the small model; the same every time.

    Args:
        window: seconds that the encoder reads at once.
        mel_bands: of the features.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        AudioFlamingo3Processor,
        PreTrainedTokenizerFast,
        WhisperFeatureExtractor,
    )

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        special_tokens=[_PAD, _END, *_TURNS, _AUDIO],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words.train_from_iterator(_texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=_PAD,
        eos_token=_END,
        extra_special_tokens=[_AUDIO, *_TURNS],
    )
    # What every short question begins and ends with is one token each.
    short = question(SCORES[0])
    start, end = short.split(SCORES[0].words)
    tokenizer.add_tokens([start.rstrip(), end, LONG_QUESTION])
    extractor = WhisperFeatureExtractor(
        feature_size=mel_bands, sampling_rate=RATE, hop_length=HOP, chunk_length=window
    )
    return AudioFlamingo3Processor(
        extractor, tokenizer, chat_template=_TEMPLATE, audio_token=_AUDIO, max_audio_len=_LONGEST
    )


def build(
    seed: int = 0,
    *,
    processor: Any = None,
    width: int = 128,
    encoder_layers: int = 2,
    layers: int = 2,
    heads: int = 4,
    context: int = 1024,
) -> Any:
    """A random ``AudioFlamingo3ForConditionalGeneration`` in fp32.

    Args:
        seed: of the weights.
        processor: whose vocabulary and windows it has; None for :func:`build_processor`.
        width: of encoder and decoder.
        encoder_layers: of the encoder.
        layers: of the decoder.
        heads: of each.
        context: longest sequence of the decoder, embeddings of audio included.

    Raises:
        SettingsError: a width that the heads do not divide into even parts.
    """
    from transformers import (
        AudioFlamingo3Config,
        AudioFlamingo3EncoderConfig,
        AudioFlamingo3ForConditionalGeneration,
        Qwen2Config,
    )

    if width % (2 * heads):
        raise SettingsError(f"width is {width} for {heads} heads; expected an even multiple")
    processor = processor or build_processor()
    tokenizer, extractor = processor.tokenizer, processor.feature_extractor
    encoder = AudioFlamingo3EncoderConfig(
        num_mel_bins=extractor.feature_size,
        num_hidden_layers=encoder_layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_size=width,
        max_source_positions=extractor.nb_max_frames // 2,
    )
    decoder = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=8 * width // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    config = AudioFlamingo3Config(
        audio_config=encoder, text_config=decoder, audio_token_id=processor.audio_token_id
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AudioFlamingo3ForConditionalGeneration(config)
        _initialise(model)
    return model.eval()


@torch.no_grad()
def _initialise(model: Any) -> None:
    """Weights by their fan-in, positions a tenth as large as Whisper's, and cepstra where features are read.

    transformers draws every weight with a deviation of 0.02, which is meant for a width of thousands. Here the two
    convolutions would shrink a recording to a twentieth of its positions, and training would first have to find it.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d) and name != "lm_head":
            deviation = module.weight[0].numel() ** -0.5
            # What is added to a stream; there are two additions in each of a few layers.
            added = name.endswith(("o_proj", "out_proj", "down_proj", "fc2"))
            module.weight.normal_(0, deviation / 2 if added else deviation)
    _read_cepstra(model.model.audio_tower.conv1)
    model.model.language_model.embed_tokens.weight.normal_(0, 0.5)
    positions = model.model.audio_tower.embed_positions.weight
    positions.copy_(0.1 * _sinusoids(*positions.shape))


def _read_cepstra(convolution: nn.Conv1d) -> None:
    """Start from random mixtures of cepstra and their first and second differences in time, all of like size.

    Neighbouring bands of log-mel features say nearly the same: what they have in common is fifty times as large as what
    sets them apart, and gradient descent learns it fifty times as fast. The deviations are those of speech, roughly.
    """
    width, bands, _ = convolution.weight.shape
    order = torch.arange(min(24, bands), dtype=torch.float64)
    place = (torch.arange(bands, dtype=torch.float64) + 0.5) / bands
    cosines = torch.cos(math.pi * order[:, None] * place) * (2 / bands) ** 0.5  # [cepstra, bands]
    cosines[0] /= 2**0.5
    deviations = 4.5 * (64 / bands) ** -0.5 / (1 + order) ** 0.95
    patterns = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
    patterns /= patterns.norm(dim=1, keepdim=True) * torch.tensor([[1.0], [0.37], [0.25]])
    basis = torch.einsum("cb,pt->cpbt", cosines / deviations[:, None], patterns).flatten(0, 1)
    mixture = torch.randn(width, len(basis), dtype=torch.float64) * len(basis) ** -0.5
    convolution.weight.copy_((mixture @ basis.flatten(1)).view_as(convolution.weight))
    mean = torch.linspace(0.35, -0.7, bands, dtype=torch.float64)  # of speech, over bands
    usual = (convolution.weight.double() * mean[:, None]).sum((1, 2))
    cast(nn.Parameter, convolution.bias).copy_(-usual)


def _sinusoids(length: int, width: int) -> Tensor:
    """Whisper's table of positions, ``[length, width]``, which is not learned (arXiv:2212.04356)."""
    rates = torch.exp(-math.log(10_000) / (width // 2 - 1) * torch.arange(width // 2))
    angles = torch.arange(length)[:, None] * rates[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def make(out: Path, seed: int = 0, overwrite: bool = False) -> dict[str, Any]:
    """Write a random model and its processor.

    Raises:
        OutputExistsError: ``out`` holds a checkpoint.
    """
    if (out / "config.json").exists() and not overwrite:
        raise OutputExistsError(f"{out} holds a checkpoint; give --overwrite to replace it")
    processor = build_processor()
    model = build(seed, processor=processor)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    for file in out.glob("*.safetensors"):
        file.chmod(0o644)  # the library writes weights for their owner alone
    return {
        "output": str(out),
        "seed": seed,
        "parameters": sum(one.numel() for one in model.parameters()),
        "vocabulary": len(processor.tokenizer),
        "bytes": sum(file.stat().st_size for file in out.glob("*.safetensors")),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m postlude.zoo.audio_llm", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("make", help="write a model with random weights")
    command.add_argument("-o", "--out", type=Path, required=True)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--overwrite", action="store_true")
    command.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        made = make(options.out, options.seed, options.overwrite)
    except InputError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps(made))
        return 0
    for key, value in made.items():
        print(f"{key}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
