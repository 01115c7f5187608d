"""Inputs made to do harm: nothing of them is executed, nothing outside their folder is read, none takes for ever."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.kills import build_words
from faults.suite import Trial, Words, Work, command, contents, fault, harm, judge_refusal

_FAMILY = "hostile"
_DEEP = 200_000


@dataclasses.dataclass(frozen=True)
class Case:
    """One hostile input.

    Attributes:
        name: for a person who looks for what went wrong.
        make: writes it into a folder and gives the command.
        says: a pattern that the refusal must hold; None where the command works as if it were not there.
    """

    name: str
    make: Callable[[Work, Path], Words]
    says: str | None


def tried(work: Work, cases: list[Case]) -> Iterator[Trial]:
    """Each case in a folder of its own."""
    for case in cases:
        folder = work.fresh()
        words = case.make(work, folder)
        inputs, before = contents(work.inputs), contents(folder)
        done = command(words)
        if case.says is not None:
            trial = judge_refusal(work, done, inputs, [], case.says)
            if trial.outcome == "refused" and contents(folder) != before:
                trial = Trial("FAILED", f"its folder changed: {done.shown()}")
        else:
            wrong = harm(work, done) + ([f"exit code {done.code}"] if done.code else [])
            trial = (
                Trial("FAILED", f"{'; '.join(wrong)}: {done.shown()}")
                if wrong
                else Trial("no effect")
            )
        yield dataclasses.replace(trial, about=f"{case.name}: {trial.about}")


class _Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self._sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._sentinel}",)


def _pickle(work: Work) -> bytes:
    return pickle.dumps({"model.weight": _Payload(work.sentinel)}, protocol=2)


def _code(work: Work) -> str:
    return f"import pathlib\npathlib.Path({str(work.sentinel)!r}).touch()\n"


def _model(work: Work, folder: Path) -> Path:
    return Path(shutil.copytree(work.inputs / "model", folder / "model"))


def _evaluate(work: Work, model: Path) -> Words:
    return ["evaluate", model, "--text", work.inputs / "text.txt", "--json"]


def _changed(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**content, **values}))


def _tensors(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _with_header(file: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


# ------------------------------------------------------------------------------------------------ pickles


@fault(_FAMILY, "a pickle in the place of tensors", everyday=True)
def pickles(work: Work, count: int) -> Iterator[Trial]:
    """Under the name of a safetensors file, in its place, and beside it."""

    def renamed(work: Work, folder: Path) -> Words:
        model = _model(work, folder)
        (model / "model.safetensors").write_bytes(_pickle(work))
        return _evaluate(work, model)

    def alone(name: str) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            model = _model(work, folder)
            (model / "model.safetensors").unlink()
            (model / name).write_bytes(_pickle(work))
            return _evaluate(work, model)

        return make

    def beside(work: Work, folder: Path) -> Words:
        model = _model(work, folder)
        for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt"):
            (model / name).write_bytes(_pickle(work))
        return _evaluate(work, model)

    def adapter(work: Work, folder: Path) -> Words:
        model = folder / "adapter"
        model.mkdir()
        config = {"base_model_name_or_path": str(work.inputs / "model"), "peft_type": "LORA"}
        _changed(model / "adapter_config.json", **config)
        (model / "adapter_model.bin").write_bytes(_pickle(work))
        return _evaluate(work, model)

    def drift(work: Work, folder: Path) -> Words:
        (folder / "drift.safetensors").write_bytes(_pickle(work))
        return [
            "sample",
            "zoo:tiny-dit",
            "--drift",
            folder / "drift.safetensors",
            "-o",
            folder / "x.safetensors",
        ]

    def conditions(work: Work, folder: Path) -> Words:
        (folder / "c.safetensors").write_bytes(_pickle(work))
        return [
            "sample",
            "zoo:tiny-dit",
            "--conditions",
            folder / "c.safetensors",
            "-o",
            folder / "x.safetensors",
        ]

    def layer_weights(work: Work, folder: Path) -> Words:
        index = work.made("index", lambda out: build_words(work, out))
        (folder / "w.safetensors").write_bytes(_pickle(work))
        words = [
            "attribute",
            "query",
            index,
            "Once",
            "--no-keep",
            "--weights",
            folder / "w.safetensors",
        ]
        return words

    def arrays(work: Work, folder: Path) -> Words:
        import numpy

        numpy.savez(folder / "x.npz", images=numpy.array([_Payload(work.sentinel)], dtype=object))
        return [
            "attribute",
            "build",
            "zoo:tiny-dit",
            folder / "x.npz",
            "--method",
            "d-trak",
            "-o",
            folder / "i",
        ]

    safe = "not a safetensors file"
    yield from tried(
        work,
        [
            Case("named model.safetensors", renamed, safe),
            Case("pytorch_model.bin alone", alone("pytorch_model.bin"), "only as pickle files"),
            Case("model.pt alone", alone("model.pt"), "only as pickle files"),
            Case("beside the weights", beside, None),
            Case("as an adapter", adapter, "adapter"),
            Case("as drift statistics", drift, safe),
            Case("as conditions", conditions, r"c\.safetensors"),
            Case("as weights of layers", layer_weights, r"w\.safetensors"),
            Case("in a .npz", arrays, r"x\.npz cannot be read"),
        ],
    )


# ------------------------------------------------------------------------------------------------ headers


def _headers() -> list[Case]:
    def with_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            model = _model(work, folder)
            header, data = _tensors(model / "model.safetensors")
            changed = change(header)
            raw = changed if isinstance(changed, bytes) else json.dumps(changed or header).encode()
            _with_header(model / "model.safetensors", raw, data)
            return _evaluate(work, model)

        return make

    def of_length(length: int) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            model = _model(work, folder)
            header, data = _tensors(model / "model.safetensors")
            _with_header(model / "model.safetensors", json.dumps(header).encode(), data, length)
            return _evaluate(work, model)

        return make

    def first(header: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = next(v for k, v in sorted(header.items()) if k != "__metadata__")
        return found

    def shape(value: Any) -> Callable[[dict[str, Any]], None]:
        return lambda header: first(header).update(shape=value)

    def offsets(value: Any) -> Callable[[dict[str, Any]], None]:
        return lambda header: first(header).update(data_offsets=value)

    def overlapping(header: dict[str, Any]) -> None:
        names = sorted(k for k in header if k != "__metadata__")
        last = max((n for n in names), key=lambda n: header[n]["data_offsets"][1])
        twin = next(n for n in names if n != last and header[n]["shape"] == header[last]["shape"])
        header[twin]["data_offsets"] = header[last]["data_offsets"]

    def many(header: dict[str, Any]) -> bytes:
        entries = ",".join(
            f'"t{n}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for n in range(400_000)
        )
        return ("{" + entries + "}").encode()

    billion = 10**9
    return [
        Case("a billion elements", with_header(shape([billion])), "model.safetensors"),
        Case("a billion times a billion", with_header(shape([billion] * 3)), "model.safetensors"),
        Case("2^64 elements", with_header(shape([2**32, 2**32])), "model.safetensors"),
        Case("a negative size", with_header(shape([-1, -64])), "model.safetensors"),
        Case("sizes that are words", with_header(shape(["many"])), "model.safetensors"),
        Case("an end beyond the file", with_header(offsets([0, 10**15])), "truncated"),
        Case("a start after the end", with_header(offsets([64, 0])), "model.safetensors"),
        Case("a negative start", with_header(offsets([-64, 64])), "model.safetensors"),
        Case("tensors that overlap", with_header(overlapping), "model.safetensors"),
        Case(
            "no types", with_header(lambda h: first(h).pop("dtype") and None), "model.safetensors"
        ),
        Case(
            "an unknown type",
            with_header(lambda h: first(h).update(dtype="F31")),
            "model.safetensors",
        ),
        Case("a list for a header", with_header(lambda _: b"[1, 2]"), "model.safetensors"),
        Case("a deep header", with_header(lambda _: b"[" * _DEEP), "model.safetensors"),
        Case("400 000 empty tensors", with_header(many), "model"),
        Case("a header longer than the file", of_length(2**26), "model.safetensors"),
        Case("a header of 2^63 bytes", of_length(2**63), "model.safetensors"),
    ]


@fault(_FAMILY, "headers of safetensors", everyday=True)
def headers(work: Work, count: int) -> Iterator[Trial]:
    """Sizes and places that are not those of the file."""
    yield from tried(work, _headers())


@fault(_FAMILY, "NaN and infinity among the weights", everyday=True)
def not_finite(work: Work, count: int) -> Iterator[Trial]:
    """One value of one tensor."""

    def put(value: float) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            from safetensors.torch import load_file, save_file

            model = _model(work, folder)
            tensors = load_file(model / "model.safetensors")
            next(iter(tensors.values())).view(-1)[7] = value
            save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
            return _evaluate(work, model)

        return make

    says = "holds 1 NaN or infinite values"
    values = {"NaN": float("nan"), "infinity": float("inf"), "minus infinity": float("-inf")}
    yield from tried(work, [Case(name, put(value), says) for name, value in values.items()])


# ------------------------------------------------------------------------------------------------ paths


def _sharded(work: Work, folder: Path, name: str) -> Words:
    """A checkpoint whose list of shards names a file elsewhere, which is there."""
    model = _model(work, folder)
    outside = folder / "outside.safetensors"
    shutil.move(model / "model.safetensors", outside)
    header, _ = _tensors(outside)
    names = [one for one in header if one != "__metadata__"]
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(names, name.replace("FOLDER", str(folder))),
    }
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return _evaluate(work, model)


@fault(_FAMILY, "paths that lead out of their folder", everyday=True)
def paths(work: Work, count: int) -> Iterator[Trial]:
    """In lists of shards, of pictures, of labels, and in the names of a recipe's stages."""

    def stored(name: str, link: bool = False) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            source = work.made("index", lambda out: build_words(work, out))
            index = Path(shutil.copytree(source, folder / "index"))
            shard = sorted((index / "shards").iterdir())[0]
            shutil.move(shard, folder / shard.name)
            if link:
                (index / "shards" / shard.name).symlink_to(folder / shard.name)
            else:
                content = json.loads((index / "shards.json").read_text())
                content["shards"][0]["file"] = name.replace("FOLDER", str(folder)) + shard.name
                (index / "shards.json").write_text(json.dumps(content))
            return ["attribute", "query", index, "Once", "--no-keep"]

        return make

    def pictures(name: str) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            images = Path(shutil.copytree(work.inputs / "images", folder / "images"))
            shutil.move(images / "0.png", folder / "0.png")
            rows = [{"file": one.name} for one in sorted(images.iterdir())]
            rows.append({"file": name.replace("FOLDER", str(folder))})
            (images / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            return [
                "attribute",
                "build",
                "zoo:tiny-dit",
                images,
                "--method",
                "d-trak",
                "-o",
                folder / "i",
            ]

        return make

    def stage(text: str) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            (folder / "recipe.yaml").write_text(text.replace("FOLDER", str(folder)))
            return ["run", folder / "recipe.yaml", "-o", folder / "run"]

        return make

    def clips(name: str) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            data = folder / "clips"
            data.mkdir()
            (folder / "0.wav").write_bytes(b"RIFF")
            row = {"audio": name.replace("FOLDER", str(folder)), "prompt": "a", "completion": "b"}
            (data / "rows.jsonl").write_text(json.dumps(row) + "\n")
            return ["tune", "zoo:audio-llm", data / "rows.jsonl", "-o", folder / "out"]

        return make

    shard = "not inside the checkpoint directory"
    quantize = "{quantize: zoo:tiny-lm, method: rtn"
    outside = r"points elsewhere|expected a file of its own"
    yield from tried(
        work,
        [
            Case("shards, ..", lambda w, f: _sharded(w, f, "../outside.safetensors"), shard),
            Case(
                "shards, absolute", lambda w, f: _sharded(w, f, "FOLDER/outside.safetensors"), shard
            ),
            Case(
                "shards, backslashes", lambda w, f: _sharded(w, f, "..\\outside.safetensors"), shard
            ),
            Case("an index, ..", stored("../../"), outside),
            Case("an index, absolute", stored("FOLDER/"), outside),
            Case("an index, a link", stored("", link=True), outside),
            Case("pictures, ..", pictures("../0.png"), "a file of this folder"),
            Case("pictures, absolute", pictures("FOLDER/0.png"), "a file of this folder"),
            Case("recordings, ..", clips("../0.wav"), "leads out of|folder"),
            Case("recordings, absolute", clips("FOLDER/0.wav"), "leads out of|folder"),
            Case(
                "a stage, ..",
                stage(f"stages:\n  ../out: {quantize}}}\n"),
                "line 2: a stage is named",
            ),
            Case("a stage, absolute", stage(f"stages:\n  FOLDER/out: {quantize}}}\n"), "line 2"),
            Case(
                "a stage's output", stage(f"stages:\n  a: {quantize}, output: ../out}}\n"), "line 2"
            ),
        ],
    )


# ------------------------------------------------------------------------------------------------ templates


@fault(_FAMILY, "a tokenizer's chat template", everyday=True)
def templates(work: Work, count: int) -> Iterator[Trial]:
    """That reaches for Python, that never ends, that is no template."""

    def template(text: str) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            model = _model(work, folder)
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
                "by attr", template("{{ ''|attr('__class__')|attr('__mro__') }}"), "chat template|response is empty"
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


# ------------------------------------------------------------------------------------------------ code


@fault(_FAMILY, "code that comes with a checkpoint", everyday=True)
def code(work: Work, count: int) -> Iterator[Trial]:
    """Named by its configuration, in the places where libraries look for it."""

    def named(change: Callable[[Path], None]) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            model = _model(work, folder)
            for name in ("modeling_evil.py", "tokenization_evil.py", "configuration_evil.py"):
                (model / name).write_text(_code(work))
            change(model)
            return _evaluate(work, model)

        return make

    auto_model = {
        "auto_map": {
            "AutoConfig": "configuration_evil.C",
            "AutoModelForCausalLM": "modeling_evil.M",
        }
    }
    auto_tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_evil.T", "tokenization_evil.T"]}}

    def unknown(model: Path) -> None:
        _changed(model / "config.json", model_type="evil", architectures=["Evil"], **auto_model)

    def tokenizer(model: Path) -> None:
        _changed(model / "tokenizer_config.json", tokenizer_class="EvilTokenizer", **auto_tokenizer)

    def pipeline(index: dict[str, Any]) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            from postlude.runs.loading import resolve

            model = Path(shutil.copytree(resolve("zoo:tiny-dit"), folder / "dit"))
            _changed(model / "model_index.json", **index)
            for place in (model, model / "transformer", model / "scheduler"):
                (place / "evil.py").write_text(_code(work))

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
        (model / "evil.py").write_text(_code(work))
        mapping = {"base_model_class": "M", "parent_library": "evil"}
        _changed(model / "adapter_config.json", auto_mapping=mapping)
        return _evaluate(work, model)

    yield from tried(
        work,
        [
            Case(
                "auto_map of a known type",
                named(lambda m: _changed(m / "config.json", **auto_model)),
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


@fault(_FAMILY, "rewards of `tune --objective grpo`")
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


# ------------------------------------------------------------------------------------------------ bombs


@fault(_FAMILY, "YAML of a recipe", everyday=True)
def yaml(work: Work, count: int) -> Iterator[Trial]:
    """Tags that build objects, anchors that multiply, depth without end."""

    def recipe(text: str, *more: str) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            (folder / "recipe.yaml").write_text(text.replace("SENTINEL", str(work.sentinel)))
            values = [one.replace("SENTINEL", str(work.sentinel)) for one in more]
            return ["run", folder / "recipe.yaml", "-o", folder / "run", *values]

        return make

    call = '!!python/object/apply:os.system ["touch SENTINEL"]'
    laughs = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(12)
    )
    stages = "stages:\n  a: {inspect: zoo:tiny-lm}\n"
    variable = "variables: {x: 1}\n" + stages
    lists = "variables: {x: " + "[" * _DEEP + "]" * _DEEP + "}\n" + stages
    yield from tried(
        work,
        [
            Case("an object as a stage", recipe(f"stages:\n  a: {call}\n"), r"recipe\.yaml"),
            Case(
                "an object as a value",
                recipe(f"variables: {{x: {call}}}\n{stages}"),
                r"recipe\.yaml",
            ),
            Case("an object as a name", recipe(f"? {call}\n: 1\n"), r"recipe\.yaml"),
            Case("an object by --set", recipe(variable, "--set", f"x={call}"), "x"),
            Case("a module", recipe("stages: !!python/module:antigravity\n"), r"recipe\.yaml"),
            Case("anchors that multiply", recipe(laughs + stages), r"recipe\.yaml"),
            Case("an anchor within itself", recipe("stages: &a {a: *a}\n"), r"recipe\.yaml"),
            Case("lists in lists", recipe(lists), r"recipe\.yaml"),
            Case("mappings in mappings", recipe("{a: " * 20_000), r"recipe\.yaml"),
            Case("a list by --set", recipe(variable, "--set", "x=" + "[" * 50_000), "x"),
            Case("bytes that are no text", recipe("stages: \x00\x01\n"), r"recipe\.yaml"),
        ],
    )


@fault(_FAMILY, "JSON in JSON in JSON", everyday=True)
def json_bombs(work: Work, count: int) -> Iterator[Trial]:
    """Two hundred thousand levels, in every kind of file."""
    deep = "[" * _DEEP + "]" * _DEEP

    def beside(name: str, text: str) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            model = _model(work, folder)
            (model / name).write_text(text)
            return _evaluate(work, model)

        return make

    def rows(verb: tuple[str, ...], *more: str) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            (folder / "rows.jsonl").write_text('{"text": ' + deep + "}\n")
            return [
                *verb,
                work.inputs / "model",
                folder / "rows.jsonl",
                *more,
                "-o",
                folder / "out",
            ]

        return make

    def evaluated(work: Work, folder: Path) -> Words:
        (folder / "rows.jsonl").write_text('{"text": ' + deep + "}\n")
        return ["evaluate", work.inputs / "model", "--text", folder / "rows.jsonl"]

    def index(work: Work, folder: Path) -> Words:
        source = work.made("index", lambda out: build_words(work, out))
        copy = Path(shutil.copytree(source, folder / "index"))
        (copy / "manifest.json").write_text(deep)
        return ["attribute", "query", copy, "Once", "--no-keep"]

    def network(work: Work, folder: Path) -> Words:
        (folder / "x.inr").mkdir()
        (folder / "x.inr" / "config.json").write_text(deep)
        return ["render", folder / "x.inr", "-o", folder / "x.png"]

    def adapter(work: Work, folder: Path) -> Words:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_config.json").write_text(deep)
        return _evaluate(work, folder / "adapter")

    def run_directory(work: Work, folder: Path) -> Words:
        (folder / "kept").mkdir()
        (folder / "kept" / "manifest.json").write_text(deep)
        words = [
            "quantize",
            work.inputs / "model",
            "--no-check",
            "--run",
            folder / "kept",
            "-o",
            folder / "out",
        ]
        return words

    def prior(work: Work, folder: Path) -> Words:
        source = work.made(
            "prior",
            lambda out: [
                "tune",
                "prior",
                work.inputs / "model",
                work.inputs / "train.jsonl",
                "-o",
                out,
            ],
        )
        copy = Path(shutil.copytree(source, folder / "prior"))
        manifest = next(one for one in copy.iterdir() if one.suffix == ".json")
        manifest.write_text(deep)
        words = [
            "tune",
            work.inputs / "model",
            work.inputs / "train.jsonl",
            "--weights",
            "prift-mass",
            "--prior",
        ]
        return [*words, copy, "--steps", "1", "-o", folder / "out"]

    def pictures(work: Work, folder: Path) -> Words:
        images = Path(shutil.copytree(work.inputs / "images", folder / "images"))
        (images / "labels.jsonl").write_text(deep + "\n")
        return [
            "attribute",
            "build",
            "zoo:tiny-dit",
            images,
            "--method",
            "d-trak",
            "-o",
            folder / "i",
        ]

    yield from tried(
        work,
        [
            Case("config.json", beside("config.json", deep), "config.json"),
            Case("tokenizer.json", beside("tokenizer.json", deep), "tokenizer"),
            Case("tokenizer_config.json", beside("tokenizer_config.json", deep), "tokenizer"),
            Case("generation_config.json", beside("generation_config.json", deep), "model"),
            Case("text to evaluate", evaluated, "line 1"),
            Case("data to tune on", rows(("tune",)), "line 1"),
            Case("data to attribute to", rows(("attribute", "build")), "line 1"),
            Case("the manifest of an index", index, "manifest.json"),
            Case("a picture in a network", network, "config.json"),
            Case("an adapter", adapter, "adapter_config.json"),
            Case("the manifest of a run", run_directory, "manifest.json"),
            Case("a prior", prior, "damaged"),
            Case("labels of pictures", pictures, "line 1"),
        ],
    )


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


@fault(_FAMILY, "pictures and arrays of enormous size", everyday=True)
def pictures(work: Work, count: int) -> Iterator[Trial]:
    """A hundred bytes that say they are billions of pixels."""

    def fit(width: int, height: int) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            (folder / "bomb.png").write_bytes(_png(width, height))
            return [
                "fit",
                folder / "bomb.png",
                "--width",
                "16",
                "--steps",
                "1",
                "-o",
                folder / "x.inr",
            ]

        return make

    def calibrated(work: Work, folder: Path) -> Words:
        images = Path(shutil.copytree(work.inputs / "images", folder / "images"))
        (images / "bomb.png").write_bytes(_png(60_000, 60_000))
        return [
            "quantize", work.inputs / "vit", "--method", "repq-vit", "--bits", "w8a8", "--calibration", images,
            "--samples", "5", "--no-check", "-o", folder / "small",
        ]  # fmt: skip

    def attributed(work: Work, folder: Path) -> Words:
        (folder / "images").mkdir()
        (folder / "images" / "bomb.png").write_bytes(_png(60_000, 60_000))
        return [
            "attribute",
            "build",
            "zoo:tiny-dit",
            folder / "images",
            "--method",
            "d-trak",
            "-o",
            folder / "i",
        ]

    def array(work: Work, folder: Path) -> Words:
        import io
        import zipfile

        import numpy

        head = io.BytesIO()
        described = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 1000, 1000)}
        numpy.lib.format.write_array_header_1_0(head, described)
        with zipfile.ZipFile(folder / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("images.npy", head.getvalue() + b"\0" * 1000)
        return [
            "attribute",
            "build",
            "zoo:tiny-dit",
            folder / "x.npz",
            "--method",
            "d-trak",
            "-o",
            folder / "i",
        ]

    yield from tried(
        work,
        [
            Case("fitted, 3.6 billion pixels", fit(60_000, 60_000), "60000 x 60000 pixels"),
            Case("fitted, 10^18 pixels", fit(2**31 - 1, 2**31 - 1), "2147483647 pixels"),
            Case("to calibrate on", calibrated, r"bomb\.png"),
            Case("to attribute to", attributed, r"bomb\.png"),
            Case("an array of 10^12 bytes", array, r"x\.npz"),
        ],
    )
