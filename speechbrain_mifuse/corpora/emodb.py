"""EmoDB (Burkhardt et al. 2005), German: 535 clips of ten actors. See `recipes/EmoDB/README.md`, also on "EmoDB, 2 s".

Tree: `wav/SSttEv.wav`: speaker, text, emotion letter, version. What lies beside `wav` is not read.
Four classes: W anger 127, F happiness 71, N neutral 79, T sadness 62; boredom, disgust and fear take no part.
`prepare_emodb_7` takes all seven: L boredom 81, E disgust 46, A fear 69 beside them.
Split policy: speaker-independent. Speakers are dealt to the splits in the order of `SPEAKERS`, which alternates the
sexes (men 03 10 11 12 15, women 08 09 13 14 16).
The openly mirrored copy, in a folder called `emodb_2s`, has every clip cut or padded to exactly 2.000 s, and no licence
is stated with it: figures on it are "EmoDB, 2 s" and are not comparable with published EmoDB figures.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from speechbrain_mifuse.corpora.corpus import Corpus, common_classes, own_recordings
from speechbrain_mifuse.corpora.manifest import Utterance

SEVEN_CLASSES = {"W": "angry", "F": "happy", "N": "neutral", "T": "sad", "L": "bored", "E": "disgust", "A": "fearful"}
LABEL_MAP = common_classes(SEVEN_CLASSES)
NAME = re.compile(r"(?P<speaker>\d\d)[a-z]\d\d(?P<code>[A-Z])[a-z]")
SPEAKERS = ("03", "08", "10", "09", "11", "13", "12", "14", "15", "16")
MEN = ("03", "10", "11", "12", "15")


def list_emodb(data_folder: str | Path, label_map: Mapping[str, str | None] = LABEL_MAP) -> list[Utterance]:
    """List the clips of some classes, by default the four common ones."""
    paths = (Path(data_folder) / "wav").glob("*")
    own = own_recordings("emodb", paths, NAME, label_map, SEVEN_CLASSES)
    return [Utterance(f"emodb-{wav.stem}", wav, emo, name["speaker"]) for wav, name, emo in own]


def speaker_gender(speaker: str) -> str | None:
    """Tell the gender that the release states for a speaker."""
    return ("male" if speaker in MEN else "female") if speaker in SPEAKERS else None


def sentence_of(utterance: Utterance) -> str:
    """Give the code of the text that is said."""
    return utterance.wav.stem[2:5]


EMODB = Corpus("emodb", "emodb*", "wav/[0-9]*", SPEAKERS, list_emodb, sentence_of=sentence_of)
EMODB_7 = replace(EMODB, list_utterances=partial(list_emodb, label_map=SEVEN_CLASSES))
prepare_emodb = EMODB.prepare
prepare_emodb_7 = EMODB_7.prepare
