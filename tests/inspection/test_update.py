from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from postlude.errors import SettingsError
from postlude.inspection.update import Update
from postlude.inspection.update_report import ABSOLUTE
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import anatomy_of

TYPES = ("llama", "gpt2")


def checkpoint(model: Any) -> Checkpoint:
    return Checkpoint(model, None, anatomy_of(model))


@pytest.fixture
def pair(make_model: Callable[..., Any]) -> Callable[..., tuple[Checkpoint, Checkpoint]]:
    """A base and a copy of it to change."""

    def make(model_type: str = "llama", **settings: Any) -> tuple[Checkpoint, Checkpoint]:
        model = make_model(model_type, **settings)
        return checkpoint(model), checkpoint(copy.deepcopy(model))

    return make


@pytest.mark.parametrize("model_type", TYPES)
def test_a_rank_one_spike(
    pair: Callable[..., tuple[Checkpoint, Checkpoint]], model_type: str
) -> None:
    base, tuned = pair(model_type)
    weight = tuned.anatomy.blocks[1].linear("down").weight(tuned.model)
    # Powers of two in a corner of zeros: the difference is exact in fp32.
    before = base.anatomy.blocks[1].linear("down").weight(base.model)
    before.copy_((before * 64).round() / 64)
    weight.copy_(before)
    left = torch.zeros(weight.shape[0], 1)
    left[::3] = 8.0
    right = torch.zeros(1, weight.shape[1])
    right[0, ::5] = 4.0
    weight += left @ right
    report = Update(top=4).compare(base, tuned)
    spiked = next(m for m in report.matrices if (m.block, m.role) == (1, "down"))
    assert spiked.effective_rank == pytest.approx(1, abs=1e-9)
    assert spiked.stable_rank == pytest.approx(1, abs=1e-12)
    assert (spiked.rank_90, spiked.rank_99, spiked.above_rounding) == (1, 1, 1)
    assert spiked.intruders == 1 and spiked.cosines[0] < 0.5
    for matrix in report.matrices:
        if matrix is not spiked:
            assert not matrix.changed and matrix.intruders == 0
            assert matrix.cosines == (1.0,) * len(matrix.cosines)
    blocks = report.to_dict()["blocks"]
    assert [row["block"] for row in blocks] == [0, 1, None]
    assert [row["intruders"] for row in blocks] == [0, 1, None]
    assert (blocks[0]["effective_rank"], blocks[1]["effective_rank"]) == (None, 1.0)
    assert "1 of " in report.summary()


def test_a_sparse_update_is_counted_exactly(
    pair: Callable[..., tuple[Checkpoint, Checkpoint]],
) -> None:
    base, tuned = pair()
    name = "model.layers.0.mlp.up_proj.weight"
    weight = tuned.model.get_parameter(name).data
    flat = weight.view(-1)
    original = base.model.get_parameter(name).data.view(-1)
    original[:30] = flat[:30] = 1.0
    flat[:10] += 2.0**-20  # 9.5e-7: exact beside 1
    flat[10:30] -= 2.0**-9  # 2.0e-3
    report = Update(layers=()).compare(base, tuned)
    assert report.matrices == ()
    found = next(tensor for tensor in report.tensors if tensor.name == name)
    entries = weight.numel()
    shares = dict(zip(ABSOLUTE, found.unchanged, strict=True))
    assert shares == {
        0.0: (entries - 30) / entries,
        1e-8: (entries - 30) / entries,
        1e-7: (entries - 30) / entries,
        1e-6: (entries - 20) / entries,
        1e-5: (entries - 20) / entries,
        1e-4: (entries - 20) / entries,
        1e-3: (entries - 20) / entries,
    }
    # Relative to an entry of 1 the same numbers: 1e-5 .. 1e-3 leave twenty, 1e-2 and 1e-1 none.
    assert [round(entries * (1 - share)) for share in found.unchanged_relative] == [
        20,
        20,
        20,
        0,
        0,
    ]
    assert found.largest == 2.0**-9
    assert found.norm == pytest.approx(math.sqrt(10 * 2.0**-40 + 20 * 2.0**-18))
    total = report.entries
    assert total == sum(p.numel() for p in base.model.parameters())
    assert report.unchanged(0.0) == pytest.approx((total - 30) / total)
    with pytest.raises(SettingsError, match="measured were"):
        report.unchanged(0.5)


