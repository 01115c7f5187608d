"""Every command of the README is run here, on tiny models under the names it uses; those of docs/ are at least parsed.

A command in a fenced block runs as it stands, with ``CHEAPER`` put after it. A command of the table of commands has
placeholders, so ``TABLE`` says what is run for it: a new row fails until it has an entry.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from postlude import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Less of everything; by the first words of a command, the longest that fit.
CHEAPER = {
    "inspect": "",
    "inspect compare": "",
    "inspect kernels": "",
    "quantize": "--length 24 --no-check",
    "quantize dit/": "--no-check --set iterations=2",
    "tune": "--steps 2 --max-length 24 --batch-size 2",
    "tune ears": "--steps 1 --batch-size 2",
    "tune prior": "--max-length 24",
    "evaluate": "",
    "evaluate lds": "--subsets 2 --seeds 1 --epochs 1",
    "evaluate retrieval": "",
    "evaluate samples": "--count 20",
    "evaluate pose": "",
    "evaluate speech": "",
    "explain": "",
    "attribute build": "",
    "attribute query": "",
    "attribute learn-weights": "--steps 2",
    "attribute select": "",
    "attribute verify": "",
    "attribute plan": "",
    "sample": "--count 4",
    "sample calibrate": "--batch 2",
    "generate": "",
    "export": "--no-check",
    "fit": "",
    "render": "",
    "run": "",
    "run recipes/four-bit-chat.yaml": "--set model=path/to/model",
    "report": "",
    "methods": "",
    "demo": "",
}

# What is run for a row of the table, in this order, after everything in the fenced blocks.
TABLE = {
    "postlude inspect CKPT": ["inspect path/to/model"],
    "postlude inspect compare A B ...": [
        "inspect compare path/to/model tuned --layers 0 --html c.html"
    ],
    "postlude tune CKPT DATA.JSONL -o DIR": [
        "tune path/to/model data.jsonl --weights dft --adapter lora -o a"
    ],
    "postlude tune prior CKPT DATA.JSONL -o PRIOR": ["tune prior path/to/model data.jsonl -o p"],
    "postlude tune CKPT DATA --objective dpo|grpo -o DIR": [
        "tune path/to/model pairs.jsonl --objective dpo -o dpo",
        "tune path/to/model prompts.jsonl --objective grpo --reward rewards_of_readme:length -o rl"
        " --set generations=2 --set max_new_tokens=4",
    ],
    "postlude quantize CKPT -o DIR": [
        "quantize path/to/model --method gptq --bits w4a16kv16 --group 32 --calibration text.txt"
        " --set damping=0.02 -o weights-only"
    ],
    "postlude attribute build CKPT TRAIN.JSONL -o INDEX": [
        "attribute build path/to/model train.jsonl -o i"
    ],
    'postlude attribute query INDEX "TEXT"': [
        'attribute query i "the boat" --html i.html',
        "attribute verify i",
        "attribute plan --parameters 70B --examples 5M --hardware h100 --devices 64",
    ],
    "postlude attribute build DIT IMAGES/ -o INDEX --method d-trak": [
        "attribute build dit images/ -o j --method d-trak --timesteps 2 --set side=4",
        "attribute query j images/3.png --html j.html",
    ],
    "postlude attribute learn-weights INDEX QUERIES -o WEIGHTS": [
        "attribute learn-weights i queries.jsonl -o weights.safetensors --k 2",
        'attribute query i "the boat" --weights weights.safetensors',
    ],
    "postlude evaluate CKPT --text FILE": ["evaluate path/to/model --text test.txt"],
    "postlude evaluate lds CKPT TRAIN.JSONL": [
        "evaluate lds path/to/model train.jsonl --methods bm25,graddot --queries queries.jsonl --run lds",
        "evaluate retrieval path/to/model train.jsonl --methods bm25",
    ],
    "postlude sample DIT -o GRID.PNG": ["sample dit -o grid2.png --steps 2 --compare dit4"],
    "postlude sample calibrate DIT4 --reference DIT -o DRIFT": [
        "sample calibrate dit4 --reference dit -o d.safetensors --steps 2 --runs 2",
        "sample dit4 --drift d.safetensors -o grid3.png",
    ],
    "postlude evaluate samples DIT": ["evaluate samples dit --steps 2"],
    "postlude evaluate pose POSE --data FOLDER": ["evaluate pose pose --data poses"],
    "postlude tune EARS calibration.jsonl -o DIR": [
        "tune ears clips/calibration.jsonl --encoder frozen -o heard"
    ],
    "postlude evaluate speech EARS --data FOLDER": [
        "evaluate speech ears --data clips",
        "explain clips/wav/0.wav --model ears -o spectrum.png",
    ],
    'postlude generate CKPT "PROMPT"': ['generate small "the boat" --max-new-tokens 3'],
    "postlude export CKPT --to FORMAT -o PATH": ["export weights-only --to gguf -o small.gguf"],
    "postlude inspect kernels CKPT": ["inspect kernels small"],
    "postlude fit PICTURE -o X.inr": [
        "fit images/1.png -o x.inr --steps 5 --width 8 --html x.html"
    ],
    "postlude render X.inr -o PNG": ["render x.inr -o x.png --scale 2"],
    "postlude attribute select INDEX QUERIES --top N -o JSONL": [
        "attribute select i queries.jsonl --top 2 -o chosen.jsonl",
        "attribute select i queries.jsonl --top 2 -o left.jsonl --drop",
    ],
    "postlude run RECIPE.YAML -o RUN": ["run short.yaml -o run --dry-run", "run short.yaml -o run"],
    "postlude report RUN...": ["report run --overwrite"],
    "postlude methods [NAME]": ["methods", "methods offq"],
    "postlude demo -o DIR": ["demo -o demo"],
}
# They take seconds even on tiny models.
SLOW_ROWS = ("postlude demo -o DIR", "postlude evaluate lds CKPT TRAIN.JSONL")


def fenced(page: str, *languages: str) -> Iterator[str]:
    """The fenced blocks of these languages."""
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        if language in languages:
            yield text


def commands(page: str) -> list[list[str]]:
    """Command lines of postlude in fenced blocks, without comments; what is in brackets is given."""
    found = []
    for text in fenced(page, "", "sh", "bash", "console"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"\[(--[^\]]*)\]", r"\1", line), comments=True)
            if words[:1] == ["postlude"]:
                found.append(words[1:])
            if "postlude" in words and words[0] == "torchrun":
                found.append(words[words.index("postlude") + 1 :])
    return found


def rows() -> list[str]:
    """The commands in the first column of the table of commands."""
    table = README.split("| command | what it does |")[1].split("\n\n")[0]
    first = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    return [
        one.replace("\\|", "|") for cell in first for one in re.findall(r"`(postlude [^`]*)`", cell)
    ]


def cheaper(words: list[str]) -> list[str]:
    joined = " ".join(words)
    fits = [name for name in CHEAPER if joined == name or joined.startswith(f"{name} ")]
    assert fits, f"postlude {joined}: say in CHEAPER how a test runs it"
    return [*words, *CHEAPER[max(fits, key=len)].split()]


@pytest.fixture(scope="module")
def prepared(
    tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path], some_text: str
) -> Path:
    """A folder with everything that the README's commands read, small."""
    pytest.importorskip("diffusers")
    from PIL import Image

    from postlude.runs.checkpoint import Checkpoint
    from postlude.surgery.anatomy import anatomy_of
    from postlude.zoo import checkpoint_path
    from postlude.zoo.audio_llm import build, build_processor
    from postlude.zoo.fastpose_vit import data as sets
    from postlude.zoo.fastpose_vit.making import make
    from postlude.zoo.fastpose_vit.network import Backbone
    from postlude.zoo.fastpose_vit.network import build as build_pose
    from postlude.zoo.fastpose_vit.spacecraft import own_spacecraft
    from postlude.zoo.fastpose_vit.training import save

    folder = tmp_path_factory.mktemp("readme")
    # Blocks of GGUF hold 32 weights of a row.
    llama = make_checkpoint("llama", intermediate_size=64)
    shutil.copytree(llama, folder / "path" / "to" / "model")
    for name in ("text", "test", "other"):
        (folder / f"{name}.txt").write_text(some_text)

    words = some_text.split()
    texts = [" ".join(words[n : n + 5]) for n in range(8)]
    lines = {
        "train": [{"id": f"s{n}", "text": text} for n, text in enumerate(texts)],
        "queries": [{"id": f"q{n}", "text": text} for n, text in enumerate(texts[:3])],
        "data": [{"prompt": text[:12], "completion": " yes"} for text in texts],
        "pairs": [{"prompt": text[:12], "chosen": " yes", "rejected": " no"} for text in texts[:4]],
        "prompts": [{"prompt": text[:12]} for text in texts[:4]],
    }
    for name, content in lines.items():
        text = "".join(json.dumps(line) + "\n" for line in content)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "rewards_of_readme.py").write_text(
        "def length(completions):\n    return [float(len(one)) for one in completions]\n"
    )

    shutil.copytree(checkpoint_path("tiny-dit"), folder / "dit")
    (folder / "images").mkdir()
    for number in range(8):
        Image.effect_noise((8, 8), 60 + number).save(folder / "images" / f"{number}.png")
    shutil.copy(folder / "images" / "3.png", folder / "image.png")
    sets.write(make(own_spacecraft(), 4, seed=0), folder / "poses")
    shape = Backbone(image_size=16, patch=8, width=16, depth=1, heads=2)
    save(build_pose(shape), folder / "pose", {})

    processor = build_processor()
    hearing = build(0, processor=processor, width=16, encoder_layers=1, layers=1, heads=2)
    Checkpoint(hearing, processor.tokenizer, anatomy_of(hearing), processor=processor).save(
        folder / "ears"
    )
    write_clips(folder / "clips")

    shutil.copytree(ROOT / "recipes", folder / "recipes")
    (folder / "short.yaml").write_text(
        "name: Short\nstages:\n  small:\n    quantize: path/to/model\n    check: false\n"
        "  quality:\n    evaluate: ${small}\n    text: test.txt\n"
    )
    return folder


