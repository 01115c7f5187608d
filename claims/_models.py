"""Small language models that are tuned on arithmetic told in words, and what that does to them.

The models know nothing of the task when they come. So besides tuning them as they are (``untaught``) there is a start
that knows some of it, as the pretrained models of the papers do: 250 steps on clean problems mixed with text that the
model itself had written (``taught``). What is measured as forgetting is always against the model that tuning starts
from.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import postlude as pl
from _arithmetic import Example, Rows, corrupt, encode, make
from _weightings import Batch, fit
from postlude.evaluation.perplexity import evaluate
from postlude.numerics.weighted_likelihood import Head, TokenColumns, token_columns
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.head import LanguageHead
from postlude.tuning.weighting import TargetTokens, TokenWeighting
from postlude.zoo import tiny_lm

__all__ = ["COLUMNS", "MEASURES", "Lesson", "Student", "built_in", "solved", "stories"]

MEASURES = ("accuracy", "clean_loss", "forgetting", "kl")
COLUMNS = ("log_probability", "mass_above", "top_entropy")

# Seeds of the problems that nobody is tuned on, of those that the start was taught with, and those without solutions.
HELD_OUT, TEACHER, PROMPTS = 10**6, 10**7, 10**8
_ANSWER = re.compile(r".* is (\d+)\.", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What a model is tuned on: problems, of which some tokens were replaced.

    Attributes:
        rows: ``N`` problems as tokens.
        columns: what the model that tuning starts from says of every place, ``[N * S]``.
    """

    rows: Rows
    columns: TokenColumns


