"""What every registered attribution method must do. None is listed by hand: a new method is tested by being there."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from postlude import registry
from postlude.attribution.build import build
from postlude.attribution.examples import Collection
from postlude.attribution.index import Index
from postlude.attribution.queries import record_queries
from postlude.attribution.query import method_of, query
from postlude.errors import SettingsError
from postlude.registry import MethodInfo
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.store import TensorStore

from ..attribution.small import checkpoint, collection, denoiser, pictures, texts

METHODS = registry.available("attribute")
each_method = pytest.mark.parametrize("info", METHODS, ids=lambda info: info.name)
ARCHITECTURES = {"language": ("llama", "gpt2", "qwen2-bf16"), "diffusion": ("dit",)}
each_pair = pytest.mark.parametrize(
    ("info", "architecture"),
    [
        (info, architecture)
        for info in METHODS
        for kind in info.settings.kinds
        for architecture in ARCHITECTURES[kind]
    ],
    ids=lambda one: getattr(one, "name", one),
)
TRAIN = texts(24)
# What prefers long examples may put another one before a copy.
PREFERS_LENGTH = {"graddot", "bm25"}
# Asks about the way to an image, not about the image.
ASKS_OTHERWISE = {"journey-trak"}


def home(info: MethodInfo) -> str:
    """The architecture on which a method is tested most."""
    return ARCHITECTURES[info.settings.kinds[0]][0]


def data(architecture: str, count: int = 24) -> Any:
    """Training examples, or the first of them."""
    if architecture != "dit":
        return TRAIN[:count]
    images, labels = pictures(24)
    return images[:count], labels[:count]


@pytest.fixture(scope="module")
def models() -> dict[str, Checkpoint]:
    # At the usual start GPT-2 predicts all tokens alike, and gradients of all texts are alike too.
    return {
        "llama": checkpoint(),
        "gpt2": checkpoint("gpt2", initializer_range=0.2),
        "qwen2-bf16": checkpoint("qwen2", dtype=torch.bfloat16),
        "dit": denoiser(),
    }


@pytest.fixture(scope="module")
def indices(
    models: dict[str, Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Index]:
    """Of every method with its defaults, made when first asked for."""
    folder = tmp_path_factory.mktemp("indices")

    class Made(dict[tuple[str, str], Index]):
        def __missing__(self, key: tuple[str, str]) -> Index:
            name, architecture = key
            method = registry.find("attribute", name).settings()
            out = folder / f"{name}-{architecture}"
            self[key] = build(
                models[architecture], data(architecture), method, out, collection=settings()
            )[0]
            return self[key]

    return Made()


def settings(**changes: Any) -> Collection:
    return collection(**{"timesteps": 3, **changes})


def scores(index: Index, model: Checkpoint, records: Any) -> Tensor:
    method = method_of(index)
    return method.score(index, record_queries(index, model, records)).total


def assert_close(found: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=1e-3 * scale, rtol=1e-3)


@each_pair
def test_a_training_copy_finds_itself(
    indices: Any, models: dict[str, Checkpoint], info: MethodInfo, architecture: str
) -> None:
    index = indices[info.name, architecture]
    found = scores(index, models[architecture], data(architecture, 10))
    assert found.shape == (10, len(TRAIN)) and found.dtype == torch.float32
    assert torch.isfinite(found).all()
    right = int((found.argmax(1) == torch.arange(10)).sum())
    if info.name in ASKS_OTHERWISE:
        return
    assert right >= 6 if info.name in PREFERS_LENGTH else right == 10


@each_method
def test_the_same_twice_and_after_opening_again(
    indices: Any, models: dict[str, Checkpoint], info: MethodInfo
) -> None:
    where = home(info)
    index, model, some = indices[info.name, where], models[where], data(where, 3)
    first = scores(index, model, some)
    assert torch.equal(scores(index, model, some), first)
    again = Index(index.path)
    again.records(data(where))
    assert method_of(again) == info.settings()
    assert torch.equal(scores(again, model, some), first)


@each_method
def test_queries_do_not_depend_on_their_company(
    indices: Any, models: dict[str, Checkpoint], info: MethodInfo
) -> None:
    where = home(info)
    index, model, some = indices[info.name, where], models[where], data(where, 3)
    together = scores(index, model, some)
    each = (
        [(some[0][n : n + 1], some[1][n : n + 1]) for n in range(3)]
        if where == "dit"
        else [[record] for record in some]
    )
    alone = [scores(index, model, one) for one in each]
    assert_close(torch.cat(alone), together)


@each_method
def test_batches_and_shards_change_nothing(
    indices: Any, models: dict[str, Checkpoint], info: MethodInfo, tmp_path: Path
) -> None:
    """Padding neither: in batches of one there is none."""
    where = home(info)
    other, _ = build(
        models[where],
        data(where),
        info.settings(),
        tmp_path / "index",
        collection=settings(tokens_per_batch=1, shard_examples=5),
    )
    found = scores(other, models[where], data(where, 3))
    expected = scores(indices[info.name, where], models[where], data(where, 3))
    scale = float(expected.abs().max())
    # A stored number on the edge between two values may go either way.
    torch.testing.assert_close(found, expected, atol=2e-2 * scale, rtol=2e-2)
    assert torch.equal(found.argmax(1), expected.argmax(1))


@each_method
def test_a_build_that_is_stopped_goes_on_bit_equal(
    indices: Any,
    models: dict[str, Checkpoint],
    info: MethodInfo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = TensorStore.write

    def stop(self: TensorStore, number: int, tensors: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt
        write(self, number, tensors)

    where = home(info)
    given = (models[where], data(where), info.settings(), tmp_path / "index")
    monkeypatch.setattr(TensorStore, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        build(*given, collection=settings())
    monkeypatch.setattr(TensorStore, "write", write)
    index, report = build(*given, collection=settings())
    assert report["resumed"] == 16
    assert index.hash() == indices[info.name, where].hash()


@pytest.mark.parametrize(
    ("info", "architecture"),
    [(info, ARCHITECTURES[kind][0]) for info in METHODS for kind in info.settings.kinds],
    ids=lambda one: getattr(one, "name", one),
)
def test_an_answer_is_complete(
    indices: Any, models: dict[str, Checkpoint], info: MethodInfo, architecture: str
) -> None:
    if architecture == "dit":
        images = data("dit")
        (answer,) = query(
            indices[info.name, "dit"],
            (images[0][:1], images[1][:1]),
            top=2,
            layers=True,
            tokens=True,
            checkpoint=models["dit"],
            data=images,
        )
        assert (answer.count, answer.truncated) == (16, 0) and answer.image is not None
        for hit in answer.results:
            assert hit.tokens is None and hit.layers is not None and hit.image is not None
            assert torch.equal(hit.image, images[0][hit.number])
            assert sum(hit.layers.values()) == pytest.approx(hit.score, rel=0.01)
        return
    index = indices[info.name, "llama"]
    record = {"text": " ".join([TRAIN[0]["text"]] * 9)}
    (answer,) = query(
        index, [record], top=2, layers=True, tokens=True, checkpoint=models["llama"], data=TRAIN
    )
    assert answer.truncated > 0 and answer.count == 64
    assert answer.unit and answer.deviation > 0
    for hit in answer.results:
        for parts in (hit.tokens, hit.query_tokens):
            assert parts is None or sum(part.score for part in parts) == pytest.approx(
                hit.score, rel=0.05, abs=0.02 * abs(answer.results[0].score)
            )


@each_method
def test_settings_that_make_no_sense_are_refused(info: MethodInfo) -> None:
    hints = typing.get_type_hints(info.settings)
    for field in dataclasses.fields(info.settings):
        kinds = {hints[field.name], *typing.get_args(hints[field.name])}
        if kinds & {int, float} and field.name != "layer":  # layers count from the end too
            bad: Any = -1
        elif typing.get_origin(hints[field.name]) is typing.Literal:
            bad = "nonsense"
        else:
            continue
        with pytest.raises(SettingsError) as caught:
            info.settings(**{field.name: bad})
        message = str(caught.value)
        assert str(bad) in message
        word = field.name.removeprefix("projection_").removeprefix("factor_")
        assert word in message, f"{info.name}: {message!r} does not name {field.name}"
