"""``postlude attribute``: the commands against a tiny checkpoint, and every refusal by its message."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from postlude.attribution import plan as plan_module
from postlude.attribution.index import Index
from postlude.attribution.lorif import LoRIF
from postlude.attribution.plan import Hardware

SENTENCE = "the boat lay on the shore and a bird called over grey water"
WORDS = SENTENCE.split()


@pytest.fixture(scope="module")
def built(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model``, ``train.jsonl`` and ``index``; read only."""
    from postlude.cli import run

    folder = tmp_path_factory.mktemp("attribute")
    shutil.copytree(tiny_llama_dir, folder / "model")
    lines = [{"id": f"s{n}", "text": " ".join(WORDS[n % 5 : n % 5 + 3 + n % 7])} for n in range(12)]
    lines += [{"id": "long", "text": " ".join(WORDS * 2)}]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["attribute", "build", folder / "model", folder / "train.jsonl", "-o", folder / "index"]
    options = ["--method", "lorif", "--rank", "1", "--format", "int8", "--shard-examples", "5"]
    assert run([*map(str, words), *options, "--json"]) == 0
    return folder


@pytest.fixture
def work(built: Path, tmp_path: Path) -> Path:
    """A copy to damage. Its index still names the model and the data of the original."""
    return Path(shutil.copytree(built, tmp_path / "work"))