def test_tied_embeddings_count_once(
    pair: Callable[..., tuple[Checkpoint, Checkpoint]], make_model: Callable[..., Any]
) -> None:
    base, tuned = pair(tie_word_embeddings=True)
    tuned.model.get_input_embeddings().weight.data[7] += 1
    report = Update(layers=()).compare(base, tuned)
    assert report.entries == sum(p.numel() for p in base.model.parameters())
    assert [tensor.name for tensor in report.tensors if tensor.norm] == [
        "model.embed_tokens.weight"
    ]
    assert report.left_out == {}
    # A head that was given its own weight is compared with what it was.
    untied = make_model(tie_word_embeddings=False)
    untied.load_state_dict(base.model.state_dict())
    untied.lm_head.weight.data[3] += 1
    report = Update(layers=()).compare(base, checkpoint(untied))
    assert [tensor.name for tensor in report.tensors if tensor.norm] == ["lm_head.weight"]


def test_bfloat16_is_compared_in_full_precision(
    pair: Callable[..., tuple[Checkpoint, Checkpoint]],
) -> None:
    base, tuned = pair()
    base.model.bfloat16()
    tuned.model.bfloat16()
    weight = tuned.anatomy.blocks[0].linear("up").weight(tuned.model)
    before = weight.double()
    weight += 1 / 256
    expected = weight.double() - before
    report = Update().compare(base, tuned)
    found = next(t for t in report.tensors if t.name == "model.layers.0.mlp.up_proj.weight")
    assert found.dtype == "bfloat16"
    assert found.norm == pytest.approx(float(expected.norm()), rel=1e-12)
    assert found.unchanged[0] == float((expected == 0).double().mean())
    values = torch.linalg.svdvals(expected)
    matrix = next(m for m in report.matrices if (m.block, m.role) == (0, "up"))
    p = values / values.sum()
    assert matrix.effective_rank == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-6)
    # A shift of all entries has rank one; what the type made of it has not.
    assert matrix.effective_rank > 1.2 and matrix.above_rounding == 1
    assert "Stored in bfloat16" in report.summary()
    # The same weights saved in float32 are known for what they are.
    base.model.float()
    tuned.model.float()
    again = Update().compare(base, tuned)
    assert again.to_dict()["matrices"] == report.to_dict()["matrices"]
    assert next(t for t in again.tensors if t.name == found.name).dtype == "bfloat16"


# peft asks a transformers model by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_intruders_are_those_that_peft_finds(
    pair: Callable[..., tuple[Checkpoint, Checkpoint]],
) -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    base, tuned = pair()
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj", "down_proj"])
    model = peft.get_peft_model(tuned.model, config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    lines: list[str] = []
    reduce_intruder_dimension(model, top_k=6, logging_sink=lines.append)
    expected = {
        line.split(":")[0].removeprefix("base_model.model."): int(line.rsplit(" ", 1)[1])
        if "Intruders" in line
        else 0
        for line in lines
        if "adapter" not in line
    }
    model.set_adapter("default")
    merged = checkpoint(model.merge_and_unload())
    found = {m.module: m.intruders for m in Update(top=6).compare(base, merged).matrices}
    assert {name: found[name] for name in expected} == expected
    assert len(expected) == 6 and sum(expected.values()) > 0


def test_only_the_blocks_that_were_asked_for(
    pair: Callable[..., tuple[Checkpoint, Checkpoint]],
) -> None:
    base, tuned = pair()
    report = Update(layers=(1,)).compare(base, tuned)
    assert {matrix.block for matrix in report.matrices} == {1}
    assert {tensor.block for tensor in report.tensors} == {0, 1, None}
    with pytest.raises(SettingsError, match="no block 2, 9: this model has blocks 0 to 1"):
        Update(layers=(1, 9, 2)).compare(base, tuned)


@pytest.mark.parametrize("settings", [{"top": 0}, {"threshold": 0.0}, {"threshold": 1.5}])
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"top is|threshold is"):
        Update(**settings)


