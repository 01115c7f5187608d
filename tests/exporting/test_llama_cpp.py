"""The same text and the same losses from llama.cpp itself.

Needs an interpreter with the package xllamacpp (prebuilt llama.cpp), in an environment of its own::

    python -m venv llama && llama/bin/pip install xllamacpp
    POSTLUDE_LLAMA_PYTHON=llama/bin/python pytest -m slow tests/exporting/test_llama_cpp.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import postlude as pl
from postlude.exporting.gguf import GGUF
from postlude.quantization.rtn import RTN

SCRIPT = Path(__file__).with_name("llama_cpp.py")
PROMPTS = {
    "stories260k": "Once upon a time, there was a little",
    "zoo:tiny-lm": "Return the string object that",
}
TEXTS = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her dog Max.",
    "Tom and Anna were friends. One day they went to the 3 caf\u00e9s near the river, and it wasn't raining at all!",
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def llama() -> str:
    default = Path(__file__).resolve().parents[3] / "env" / "llama" / "bin" / "python"
    python = os.environ.get("POSTLUDE_LLAMA_PYTHON", str(default))
    if not Path(python).exists():
        pytest.skip(f"no interpreter with llama.cpp at {python} (POSTLUDE_LLAMA_PYTHON)")
    return python


def run(python: str, file: Path, **asked: Any) -> dict[str, Any]:
    done = subprocess.run(
        [python, str(SCRIPT), str(file)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("model", ["stories260k", "zoo:tiny-lm"])
@pytest.mark.parametrize(
    ("bits", "group"), [(16, "channel"), (8, 32), (4, 32)], ids=["float", "w8", "w4"]
)
def test_text_and_losses(
    llama: str, tmp_path: Path, request: pytest.FixtureRequest, model: str, bits: int, group: Any
) -> None:
    source = request.getfixturevalue("stories_dir") if model == "stories260k" else model
    prompt = PROMPTS[model]
    # The arithmetic of llama.cpp is in fp32 too.
    small = pl.load(source, dtype="float32")
    if bits < 16:
        small = pl.quantize(small, RTN(weights=bits, activations=16, kv=16, group=group))
    file = tmp_path / "model.gguf"
    # stories260k has a layer of 172 inputs, which blocks of 32 do not hold.
    settings = GGUF(requantize="f32") if model == "stories260k" and bits < 16 else GGUF()
    pl.export(small, settings, file, check=False)

    sequences = [small.tokenizer(text)["input_ids"] for text in TEXTS]
    vocabulary = small.model.config.vocab_size
    found = run(llama, file, prompt=prompt, tokens=sequences, vocabulary=vocabulary)
    assert found["prompt_tokens"] == len(small.tokenizer(prompt)["input_ids"])
    ours = pl.generate(small, prompt, max_new_tokens=32, kernel="simulate").text
    # llama.cpp rounds activations of quantized layers to 8 bits, so near ties may go either way late in a text.
    there, here = found["text"].strip(), ours.strip()
    length = len(here) if bits == 16 else 20
    assert there[:length] == here[:length], (there, here)
    for tokens, loss in zip(sequences, found["losses"], strict=True):
        batch = torch.tensor([tokens])
        with torch.inference_mode():
            logits = small.model(batch, use_cache=False).logits.float()
        expected = torch.nn.functional.cross_entropy(logits[0, :-1], batch[0, 1:])
        # Perplexity within 1 %.
        assert abs(loss - float(expected)) < 0.01, (loss, float(expected))


@pytest.mark.parametrize(("bits", "type"), [(3, "q3_k"), (6, "q6_k")])
def test_large_blocks(llama: str, tmp_path: Path, bits: int, type: str) -> None:
    small = pl.load("zoo:tiny-lm", dtype="float32")
    small = pl.quantize(small, RTN(weights=bits, activations=16, kv=16))
    report = pl.export(small, GGUF(), tmp_path / "model.gguf", check=False)
    assert report["types"] == {type: 35}
    tokens = small.tokenizer(PROMPTS["zoo:tiny-lm"] + TEXTS[1])["input_ids"]
    found = run(llama, tmp_path / "model.gguf", prompt="a", tokens=[tokens], vocabulary=2048)
    batch = torch.tensor([tokens])
    with torch.inference_mode():
        logits = small.model(batch, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], batch[0, 1:])
    # One scale for 256 activations in llama.cpp, and this model has activations that stand far out.
    assert abs(found["losses"][0] - float(expected)) < 0.05


@pytest.mark.parametrize("model", ["stories260k", "zoo:tiny-lm"])
def test_tokens(llama: str, tmp_path: Path, request: pytest.FixtureRequest, model: str) -> None:
    source = request.getfixturevalue("stories_dir") if model == "stories260k" else model
    opened = pl.load(source)
    file = tmp_path / "model.gguf"
    pl.export(opened, GGUF(), file, check=False)
    script = (
        "import sys, json, xllamacpp as x; p = x.CommonParams(); p.model.path = sys.argv[1]; p.n_ctx = 64; "
        "p.warmup = False; s = x.Server(p); "
        "print(json.dumps([s.handle_completions({'prompt': t, 'n_predict': 1, 'temperature': 0})['usage']"
        "['prompt_tokens'] for t in json.load(sys.stdin)]))"
    )
    texts = [
        "a",
        "  two  spaces",
        "tab\tand\nline\n\n",
        "don't 12345 x=3;",
        "na\u00efve \u65e5\u672c \U0001f600",
        "A.B c",
    ]
    done = subprocess.run(
        [llama, "-c", script, str(file)], input=json.dumps(texts), capture_output=True, text=True, check=True
    )  # fmt: skip
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts == [len(opened.tokenizer(text)["input_ids"]) for text in texts]
