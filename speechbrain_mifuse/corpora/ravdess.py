"""RAVDESS (Livingstone & Russo 2018), North American English, speech part. See `recipes/RAVDESS/README.md`.

Tree: `Actor_NN/MM-VV-EE-II-SS-RR-AA.wav`, in some copies below a folder such as `audio_speech_actors_01-24`, or both
there and above it: each clip counts once. Only `03-01-...` is speech without video.
Four classes: neutral 96, happy 192, sad 192, angry 192 = 672 clips; calm, fearful, disgust and surprised take no part.
Two clips of actor 07 (happy, normal intensity, second sentence, both repetitions) are one recording; preparation keeps
the first, so 671 take part. `prepare_ravdess_8` takes all eight classes, of which each has 192 clips but neutral.
Split policy: speaker-independent. Actors (odd numbers male, even female) are dealt to the splits in numerical order.
Licence: CC BY-NC-SA 4.0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from speechbrain_mifuse.corpora.corpus import Corpus, common_classes, own_recordings
from speechbrain_mifuse.corpora.manifest import Utterance

EIGHT_CLASSES = {"01": "neutral", "02": "calm", "03": "happy", "04": "sad"}
EIGHT_CLASSES |= {"05": "angry", "06": "fearful", "07": "disgust", "08": "surprised"}
LABEL_MAP = common_classes(EIGHT_CLASSES)
NAME = re.compile(r"03-01-(?P<code>\d\d)-\d\d-\d\d-\d\d-(?P<speaker>\d\d)")
OTHER_PARTS = re.compile(r"(?!03-01)0[1-3]-0[12](-\d\d){5}")
SPEAKERS = tuple(f"{actor:02d}" for actor in range(1, 25))


def list_ravdess(data_folder: str | Path, label_map: Mapping[str, str | None] = LABEL_MAP) -> list[Utterance]:
    """List the clips of some classes, by default the four common ones."""
    paths = [path for below in ("", "*/") for path in Path(data_folder).glob(f"{below}Actor_*/*")]
    own = own_recordings("ravdess", paths, NAME, label_map, EIGHT_CLASSES, other_parts=OTHER_PARTS)
    return [Utterance(f"rav-{wav.stem}", wav, emo, name["speaker"]) for wav, name, emo in own]


def speaker_gender(speaker: str) -> str | None:
    """Tell the gender that the release states for a speaker."""
    return ("female", "male")[int(speaker) % 2] if speaker in SPEAKERS else None


def sentence_of(utterance: Utterance) -> str:
    """Give the number of the statement that is said."""
    return utterance.wav.stem.split("-")[4]


MARKERS = ("Actor_*", "[Aa]udio_[Ss]peech*/Actor_*")
RAVDESS = Corpus("ravdess", "ravdess", MARKERS, SPEAKERS, list_ravdess, sentence_of=sentence_of)
RAVDESS_8 = replace(RAVDESS, list_utterances=partial(list_ravdess, label_map=EIGHT_CLASSES))
prepare_ravdess = RAVDESS.prepare
prepare_ravdess_8 = RAVDESS_8.prepare
