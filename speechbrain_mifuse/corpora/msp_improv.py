"""MSP-IMPROV (Busso et al. 2017), English: six sessions of a woman and a man. See `recipes/MSP-IMPROV/README.md`.

Tree: labels `Evalution.txt` (so spelled in the release; `Evaluation.txt` in some copies), recordings
`session{1..6}/S01A/{P,R,S,T}/MSP-IMPROV-S01A-F01-P-FM01.wav`, in some copies below `Audio/`. A name gives sentence and
intended emotion, speaker (sex and session), scenario (P natural, R read, S improvised, T target) and turn. A label line
`UTD-IMPROV-S01A-F01-P-FM01.avi; N; A:2.8; V:3.0; D:3.2; N:3.9;` names the video of the same turn; the annotators' lines
that follow are passed over.
Four classes: A angry, H happy, N neutral, S sad; O (other) and X (no agreement) take no part. A copy that differs from
the commonly cited counts is reported, in the log and in `corpus.json` under `release_check`; so are labels whose
recording cannot be used.
Split policy: whole sessions, in numerical order, because the two speakers of one talk to each other.
Licence: academic licence signed by the institution, from the Multimodal Signal Processing (MSP) laboratory of the
University of Texas at Dallas, page "MSP-IMPROV".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from speechbrain_mifuse.corpora.checks import check_release
from speechbrain_mifuse.corpora.corpus import Corpus, by_stem, map_label, report_other_classes
from speechbrain_mifuse.corpora.manifest import CorpusError, Utterance

LABEL_MAP = {"A": "angry", "H": "happy", "N": "neutral", "S": "sad", "O": None, "X": None}
COUNTS = {"angry": 792, "happy": 2644, "neutral": 3477, "sad": 885}
SESSIONS = tuple(f"session{number}" for number in range(1, 7))
TURN = re.compile(r"UTD-IMPROV-(S\d\d[A-Z]-([FM])0?(\d)-([PRST])-\w+)\.avi\s*;\s*(\w+)\s*;")


def list_msp_improv(data_folder: str | Path) -> list[Utterance]:
    """List the turns of the four common classes."""
    root = Path(data_folder)
    tables = sorted(root.glob("Eval*tion.txt"))
    if len(tables) != 1:
        raise CorpusError(f"{root}: holds {len(tables)} files Evalution.txt or Evaluation.txt. Leave one.")
    found = by_stem(
        path for below in ("", "Audio/") for path in root.glob(f"{below}[Ss]ession[1-6]/*/*/MSP-IMPROV-*.*")
    )
    utterances, left_out = [], []
    for number, line in enumerate(tables[0].read_text(encoding="utf-8-sig", errors="replace").splitlines(), start=1):
        if not line.startswith("UTD-IMPROV-"):
            continue
        turn = TURN.match(line)
        if turn is None:
            raise CorpusError(f"{tables[0]}, line {number}: not a turn of MSP-IMPROV: {line!r}. Restore the file.")
        name, sex, session, scenario, code = turn.groups()
        emo = map_label(LABEL_MAP, code, f"{tables[0]}, line {number}")
        if emo is None:
            left_out.append({"O": "other", "X": "no agreement"}[code])
        else:
            stem, sentence = f"MSP-IMPROV-{name}", name.split("-")[0]
            wav = found.get(stem, root / f"session{session}" / sentence / scenario / f"{stem}.wav")
            utterances.append(Utterance(f"imp-{name}", wav, emo, f"{sex}0{session}", f"session{session}"))
    report_other_classes("msp_improv", left_out)
    return utterances


def facts(data_folder: Path, utterances: list[Utterance]) -> Mapping:
    """Compare a copy with the commonly cited counts of the classes."""
    return {"release_check": check_release("msp_improv", utterances, "emo", COUNTS)}


def speaker_gender(speaker: str) -> str | None:
    """Tell the gender that the release states for a speaker."""
    return {"F": "female", "M": "male"}.get(speaker[:1])


MSP_IMPROV = Corpus(*("msp_improv", "MSP?I*", "Eval*tion.txt", SESSIONS, list_msp_improv), group="session", facts=facts)
prepare_msp_improv = MSP_IMPROV.prepare
