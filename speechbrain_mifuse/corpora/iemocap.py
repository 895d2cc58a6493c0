r"""IEMOCAP (Busso et al. 2008), English: five sessions of a woman and a man. See `recipes/IEMOCAP/README.md`.

Tree: labels `Session{1..5}/dialog/EmoEvaluation/*.txt`, recordings
`Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav`. In a label file a line
`[start - end]\tSes01F_impro01_F000\tneu\t[V, A, D]` gives a turn; the annotators' lines follow and are passed over.
Four classes: ang, hap and exc (excited counts as happy), neu, sad = 5,531 utterances. Another copy is reported, in the
log and in `corpus.json` under `release_check`; so are labels whose recording cannot be used. Frustration, surprise,
fear, disgust, other and xxx (no agreement) take no part.
Speaker: session and the F or M of the turn, as Ses01F; the F or M after the session in a dialogue's name is not it.
Split policy: whole sessions, in numerical order, because the two speakers of one talk to each other.
Licence: free for research on a signed form, from the Signal Analysis and Interpretation Laboratory (SAIL) of the
University of Southern California, page "IEMOCAP release".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from speechbrain_mifuse.corpora.checks import check_release
from speechbrain_mifuse.corpora.corpus import Corpus, by_stem, map_label, report_other_classes
from speechbrain_mifuse.corpora.manifest import CorpusError, Utterance

LABEL_MAP = {"ang": "angry", "hap": "happy", "exc": "happy", "neu": "neutral", "sad": "sad"}
LABEL_MAP |= dict.fromkeys(("fru", "sur", "fea", "dis", "oth", "xxx"))
SESSIONS = {"Ses01": 1085, "Ses02": 1023, "Ses03": 1151, "Ses04": 1031, "Ses05": 1241}
TURN = re.compile(r"\[[^]]*\]\s+((Ses\d\d)[FM]_\S+)_([FM])(\w+)\s+(\w+)\s+\[")


def list_iemocap(data_folder: str | Path) -> list[Utterance]:
    r"""List the turns of the four common classes."""
    utterances, left_out = [], []
    for table in sorted(Path(data_folder).glob("Session[1-5]/dialog/EmoEvaluation/[!.]*.txt")):
        wavs = table.parents[2] / "sentences" / "wav"
        lines = table.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, start=1):
            if not line.startswith("["):
                continue
            turn = TURN.match(line)
            if turn is None:
                raise CorpusError(f"{table}, line {number}: not a turn of IEMOCAP: {line!r}. Restore the file.")
            dialogue, session, sex, rest, code = turn.groups()
            emo, name = map_label(LABEL_MAP, code, f"{table}, line {number}"), f"{dialogue}_{sex}{rest}"
            if emo is None:
                left_out.append(code)
            else:
                wav = recording(wavs / dialogue, name)
                utterances.append(Utterance(f"iem-{name}", wav, emo, session + sex, session))
    report_other_classes("iemocap", left_out)
    return utterances


def recording(folder: Path, name: str) -> Path:
    """Path of a turn's recording, of whatever file type."""
    wav = folder / f"{name}.wav"
    return wav if wav.exists() else by_stem(folder.glob(f"{name}.*")).get(name, wav)


def facts(data_folder: Path, utterances: list[Utterance]) -> Mapping:
    """Compare a copy with the published counts of the sessions."""
    return {"release_check": check_release("iemocap", utterances, "session", SESSIONS)}


def speaker_gender(speaker: str) -> str | None:
    """Tell the gender that the release states for a speaker."""
    return {"F": "female", "M": "male"}.get(speaker[-1:])


IEMOCAP = Corpus(
    *("iemocap", "IEMOCAP_full_release", "Session[1-5]", tuple(SESSIONS), list_iemocap), group="session", facts=facts
)
prepare_iemocap = IEMOCAP.prepare
