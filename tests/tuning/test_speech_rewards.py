from pathlib import Path
from typing import Any

import pytest
import torch

from postlude.errors import CheckpointError, DataError, SettingsError
from postlude.tuning.rewards import NAMED, Dimensioned, parse_reward
from postlude.tuning.speech_rewards import SPEECH_REWARDS, SpeechReward

COLUMNS = {
    "Background noise": 3,
    "Distortion": 5,
    "Continuity": 5,
    "Listening effort": 4,
    "Naturalness": 4,
    "Overall quality": 3,
    "Noise Description": "hum noise 0.8-1.6s",
    "Distortion description": "not distorted",
    "Unnatural pause": "very smooth",
}
RIGHT = "noi=3 dis=5 con=5 eff=4 nat=4 mos=3 | noise hum 0.8-1.6 | dist none | pause none"


def judged(name: str, text: str, **columns: Any) -> tuple[float, dict[str, float]]:
    reward = SPEECH_REWARDS[name]("")
    assert isinstance(reward, SpeechReward) and isinstance(reward, Dimensioned)
    given = {key: [value] for key, value in {**COLUMNS, **columns}.items()}
    (values,) = reward.by_dimension([text], **given)
    (total,) = reward([text], **given)
    return total, dict(zip(reward.dimensions, values, strict=True))


@pytest.mark.parametrize(
    "name", ["speech-verifiable", "speech-verifiable-graded", "speech-trigrams"]
)
def test_perfect_empty_and_malformed(name: str) -> None:
    total, by = judged(name, RIGHT)
    assert total == pytest.approx(1.1) and set(by.values()) == {1.0}
    for text in ("", "noise", "I rate this from 1 to 5", "noi:3, dis:5 - all fine"):
        total, by = judged(name, text)
        assert total == 0 and set(by.values()) == {0.0}


def test_scores_exact_and_graded() -> None:
    wrong = RIGHT.replace("noi=3", "noi=1").replace("mos=3", "mos=9")
    total, by = judged("speech-verifiable", wrong)
    assert (by["noi"], by["mos"], by["format"]) == (0, 0, 0)
    assert total == pytest.approx(10 / 12)
    total, by = judged("speech-verifiable-graded", wrong)
    assert (by["noi"], by["mos"]) == (0.5, 0)
    assert total == pytest.approx(10.5 / 12)


@pytest.mark.parametrize(
    ("said", "description", "times"),
    [
        ("noise hum 0.8-1.6", 1, 1),
        ("noise hum 1.0-1.8", 1, 0.6),
        ("noise hum 2.0-3.0", 1, 0),
        ("noise white 0.8-1.6", 0.5, 1),
        ("noise none", 0, 0),
        ("noise hum 1.6-0.8", 0, 0),
        ("noise hum", 1, 0),
        ("noise hum 0.8-1.2 1.2-1.6", 1, 1),
        ("noise hum 0.8-1.6 | noise hum 0.8-1.6", 0, 0),
        ("noise", 0, 0),
    ],
)
def test_descriptions_and_times(said: str, description: float, times: float) -> None:
    _, by = judged("speech-verifiable", RIGHT.replace("noise hum 0.8-1.6", said))
    assert by["noise"] == pytest.approx(description)
    assert by["noise_times"] == pytest.approx(times)


def test_silence_about_nothing_and_a_wrong_alarm() -> None:
    _, by = judged("speech-verifiable", RIGHT)
    assert (by["pause"], by["pause_times"], by["dist"], by["dist_times"]) == (1, 1, 1, 1)
    _, by = judged("speech-verifiable", RIGHT.replace("pause none", "pause 0.2-0.5"))
    assert (by["pause"], by["pause_times"]) == (0, 0)
    _, by = judged("speech-verifiable", RIGHT.replace("dist none", "dist clipping 0.2-0.5"))
    assert (by["dist"], by["dist_times"]) == (0, 0)


def test_text_similarity_is_higher_for_what_is_nearer() -> None:
    values = [
        judged("speech-trigrams", RIGHT.replace("hum 0.8-1.6", other))[1]["noise"]
        for other in ("hum 0.8-1.6", "hum 0.8-1.7", "white 2.0-3.1")
    ]
    assert 1 == values[0] > values[1] > values[2] >= 0.5
    assert judged("speech-trigrams", RIGHT.replace("hum 0.8-1.6", "hum 1.6-0.8"))[1]["noise"] == 0


def test_segments_without_times_hold_them() -> None:
    places = SPEECH_REWARDS["speech-trigrams"]("").segments(RIGHT)
    assert RIGHT[slice(*places["noise"])] == "noise hum 0.8-1.6"
    assert "noise_times" not in places
    places = SPEECH_REWARDS["speech-verifiable"]("").segments(RIGHT)
    assert RIGHT[slice(*places["noise_times"])] == "0.8-1.6"


def test_sentence_encoder(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    (tmp_path / "vocab.txt").write_text(
        "\n".join(
            [
                "[PAD]",
                "[UNK]",
                "[CLS]",
                "[SEP]",
                "[MASK]",
                "noise",
                "hum",
                "white",
                "none",
                "dist",
                "pause",
            ]
        )
    )
    tokenizer = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=11,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    ).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = parse_reward("speech-similarity", str(tmp_path)).function
    given = {key: [value] for key, value in COLUMNS.items()}
    (values,) = reward.by_dimension([RIGHT.replace("noise hum 0.8-1.6", "noise white")], **given)
    found = dict(zip(reward.dimensions, values, strict=True))

    def embedded(text: str) -> torch.Tensor:
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)

    cosine = torch.cosine_similarity(embedded("noise white"), embedded("noise hum 0.8-1.6"), dim=0)
    assert found["noise"] == pytest.approx((1 + float(cosine)) / 2, abs=1e-5)
    assert found["dist"] == pytest.approx(1)
    with pytest.raises(CheckpointError, match="is no sentence encoder"):
        parse_reward("speech-similarity", str(tmp_path / "other"))


def test_what_is_refused() -> None:
    with pytest.raises(SettingsError, match="needs a sentence encoder: --set sentence_encoder="):
        parse_reward("speech-similarity")
    with pytest.raises(SettingsError, match="speech-verifiable uses no sentence encoder"):
        parse_reward("speech-verifiable", "somewhere")
    with pytest.raises(SettingsError, match=f"or one of {', '.join(NAMED)}"):
        parse_reward("speech")
    assert parse_reward("speech-verifiable=0.5").weight == 0.5
    with pytest.raises(DataError, match="has no column 'Background noise'"):
        SPEECH_REWARDS["speech-verifiable"]("").check({"id": "x"})