def test_build_says_what_it_made(built: Path, postlude_command: Any, tmp_path: Path) -> None:
    done = postlude_command(
        "attribute", "build", built / "model", built / "train.jsonl", "-o", tmp_path / "i",
        "--method", "lorif", "--rank", 2, "--factor", 8, "--set", "damping=2", "--seed", 3, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    report = done.json
    assert (report["examples"], report["truncated"], report["seed"]) == (13, 1, 3)
    assert report["seconds"] > 0
    files = sum(file.stat().st_size for file in (tmp_path / "i" / "shards").iterdir())
    assert report["bytes"] == files
    assert "path" not in report
    assert report["settings"]["damping"] == 2.0 and report["settings"]["projection_factor"] == 8
    # What it is expected to take is said before it starts.
    assert "expected: 13 examples of about" in done.err


def test_build_again_changes_nothing_and_other_settings_are_refused(
    work: Path, postlude_command: Any
) -> None:
    words = ["attribute", "build", work / "model", work / "train.jsonl", "-o", work / "new"]
    first = postlude_command(*words, "--json")
    before = Index(work / "new").hash()
    again = postlude_command(*words, "--json")
    assert (again.json["resumed"], Index(work / "new").hash()) == (13, before)
    assert first.json["bytes"] == again.json["bytes"]
    other = postlude_command(*words, "--rank", 2, "--json")
    assert other.code == 2
    assert (
        "rank" in other.json["error"]["message"] and "--overwrite" in other.json["error"]["message"]
    )
    assert postlude_command(*words, "--rank", 2, "--overwrite", "--json").code == 0


def test_query_of_a_text(built: Path, postlude_command: Any) -> None:
    words = ("attribute", "query", built / "index", "the boat lay on the shore", "--top", 3)
    done = postlude_command(*words, "--json")
    assert done.code == 0, done.err
    results = done.json["results"]
    assert len(results) == 3
    assert set(results[0]) >= {"id", "score", "text"} and "layers" not in results[0]
    assert [one["score"] for one in results] == sorted((r["score"] for r in results), reverse=True)
    assert done.json["curvature"].startswith("dual (")
    plain = postlude_command(*words)
    assert "curvature: dual, read from the index\n" in plain.err
    fresh = postlude_command(*words, "--no-keep")
    assert "curvature: dual, fitted now\n" in fresh.err
    assert plain.code == 0 and results[0]["id"] in plain.out
    both = postlude_command(*words, "--layers", "--tokens", "--json").json["results"][0]
    assert len(both["layers"]) == 14
    assert sum(both["layers"].values()) == pytest.approx(both["score"], rel=1e-3)
    assert "".join(piece["text"] for piece in both["tokens"]).startswith("<s>the")


def test_query_of_a_file_and_its_page(work: Path, postlude_command: Any) -> None:
    queries = work / "queries.jsonl"
    queries.write_text(
        '{"id": "q", "text": "a bird called"}\n{"prompt": "a ", "completion": "boat"}\n'
    )
    page = work / "page.html"
    words = ("attribute", "query", work / "index", queries, "--html", page, "--top", 2)
    done = postlude_command(*words, "--json")
    assert done.code == 0, done.err
    assert [one["id"] for one in done.json["queries"]] == ["q", 1]
    assert all(len(one["results"]) == 2 for one in done.json["queries"])
    assert "a bird called" in page.read_text()
    again = postlude_command(*words)
    assert again.code == 2 and "--overwrite" in again.err
    assert str(page) in " ".join(postlude_command(*words, "--overwrite").out.split())


def test_query_with_other_settings(built: Path, postlude_command: Any) -> None:
    words = ("attribute", "query", built / "index", "a bird called", "--json")
    usual = postlude_command(*words).json
    damped = postlude_command(*words, "--set", "damping=50").json
    assert damped["results"][0]["score"] < usual["results"][0]["score"]
    cosine = postlude_command(*words, "--method", "gradcos").json
    assert cosine["unit"] == "cosine" and abs(cosine["results"][0]["score"]) <= 1.0001


def test_verify(built: Path, work: Path, postlude_command: Any) -> None:
    done = postlude_command("attribute", "verify", work / "index", "--json")
    assert done.code == 0
    assert (done.json["ok"], done.json["shards"], done.json["data"]) == (True, 3, "unchanged")
    shard = sorted((work / "index" / "shards").iterdir())[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    damaged = postlude_command("attribute", "verify", work / "index", "--json")
    assert damaged.code == 2
    message = damaged.json["error"]["message"]
    assert "damaged in 1 of 3 shards: shard 1" in message and shard.name in message
    # What it advises mends it.
    assert "Run the same build command again" in message
    build = (
        "build",
        built / "model",
        built / "train.jsonl",
        "-o",
        work / "index",
        "--method",
        "lorif",
    )
    options = ("--rank", "1", "--format", "int8", "--shard-examples", "5")
    assert postlude_command("attribute", *build, *options, "--json").json["resumed"] == 8
    mended = postlude_command("attribute", "verify", work / "index")
    assert mended.code == 0 and "damaged" not in mended.out


def test_plan(built: Path, postlude_command: Any) -> None:
    words = ("attribute", "plan", "--parameters", "70B", "--examples", "5M", "--hardware", "h100")
    done = postlude_command(*words, "--json")
    assert done.code == 0
    assert done.json["examples"] == 5_000_000
    assert done.json["bytes"]["index"] > 1e12
    assert len(done.json["table"]) == 12
    assert postlude_command(*words, "--format", "int8", "--json").json["bytes"]["index"] < (
        0.6 * done.json["bytes"]["index"]
    )
    shown = postlude_command(*words)
    assert shown.code == 0 and "h100" in shown.out
    assert (done.json["factor"], done.json["tokens"]) == (LoRIF().projection_factor, 512)
    of_model = postlude_command("attribute", "plan", built / "model", "--examples", 13, "--json")
    assert (of_model.json["layers"], of_model.json["tokens"]) == (14, 64)


def test_plan_is_told_in_words(postlude_command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    slow = Hardware("this CPU, 1 thread, measured", 4e10, 1e10, 1e9, 5e12)
    monkeypatch.setattr(plan_module, "this_machine", lambda: slow)
    words = ("attribute", "plan", "--parameters", "70B", "--examples", "5M", "--tokens", 512)
    out = postlude_command(*words).out
    assert all(len(line.rstrip()) <= 80 for line in out.splitlines())
    assert re.search(r"takes [\d,]+ years here; --hardware h100 --devices 64 for others", out)
    assert "of the largest layer" in out and "\u2026" not in out
    assert "in memory" in out and "from disk" in out


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (("plan",), "give one of them"),
        (("plan", "--parameters", "70X"), "--parameters is '70X'"),
        (("plan", "--parameters", "70B", "--hardware", "h10"), "Did you mean 'h100'"),
        (("build", "model", "gone.jsonl", "-o", "o"), "There is no file gone.jsonl"),
        (("build", "model", "train.jsonl", "-o", "o", "-m", "lorfi"), "Did you mean 'lorif'"),
        (("build", "model", "train.jsonl", "-o", "o", "-m", "bm25", "--rank", "2"), "setting of bm25"),
        (("build", "model", "train.jsonl", "-o", "o", "--format", "fp16"), "does not fit lorif"),
        (("build", "model", "train.jsonl", "-o", "o", "--max-length", "99"), "at most 64 tokens"),
        (("build", "model", "train.jsonl", "-o", "o", "--layers", "*.nothing"), "no linear layer matches"),
        (("build", "model", "empty.jsonl", "-o", "o"), "empty.jsonl line 2 is empty"),
        (("query", "model", "a boat"), "model holds no attribution index"),
        (("query", "gone", "a boat"), "gone"),
        (("query", "index", " "), "the text of the query is empty"),
        (("query", "index", "gone.jsonl"), "There is no file gone.jsonl"),
        (("build", "model", "twice.jsonl", "-o", "o"), "line 2 has the id 'a', which line 1 has too"),
        (("query", "index", "a boat", "--method", "logra"), "for logra build its own"),
        (("query", "index", "a boat", "--set", "dampening=2"), "Did you mean 'damping'"),
        (("query", "index", "a boat", "--checkpoint", "other"), "built with another model"),
        (("query", "index", "a boat", "--data", "empty.jsonl"), "line 2 is empty"),
        (("query", "index", "a boat", "--data", "changed.jsonl"), "has changed since"),
    ],
)  # fmt: skip
def test_refusals(
    work: Path,
    make_checkpoint: Any,
    postlude_command: Any,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    pattern: str,
) -> None:
    monkeypatch.chdir(work)
    (work / "empty.jsonl").write_text('{"text": "a boat"}\n{"text": " "}\n')
    (work / "twice.jsonl").write_text(2 * '{"id": "a", "text": "a boat"}\n')
    (work / "changed.jsonl").write_text('{"text": "a boat"}\n')
    if "other" in words:
        shutil.copytree(make_checkpoint(seed=7), work / "other")
    done = postlude_command("attribute", *words, "--json")
    assert done.code == 2, done.err
    message = done.json["error"]["message"]
    assert re.search(pattern, message), message
    assert not (work / "o").exists()


def test_changed_data_are_refused_at_the_next_query(work: Path, postlude_command: Any) -> None:
    data = work / "train.jsonl"
    words = ["attribute", "build", work / "model", data, "-o", work / "new", "--json"]
    assert postlude_command(*words).code == 0
    data.write_text(data.read_text().replace("boat", "ship", 1))
    for command in (["attribute", "query", work / "new", "a boat", "--json"], words):
        done = postlude_command(*command)
        assert done.code == 2
        assert "hash" in done.json["error"]["message"] or "data" in done.json["error"]["message"]
    done = postlude_command("attribute", "verify", work / "new", "--json")
    assert done.code == 2
    assert re.search(
        "shards of .* are whole, but: .* has changed since", done.json["error"]["message"]
    )
    data.unlink()
    report = postlude_command("attribute", "verify", work / "new", "--json").json
    assert report["ok"] and "there is no file" in report["data"]


def test_learned_weights_of_layers(work: Path, postlude_command: Any) -> None:
    queries = work / "queries.jsonl"
    lines = [{"text": " ".join(WORDS[n % 4 : n % 4 + 4 + n % 3])} for n in range(10)]
    queries.write_text("".join(json.dumps(line) + "\n" for line in lines))
    weights = work / "weights.safetensors"
    words = ("attribute", "learn-weights", work / "index", queries, "-o", weights)
    done = postlude_command(*words, "--k", 3, "--steps", 20, "--json")
    assert done.code == 0, done.err
    assert (done.json["queries"], done.json["k"], len(done.json["weights"])) == (10, 3, 14)
    assert sum(done.json["weights"].values()) == pytest.approx(14)
    assert "Few queries: 10 for 14 layers" in done.json["notes"][1]
    told = postlude_command(*words, "--k", 3, "--steps", 0, "--overwrite").out
    assert "loss: minus the mean score of the 3 best" in " ".join(told.split()) and "Few q" in told
    assert postlude_command(*words, "--k", 3, "--steps", 20, "--overwrite").code == 0
    again = postlude_command(*words, "--k", 3, "--json")
    assert again.code == 2 and "already exists" in again.json["error"]["message"]
    asked = ("attribute", "query", work / "index", "a bird called", "--top", 2)
    plain = postlude_command(*asked, "--json").json
    page = work / "page.html"
    weighted = postlude_command(*asked, "--weights", weights, "--html", page, "--json").json
    assert weighted["results"][0]["score"] != plain["results"][0]["score"]
    assert "What each layer counts for" in page.read_text()
    # By default they lie in the index, which does not mind.
    assert postlude_command(*words[:4], "--k", 3, "--steps", 0, "--json").code == 0
    equal = postlude_command(*asked, "--weights", work / "index" / "weights.safetensors", "--json")
    assert equal.json["results"] == plain["results"]
    assert postlude_command("attribute", "verify", work / "index", "--json").code == 0
    few = postlude_command(*words[:3], queries, "-o", work / "w", "--k", 11, "--json")
    assert few.code == 2 and "fewer than k, 11" in few.json["error"]["message"]
    other = postlude_command(*asked, "--weights", weights, "--method", "graddot", "--json")
    assert other.code == 2 and "the method lorif, not graddot" in other.json["error"]["message"]
    none = postlude_command(*asked, "--weights", work / "none", "--json")
    assert none.code == 2 and "There is no file" in none.json["error"]["message"]


def test_images_of_a_diffusion_model(tmp_path: Path, postlude_command: Any) -> None:
    pytest.importorskip("diffusers")
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(8):
        image = Image.effect_noise((8, 8), 60 + number)
        image.save(folder / f"{number}.png")
    labels = "".join(f'{{"file": "{n}.png", "label": {n}}}\n' for n in range(8))
    (folder / "labels.jsonl").write_text(labels)
    words = ("attribute", "build", "zoo:tiny-dit", folder, "-o", tmp_path / "index", "--json")
    done = postlude_command(*words, "--method", "d-trak", "--timesteps", 2, "--set", "side=4")
    assert done.code == 0, done.err
    assert (done.json["examples"], done.json["tokens"]) == (8, 8 * 16)
    assert "8 examples of 16 patches, each 2 times through the model" in done.err
    plain = postlude_command(*words[:-1], "--method", "d-trak", "--timesteps", 2, "--set", "side=4")
    assert "patches" in plain.out and "truncated" not in plain.out and "tokens" not in plain.out
    page = tmp_path / "page.html"
    asked = ("attribute", "query", tmp_path / "index", folder / "3.png")
    found = postlude_command(*asked, "--top", 2, "--html", page, "--json")
    assert found.code == 0, found.err
    assert found.json["results"][0]["id"] == "3" and found.json["text"] == "label 3, 3.png"
    assert page.read_text().count("data:image/png;base64,") == 1 + 2 * 2
    assert "squared norm" in page.read_text()
    several = postlude_command("attribute", "query", tmp_path / "index", folder, "--json")
    assert len(several.json["queries"]) == 8
    (tmp_path / "large").mkdir()
    Image.effect_noise((16, 16), 60).save(tmp_path / "large" / "0.png")
    large = postlude_command("attribute", "query", tmp_path / "index", tmp_path / "large", "--json")
    assert large.code == 2
    assert "images are 1 x 16 x 16, and the model takes 1 x 8 x 8" in large.json["error"]["message"]
    text = postlude_command(*words[:5], tmp_path / "o", "--method", "bm25", "--json")
    assert (
        text.code == 2 and "is a diffusion model; methods for it" in text.json["error"]["message"]
    )
