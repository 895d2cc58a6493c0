"""Recordings of a published corpus, known by their names: whatever else lies beside them is not taken for one."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from speechbrain_mifuse.corpora.corpus import by_stem
from speechbrain_mifuse.corpora.manifest import CorpusError
from speechbrain_mifuse.utils.audio_files import ENDINGS
from speechbrain_mifuse.utils.texts import shown

logger = logging.getLogger(__name__)


def own_recordings(
    corpus: str,
    paths: Iterable[Path],
    pattern: re.Pattern,
    label_map: Mapping[str, str | None],
    emotions: Mapping[str, str],
    other_parts: re.Pattern | None = None,
) -> list[tuple[Path, re.Match, str]]:
    """List the recordings of the wanted classes by their file names, and log what takes no part."""
    audio = sorted(path for path in paths if path.suffix.lower() in ENDINGS and path.name[0] != ".")
    own = [path for path in audio if _code(pattern, path) in emotions]
    rest = sorted(set(audio).difference(own))
    parts = [path for path in rest if other_parts and other_parts.fullmatch(path.stem)]
    _report_strange(corpus, sorted(set(rest).difference(parts)), len(audio))
    if parts:
        logger.info("%s: %d files of other parts of the release take no part.", corpus, len(parts))
    distinct = by_stem(own)
    if len(distinct) < len(own):
        doubled = next(path for path in own if distinct[path.stem] != path)
        logger.warning(
            "%s: %d recordings are there a second time (first: %s); each utterance counts once.",
            *(corpus, len(own) - len(distinct), shown(doubled)),
        )
    matches = [(path, pattern.fullmatch(stem)) for stem, path in distinct.items()]
    report_other_classes(corpus, (emotions[m["code"]] for _, m in matches if label_map[m["code"]] is None))
    return [(path, match, emo) for path, match in matches if (emo := label_map[match["code"]]) is not None]


def _code(pattern: re.Pattern, path: Path) -> str | None:
    """Emotion code in a recording's name, if it has the corpus's form."""
    match = pattern.fullmatch(path.stem)
    return match["code"] if match else None


def _report_strange(corpus: str, strange: list[Path], audio: int) -> None:
    """Count files that are not named as the corpus's are; if they are most, it is another corpus."""
    if not strange:
        return
    what = f"{corpus}: {len(strange)} of {audio} audio files are not named as this corpus's recordings"
    what += f" (first: {shown(strange[0])})"
    if 2 * len(strange) > audio:
        raise CorpusError(f"{what}. Is --data_folder the right one? Restore the release's own file names.")
    logger.warning("%s and take no part.", what)


def report_other_classes(corpus: str, emotions: Iterable[str]) -> None:
    """Log how many recordings are left out because of their class."""
    counts = Counter(emotions)
    if counts:
        listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        logger.info("%s: %d recordings of other classes take no part: %s.", corpus, counts.total(), listed)
