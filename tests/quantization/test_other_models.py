"""Quantizing denoisers and vision models from end to end."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import postlude as pl
from postlude.cli import run
from postlude.errors import DataError, OutputExistsError
from postlude.numerics.formats import Integer
from postlude.numerics.moments import SecondMoment
from postlude.numerics.rounding import gptq
from postlude.numerics.schemes import Granularity, Scheme
from postlude.quantization.gptq import GPTQ
from postlude.quantization.rtn import RTN
from postlude.quantization.smoothquant import SmoothQuant
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import anatomy_of
from postlude.surgery.layers import QuantizedLinear

from ..surgery.other_models import OTHER_MODELS, build_other

# diffusers makes arrays of tensors in a way that numpy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.*copy keyword:DeprecationWarning")


def checkpoint(name: str, **more: Any) -> Checkpoint:
    model = build_other(name)
    return Checkpoint(model, None, anatomy_of(model), **more)


def outputs(one: Checkpoint) -> torch.Tensor:
    with torch.no_grad():
        return one.model(**one.anatomy.example())[0]


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "dit"
    checkpoint("dit", scheduler=diffusers.EulerDiscreteScheduler()).save(directory)
    return directory


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_eight_bits_are_close_and_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    original = checkpoint(name)
    small = pl.quantize(original, RTN(weights=8, activations=8))
    exact = outputs(original)
    assert (outputs(small) - exact).norm() < 0.03 * exact.norm()
    again = pl.load(small.save(tmp_path / "small"))
    assert torch.equal(outputs(again), outputs(small))
    for path in again.anatomy.linears():
        assert isinstance(again.model.get_submodule(path), QuantizedLinear)
    for path in again.anatomy.kept():
        assert not isinstance(again.model.get_submodule(path), QuantizedLinear)


@pytest.mark.parametrize("name", ["dit", "vit"])
def test_bf16_stays_bf16(name: str, tmp_path: Path) -> None:
    original = checkpoint(name)
    original.model.to(torch.bfloat16)
    batches = [original.anatomy.example()]
    small = pl.quantize(original, GPTQ(), calibration=batches)
    assert {p.dtype for p in small.model.parameters()} == {torch.bfloat16}
    again = pl.load(small.save(tmp_path / "small"))
    batch = {
        key: value.bfloat16() if value.is_floating_point() else value
        for key, value in original.anatomy.example().items()
    }
    with torch.no_grad():
        assert torch.equal(again.model(**batch)[0], small.model(**batch)[0])


def test_gptq_against_its_function() -> None:
    """The first linear of a block, whose inputs no rounding has reached; then one that sees what was rounded."""
    original = checkpoint("dit")
    batches = [original.anatomy.example(rows=8, seed=seed) for seed in (1, 2)]
    small = pl.quantize(original, GPTQ(activations=16), calibration=batches)
    scheme = Scheme(Integer(4), Granularity.parse("channel"))
    cases = [("attn1.to_q", original), ("ff.net.2", small)]
    for path, source in cases:
        moment = SecondMoment(
            original.model.get_submodule(f"transformer_blocks.0.{path}").in_features
        )
        handle = source.model.get_submodule(
            f"transformer_blocks.0.{path}"
        ).register_forward_pre_hook(lambda _, args, moment=moment: moment.update(args[0]))
        for batch in batches:
            with torch.no_grad():
                source.model(**batch)
        handle.remove()
        weight = original.model.get_submodule(f"transformer_blocks.0.{path}").weight.data
        expected = gptq(
            weight, 2 * moment.value(), scheme, damping=0.01, act_order=False, clip=False
        )
        layer = small.model.get_submodule(f"transformer_blocks.0.{path}")
        assert torch.equal(layer.dense_weight(), expected.decode()), path


def test_weight_error_by_hand() -> None:
    original = checkpoint("vit")
    small = pl.quantize(original, RTN())
    exact = [original.model.get_submodule(path).weight.data for path in original.anatomy.linears()]
    rounded = [
        small.model.get_submodule(path).dense_weight() for path in original.anatomy.linears()
    ]
    error = sum(float((a - b).double().square().sum()) for a, b in zip(exact, rounded, strict=True))
    total = sum(float(a.double().square().sum()) for a in exact)
    assert small.made_by()["weight_error"] == pytest.approx((error / total) ** 0.5, rel=1e-6)


def test_smoothquant_helps_where_channels_differ() -> None:
    """adaLN that scales one channel by hundreds: exactly what smoothing moves into weights."""
    original = checkpoint("dit")
    for block in original.anatomy.blocks:
        modulation = block.site("qkv_in").modulation
        assert modulation is not None
        modulation.scale.bias(original.model)[5] = 300.0
        modulation.scale.weight(original.model)[5] = 0
    batches = [original.anatomy.example(rows=8)]
    exact = outputs(original)
    plain = outputs(pl.quantize(original, RTN(weights=8, activations=8)))
    smooth = outputs(pl.quantize(original, SmoothQuant(), calibration=batches))
    assert (smooth - exact).norm() < 0.6 * (plain - exact).norm()


def test_smoothquant_without_a_norm_that_takes_scales() -> None:
    one = checkpoint("pixart")
    with pytest.raises(pl.errors.SettingsError, match=r"no norm of this pixart model .* svdquant"):
        pl.quantize(one, SmoothQuant(), calibration=[one.anatomy.example()])


# From the command line


def test_the_command(dit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "small"
    words = [
        "quantize",
        str(dit),
        "--method",
        "rtn",
        "--bits",
        "w4a4",
        "-o",
        str(out),
        "--no-check",
        "--json",
    ]
    assert run(words) == 0
    said = json.loads(capsys.readouterr().out)
    file = out / "transformer" / "diffusion_pytorch_model.safetensors"
    assert said["bytes"] == file.stat().st_size
    assert 0 < said["weight_error"] < 0.3
    assert 4 < said["bits_per_weight"] < 5.1
    assert said["settings"]["kv"] == 16
    assert sorted(path.name for path in out.iterdir()) == [
        "model_index.json",
        "scheduler",
        "transformer",
    ]
    assert run(words) == 2  # it exists
    assert run([*words, "--overwrite"]) == 0
    assert (
        run(["quantize", str(dit), "--method", "offq", "-o", str(tmp_path / "no"), "--json"]) == 2
    )
    assert "offq quantizes language models" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_read_by_a_fresh_process(dit: Path, tmp_path: Path) -> None:
    small = pl.quantize(dit, GPTQ(), samples=6, out=tmp_path / "small", check=True)
    assert small.reload is not None
    assert small.reload.max_difference == 0
    again = pl.load(tmp_path / "small")
    assert torch.equal(outputs(again), outputs(small))


def hashes(directory: Path) -> dict[str, str]:
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_killed_and_resumed(dit: Path, tmp_path: Path) -> None:
    """Killed after the first block; the second run samples nothing again and writes the same files."""
    script = """
        import os, signal, sys
        import torch
        torch.set_num_threads(1)
        import postlude as pl
        from postlude.quantization.gptq import GPTQ
        from postlude.runs.directory import RunDirectory
        unit = RunDirectory.unit
        def killing(self, name, compute):
            print(name, name in self.finished(), flush=True)
            if name == sys.argv[3]:
                os.kill(os.getpid(), signal.SIGKILL)
            return unit(self, name, compute)
        RunDirectory.unit = killing
        pl.quantize(sys.argv[1], GPTQ(), samples=6, out=sys.argv[2])
    """

    def start(out: Path, kill: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            textwrap.dedent(script),
            str(dit),
            str(out),
            kill,
        ]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    out = tmp_path / "out"
    assert start(out, "block-0001").returncode == -9
    assert not out.exists()
    done = start(out, "none")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "calibration", "True", "statistics", "True", "block-0000", "True", "block-0001", "False",
    ]  # fmt: skip
    whole = pl.quantize(dit, GPTQ(), samples=6, out=tmp_path / "whole")
    assert whole.path is not None
    assert hashes(out) == hashes(whole.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


# Calibration data


def test_calibration_of_a_denoiser(dit: Path, tmp_path: Path) -> None:
    made = [
        pl.quantize(dit, GPTQ(), samples=6, timesteps=spread) for spread in ("uniform", "skewed")
    ]
    assert not torch.equal(outputs(made[0]), outputs(made[1]))
    batch = made[0].anatomy.example(rows=40)
    save_file(batch, tmp_path / "inputs.safetensors")
    from_file = pl.quantize(dit, GPTQ(), calibration=tmp_path / "inputs.safetensors")
    given = pl.quantize(
        dit,
        GPTQ(),
        calibration=[{k: v[rows] for k, v in batch.items()} for rows in (slice(32), slice(32, 40))],
    )
    assert torch.equal(outputs(from_file), outputs(given))
    save_file({"pixels": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        DataError,
        match=r"holds pixels; expected arguments of a DiTTransformer2DModel: hidden_states",
    ):
        pl.quantize(dit, GPTQ(), calibration=tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="is no calibration data of a denoiser"):
        pl.quantize(dit, GPTQ(), calibration=tmp_path)
    with pytest.raises(
        DataError, match=r"PixArtTransformer2DModel draws what a text describes.*FILE\.safetensors"
    ):
        pl.quantize(checkpoint("pixart"), GPTQ())


def test_calibration_of_a_vision_model(tmp_path: Path) -> None:
    one = checkpoint("vit")
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    values = torch.randint(
        0, 256, (6, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    for index, picture in enumerate(values):
        place = folder / "more" if index % 2 else folder
        Image.fromarray(picture.numpy()).save(place / f"{index}.png")
    made = pl.quantize(one, GPTQ(), calibration=folder, samples=6)
    order = [0, 2, 4, 1, 3, 5]
    pixels = values[order][:, None].float() / 127.5 - 1
    assert torch.equal(
        outputs(made), outputs(pl.quantize(one, GPTQ(), calibration=[{"pixel_values": pixels}]))
    )
    with pytest.raises(DataError, match=r"holds 6 images.* and 7 are asked for"):
        pl.quantize(one, GPTQ(), calibration=folder, samples=7)
    with pytest.raises(DataError, match="is not a folder"):
        pl.quantize(one, GPTQ(), calibration=tmp_path / "none")
    with pytest.raises(DataError, match="gptq learns from calibration images"):
        pl.quantize(one, GPTQ())
    (folder / "7.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"7\.png cannot be read as an image"):
        pl.quantize(one, GPTQ(), calibration=folder, samples=7)


def test_a_language_model_takes_no_batches() -> None:
    with pytest.raises(DataError, match="calibrated on text"):
        pl.quantize(
            "zoo:tiny-lm", GPTQ(), calibration=[{"input_ids": torch.zeros(1, 4, dtype=torch.long)}]
        )


def test_an_output_that_is_something_else(dit: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"holds no config\.json or model_index\.json"):
        pl.quantize(dit, RTN(), out=tmp_path / "notes", overwrite=True)
