"""Paths that lead out of the folder they should stay in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.hostile.case import (
    FAMILY,
    Case,
    copied_model,
    evaluating,
    tried,
)
from faults.hostile.tensors import tensors_of
from faults.kills import build_words
from faults.suite import Trial, Words, Work, fault


def _sharded(work: Work, folder: Path, name: str) -> Words:
    """A checkpoint whose list of shards names a file elsewhere, which is there."""
    model = copied_model(work, folder)
    outside = folder / "outside.safetensors"
    shutil.move(model / "model.safetensors", outside)
    header, _ = tensors_of(outside)
    names = [one for one in header if one != "__metadata__"]
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(names, name.replace("FOLDER", str(folder))),
    }
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return evaluating(work, model)


@fault(FAMILY, "paths that lead out of their folder", everyday=True)
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

            def read() -> object:
                from postlude.tuning.recordings import audio_path
                from postlude.tuning.rows import read_rows

                return audio_path(read_rows(data / "rows.jsonl")[0])

            return read

        return make

    def poses(name: str) -> Callable[[Work, Path], Words]:
        def make(work: Work, folder: Path) -> Words:
            data = folder / "poses"
            data.mkdir()
            shutil.copy(work.inputs / "picture.png", folder / "0.png")
            label = {
                "filename": name.replace("FOLDER", str(folder)), "q_vbs2tango": [1.0, 0.0, 0.0, 0.0],
                "r_Vo2To_vbs_true": [0.0, 0.0, 8.0], "box": [900, 500, 1020, 700],
            }  # fmt: skip
            (data / "labels.json").write_text(json.dumps([label]))

            def read() -> object:
                from postlude.zoo.fastpose_vit.data import load

                return load(data)

            return read

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
            Case("recordings, ..", clips("../0.wav"), "outside of"),
            Case("recordings, absolute", clips("FOLDER/0.wav"), "outside of"),
            Case("poses, ..", poses("../0.png"), "expected one in"),
            Case("poses, absolute", poses("FOLDER/0.png"), "expected one in"),
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
