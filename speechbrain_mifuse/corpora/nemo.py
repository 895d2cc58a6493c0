"""nEMO (Christop 2024), Polish: nine actors. How to get it: `recipes/nEMO/README.md`.

Tree: `samples/<speaker>_<emotion>_<sentence>.wav` and `data.tsv` with the columns `file_id, emotion, raw_text,
normalized_text, speaker_id, gender, age`. A copy may hold fewer speakers or emotions.
Four classes: anger, happiness, neutral, sadness; fear and surprise take no part. `prepare_nemo_6` takes all six, or
those that a copy holds.
Split policy: speaker-independent. Speakers are dealt to the splits in the order of `SPEAKERS`, so that a man and a
woman stand at each end; it names the five speakers of the openly mirrored part (SM0, TP0 men; IC0, KD0, MK0 women).
Licence: CC BY-NC-SA 4.0.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from speechbrain_mifuse.corpora.corpus import Corpus, by_stem, common_classes, map_label, report_other_classes
from speechbrain_mifuse.corpora.manifest import CorpusError, Utterance
from speechbrain_mifuse.corpora.tables import read_table

SIX_CLASSES = {"anger": "angry", "happiness": "happy", "neutral": "neutral", "sadness": "sad", "fear": "fearful"}
# As the release's table has it, and as its paper does.
SIX_CLASSES |= dict.fromkeys(("surprised", "surprise"), "surprised")
LABEL_MAP = common_classes(SIX_CLASSES)
COLUMNS = dict.fromkeys(("file_id", "emotion", "speaker_id"), ())
SPEAKERS = ("SM0", "IC0", "KD0", "TP0", "MK0")
MEN = ("SM0", "TP0")


def list_nemo(data_folder: str | Path, label_map: Mapping[str, str | None] = LABEL_MAP) -> list[Utterance]:
    r"""List the recordings of some classes that `data.tsv` names, by default of the four common ones."""
    table = Path(data_folder) / "data.tsv"
    # Copies convert the audio to other formats and leave the names in the table as they were.
    found = by_stem((Path(data_folder) / "samples").glob("*.*"))
    utterances, left_out = [], []
    # The sentences may hold quotation marks of their own.
    for line, row in read_table(table, COLUMNS, quoting=csv.QUOTE_NONE):
        name, emotion, speaker = row.values()
        if not (name and emotion and speaker):
            raise CorpusError(f"{table}, line {line}: lacks file_id, emotion or speaker_id. Restore the table.")
        emo = map_label(label_map, emotion, f"{table}, line {line} ({name})")
        if emo is None:
            left_out.append(SIX_CLASSES[emotion])
        else:
            stem = Path(name).stem
            wav = found.get(stem, Path(data_folder) / "samples" / Path(name).name)
            utterances.append(Utterance(f"nemo-{stem}", wav, emo, speaker))
    report_other_classes("nemo", left_out)
    return utterances


def speaker_gender(speaker: str) -> str | None:
    """Tell the gender that the release states for a speaker."""
    return ("male" if speaker in MEN else "female") if speaker in SPEAKERS else None


def sentence_of(utterance: Utterance) -> str:
    """Give the number of the sentence that is said."""
    return utterance.utt_id.rsplit("_", 1)[-1]


NEMO = Corpus("nemo", "nemo", "data.tsv", SPEAKERS, list_nemo, sentence_of=sentence_of)
NEMO_6 = replace(NEMO, list_utterances=partial(list_nemo, label_map=SIX_CLASSES))
prepare_nemo = NEMO.prepare
prepare_nemo_6 = NEMO_6.prepare
