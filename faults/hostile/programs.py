"""What a checkpoint or a command line brings along that is code, or nearly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.hostile.case import (
    FAMILY,
    Case,
    changed,
    code,
    copied_model,
    evaluating,
    tried,
)
from faults.suite import Trial, Words, Work, fault


@fault(FAMILY, "a tokenizer's chat template")
def templates(work: Work, count: int) -> Iterator[Trial]:
    """That reaches for Python, that never ends, that is no template."""

    def template(text: str) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            model = copied_model(work, folder)
            (model / "chat_template.jinja").write_text(text.replace("SENTINEL", str(work.sentinel)))
            turns = [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hello, you"},
            ]
            (folder / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
            return ["tune", model, folder / "chat.jsonl", "--steps", "1", "-o", folder / "out"]

        return make

    builtins = "cycler.__init__.__globals__"
    classes = "''.__class__.__mro__[1].__subclasses__()"
    call = "os.popen('touch SENTINEL').read()"
    loop = "{% for a in range(99999) %}" * 3 + "x" + "{% endfor %}" * 3
    yield from tried(
        work,
        [
            Case("os by cycler", template("{{ " + builtins + "." + call + " }}"), "chat template"),
            Case(
                "os by lipsum", template("{{ lipsum.__globals__." + call + " }}"), "chat template"
            ),
            Case(
                "subclasses",
                template("{{ " + classes + "[100]('SENTINEL', 'w') }}"),
                "chat template",
            ),
            Case(
                "by attr",
                template("{{ ''|attr('__class__')|attr('__mro__') }}"),
                "chat template|response is empty",
            ),
            Case(
                "by format", template("{{ '{0.__class__.__mro__}'.format('') }}"), "chat template"
            ),
            Case("a file", template("{% include '/etc/passwd' %}"), "chat template"),
            Case("an endless loop", template(loop), "chat template"),
            Case(
                "a range of 10^12",
                template("{% for a in range(10**12) %}x{% endfor %}"),
                "chat template",
            ),
            Case(
                "recursion",
                template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
                "chat template",
            ),
            Case("no template", template("{% for %}"), "chat template"),
        ],
    )


@fault(FAMILY, "code that comes with a checkpoint")
def codes(work: Work, count: int) -> Iterator[Trial]:
    """Named by its configuration, in the places where libraries look for it."""

    def named(change: Callable[[Path], None]) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            model = copied_model(work, folder)
            for name in ("modeling_evil.py", "tokenization_evil.py", "configuration_evil.py"):
                (model / name).write_text(code(work))
            change(model)
            return evaluating(work, model)

        return make

    auto_model = {
        "auto_map": {
            "AutoConfig": "configuration_evil.C",
            "AutoModelForCausalLM": "modeling_evil.M",
        }
    }
    auto_tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_evil.T", "tokenization_evil.T"]}}

    def unknown(model: Path) -> None:
        changed(model / "config.json", model_type="evil", architectures=["Evil"], **auto_model)

    def tokenizer(model: Path) -> None:
        changed(model / "tokenizer_config.json", tokenizer_class="EvilTokenizer", **auto_tokenizer)

    def pipeline(index: dict[str, Any]) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            from postlude.runs.loading import resolve

            model = Path(shutil.copytree(resolve("zoo:tiny-dit"), folder / "dit"))
            changed(model / "model_index.json", **index)
            for place in (model, model / "transformer", model / "scheduler"):
                (place / "evil.py").write_text(code(work))

            return ["sample", model, "--count", "1", "--steps", "1", "-o", folder / "x.safetensors"]

        return make

    def adapter(work: Work, folder: Path) -> Words:
        source = work.made(
            "adapter",
            lambda out: [
                "tune", work.inputs / "model", work.inputs / "train.jsonl", "--adapter", "lora", "--steps", "1",
                "--batch-size", "2", "-o", out,
            ],
        )  # fmt: skip
        model = Path(shutil.copytree(source, folder / "adapter"))
        (model / "evil.py").write_text(code(work))
        mapping = {"base_model_class": "M", "parent_library": "evil"}
        changed(model / "adapter_config.json", auto_mapping=mapping)
        return evaluating(work, model)

    yield from tried(
        work,
        [
            Case(
                "auto_map of a known type",
                named(lambda m: changed(m / "config.json", **auto_model)),
                None,
            ),
            Case("auto_map of an unknown type", named(unknown), "evil"),
            Case("auto_map of a tokenizer", named(tokenizer), "tokenizer"),
            Case("a transformer of a library", pipeline({"transformer": ["evil", "M"]}), "not run"),
            Case("a scheduler of a library", pipeline({"scheduler": ["evil", "S"]}), "scheduler"),
            Case("a pipeline's class", pipeline({"_class_name": ["evil", "Pipeline"]}), None),
            Case("an adapter's library", adapter, None),
        ],
    )


@fault(FAMILY, "rewards of `tune --objective grpo`")
def rewards(work: Work, count: int) -> Iterator[Trial]:
    """A module named by the person who runs the command is imported; what cannot be is refused."""

    def reward(name: str, text: str | None = None) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n")
            if text is not None:
                (folder / "rewards.py").write_text(text)
            words = [
                "tune",
                work.inputs / "model",
                folder / "prompts.jsonl",
                "--objective",
                "grpo",
                "--reward",
            ]
            return [
                *words,
                name.replace("FOLDER", str(folder)),
                "--steps",
                "1",
                "-o",
                folder / "out",
            ]

        return make

    yield from tried(
        work,
        [
            Case("no such file", reward("FOLDER/../../no.py:f"), "reward"),
            Case("no such module", reward("no.such.module:f"), "reward"),
            Case("no such function", reward("FOLDER/rewards.py:f", "x = 1\n"), "reward"),
            Case("no function", reward("FOLDER/rewards.py:x", "x = 1\n"), "reward"),
            Case("a module that fails", reward("FOLDER/rewards.py:f", "1 / 0\n"), "reward"),
            Case(
                "a module that ends",
                reward("FOLDER/rewards.py:f", "raise SystemExit(0)\n"),
                "reward",
            ),
            Case("no Python", reward("FOLDER/rewards.py:f", "def f(:\n"), "reward"),
        ],
    )
