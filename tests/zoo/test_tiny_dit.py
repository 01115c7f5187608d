from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from postlude.errors import DataError, MissingDependencyError, SettingsError, UnknownNameError
from postlude.zoo import checkpoint_path, digits_classifier, tiny_dit
from postlude.zoo import digits as digits_module
from postlude.zoo.noising import NOISINGS, denoising_loss, noising_of

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:.*copy keyword:DeprecationWarning")

PACKAGED = {"epsilon": "tiny-dit", "flow": "tiny-dit-flow"}


@pytest.fixture(scope="module")
def pictures() -> tuple[Tensor, Tensor]:
    """Twenty bright and dark images of two classes."""
    labels = torch.arange(20) % 2
    spread = 0.1 * torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return (labels * 2.0 - 1.0).view(-1, 1, 1, 1) * 0.8 + spread, labels


@pytest.fixture(scope="module", params=list(PACKAGED))
def packaged(request: Any) -> tuple[str, Any]:
    directory = checkpoint_path(PACKAGED[request.param])
    return request.param, diffusers.DiTTransformer2DModel.from_pretrained(
        directory / "transformer"
    ).eval()


def train(pictures: tuple[Tensor, Tensor], **settings: Any) -> Any:
    return tiny_dit.train_model(
        *pictures, **({"steps": 4, "width": 8, "layers": 1, "batch": 8} | settings)
    )


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("name", NOISINGS)
def test_training(pictures: tuple[Tensor, Tensor], name: str) -> None:
    losses: list[float] = []
    model = train(
        pictures, steps=60, rate=2e-2, batch=32, prediction=name,
        progress=lambda step, loss: losses.append(loss),
    )  # fmt: skip
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert model.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.num_embeddings == 11
    # The class is learned: the bright one comes out bright.
    drawn = tiny_dit.draw(model, noising_of(name).scheduler(), torch.tensor([0, 1] * 8), steps=6)
    assert drawn[1::2].mean() > drawn[::2].mean() + 0.5


def test_the_seed_decides_and_so_do_the_images(pictures: tuple[Tensor, Tensor]) -> None:
    images, labels = pictures
    one = train(pictures, seed=3)
    assert same(one, train(pictures, seed=3))
    assert not same(one, train(pictures, seed=4))
    some = train(pictures, seed=3, indices=[0, 5, 7])
    assert not same(one, some)
    assert same(
        some,
        tiny_dit.train_model(
            images[[0, 5, 7]], labels[[0, 5, 7]], steps=4, width=8, layers=1, batch=8, seed=3
        ),
    )
    before = torch.random.get_rng_state()
    train(pictures)
    assert torch.equal(before, torch.random.get_rng_state())


def test_other_images(pictures: tuple[Tensor, Tensor]) -> None:
    model = train((torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 2, 12, 3, 4])), steps=2)
    assert model.config.in_channels == 3 and model.config.sample_size == 4
    assert model.config.num_embeds_ada_norm == 13


def test_a_new_model_predicts_nothing() -> None:
    model = tiny_dit.build(width=8, layers=2)
    output = model(
        torch.randn(2, 1, 8, 8),
        timestep=torch.tensor([5.0, 900.0]),
        class_labels=torch.tensor([1, 10]),
    )
    assert torch.equal(output.sample, torch.zeros(2, 1, 8, 8))


def test_timesteps_are_those_of_the_schedulers() -> None:
    sigma = torch.tensor([0.03, 0.0431, 0.5, 3.0, 29.9], dtype=torch.float64)
    scheduler = noising_of("epsilon").scheduler()
    kept = scheduler.alphas_cumprod.double()
    table = (((1 - kept) / kept) ** 0.5).log().numpy()
    expected = [scheduler._sigma_to_t(np.asarray(one), table) for one in sigma.numpy()]
    found = noising_of("epsilon").timesteps(sigma)
    assert found.tolist() == pytest.approx([float(one) for one in expected], abs=2e-2)
    scheduler.set_timesteps(10)
    visited = noising_of("epsilon").timesteps(scheduler.sigmas[:-1])
    assert torch.allclose(visited, scheduler.timesteps, atol=2e-2)
    flow = noising_of("flow").scheduler()
    flow.set_timesteps(10)
    assert torch.allclose(noising_of("flow").timesteps(flow.sigmas[:-1]), flow.timesteps)


def test_epsilon_is_the_variance_preserving_process(pictures: tuple[Tensor, Tensor]) -> None:
    """Noised by sigma and scaled is what a DDPM scheduler makes of it at the timestep."""
    images, noise = pictures[0][:3], torch.randn(3, 1, 8, 8)
    timesteps = torch.tensor([0, 400, 999])
    scheduler = diffusers.DDPMScheduler.from_config(noising_of("epsilon").scheduler().config)
    kept = scheduler.alphas_cumprod[timesteps]
    inputs, target = noising_of("epsilon").noised(images, noise, ((1 - kept) / kept).sqrt())
    assert torch.allclose(inputs, scheduler.add_noise(images, noise, timesteps), atol=1e-5)
    assert torch.equal(target, noise)


def test_flow_is_the_straight_line(pictures: tuple[Tensor, Tensor]) -> None:
    images, noise = pictures[0][:2], torch.randn(2, 1, 8, 8)
    inputs, target = noising_of("flow").noised(images, noise, torch.tensor([0.25, 1.0]))
    assert torch.allclose(inputs[0], 0.75 * images[0] + 0.25 * noise[0])
    assert torch.equal(inputs[1], noise[1])
    assert torch.allclose(target, noise - images)


