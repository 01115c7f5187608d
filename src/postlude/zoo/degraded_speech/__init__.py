"""Speech with known damage: what is wrong, how much, and when, in the columns of QualiSpeech (arXiv:2503.20290).

    python -m postlude.zoo.degraded_speech data --n 1200 --seed 0 -o speech-mini/

`voices` speaks sentences, `damage` spoils them, `labels` says what was done in scores and words, `making` puts the
three together. Reading such folders, and the real data set, is `postlude.runs.clips`'s.
"""

from __future__ import annotations

__all__: list[str] = []