class Student:
    """A model, the text it was pretrained on, and a copy of it to tune.

    Args:
        name: of the model.
        checkpoint: it.
        text: documents like those it was pretrained on.
        problems: to measure its accuracy with.
        batch: problems of one step.
        steps: of tuning.
        rate: highest learning rate.
    """

    def __init__(
        self,
        name: str,
        checkpoint: Checkpoint,
        text: Sequence[str],
        *,
        problems: int,
        batch: int,
        steps: int,
        rate: float,
    ) -> None:
        self.name, self.text = name, text
        self.batch, self.steps, self.rate = batch, steps, rate
        self.start, self.work = checkpoint, copy.deepcopy(checkpoint)
        self.start.model.requires_grad_(False)
        self.freeze(self.start)
        self._head = LanguageHead(self.work.model, self.work.anatomy)
        self._problems = make(problems, HELD_OUT)
        self._clean = encode(checkpoint.tokenizer, self._problems)

    def freeze(self, reference: Checkpoint) -> None:
        """Read the reference's columns from this model, which stays as it is."""
        self._frozen = LanguageHead(reference.model, reference.language)

    @property
    def problems(self) -> list[Example]:
        """That its accuracy is measured with."""
        return self._problems

    @property
    def words(self) -> int:
        """Of the vocabulary."""
        return len(self._head.weight)

    def teach(self, state: dict[str, Tensor]) -> None:
        """Make this the model that tuning starts from."""
        self.start.model.load_state_dict(state)

    def taught(self, steps: int = 250, rate: float = 1e-3, texts: int = 512) -> dict[str, Tensor]:
        """Weights after some steps on clean problems and on text of its own."""
        own = self.own(texts, 64)
        labels = own.clone()
        rows = encode(self.start.tokenizer, make(1000, TEACHER))
        source = torch.Generator().manual_seed(TEACHER)
        self.reset()

        def batches() -> Iterator[Batch]:
            for _ in range(steps):
                problem = rows[torch.randint(0, len(rows), (16,), generator=source)]
                some = torch.randint(0, len(own), (8,), generator=source)
                width = max(own.shape[1], problem.ids.shape[1])
                ids = torch.cat([_wide(problem.ids, width, 0), _wide(own[some], width, 0)])
                learned = torch.cat([_wide(_labels(problem), width), _wide(labels[some], width)])
                yield Batch(ids, TargetTokens.from_labels(learned), None)

        from postlude.tuning import SFT

        self._fit(TokenWeighting(SFT()), batches(), steps, rate)
        return {name: value.clone() for name, value in self.work.model.state_dict().items()}

    def lesson(self, noise: float, seed: int) -> Lesson:
        """Problems for one pass of tuning, with a share of the tokens of their solutions replaced."""
        clean = encode(self.start.tokenizer, make(self.batch * self.steps, seed))
        rows = corrupt(clean, noise, self.words, seed)
        parts: list[TokenColumns] = []
        for first in range(0, len(rows), 128):
            part = rows[slice(first, first + 128)]
            states = TargetTokens.align(self._frozen.states(input_ids=part.ids))
            tokens = TargetTokens.from_labels(_labels(part))
            parts.append(
                token_columns(
                    states, self._frozen.weight, tokens.targets.clamp(min=0), columns=COLUMNS
                )
            )
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in COLUMNS}
        return Lesson(rows, TokenColumns(**joined, top=parts[0].top))

    def tune(self, lesson: Lesson, weighting: TokenWeighting, seed: int) -> list[float]:
        """Tune the copy on a lesson, once through; the plain loss of each step."""
        self.reset()
        order = torch.randperm(len(lesson.rows), generator=torch.Generator().manual_seed(seed))
        length = lesson.rows.ids.shape[1]

        def batches() -> Iterator[Batch]:
            for some in order.split(self.batch):
                rows = lesson.rows[some]
                width = int(rows.attended.sum(1).max())
                rows = rows[:, :width]
                reference: Head | TokenColumns | None = None
                if weighting.needs_reference_model:
                    states = TargetTokens.align(self._frozen.states(input_ids=rows.ids))
                    reference = Head(states, self._frozen.weight)
                elif weighting.needs_reference:
                    places = some[:, None] * length + torch.arange(width)
                    reference = lesson.columns[places.flatten()]
                yield Batch(rows.ids, TargetTokens.from_labels(_labels(rows)), reference)

        return self._fit(weighting, batches(), self.steps, self.rate)

    def measure(self) -> dict[str, float]:
        """Of the copy: accuracy of greedy answers, loss on clean solutions, and what became of its own text.

        ``forgetting`` is the increase of the loss on its own text, ``kl`` the divergence from the start there.
        """
        found = evaluate(
            self.work, list(self.text), protocol="documents", max_length=256, reference=self.start
        )
        return {
            "accuracy": self.accuracy(),
            "clean_loss": self._clean_loss(),
            "forgetting": found["loss"] - found["reference_loss"],
            "kl": found["kl"],
        }

    @torch.no_grad()
    def accuracy(self) -> float:
        """Share of problems whose answer, written greedily, is right."""
        pairs = zip(self._written(), self._problems, strict=True)
        return sum(solved(text, one.answer) for text, one in pairs) / len(self._problems)

    def _written(self) -> list[str]:
        tokenizer = self.work.tokenizer
        prompts = [tokenizer(one.prompt).input_ids for one in self._problems]
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), tokenizer.pad_token_id or 0)
        attended = torch.zeros_like(ids)
        for row, tokens in enumerate(prompts):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            attended[row, width - len(tokens) :] = 1
        longest = int(self._clean.trained.sum(1).max()) + 2
        written = self.work.model.generate(
            ids,
            attention_mask=attended,
            max_new_tokens=longest,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
        texts: list[str] = tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
        return texts

    @torch.no_grad()
    def _clean_loss(self) -> float:
        states = TargetTokens.align(self._head.states(input_ids=self._clean.ids))
        tokens = TargetTokens.from_labels(_labels(self._clean))
        rows = tokens.mask
        found = token_columns(states[rows], self._head.weight, tokens.targets[rows])
        return -float(found.log_probability.mean())

    def _fit(
        self, weighting: TokenWeighting, batches: Iterator[Batch], steps: int, rate: float
    ) -> list[float]:
        model = self.work.model

        def head(ids: Tensor) -> Head:
            # Rows are padded on the right: under causal attention no token sees the padding.
            return Head(TargetTokens.align(self._head.states(input_ids=ids)), self._head.weight)

        optimizer = torch.optim.AdamW(
            model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )
        rise = max(1, steps // 10)
        return fit(
            model.parameters(),
            head,
            weighting,
            batches,
            optimizer,
            schedule=lambda step: min(1.0, (step + 1) / rise) * (1 - step / steps),
        )

    def reset(self) -> None:
        """Take the copy back to where tuning starts."""
        self.work.model.load_state_dict(self.start.model.state_dict())

    @torch.no_grad()
    def own(self, count: int, length: int) -> Tensor:
        """``[count, length]`` text written by the model at temperature 1."""
        tokenizer = self.start.tokenizer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(TEACHER)
            written: Tensor = self.start.model.generate(
                torch.full((count, 1), tokenizer.bos_token_id),
                attention_mask=torch.ones(count, 1, dtype=torch.int64),
                do_sample=True,
                top_k=0,
                max_new_tokens=length - 1,
                min_new_tokens=length - 1,
                pad_token_id=tokenizer.pad_token_id or 0,
            )
        return written


def solved(written: str, answer: str) -> bool:
    """Whether the last number of a solution is the answer."""
    found = _ANSWER.fullmatch(written.strip())
    return found is not None and found.group(1) == answer


def _labels(rows: Rows) -> Tensor:
    return rows.ids.masked_fill(rows.trained == 0, -100)


def _wide(ids: Tensor, width: int, value: int = -100) -> Tensor:
    return nn.functional.pad(ids, (0, width - ids.shape[1]), value=value)


def stories(folder: Path, quick: bool = False) -> Student:
    """stories260k."""
    file = folder / "text" / "tinystories_sample.jsonl"
    text = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    return Student(
        "stories260k",
        pl.load(folder / "stories260k", dtype="float32"),
        text,
        problems=20 if quick else 200,
        batch=8,
        steps=10 if quick else 120,
        rate=5e-4,
    )


def built_in(quick: bool = False) -> Student:
    """tiny-lm."""
    text = tiny_lm.held_out_text()
    return Student(
        "tiny-lm",
        pl.load("zoo:tiny-lm", dtype="float32"),
        [text[start : start + 1000] for start in range(0, 4_000 if quick else 16_000, 1000)],
        problems=20 if quick else 100,
        batch=8,
        steps=5 if quick else 60,
        rate=2e-4,
    )