@pytest.mark.parametrize("name", NOISINGS)
def test_levels_of_training(name: str) -> None:
    drawn = noising_of(name).draw(4000, torch.Generator().manual_seed(0))
    low, high = {"epsilon": (0.0299999, 30.0), "flow": (0.0, 1.0)}[name]
    assert low <= float(drawn.min()) and float(drawn.max()) <= high
    middle = {"epsilon": np.exp(-0.4), "flow": 0.5}[name]
    assert float(drawn.median()) == pytest.approx(middle, rel=0.1)


def test_denoising_loss_is_of_each_example() -> None:
    class Half:
        def __call__(self, noisy: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
            assert timestep.shape == class_labels.shape
            return type("Output", (), {"sample": 0.5 * noise})

    noise = torch.randn(3, 1, 8, 8)
    found = denoising_loss(Half(), torch.zeros(3, 1, 8, 8), torch.zeros(3), noise, torch.ones(3))
    assert torch.allclose(found, 0.25 * noise.square().flatten(1).mean(1))


def test_the_packaged_models_denoise_digits(packaged: tuple[str, Any]) -> None:
    pytest.importorskip("sklearn")
    from postlude.zoo.digits import digits

    name, model = packaged
    images, labels = (one[:200] for one in digits())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator)
    sigma = noising_of(name).draw(200, generator)
    with torch.no_grad():
        loss = denoising_loss(model, images, labels, noise, sigma, prediction=name).mean()
        wrong = denoising_loss(
            model, images, (labels + 3) % 10, noise, sigma, prediction=name
        ).mean()
    assert float(loss) < {"epsilon": 0.2, "flow": 0.4}[name]
    assert float(wrong) > 1.05 * float(loss)


def test_check_measures_the_packaged_models(packaged: tuple[str, Any]) -> None:
    name, _ = packaged
    found = tiny_dit.check(checkpoint_path(PACKAGED[name]), count=200, steps=8, seeds=(0,))
    assert found["prediction"] == name and found["parameters"] == 296_900
    assert found["class_accuracy"][0] > 0.8
    assert found["frechet_pixels"][0] < 3.0
    assert found["real"]["frechet_pixels"] == pytest.approx(0.71, abs=0.01)


def test_packaged_files() -> None:
    for name in PACKAGED.values():
        directory = checkpoint_path(name)
        files = [file for file in directory.rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) < 2_000_000
        assert {file.suffix for file in files} == {".json", ".md", ".safetensors"}
        card = (directory / "README.md").read_text(encoding="utf-8")
        assert "{" not in card and f"# {name}\n" in card
        assert json.loads((directory / "training.json").read_text())["steps"] == 3500
    assert digits_classifier.FILE.stat().st_size < 500_000


def test_train_writes_a_checkpoint(
    tmp_path: Path, pictures: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(tiny_dit, "digits", lambda: pictures)
    check = tiny_dit.check
    monkeypatch.setattr(tiny_dit, "check", lambda out: check(out, count=20, steps=2))
    out = tmp_path / "dit"
    words = ["train", "-o", str(out), "--steps", "2", "--prediction", "flow"]
    assert tiny_dit.main(words) == 0
    assert "class_accuracy" in capsys.readouterr().out
    again = diffusers.DiTTransformer2DModel.from_pretrained(out / "transformer")
    assert same(again, tiny_dit.train_model(*pictures, steps=2, prediction="flow"))
    assert "tiny-dit-flow" in (out / "README.md").read_text()
    assert tiny_dit.main(words) == 2
    assert "holds a checkpoint; give --overwrite" in capsys.readouterr().err
    assert tiny_dit.main(["check", str(tmp_path)]) == 2
    assert "holds no scheduler/scheduler_config.json" in capsys.readouterr().err


def test_the_classifier_learns() -> None:
    pytest.importorskip("sklearn")
    from postlude.zoo.digits import digits

    images, labels = digits()
    first, rest = digits_classifier.split(len(images))
    assert len(first) == 1437 and not set(first.tolist()) & set(rest.tolist())
    model = digits_classifier.train(images[first], labels[first], epochs=4)
    assert float((model(images[rest]).argmax(1) == labels[rest]).float().mean()) > 0.5


@pytest.mark.parametrize(
    ("module", "call"),
    [("sklearn.datasets", lambda: digits_module.digits()), ("diffusers", lambda: tiny_dit.build(width=8))],
)  # fmt: skip
def test_missing_libraries(module: str, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'postlude\[diffusion\]'"):
        call()


def test_bad_input(pictures: tuple[Tensor, Tensor]) -> None:
    images, labels = pictures
    with pytest.raises(SettingsError, match="steps is 0 and batch 8; expected 1 or more"):
        train(pictures, steps=0)
    with pytest.raises(DataError, match=r"20 of images \[20, 1, 8, 8\] with 3 labels"):
        train((images, labels[:3]))
    with pytest.raises(DataError, match="0 of images"):
        train(pictures, indices=[])
    with pytest.raises(
        UnknownNameError, match=r"No prediction named 'epsilom'. Did you mean 'epsilon'"
    ):
        train(pictures, prediction="epsilom")
    with pytest.raises(SettingsError, match="width is 10 for 4 heads; expected a multiple"):
        train(pictures, width=10)
