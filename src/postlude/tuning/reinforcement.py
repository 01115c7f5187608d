"""GRPO: several answers to each prompt, and the model moves towards those that a reward puts above their group's mean.

For the ``generations`` answers to one prompt with rewards r and log-probabilities of their tokens:

    A_i   = (r_i - mean(r)) / (std(r) + 1e-4)               or without the division
    ratio = p(token) / p(token) when it was sampled
    loss  = -mean_i mean_t min(ratio A_i, clip(ratio, 1 - e, 1 + e) A_i) + beta KL(p || reference)

with the estimator exp(log q - log p) - (log q - log p) - 1 of the divergence. Answers are sampled from the model as it
stands, at ``temperature``; with one pass over them (``iterations`` 1) every ratio is 1. A group whose rewards are all
equal teaches nothing: the share of such groups is logged.

Paper: DeepSeekMath, arXiv:2402.03300. Sampling, advantages, loss and loop are TRL's. ``loss_type`` is the denominator:
``grpo`` is the paper's mean over answers of means over tokens; ``dapo`` (TRL's default, arXiv:2503.14476) and ``bnpo``
divide by the tokens of the step or of the micro-batch, ``dr_grpo`` (arXiv:2503.20783) by the longest answer allowed.

A reward is a Python function

    def exact(completions: list[str], prompts: list[str], **columns) -> list[float]

that is handed, by name, what it asks for of ``completions``, ``prompts`` and the other columns of the data (each a list
of the same length); with ``**columns`` everything. It returns a finite number for each completion. Several rewards are
summed with their weights.

Data: one JSON object a line, ``{"prompt": "...", ...}`` with the prompt a string, or a list of messages that goes
through the chat template (``prompts`` then holds the text of the last one, ``messages`` all). Memory: with beta above 0
and no adapters a second copy of the model.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch

from postlude.errors import DataError, SettingsError, UnknownNameError
from postlude.registry import method
from postlude.tuning import on_trl
from postlude.tuning.examples import Row, read_rows
from postlude.tuning.run import Job, Objective, Outcome, RewardError
from postlude.tuning.trainer import arguments, joined

__all__ = ["GRPO", "Reward", "Rollouts", "find_reward", "parse_reward"]

LOSSES = ("grpo", "dapo", "bnpo", "dr_grpo")
_GIVEN = ("completions", "prompts")
_SHOWN = 4

# What TRL logs, under our names.
_NAMES = {
    "reward": "reward",
    "reward_std": "reward_std",
    "frac_reward_zero_std": "zero_variance_groups",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "completion_length",
    "completions/clipped_ratio": "truncated_completions",
    "clip_ratio/region_mean": "clipped_tokens",
}

RewardFunction = Callable[..., Sequence[float]]


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward function and how much it counts.

    Attributes:
        name: as it was asked for.
        function: see the top of this file.
        weight: that it is multiplied with.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0

    def digest(self) -> str | None:
        """A SHA-256 of its source file, so that a run is not resumed with another reward; None where there is none."""
        try:
            file = inspect.getsourcefile(self.function)
        except TypeError:
            return None
        if file is None or not os.path.isfile(file):
            return None
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()

    def asks_for(self) -> tuple[set[str], set[str], bool]:
        """Names it needs, names it takes beside them, and whether it takes any.

        Raises:
            SettingsError: it does not take ``completions``, or takes something that cannot be given by name.
        """
        needs: set[str] = set()
        takes: set[str] = set()
        anything = False
        for parameter in inspect.signature(self.function).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                anything = True
            elif parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                (needs if parameter.default is parameter.empty else takes).add(parameter.name)
        if not ("completions" in needs | takes or anything):
            raise SettingsError(
                f"The reward {self.name} takes {', '.join(sorted(needs | takes)) or 'nothing'}; expected a function "
                "(completions, prompts, **columns) that returns a number for each completion."
            )
        return needs, takes, anything

    def __call__(self, completions: list[str], columns: Mapping[str, list[Any]]) -> list[float]:
        """The rewards of some completions.

        Args:
            completions: texts.
            columns: ``prompts`` and the columns of the data, one value for each completion.

        Raises:
            DataError: not one finite number for each.
            RewardError: the function raised something.
        """
        needs, takes, anything = self.asks_for()
        given = {"completions": completions, **columns}
        if not anything:
            given = {name: values for name, values in given.items() if name in needs | takes}
        try:
            values = self.function(**given)
        except Exception as error:
            said = f": {error}" if str(error) else ""
            raise RewardError(
                f"The reward {self.name} raised {type(error).__name__}{said}{self._place(error)}. "
                "Mend it, and run the same command again."
            ) from error
        return self._checked(values, completions)

    def _place(self, error: Exception) -> str:
        """Where an error was raised: the innermost line of the file of the function."""
        try:
            home = inspect.getsourcefile(inspect.unwrap(self.function))
        except TypeError:
            return ""
        # The first frame is the call above.
        frames = traceback.extract_tb(error.__traceback__)[1:]
        line = next((one.lineno for one in reversed(frames) if one.filename == home), None)
        return "" if home is None or line is None else f" ({Path(home).name} line {line})"

    def _checked(self, values: Any, completions: list[str]) -> list[float]:
        values = values.tolist() if hasattr(values, "tolist") else values
        expected = "expected a list with one finite number for each completion"
        if not isinstance(values, list | tuple):
            raise DataError(
                f"The reward {self.name} returned a {type(values).__name__}; {expected}."
            )
        if len(values) != len(completions):
            raise DataError(
                f"The reward {self.name} returned {len(values)} numbers for {len(completions)} completions; {expected}."
            )
        for value, completion in zip(values, completions, strict=True):
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise DataError(
                    f"The reward {self.name} returned {value!r} for the completion {completion[:80]!r}; {expected}."
                )
        return [float(value) for value in values]


def parse_reward(text: str) -> Reward:
    """``module:function`` or ``path/file.py:function``, with ``=WEIGHT`` behind it where the weight is not 1.

    A module is looked for where Python finds it, the current directory first.

    Raises:
        SettingsError: another form, a module that cannot be imported, or a weight that is no finite number.
        UnknownNameError: no such module or function; carries the nearest names.
    """
    name, _, weight = text.partition("=")
    module, _, function = name.strip().rpartition(":")
    if not (module and function.isidentifier()):
        raise SettingsError(
            f"The reward {text!r} is not understood: expected module:function or file.py:function, for example "
            "my_rewards:exact, with =0.5 behind it for a weight."
        )
    try:
        number = float(weight) if weight else 1.0
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise SettingsError(
            f"The reward {text!r} has the weight {weight!r}; expected a finite number."
        )
    return Reward(name.strip(), find_reward(module, function), number)


def find_reward(module: str, function: str) -> RewardFunction:
    """A function of a module or of a .py file; see :func:`parse_reward`."""
    home = _module_of_file(Path(module)) if module.endswith(".py") else _module(module)
    public = [
        name
        for name, value in vars(home).items()
        if callable(value) and not inspect.isclass(value) and not name.startswith("_")
    ]
    found = getattr(home, function, None)
    if not callable(found):
        raise UnknownNameError(f"reward function in {module}", function, public)
    return found


@method("tune", "grpo", family="objective", paper="arXiv:2402.03300", needs=("prompts", "reward"))
@dataclasses.dataclass(frozen=True)
class GRPO(Objective):
    """Reinforce the answers that a reward puts above those to the same prompt (group relative policy optimisation).

    Attributes:
        reward: ``module:function`` words, each with ``=WEIGHT`` where it is not 1; from Python also functions.
        generations: answers to each prompt; a batch is a whole number of such groups.
        max_new_tokens: longest answer.
        temperature: of sampling.
        beta: weight of the divergence from the reference; 0 needs no reference.
        iterations: passes over the answers before new ones are sampled.
        clip_ratio: how far the ratio of probabilities may move from 1.
        normalize: divide by the standard deviation of the group.
        loss_type: denominator: grpo, dapo, bnpo or dr_grpo.
    """

    reward: tuple[str, ...] = ()
    generations: int = 8
    max_new_tokens: int = 128
    temperature: float = 1.0
    beta: float = 0.0
    iterations: int = 1
    clip_ratio: float = 0.2
    normalize: bool = True
    loss_type: str = "grpo"

    def __post_init__(self) -> None:
        if isinstance(self.reward, str) or callable(self.reward):
            object.__setattr__(self, "reward", (self.reward,))
        if self.generations < 2:
            raise SettingsError(
                f"generations is {self.generations}; expected at least 2, to be compared with each other"
            )
        for name in ("max_new_tokens", "iterations"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; expected 1 or more")
        for name in ("temperature", "clip_ratio"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise SettingsError(f"{name} is {getattr(self, name)}; expected a number above 0")
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise SettingsError(f"beta is {self.beta}; expected 0 or more")
        if self.loss_type not in LOSSES:
            raise SettingsError(f"loss_type is {self.loss_type!r}; expected {', '.join(LOSSES)}")

    def rewards(self) -> list[Reward]:
        """The functions.

        Raises:
            SettingsError: none were named.
            UnknownNameError: one that there is not.
        """
        if not self.reward:
            raise SettingsError(
                "grpo needs a reward: name a function, for example --reward my_rewards:exact"
            )
        return [
            parse_reward(one)
            if isinstance(one, str)
            else Reward(getattr(one, "__name__", type(one).__name__), one)
            for one in self.reward
        ]

    @property
    def needs_reference(self) -> bool:
        """See :attr:`Objective.needs_reference`."""
        return self.beta > 0

    def describe(self) -> dict[str, Any]:
        """See :meth:`Objective.describe`; of a reward its name, its weight and a digest of what it is written as."""
        settings = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "reward"
        }
        rewards = [
            {"name": one.name, "weight": one.weight, "source": one.digest()}
            for one in self.rewards()
        ]
        return {"objective": "grpo", "reward": rewards, **settings}

    def check(self, job: Job) -> None:
        """See :meth:`Objective.check`."""
        on_trl.check_job(job, "grpo")
        prompts = _read_prompts(job.data, job.checkpoint.tokenizer)
        for reward in self.rewards():
            needs, _, _ = reward.asks_for()
            for name in sorted(needs - {*_GIVEN}):
                missing = next((one for one in prompts if name not in one.columns), None)
                if missing is not None:
                    raise DataError(
                        f"The reward {reward.name} asks for the column {name!r}, and {missing.where} has "
                        f"{', '.join(map(repr, sorted(missing.columns))) or 'no other column than its prompt'}."
                    )
        self._check_sizes(job, prompts)
        on_trl.import_trl()

    def _check_sizes(self, job: Job, prompts: Sequence[_Prompt]) -> None:
        limit = on_trl.length_limit(job)
        for prompt in prompts:
            if prompt.tokens + self.max_new_tokens > limit:
                raise SettingsError(
                    f"The prompt of {prompt.where} has {prompt.tokens} tokens: with max_new_tokens "
                    f"{self.max_new_tokens} that is more than the {limit} of this run. Shorten it, ask for shorter "
                    "answers, or raise max_length if the model's context is longer."
                )
        whole = job.run.batch_size * job.run.accumulate * on_trl.ranks()
        if whole % self.generations:
            raise SettingsError(
                f"A step holds {whole} answers (batch size x accumulation x devices), which is no whole number of "
                f"groups of {self.generations}: make it a multiple of generations."
            )

    def train(self, job: Job) -> Outcome:
        """See :meth:`Objective.train`."""
        trl = on_trl.import_trl()
        rewards = self.rewards()
        prompts = _read_prompts(job.data, job.checkpoint.tokenizer)
        run = job.run
        groups = run.batch_size * run.accumulate * on_trl.ranks() // self.generations
        steps = run.steps or math.ceil(run.epochs * len(prompts) / groups) * self.iterations
        order = _order(len(prompts), math.ceil(steps / self.iterations) * groups, run.seed)
        with on_trl.training(job):
            # Before TRL gives the model another forward, which a copy would share.
            reference = self._reference(job)
            args = arguments(
                run,
                job.directory,
                job.model,
                steps,
                kind=trl.GRPOConfig,
                per_device_train_batch_size=run.batch_size,
                **on_trl.keep_activations(trl.GRPOConfig),
                disable_dropout=True,
                shuffle_dataset=False,
                num_generations=self.generations,
                max_completion_length=self.max_new_tokens,
                temperature=self.temperature,
                num_iterations=self.iterations,
                epsilon=self.clip_ratio,
                scale_rewards="group" if self.normalize else "none",
                loss_type=self.loss_type,
                reward_weights=[reward.weight for reward in rewards],
            )
            trainer = _make_trainer(job, args, prompts, order, rewards)
            try:
                trainer.hold_to(reference, self.beta)
                trainer.prepare(job.directory, job.progress)
                trainer.run()
            finally:
                if reference is not None:
                    on_trl.unpatch(reference)
        rows = trainer.rows
        result = {
            "loss": on_trl.mean(rows, "loss"),
            "first_reward": rows[0]["reward"] if rows else None,
            "final_reward": on_trl.mean(rows, "reward", 10),
            "final_kl": on_trl.mean(rows, "kl", 10),
            "completion_length": on_trl.mean(rows, "completion_length", 10),
            "zero_variance_groups": on_trl.mean(rows, "zero_variance_groups"),
            "steps": len(rows),
            "prompts": len(prompts),
            "samples": trainer.samples(),
        }
        return Outcome(result, rows)

    def _reference(self, job: Job) -> Any:
        """The frozen model; None where there is no divergence, or where the adapters are switched off for it."""
        if self.beta == 0:
            return None
        if job.reference is not None:
            return job.reference.model
        if not job.adapters:
            return copy.deepcopy(job.model).requires_grad_(False)
        probe = torch.arange(8, device=job.model.device)[None]
        with torch.no_grad():
            with job.model.disable_adapter():
                off = job.model(probe).logits
            if not torch.allclose(job.model(probe).logits, off, rtol=1e-3, atol=1e-3):
                raise SettingsError(
                    "The new adapters do not start from the model before tuning (their initialisation changes it), so "
                    "it is not there to hold to: name it as the reference, or set beta to 0."
                )
        return None


class Rollouts(on_trl.OnTRL):
    """Overrides of TRL's GRPO trainer: a reference that was not read from a path, and states between generations."""

    names: ClassVar[Mapping[str, str]] = _NAMES

    # Of the trainer that this is joined with.
    _logs: Any
    _step: int
    beta: float
    temperature: float
    num_iterations: int

    def hold_to(self, reference: Any, beta: float) -> None:
        """Add ``beta`` times the divergence from a frozen model, or from the model without its adapters when None."""
        self.beta = beta
        if reference is not None:
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(reference, temperature=self.temperature)
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)

    def samples(self) -> list[dict[str, Any]]:
        """Some of the answers that were generated last."""
        texts = list(zip(self._logs["prompt"], self._logs["completion"], strict=True))
        rewards = [list(values) for values in self._logs["rewards"].values()]
        return [
            {
                "prompt": _text(prompt),
                "completion": _text(completion),
                "rewards": [values[index] for values in rewards],
            }
            for index, (prompt, completion) in enumerate(texts[:_SHOWN])
        ]

    def _due(self, step: int) -> bool:
        # Answers that are still to be learned from are not kept.
        return step % self.num_iterations == 0 and super()._due(step)

    def _own_state(self) -> dict[str, Any]:
        return {"step": self._step}

    def _take_own_state(self, state: dict[str, Any]) -> None:
        self._step = state["step"]


