"""Recordings and text as the inputs of an audio language model, and its answers.

Everything is the model's own: its chat template writes the turns, its feature extractor makes log-mel features, and its
processor says how many embeddings a recording becomes. Each recording is given to the processor alone, so it can be
kept and shared by any number of questions; :meth:`Listener.prepare` is what the processor makes of the same texts and
recordings together.

Features are padded to whole windows (30 s for the published models). The padding is one column again and again, so it
is not kept: a recording of three seconds takes a tenth of its window.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from postlude.errors import ArchitectureError, DataError, SettingsError
from postlude.runs.audio import Recording
from postlude.runs.chat import write_chat
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.documents import encode
from postlude.runs.progress import Progress
from postlude.surgery.anatomy import AudioAnatomy
from postlude.surgery.batches import placed_on
from postlude.surgery.shared_encoder import encode_once

__all__ = ["Answer", "Features", "Listener", "generate", "join_features"]

_TEXT = ("input_ids", "attention_mask")


@dataclasses.dataclass(frozen=True)
class Features:
    """What a model hears of one recording.

    Attributes:
        inputs: arguments of the model's forward, ``[windows, ...]`` each; float ones without the columns at their end
            that repeat the last.
        columns: of float inputs with those columns.
        embeddings: how many the recording becomes.
    """

    inputs: Mapping[str, Tensor]
    columns: int
    embeddings: int

    @property
    def windows(self) -> int:
        """Rows that the encoder reads."""
        return len(next(iter(self.inputs.values())))


def join_features(features: Sequence[Features]) -> dict[str, Tensor]:
    """Arguments of a model's forward for several recordings, one after the other; nothing for none."""
    joined: dict[str, Tensor] = {}
    for name in features[0].inputs if features else ():
        joined[name] = torch.cat([_padded(one.inputs[name], one.columns) for one in features])
    return joined


def _padded(tensor: Tensor, columns: int) -> Tensor:
    missing = columns - tensor.shape[-1]
    if not tensor.is_floating_point() or not missing:
        return tensor
    return torch.cat([tensor, tensor[..., -1:].expand(*tensor.shape[:-1], missing)], dim=-1)


def _trimmed(tensor: Tensor) -> Tensor:
    """Without columns at the end that repeat the last one, but for one of them."""
    differs = (tensor != tensor[..., -1:]).flatten(0, -2).any(0)
    last = int(differs.nonzero().max()) if bool(differs.any()) else -1
    return tensor[..., : last + 2].clone()


class Listener:
    """What the processor of an audio language model does, one recording at a time.

    Args:
        checkpoint: of an audio language model.

    Raises:
        ArchitectureError: a model of another kind.
        DataError: it has no processor, or one without a chat template.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        if not isinstance(checkpoint.anatomy, AudioAnatomy):
            raise ArchitectureError(
                f"{checkpoint.path or 'this checkpoint'} is a {checkpoint.kind} model and reads no recordings; "
                "expected an audio language model (docs/speech.md)"
            )
        processor = checkpoint.processor
        if processor is None:
            raise DataError(
                f"{checkpoint.path or 'this checkpoint'} has no processor, so recordings cannot be read with it: add "
                "its processor_config.json (or preprocessor_config.json) and its tokenizer files to the directory."
            )
        if not processor.chat_template:
            raise DataError(
                f"{checkpoint.path or 'this checkpoint'} has no chat template to write a question about a recording "
                "with: put the chat_template.jinja that the model was made for beside its processor."
            )
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.anatomy: AudioAnatomy = checkpoint.anatomy
        self.rate: int = processor.feature_extractor.sampling_rate
        # A processor that does not divide recordings into windows cuts them at the first.
        window = processor.feature_extractor.chunk_length
        self.longest = float(getattr(processor, "max_audio_len", window))

    def features(self, recording: Recording) -> Features:
        """What the model hears of a recording.

        Raises:
            DataError: of another rate than the model's, or longer than it can hear.
        """
        if recording.rate != self.rate:
            raise DataError(
                f"the recording has {recording.rate} samples a second and the model expects {self.rate}; convert it"
            )
        if recording.duration > self.longest:
            raise DataError(
                f"the recording lasts {recording.duration:.1f} s and the model hears at most {self.longest:g} s; "
                f"cut it: sox IN.wav part.wav trim 0 {self.longest:g}, or ffmpeg -i IN.wav -t {self.longest:g} part.wav"
            )
        found = self.processor(
            text=[self.processor.audio_token],
            audio=[recording.samples],
            sampling_rate=self.rate,
            return_tensors="pt",
        )
        inputs = {name: value for name, value in found.items() if name not in _TEXT}
        columns = next(one.shape[-1] for one in inputs.values() if one.is_floating_point())
        kept = {n: _trimmed(t) if t.is_floating_point() else t for n, t in inputs.items()}
        heard = int((found["input_ids"] == self.anatomy.audio_token).sum())
        return Features(kept, columns, heard)

    def written(self, prompt: str, answer: str | None = None) -> str:
        """A question about a recording as the chat template puts it, up to where the answer begins or with it.

        Raises:
            DataError: the template refuses it, or does not put exactly one recording into it.
        """
        asked = [{"type": "audio"}, {"type": "text", "text": prompt}]
        turns: list[dict[str, Any]] = [{"role": "user", "content": asked}]
        if answer is not None:
            # Templates differ in whether they take an answer as a string; all take it in parts.
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        text = str(
            write_chat(
                self.processor,
                turns,
                "a question about a recording",
                tokenize=False,
                add_generation_prompt=answer is None,
            )
        )
        token = self.processor.audio_token
        if text.count(token) != 1:
            raise DataError(
                f"the prompt becomes {text.count(token)} recordings ({token!r}); expected the one before it. Leave "
                f"{token!r} out of prompts and answers."
            )
        return text

    def heard(self, text: str, features: Features) -> str:
        """A written text with the token of audio as often as the recording has embeddings."""
        token = self.processor.audio_token
        return text.replace(token, token * features.embeddings)

    def ids(self, text: str) -> list[int]:
        """Tokens of a text; the template has written all special ones."""
        return encode(self.tokenizer, text, add_special_tokens=False)

    def prepare(self, recordings: Sequence[Features], prompts: Sequence[str]) -> dict[str, Tensor]:
        """Arguments of the model's forward, one row a question, padded on the left.

        Args:
            recordings: what :meth:`features` gave, one for each prompt; the same one may be there many times.
            prompts: the questions.

        Returns:
            ``input_ids`` and ``attention_mask`` ``[rows, length]``, and the audio inputs, on the CPU.

        Raises:
            DataError: not one recording for each prompt.
        """
        if len(recordings) != len(prompts) or not prompts:
            raise DataError(
                f"{len(recordings)} recordings and {len(prompts)} prompts; expected one for each"
            )
        rows = [
            self.ids(self.heard(self.written(prompt), one))
            for one, prompt in zip(recordings, prompts, strict=True)
        ]
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.full((len(rows), longest), self.tokenizer.eos_token_id if pad is None else pad)
        mask = torch.zeros_like(ids)
        for at, row in enumerate(rows):
            ids[at, longest - len(row) :] = torch.tensor(row)
            mask[at, longest - len(row) :] = 1
        return {"input_ids": ids, "attention_mask": mask, **join_features(recordings)}


def window_numbers(recordings: Sequence[Features]) -> Tensor:
    """``int64 [windows of all]``: equal for the same window of the same object, see ``encode_once``."""
    known: dict[tuple[int, int], int] = {}
    places = [(id(one), window) for one in recordings for window in range(one.windows)]
    return torch.tensor([known.setdefault(place, len(known)) for place in places])


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: without special tokens.
        tokens: the tokens, up to and with the one that ends the answer.
        ended: whether the model ended it, rather than the limit.
    """

    text: str
    tokens: tuple[int, ...]
    ended: bool