def write_clips(folder: Path) -> None:
    """Two recordings with what people said of them, and questions about them."""
    import numpy as np

    from postlude.runs.audio import write_wav
    from postlude.zoo.speech_answers import SCORES

    (folder / "wav").mkdir(parents=True)
    labels, questions = [], []
    for number in range(2):
        sound = np.random.default_rng(number).normal(size=9600) * 0.05
        write_wav(folder / "wav" / f"{number}.wav", sound.astype("float32"))
        scores = {one.column: 3 + number for one in SCORES}
        words = {
            "Speed": 3,
            "Feeling of voice": "clear",
            "Noise Description": "hum noise 0.1-0.3s",
            "Distortion description": "not distorted",
            "Unnatural pause": "very smooth",
            "Natural language description": "long",
        }
        labels.append({"id": str(number), **scores, **words})
        questions.append({"audio": f"wav/{number}.wav", "prompt": "Noise?", "completion": "3"})
    for name, rows_ in (("labels", labels), ("calibration", questions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_))


@pytest.fixture
def work(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = Path(shutil.copytree(prepared, tmp_path / "work"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return folder


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.run(words)
    said = capsys.readouterr()
    assert code == 0, f"postlude {shlex.join(words)}\n{said.out}\n{said.err}"


def blocks(*starts: str) -> Callable[[list[str]], bool]:
    return lambda words: " ".join(words).startswith(starts)


LANGUAGE = ("inspect", "quantize path", "evaluate small", "tune", "evaluate tuned", "attribute")
DIFFUSION = ("quantize dit/", "sample", "evaluate samples")
RECIPES = ("run",)


@pytest.mark.filterwarnings("ignore:.*copy keyword:DeprecationWarning")
@pytest.mark.parametrize(
    "starts",
    [
        pytest.param(LANGUAGE, id="language"),
        pytest.param(DIFFUSION, id="diffusion"),
        # Its stages have fresh processes read what they wrote.
        pytest.param(RECIPES, id="recipes", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_commands_of_fenced_blocks(
    work: Path, starts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for words in filter(blocks(*starts), commands(README)):
        run(cheaper(words), capsys)


def test_no_command_of_a_fenced_block_is_left_out() -> None:
    for words in commands(README):
        known = [starts for starts in (LANGUAGE, DIFFUSION, RECIPES) if blocks(*starts)(words)]
        assert len(known) == 1, f"postlude {' '.join(words)}: say with which others it is run"


def test_every_row_of_the_table_is_known() -> None:
    assert rows()
    assert [one for one in rows() if one not in TABLE] == [], "say in TABLE what a test runs for it"
    assert [one for one in TABLE if one not in rows()] == [], "not in the README"


def table_commands(slow: bool) -> list[list[str]]:
    return [
        shlex.split(line)
        for row, lines in TABLE.items()
        for line in lines
        if (row in SLOW_ROWS) == slow
    ]


@pytest.fixture
def made(work: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """With what rows of the table take from others."""
    for line in (
        "quantize path/to/model --method rtn --bits w4a4kv4 --no-check -o small",
        "quantize dit --method rtn --bits w4a16 --no-check -o dit4",
        "tune path/to/model data.jsonl --steps 1 --max-length 24 -o tuned",
    ):
        run(line.split(), capsys)
    return work


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:.*copy keyword:DeprecationWarning")
def test_commands_of_the_table(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in table_commands(slow=False):
        run(cheaper(words), capsys)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore:.*copy keyword:DeprecationWarning")
@pytest.mark.parametrize("words", table_commands(slow=True), ids=lambda words: " ".join(words[:2]))
def test_commands_of_the_table_that_take_longer(
    made: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(cheaper(words), capsys)


def test_python_of_the_readme(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "quantize path/to/model --method offq --calibration text.txt --length 24 --no-check -o small"
    run(line.split(), capsys)
    for number, text in enumerate(fenced(README, "python")):
        names: dict[str, Any] = {}
        code = text.replace('small.save("small/")', 'small.save("again/")')
        exec(compile(code, f"python block {number} of the README", "exec"), names)
    capsys.readouterr()
    assert (work / "again" / "model.safetensors").is_file()


def test_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {
        words[1]
        for page in PAGES
        for text in fenced(page.read_text(encoding="utf-8"), "", "sh", "bash")
        for line in text.splitlines()
        if line.startswith("make ")
        if (words := shlex.split(line, comments=True))[:1] == ["make"]
    }
    assert {"demo", "test", "check"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_can_be_parsed(page: Path) -> None:
    """Names of commands and options, and their types; nothing is run."""
    for words in commands(page.read_text(encoding="utf-8")):
        given = [word for word in words if word != "..."]
        given = [word for at, word in enumerate(given) if word != "--set" or at + 1 < len(given)]
        if not given:  # `postlude ...`, whatever the command
            continue
        command, left = cli._command(), given
        context = None
        while True:
            context = command.make_context(
                command.name, list(left), parent=context, resilient_parsing=False
            )
            inside = (
                [*context._protected_args, *context.args] if hasattr(command, "commands") else []
            )
            if not inside:
                break
            _, command, left = command.resolve_command(context, inside)