def _order(count: int, length: int, seed: int) -> list[int]:
    """Which prompt comes when, for the whole run: one order of all of them after the other.

    TRL draws an order for every epoch from one generator, so a run that is resumed in the second gets another.
    """
    order: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    while len(order) < length:
        order += torch.randperm(count, generator=generator).tolist()
    return order[:length]


def _make_trainer(
    job: Job,
    args: Any,
    prompts: Sequence[_Prompt],
    order: Sequence[int],
    rewards: Sequence[Reward],
) -> Any:
    from datasets import Dataset
    from trl import GRPOTrainer

    def scorer(reward: Reward) -> Callable[..., list[float]]:
        def score(completions: list[Any], row: list[int], **_: Any) -> list[float]:
            chosen = [prompts[index] for index in row]
            names = set.intersection(*(set(prompt.columns) for prompt in chosen))
            columns = {name: [prompt.columns[name] for prompt in chosen] for name in names}
            columns["prompts"] = [_text(prompt.prompt) for prompt in chosen]
            return reward([_text(completion) for completion in completions], columns)

        score.__name__ = reward.name
        return score

    # Only the number of the row goes through TRL, so columns may hold anything.
    rows = [{"prompt": prompts[index].prompt, "row": index} for index in order]
    return joined(Rollouts, GRPOTrainer)(
        job.model,
        reward_funcs=[scorer(reward) for reward in rewards],
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=job.checkpoint.tokenizer,
    )


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """One line of the data.

    Attributes:
        prompt: a string, or a list of ``{"role", "content"}``.
        columns: everything else.
        tokens: of the prompt.
        where: file and line.
    """

    prompt: Any
    columns: Mapping[str, Any]
    tokens: int
    where: str


