"""Images as data: folders and files of numbers, and every refusal by its message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from postlude.attribution.build import build
from postlude.attribution.d_trak import DTRAK
from postlude.attribution.images import Images
from postlude.errors import ArchitectureError, DataError, StoreError
from postlude.runs.checkpoint import Checkpoint

from .small import collection, denoiser, pictures

SETTINGS = collection(timesteps=2)


@pytest.fixture(scope="module")
def given() -> Checkpoint:
    return denoiser()


def folder(path: Path, images: Tensor, labels: Tensor | None) -> Path:
    """PNG files, and their labels in the opposite order of their names."""
    path.mkdir()
    codes = ((images + 1) * 127.5).round().to(torch.uint8)
    for number, image in enumerate(codes):
        array = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
        Image.fromarray(array).save(path / f"{number:03d}.png")
    if labels is not None:
        lines = [
            {"file": f"{number:03d}.png", "label": int(labels[number])}
            for number in reversed(range(len(images)))
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (path / "labels.jsonl").write_text(text)
    return path


def test_a_folder_and_files_of_numbers_hold_the_same(tmp_path: Path) -> None:
    images, labels = pictures(5)
    codes = ((images + 1) * 127.5).round().to(torch.uint8)
    found = Images(folder(tmp_path / "images", images, labels))
    assert (len(found), found.size) == (5, (1, 8, 8))
    assert [found.id(n) for n in range(2)] == ["004", "003"]
    assert found.label(0) == int(labels[4]) and found.text(0) == f"label {int(labels[4])}, 004.png"
    torch.testing.assert_close(found.pixels(0), codes[4].float() / 127.5 - 1)
    numpy.savez(tmp_path / "some.npz", images=codes[:, 0].numpy(), labels=labels.numpy())
    save_file({"images": codes, "labels": labels}, tmp_path / "some.safetensors")
    hashes = set()
    for other in (
        Images(tmp_path / "some.npz"),
        Images(tmp_path / "some.safetensors"),
        Images((codes.float() / 127.5 - 1, labels)),
    ):
        assert len(other) == 5 and other.label(4) == int(labels[4]) and other.id(4) == 4
        assert torch.equal(other.pixels(4), found.pixels(0))
        hashes.add(other.hash)
    assert len(hashes) == 1
    changed = codes.clone()
    changed[0, 0, 0, 0] ^= 1
    assert Images((changed, labels)).hash not in hashes
    plain = Images(folder(tmp_path / "plain", images, None))
    assert (plain.label(0), plain.id(0), plain.text(0)) == (None, "000", "000.png")
    coloured = Images(folder(tmp_path / "colours", pictures(2, channels=3)[0], None))
    assert coloured.size == (3, 8, 8) and coloured.picture(0) is not None
    assert Images((torch.randn(2, 4, 8, 8), None)).picture(0) is None


def test_an_index_of_a_folder_is_asked_by_images(given: Checkpoint, tmp_path: Path) -> None:
    images, labels = pictures(12)
    data = folder(tmp_path / "images", images, labels)
    index, report = build(given, data, DTRAK(side=4), tmp_path / "index", collection=SETTINGS)
    assert (report["examples"], report["tokens"], report["truncated"]) == (12, 12 * 16, 0)
    answer = index.query(str(data / "003.png"), top=2, checkpoint=given)
    assert answer.text == f"label {int(labels[3])}, 003.png" and len(answer.results) == 2
    assert "image" not in json.dumps(answer.to_dict())
    several = index.query(data, top=1, checkpoint=given)
    assert [one.results[0].number for one in several] == list(range(12))
    weights = index.learn_weights(data, checkpoint=given)
    assert len(weights.layers) == len(index.layers)
    assert index.query(data, top=1, weights=weights, checkpoint=given)[0].unit
    (data / "000.png").unlink()
    with pytest.raises((DataError, StoreError), match=r"names no image|has changed"):
        type(index)(index.path).records()


def test_images_that_do_not_fit_the_model(given: Checkpoint, tmp_path: Path) -> None:
    def refused(images: Any, message: str) -> None:
        with pytest.raises(DataError, match=message):
            build(given, images, DTRAK(), tmp_path / "index")

    labels = torch.zeros(2, dtype=torch.int64)
    refused(
        (torch.zeros(2, 1, 16, 8), labels),
        "images are 1 x 16 x 8, and the model takes 1 x 8 x 8 .*Scale them",
    )
    refused((torch.zeros(2, 3, 8, 8), labels), "images are 3 x 8 x 8, .*Make them grey")
    refused((torch.zeros(2, 4, 8, 8), labels), "encode them with its autoencoder")
    refused(
        (torch.zeros(2, 1, 8, 8), labels + 10), "image 0 has the label 10; the model knows 0 to 9"
    )
    index, _ = build(given, pictures(4), DTRAK(side=4), tmp_path / "good", collection=SETTINGS)
    with pytest.raises(DataError, match="images are 1 x 4 x 4, and the model takes 1 x 8 x 8"):
        index.query(torch.zeros(1, 1, 4, 4), checkpoint=given)


def test_data_that_cannot_be_read(tmp_path: Path) -> None:
    def refused(source: Any, message: str) -> None:
        with pytest.raises(DataError, match=message):
            Images(source)

    refused(tmp_path / "none", "There is no .*none; expected a folder of .png files")
    refused(tmp_path, "holds no .png file")
    (tmp_path / "some.txt").write_text("words")
    refused(tmp_path / "some.txt", "holds no images that can be read here")
    (tmp_path / "bad.npz").write_bytes(b"PK no archive")
    refused(tmp_path / "bad.npz", "bad.npz cannot be read")
    numpy.savez(tmp_path / "other.npz", pixels=numpy.zeros((2, 8, 8)))
    refused(tmp_path / "other.npz", r"holds \['pixels'\]; expected images")
    numpy.savez(tmp_path / "pickled.npz", images=numpy.array([object()]))
    refused(tmp_path / "pickled.npz", "cannot be read")
    refused((torch.zeros(2, 8), None), r"images are \(2, 8\); expected \[n, channels")
    refused(
        (torch.zeros(2, 1, 8, 8), torch.zeros(3).long()), r"labels are \(3,\) .*; expected 2 whole"
    )
    refused((torch.zeros(2, 1, 8, 8), torch.zeros(2)), "expected 2 whole numbers")
    refused(
        (torch.full((1, 1, 8, 8), float("nan")), None), "image 0 holds numbers that are not finite"
    )


def test_folders_that_contradict_themselves(tmp_path: Path) -> None:
    images, labels = pictures(3)
    data = folder(tmp_path / "images", images, labels)
    listed = data / "labels.jsonl"
    text = listed.read_text()

    def refused(content: str, message: str) -> None:
        listed.write_text(content)
        with pytest.raises(DataError, match=message):
            Images(data)

    refused(text.split("\n")[0] + "\n", "does not list 2 of 3 files, for example 000.png")
    refused(text.replace("001.png", "009.png"), "line 2 names no image: .* got '009.png'")
    refused("{", "line 1 is not valid JSON")
    refused("", "lists no image")
    refused(text.replace('"label": ', '"label": "a", "x": '), "has the label 'a'; expected a class")
    refused(text.replace('"file"', '"id": "a", "file"'), "gives 'a' to two images")
    refused(text.replace('"file"', '"id": [1], "file"'), r"has the id \[1\]; expected a string")
    refused(text.replace("001.png", "../images/001.png"), "line 2 names no image")
    listed.write_text(text)
    Image.new("L", (4, 8)).save(data / "001.png")
    refused(
        text, "001.png is 1 x 8 x 4 and the first image is 1 x 8 x 8: expected images of one size"
    )
    Image.new("RGBA", (8, 8)).save(data / "001.png")
    refused(text, "001.png has the mode RGBA; expected grey or RGB")
    (data / "001.png").write_bytes(b"no picture")
    refused(text, "001.png cannot be read as an image")


def test_models_without_data_here() -> None:
    from postlude.attribution.data import open_data

    with pytest.raises(
        ArchitectureError, match="works on language and diffusion models; this is a vision"
    ):
        open_data("images", "vision")