# What cannot be subtracted


def test_reasons_for_no_update(
    pair: Callable[..., tuple[Checkpoint, Checkpoint]], make_model: Callable[..., Any]
) -> None:
    base, _ = pair()

    def reason(**settings: Any) -> str:
        other = checkpoint(make_model(**settings))
        report = Update().compare(base, other, ("A", "B"))
        assert report.tensors == () and report.absent
        assert report.to_dict() == {
            "method": "update",
            "base": "A",
            "tuned": "B",
            "absent": report.absent,
        }
        assert report.absent in report.summary()
        return report.absent

    assert "A is a llama and B a gpt2" in reason(model_type="gpt2")
    assert "A has 2 blocks and B has 3" in reason(num_hidden_layers=3)
    assert "gate_proj is 44 x 32 in A and 48 x 32 in B" in reason(intermediate_size=48)


def test_a_quantized_model_has_no_update(
    pair: Callable[..., tuple[Checkpoint, Checkpoint]],
) -> None:
    from postlude import _front_door
    from postlude.quantization.rtn import RTN

    base, other = pair()
    small = _front_door.quantize(other, RTN(weights=4))
    for first, second in ((base, small), (small, base)):
        report = Update().compare(first, second)
        assert report.absent is not None
        assert "is quantized" in report.absent and "float checkpoint" in report.absent


def test_a_longer_vocabulary_leaves_the_rest_comparable(
    pair: Callable[..., tuple[Checkpoint, Checkpoint]],
) -> None:
    base, tuned = pair()
    tuned.model.resize_token_embeddings(261)
    report = Update().compare(base, tuned, ("A", "B"))
    assert report.absent is None
    names = ("model.embed_tokens.weight", "lm_head.weight")
    assert report.left_out == dict.fromkeys(names, "259 x 32 in A, 261 x 32 in B")
    assert report.unchanged(0.0) == 1
    assert "Not compared: model.embed_tokens.weight: 259 x 32" in report.summary()


def test_the_report_is_plain_json(pair: Callable[..., tuple[Checkpoint, Checkpoint]]) -> None:
    base, tuned = pair()
    tuned.model.model.norm.weight.data += 0.25
    found = json.loads(json.dumps(Update().compare(base, tuned).to_dict(), allow_nan=False))
    assert found["absent"] is None
    assert len(found["matrices"]) == 14
    assert len(found["unchanged"]) == len(found["tolerances"]) == 7
    assert found["blocks"][-1]["block"] is None and found["blocks"][-1]["relative_norm"] > 0


# The command


def test_compare_reports_both_parts(
    make_checkpoint: Callable[..., Any], postlude_command_plain: Callable[..., Any]
) -> None:
    first, second = make_checkpoint(), make_checkpoint(seed=1)
    found = postlude_command_plain("inspect", "compare", first, second, "--layers", "1", "--json")
    assert len(found["pairs"]) == 1 and found["method"] == "signature"
    (update,) = found["updates"]
    assert (update["base"], update["tuned"]) == (str(first), str(second))
    assert {matrix["block"] for matrix in update["matrices"]} == {1}


@pytest.fixture
def postlude_command_plain(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    from postlude.cli import run

    def command(*words: object) -> Any:
        code = run([str(word) for word in words])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return json.loads(captured.out)

    return command
