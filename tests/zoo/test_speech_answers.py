import pytest

from postlude.errors import DataError
from postlude.zoo.speech_answers import (
    ALL,
    PARTS,
    SCORES,
    Assessment,
    Finding,
    answer_pair,
    assessment_of,
    calibration_pairs,
    parse,
    parse_score,
    phrase,
    question,
    read_phrase,
    segments,
    write,
)

TEXT = "noi=3 dis=5 con=5 eff=4 nat=4 mos=3 | noise hum 0.8-1.6 | dist none | pause none"
COLUMNS = {
    "id": "clip-1",
    "Speed": 3,
    "Naturalness": 4,
    "Background noise": 3,
    "Distortion": 5,
    "Listening effort": 4,
    "Continuity": 5,
    "Overall quality": 3,
    "Noise Description": "hum noise 0.8-1.6s",
    "Distortion description": "not distorted",
    "Unnatural pause": "very smooth",
}
NOISE, DIST, PAUSE = PARTS


def test_written_and_read() -> None:
    parsed = parse(TEXT)
    assert parsed.exact and not parsed.unparsed
    assert parsed.scores == {"noi": 3, "dis": 5, "con": 5, "eff": 4, "nat": 4, "mos": 3}
    assert parsed.findings == {
        "noise": Finding("hum", ((0.8, 1.6),)),
        "dist": Finding(),
        "pause": Finding(),
    }
    assert write(assessment_of(COLUMNS)) == TEXT
    assert assessment_of(COLUMNS) == Assessment(parsed.scores, parsed.findings)  # type: ignore[arg-type]


def test_several_ranges_are_a_union() -> None:
    parsed = parse(TEXT.replace("hum 0.8-1.6", "hum 2.0-2.4 0.8-1.6 1.5-1.9"))
    assert parsed.findings["noise"] == Finding("hum", ((0.8, 1.9), (2.0, 2.4)))
    assert not parsed.exact


def test_times_are_tenths_and_keep_a_length() -> None:
    whole = assessment_of({**COLUMNS, "Unnatural pause": "1.21-1.24s, 2.26-2.97s"})
    assert write(whole).endswith("| pause 1.2-1.3 2.3-3.0")


@pytest.mark.parametrize(
    ("change", "unparsed"),
    [
        (("noi=3", "noi=7"), ("noi",)),
        (("noi=3", "noi=3.5"), ("noi",)),
        (("noi=3", "noi="), ("noi",)),
        (("noi=3", "noi=3 noi=4"), ("noi",)),
        (("noi=3 ", ""), ("noi",)),
        (("0.8-1.6", "1.6-0.8"), ("noise",)),
        (("0.8-1.6", "0.8-"), ("noise",)),
        (("0.8-1.6", "0.8-0.8"), ("noise",)),
        ((" hum 0.8-1.6", ""), ("noise",)),
        (("| dist none ", ""), ("dist",)),
        (("dist none", "dist none | dist clipping 0-1"), ("dist",)),
    ],
)
def test_what_cannot_be_read_is_left_out_alone(
    change: tuple[str, str], unparsed: tuple[str, ...]
) -> None:
    parsed = parse(TEXT.replace(*change))
    assert parsed.unparsed == unparsed and not parsed.exact


@pytest.mark.parametrize("text", ["", "   ", "I rate this from 1 to 5", "|||", "noise", "4"])
def test_no_answer(text: str) -> None:
    assert len(parse(text).unparsed) == len(SCORES) + len(PARTS)


def test_segments_cut_words_from_times() -> None:
    found = {key: TEXT[slice(*place)] for key, place in segments(TEXT).items()}
    assert found == {
        **{f"{key}": f"{key}={score}" for key, score in parse(TEXT).scores.items()},
        "noise": "noise hum",
        "noise_times": "0.8-1.6",
        **dict.fromkeys(("dist", "dist_times"), "dist none"),
        **dict.fromkeys(("pause", "pause_times"), "pause none"),
    }
    assert "noi" not in segments(TEXT.replace("noi=3", "noi=3 noi=4"))


@pytest.mark.parametrize(
    ("part", "text", "expected"),
    [
        (NOISE, "wind-like sound 0-1.7s", Finding("wind-like", ((0, 1.7),))),
        (NOISE, "Cheer noise 0-1s.", Finding("cheer", ((0, 1),))),
        (NOISE, "noise 1 to 2 s, 3 ~ 4s", Finding("", ((1, 2), (3, 4)))),
        (NOISE, "not noticeable", Finding()),
        (NOISE, "hum", Finding("hum")),
        (NOISE, "noise", Finding("noise")),
        (DIST, "electric-current distortion 0\u20133.6s", Finding("electric-current", ((0, 3.6),))),
        (DIST, "not distorted", Finding()),
        (PAUSE, "3-3.6s", Finding("", ((3, 3.6),))),
        (PAUSE, "very smooth", Finding()),
        (PAUSE, "not noticeable", None),
        (NOISE, "", None),
        (NOISE, "hum 2-1s", None),
        (NOISE, "rated 4", None),
    ],
)
def test_phrases_of_qualispeech(part: object, text: str, expected: Finding | None) -> None:
    found = read_phrase(part, text)  # type: ignore[arg-type]
    assert found == expected
    if found is not None:
        assert read_phrase(part, phrase(part, found)) == found  # type: ignore[arg-type]


def test_columns_that_do_not_say() -> None:
    without = {key: value for key, value in COLUMNS.items() if key != "Continuity"}
    with pytest.raises(DataError, match="clip-1 has no column 'Continuity'"):
        assessment_of(without)
    with pytest.raises(DataError, match="clip-1: 'Noise Description' is 'hum 2-1s'"):
        assessment_of({**COLUMNS, "Noise Description": "hum 2-1s"})
    with pytest.raises(DataError, match="score of Distortion is 6"):
        assessment_of({**COLUMNS, "Distortion": 6})


def test_questions() -> None:
    pairs = list(calibration_pairs(COLUMNS))
    assert [one.key for one, _, _ in pairs] == [one.key for one in ALL]
    dimension, asked, answer = pairs[1]
    assert (asked, answer) == (question(dimension), "3")
    assert asked == "Rate the background noise of this speech from 1 to 5. Answer with one number."
    assert answer_pair(COLUMNS)[1] == TEXT
    with pytest.raises(DataError, match="clip-1: 'Speed' is 0"):
        list(calibration_pairs({**COLUMNS, "Speed": 0}))


@pytest.mark.parametrize(
    ("text", "score"),
    [("4", 4), (" 4\n", 4), ("6", None), ("45", None), ("4 of 5", None), ("", None)],
)
def test_one_digit_or_skipped(text: str, score: int | None) -> None:
    assert parse_score(text) == score