def _read_prompts(path: str | os.PathLike[str], tokenizer: Any) -> list[_Prompt]:
    rows = read_rows(path)
    prompts = [_prompt(row, tokenizer) for row in rows]
    odd = next(
        (
            one
            for one in prompts
            if isinstance(one.prompt, str) != isinstance(prompts[0].prompt, str)
        ),
        None,
    )
    if odd is not None:
        words = (
            ("a string", "messages") if isinstance(odd.prompt, list) else ("messages", "a string")
        )
        raise DataError(
            f"{prompts[0].where} has a prompt that is {words[0]} and {odd.where} one that is {words[1]}: expected one "
            "of the two throughout."
        )
    return prompts


def _prompt(row: Row, tokenizer: Any) -> _Prompt:
    key = next((name for name in ("prompt", "messages") if name in row.fields), None)
    if key is None:
        raise DataError(
            f'{row.where} has keys {sorted(row.fields)}; expected "prompt" (a string, or a list of messages) and the '
            "columns that the reward asks for."
        )
    prompt = row.fields[key]
    columns = {name: value for name, value in row.fields.items() if name != key}
    taken = sorted({*_GIVEN} & columns.keys())
    if taken:
        raise DataError(
            f"{row.where} has a column {taken[0]!r}, which rewards are given under that name: rename it."
        )
    if isinstance(prompt, str):
        if not prompt:
            raise DataError(f"{row.where} has an empty prompt.")
        return _Prompt(prompt, columns, len(tokenizer(prompt)["input_ids"]), row.where)
    good = (
        isinstance(prompt, list)
        and prompt
        and all(
            isinstance(turn, dict)
            and all(isinstance(turn.get(k), str) for k in ("role", "content"))
            for turn in prompt
        )
    )
    if not good:
        raise DataError(
            f'{row.where}: expected "{key}" as a string or a list of objects with "role" and "content", both strings.'
        )
    if tokenizer.chat_template is None:
        raise DataError(
            f"{row.where} holds messages, and the model's tokenizer has no chat template to write them with. Give "
            "prompts as strings, or put the chat_template.jinja that the model was made for beside its tokenizer."
        )
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    return _Prompt(prompt, {**columns, "messages": prompt}, len(ids["input_ids"]), row.where)


