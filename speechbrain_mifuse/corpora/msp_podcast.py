"""MSP-Podcast (Lotfian & Busso 2019), English: natural speech, of any release. See `recipes/MSP-Podcast/README.md`.

Tree: `Labels/labels_consensus.csv` with the columns `FileName, EmoClass, SpkrID, Split_Set` among others, recordings
`Audios/*.wav` (`Audio/` in some releases). `corpus.json` records the release, from the folder's name, and its counts.
Four classes: A angry, H happy, N neutral, S sad; U surprise, F fear, D disgust, C contempt, O other and
X (no agreement) take no part. `prepare_msp_podcast_8` takes all but the last two.
Split policy: the official partitions `Train, Development, Test1, Test2`, by name. Test1 is the one to report: Test2 is
known to be gender-biased, and Test3 carries no labels and is left out. Recordings of a known speaker who is also in a
later split (`test`, `valid`) are left out of the earlier one (`adapt`, `train`), and counted in `corpus.json`. Each
recording of an unknown speaker counts as a speaker of its own, so intervals by speaker are somewhat too narrow; results
say how many there are.
Licence: academic licence signed by the institution, from the Multimodal Signal Processing (MSP) laboratory of the
University of Texas at Dallas, page "MSP-Podcast".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from speechbrain_mifuse.corpora.corpus import Corpus, by_stem, common_classes, map_label, report_other_classes
from speechbrain_mifuse.corpora.manifest import CorpusError, Utterance
from speechbrain_mifuse.corpora.tables import read_table

EIGHT_CLASSES = {"A": "angry", "H": "happy", "N": "neutral", "S": "sad", "U": "surprised", "F": "fearful"}
EIGHT_CLASSES |= {"D": "disgust", "C": "contempt", "O": None, "X": None}
LABEL_MAP = common_classes(EIGHT_CLASSES)
COLUMNS = ("FileName", "EmoClass", "SpkrID", "Split_Set")
UNLABELLED = "Test3"


def list_msp_podcast(data_folder: str | Path, label_map: Mapping[str, str | None] = LABEL_MAP) -> list[Utterance]:
    r"""List the recordings of some classes, by default the four common ones, in all labelled partitions."""
    root = Path(data_folder)
    table = root / "Labels" / "labels_consensus.csv"
    found = by_stem(path for folder in ("Audio", "Audios") for path in (root / folder).glob("*.*"))
    utterances, left_out = [], []
    for line, row in read_table(table, dict.fromkeys(COLUMNS, ())):
        name, code, speaker, partition = row.values()
        if not (name and partition):
            raise CorpusError(f"{table}, line {line}: lacks FileName or Split_Set. Restore the table.")
        if partition == UNLABELLED:
            continue
        emo = map_label(label_map, code, f"{table}, line {line} ({name})")
        if emo is None:
            left_out.append(EIGHT_CLASSES[code] or {"O": "other", "X": "no agreement"}[code])
        else:
            stem = Path(name).stem
            known = speaker.lower() not in ("", "unknown")
            who = speaker if known else f"unknown-{stem}"
            wav = found.get(stem, root / "Audios" / Path(name).name)
            utterances.append(Utterance(f"msp-{stem}", wav, emo, who, partition=partition, speaker_known=known))
    report_other_classes("msp_podcast", left_out)
    return utterances


def facts(data_folder: Path, utterances: list[Utterance]) -> Mapping:
    """Tell which release this is, as far as it can be seen, and what it holds."""
    number = re.search(r"\d+\.\d+(\.\d+)?", data_folder.resolve().name)
    counts = {}
    for utterance in utterances:
        counts.setdefault(utterance.partition, Counter())[utterance.emo] += 1
    return {
        "release": number.group() if number else None,
        "partition_counts": {name: dict(sorted(counts[name].items())) for name in sorted(counts)},
        "unknown_speakers": sum(not utterance.speaker_known for utterance in utterances),
    }


MSP_PODCAST = Corpus(*("msp_podcast", "MSP?P*", "Labels/labels_consensus.csv", (), list_msp_podcast), facts=facts)
MSP_PODCAST_8 = replace(MSP_PODCAST, list_utterances=partial(list_msp_podcast, label_map=EIGHT_CLASSES))
prepare_msp_podcast = MSP_PODCAST.prepare
prepare_msp_podcast_8 = MSP_PODCAST_8.prepare