def generate(
    checkpoint: Checkpoint,
    clips: Sequence[Recording | Features],
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[Answer]:
    """Ask about recordings.

    Args:
        checkpoint: an audio language model.
        clips: one for each prompt; an object that is there more than once is heard once.
        prompts: the questions.
        max_new_tokens: where an answer is cut.
        temperature: 0 takes the most probable token; 1 samples from the model's distribution.
        seed: of sampling.
        batch_size: questions at a time. Greedy answers do not depend on it but for the last bits of sums.
        progress: where to show a bar.

    Returns:
        One answer for each prompt.

    Raises:
        ArchitectureError: a model of another kind.
        DataError: no processor or template, a recording that the model cannot hear, or unlike numbers of both.
        SettingsError: a number out of range, or more tokens than the model's context holds.
    """
    if len(clips) != len(prompts):
        raise DataError(
            f"{len(clips)} recordings and {len(prompts)} prompts; expected one for each"
        )
    if max_new_tokens < 1 or batch_size < 1:
        raise SettingsError(
            f"max_new_tokens is {max_new_tokens} and batch_size {batch_size}; expected 1 or more"
        )
    if not (math.isfinite(temperature) and temperature >= 0):
        raise SettingsError(f"temperature is {temperature}; expected 0 or a number above")
    listener = Listener(checkpoint)
    known: dict[int, Features] = {}
    for one in clips:
        if id(one) not in known:
            known[id(one)] = one if isinstance(one, Features) else listener.features(one)
    features = [known[id(one)] for one in clips]
    answers: list[Answer] = []
    starts = range(0, len(prompts), batch_size)
    with torch.random.fork_rng(devices=_devices(checkpoint.model)):
        torch.manual_seed(seed)
        for start in starts if progress is None else progress.iterate(starts, "answers"):
            part = slice(start, start + batch_size)
            found = _continue(
                checkpoint, listener, features[part], prompts[part], max_new_tokens, temperature
            )
            answers += [_answer(listener.tokenizer, row) for row in found]
    return answers


def _continue(
    checkpoint: Checkpoint,
    listener: Listener,
    features: Sequence[Features],
    prompts: Sequence[str],
    limit: int,
    temperature: float,
) -> list[list[int]]:
    model = checkpoint.model
    batch = placed_on(listener.prepare(features, prompts), model)
    length = batch["input_ids"].shape[1]
    if length + limit > checkpoint.context:
        raise SettingsError(
            f"question, recording and answer take {length} + {limit} tokens, and the model holds {checkpoint.context}: "
            "ask for fewer tokens, or cut the recording"
        )
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature}
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), encode_once(model, listener.anatomy, window_numbers(features)):
            found = model.generate(
                **batch,
                **sampling,
                top_k=None,
                top_p=None,
                max_new_tokens=limit,
                pad_token_id=listener.tokenizer.pad_token_id,
                eos_token_id=listener.tokenizer.eos_token_id,
            )
    finally:
        model.train(training)
    rows: list[list[int]] = found[:, length:].tolist()
    return rows


def _answer(tokenizer: Any, row: list[int]) -> Answer:
    end = tokenizer.eos_token_id
    ended = end in row
    tokens = row[: row.index(end) + 1] if ended else row
    return Answer(str(tokenizer.decode(tokens, skip_special_tokens=True)), tuple(tokens), ended)


def _devices(model: Any) -> list[int]:
    return [model.device.index or 0] if model.device.type == "cuda" else []
