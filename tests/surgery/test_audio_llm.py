from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from postlude.errors import ArchitectureError
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.listening import Listener
from postlude.surgery.anatomy import AudioAnatomy, anatomy_of, supported_model_types
from postlude.surgery.rewrite import fold_norms, rotate_residual
from postlude.surgery.shared_encoder import encode_once

from .audio_models import KINDS, make, recording


@pytest.fixture(params=KINDS)
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    model, processor = make(request.param)
    return Checkpoint(model, processor.tokenizer, anatomy_of(model), processor=processor)


def inputs(checkpoint: Checkpoint) -> dict[str, Tensor]:
    listener = Listener(checkpoint)
    heard = [listener.features(recording(0.5 + 0.2 * seed, seed)) for seed in (0, 1)]
    return listener.prepare([heard[0], heard[1], heard[0]], ["Rate", "Rate the noise", "a"])


def test_known_types() -> None:
    assert supported_model_types("audio") == sorted(KINDS)


def test_rotating_the_stream_turns_what_the_projector_writes(checkpoint: Checkpoint) -> None:
    model, anatomy = checkpoint.model, checkpoint.language
    batch = inputs(checkpoint)
    rotation = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0]
    with torch.no_grad():
        before = model(**batch).logits
        undo = fold_norms(model, anatomy)
        undo.extend(rotate_residual(model, anatomy, rotation))
        turned = model(**batch).logits
        undo()
        again = model(**batch).logits
    attended = batch["attention_mask"].bool()
    assert (turned - before)[attended].abs().max() < 1e-4 * before[attended].abs().max()
    assert torch.equal(again, before)


def test_equal_recordings_are_encoded_once(checkpoint: Checkpoint) -> None:
    model, batch = checkpoint.model, inputs(checkpoint)
    anatomy: Any = checkpoint.anatomy
    rows: list[int] = []
    encoder = model.get_submodule(anatomy.encoder)
    encoder.conv1.register_forward_hook(lambda _, args, out: rows.append(len(out)))
    with torch.no_grad():
        expected = model(**batch).logits
        with encode_once(model, anatomy, torch.tensor([7, 2, 7])):
            found = model(**batch).logits
        with encode_once(model, anatomy, torch.tensor([0, 1, 2])):
            apart = model(**batch).logits
    assert rows == [3, 2, 3]
    assert torch.allclose(found, expected, atol=1e-5) and torch.equal(apart, expected)


def test_gradients_of_shared_recordings_add_up(checkpoint: Checkpoint) -> None:
    model, batch = checkpoint.model, inputs(checkpoint)
    anatomy: Any = checkpoint.anatomy
    weight = model.get_submodule(anatomy.encoder).conv1.weight
    weight.requires_grad_(True)
    (expected,) = torch.autograd.grad(model(**batch).logits.square().mean(), weight)
    with encode_once(model, anatomy, torch.tensor([0, 1, 0])):
        (found,) = torch.autograd.grad(model(**batch).logits.square().mean(), weight)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-6 * float(expected.abs().max()))


def test_another_decoder_is_refused(checkpoint: Checkpoint) -> None:
    checkpoint.model.config.text_config.model_type = "gpt2"
    with pytest.raises(ArchitectureError, match="a language model of type 'gpt2'; expected one of"):
        anatomy_of(checkpoint.model)


def test_the_anatomy_names_the_parts(checkpoint: Checkpoint) -> None:
    anatomy = checkpoint.anatomy
    assert isinstance(anatomy, AudioAnatomy) and anatomy.kind == "audio"
    assert next(iter(anatomy.residual_writers())).module == anatomy.projection
    assert checkpoint.model.get_submodule(anatomy.projection).out_features == anatomy.hidden_size