def _text(part: Any) -> str:
    """The text of a string, or of the last of some messages."""
    return part if isinstance(part, str) else str(part[-1].get("content") or "")


def _module(name: str) -> types.ModuleType:
    with _current_directory_first():
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            # A module that is there and misses another is not unknown.
            if not f"{name}.".startswith(f"{error.name}."):
                raise _broken(name, error) from error
            here = [path.stem for path in Path.cwd().glob("*.py")]
            raise UnknownNameError(
                "module of rewards",
                name,
                here,
                "Looked in the current directory and where Python finds modules.",
            ) from error
        except Exception as error:
            raise _broken(name, error) from error


def _module_of_file(path: Path) -> types.ModuleType:
    if not path.is_file():
        near = [one.name for one in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UnknownNameError(f"file of rewards in {path.parent.resolve()}", path.name, near)
    name = f"postlude_rewards_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SettingsError(f"{path} cannot be read as a Python file.")
    module = importlib.util.module_from_spec(spec)
    # Data classes and others look their module up by name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _broken(str(path), error) from error
    return module


def _broken(name: str, error: Exception) -> SettingsError:
    return SettingsError(
        f"{name} holds rewards and cannot be imported: {type(error).__name__}: {error}"
    )


@contextmanager
def _current_directory_first() -> Iterator[None]:
    sys.path.insert(0, str(Path.cwd()))
    try:
        importlib.invalidate_caches()
        yield
    finally:
        sys.path.remove(str(Path.cwd()))
