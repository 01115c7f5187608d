from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

TEXT = (
    "The night was calm, and the small boat went on along the shore. Nobody spoke for a while. "
    "Then a bird called from the reeds, and another answered it from the far side of the water. "
)


@functools.cache
def _freeze() -> None:
    """Take what has been imported out of garbage collection, which walks through half a million objects otherwise."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    gc.freeze()


def pytest_unconfigure() -> None:
    # Libraries count what is left of theirs when the interpreter ends, and print it.
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Tensors are tiny here, and threads that wait for a busy core cost ten times what they save.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is printed must not depend on the terminal that the tests run in.
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The real data; absent on most machines."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    directory = Path(os.environ.get("POSTLUDE_DATA", default))
    if not directory.is_dir():
        pytest.skip(f"no real data at {directory} (POSTLUDE_DATA)")
    return directory


@pytest.fixture(scope="session")
def stories_dir(data_dir: Path) -> Path:
    directory = data_dir / "stories260k"
    if not directory.is_dir():
        pytest.skip(f"no checkpoint at {directory}")
    return directory


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """Byte-level, 259 tokens: <unk> 0, <s> 1 (put before every text), </s> 2, the 256 bytes."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def plain_tokenizer() -> Any:
    """The same without anything put before a text."""
    return make_tokenizer(first="")


def make_tokenizer(first: str = "<s>") -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if first:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, vocabulary[first])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def tiny_model(model_type: str = "llama", seed: int = 0, **settings: Any) -> Any:
    """A random model of 2 blocks, width 32, 4 heads (2 for keys and values), context 64, fp32.

    Weights are larger than at a usual start, so that its predictions are far from uniform.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if model_type == "gpt2":
        sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    else:
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 44,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
        }
    tokens = {"vocab_size": 259, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    config = AutoConfig.for_model(model_type, **{**sizes, **tokens, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        # What starts at zero or one (biases, norms) would hide mistakes.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    _freeze()
    return model.eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    return tiny_model


@pytest.fixture(scope="session")
def make_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any
) -> Callable[..., Path]:
    """Write a tiny model with its tokenizer: ``make_checkpoint("qwen2", seed=1, **config)``."""

    def make(model_type: str = "llama", seed: int = 0, **settings: Any) -> Path:
        directory = tmp_path_factory.mktemp(f"tiny_{model_type}")
        tiny_model(model_type, seed, **settings).save_pretrained(directory)
        tiny_tokenizer.save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def tiny_llama_dir(make_checkpoint: Callable[..., Path]) -> Path:
    """Read only; take ``tiny_llama_copy`` to change it."""
    return make_checkpoint("llama")


@pytest.fixture
def tiny_llama_copy(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "tiny_llama"))


@pytest.fixture(scope="session")
def some_text() -> str:
    """About 900 characters, each a token of the tiny tokenizer."""
    return TEXT * 5


@pytest.fixture(scope="session")
def on_ranks() -> Iterator[Callable[..., dict[str, Any]]]:
    """Runs a command line on several ranks (``rank_server.py``) that have imported everything once for the session."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("rank_server.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert server.stdin is not None
    assert server.stdout is not None
    ready = server.stdout.readline()
    if not ready:
        server.communicate()
        pytest.fail("rank_server.py does not start; see the captured standard error")

    def run(arguments: list[str], size: int = 2, **job: Any) -> dict[str, Any]:
        server.stdin.write(json.dumps({"argv": arguments, "size": size, **job}) + "\n")
        server.stdin.flush()
        answer: dict[str, Any] = json.loads(server.stdout.readline())
        return answer

    yield run
    server.stdin.close()
    server.stdout.close()
    server.wait()
