"""What the same answer to every clip gets, by hand."""

from __future__ import annotations

import pytest

from postlude.tuning.speech_baseline import commonest_answer, reward_without_ears, unreadable
from postlude.tuning.speech_rewards import SPEECH_REWARDS

from .test_speech_rewards import COLUMNS, RIGHT


def test_the_commonest_of_everything() -> None:
    other = {**COLUMNS, "Distortion": 1, "Unnatural pause": "0.4-0.9s"}
    rows = [other, COLUMNS, COLUMNS, {**COLUMNS, "id": 3}]
    assert commonest_answer(rows) == RIGHT
    answer, value = reward_without_ears(SPEECH_REWARDS["speech-verifiable"](""), rows)
    # One clip of four is wrong in a score, a part and its times, of twelve; every answer has the right form.
    assert answer == RIGHT and value == pytest.approx((3 + 9 / 12) / 4 + 0.1)


def test_what_cannot_be_read() -> None:
    assert unreadable([RIGHT, "noi=3", "nothing", "3"]) == 0.5
