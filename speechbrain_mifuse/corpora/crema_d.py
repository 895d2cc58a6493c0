"""CREMA-D: crowd-sourced emotional multimodal actors dataset (Cao et al. 2014), English.

7,442 clips of 91 actors (48 men, 43 women), twelve sentences, six emotions. Doi 10.1109/TAFFC.2014.2336244.
Licence: Open Database License (ODbL).
Tree: `AudioWAV/1001_DFA_ANG_XX.wav` (any file type that libsndfile reads): actor, sentence, intended emotion, level.

Four classes, by the intended emotion: ANG, HAP, NEU, SAD; DIS and FEA take no part.
Split policy: speaker-independent. Actors are dealt to the splits in numerical order.
"""

from __future__ import annotations

from pathlib import Path

from speechbrain_mifuse.corpora.manifest import Corpus, CorpusError, Utterance, by_stem, map_label

LABEL_MAP = {"ANG": "angry", "HAP": "happy", "NEU": "neutral", "SAD": "sad", "DIS": None, "FEA": None}
SPEAKERS = tuple(str(actor) for actor in range(1001, 1092))


def list_crema_d(data_folder: str | Path) -> list[Utterance]:
    """List the clips of the four common classes.

    Parameters
    ----------
    data_folder : str or pathlib.Path
        Folder that holds `AudioWAV`.

    Returns
    -------
    list of Utterance
        One per clip.

    Raises
    ------
    CorpusError
        If a file name does not have four fields or names an unknown emotion.

    Example
    -------
    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> (root / "AudioWAV").mkdir()
    >>> (root / "AudioWAV" / "1001_DFA_ANG_XX.wav").touch()
    >>> [(u.utt_id, u.emo, u.speaker) for u in list_crema_d(root)]
    [('crema-1001_DFA_ANG_XX', 'angry', '1001')]
    """
    utterances = []
    for wav in by_stem((Path(data_folder) / "AudioWAV").iterdir()).values():
        fields = wav.stem.split("_")
        if len(fields) != 4:
            raise CorpusError(f"{wav}: not a CREMA-D name (four fields, as 1001_DFA_ANG_XX). Move the file away.")
        emo = map_label(LABEL_MAP, fields[2], wav)
        if emo is not None:
            utterances.append(Utterance(f"crema-{wav.stem}", wav, emo, fields[0]))
    return utterances


CREMA_D = Corpus("crema_d", "CREMA-D", "AudioWAV", SPEAKERS, list_crema_d)
prepare_crema_d = CREMA_D.prepare
