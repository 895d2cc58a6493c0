"""CREMA-D (Cao et al. 2014), English: 7,442 clips of 91 actors. How to get it: `recipes/CREMA-D/README.md`.

Tree: `AudioWAV/1001_DFA_ANG_XX.wav`: actor, sentence, intended emotion, level.
Four classes, by the intended emotion: ANG, HAP, NEU, SAD; DIS and FEA take no part.
Split policy: speaker-independent. Actors are dealt to the splits in numerical order.
Licence: Open Database License (ODbL).
"""

from __future__ import annotations

import re
from pathlib import Path

from speechbrain_mifuse.corpora.corpus import Corpus, common_classes, own_recordings
from speechbrain_mifuse.corpora.manifest import Utterance

EMOTIONS = {"ANG": "angry", "HAP": "happy", "NEU": "neutral", "SAD": "sad", "DIS": "disgust", "FEA": "fearful"}
LABEL_MAP = common_classes(EMOTIONS)
NAME = re.compile(r"(?P<speaker>\d{4})_[A-Z]{3}_(?P<code>[A-Z]{3})_[A-Z]{1,2}")
SPEAKERS = tuple(str(actor) for actor in range(1001, 1092))


def list_crema_d(data_folder: str | Path) -> list[Utterance]:
    """List the clips of the four common classes."""
    own = own_recordings("crema_d", (Path(data_folder) / "AudioWAV").glob("*"), NAME, LABEL_MAP, EMOTIONS)
    return [Utterance(f"crema-{wav.stem}", wav, emo, name["speaker"]) for wav, name, emo in own]


CREMA_D = Corpus("crema_d", "CREMA-D", "AudioWAV", SPEAKERS, list_crema_d)
prepare_crema_d = CREMA_D.prepare
