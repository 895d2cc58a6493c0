"""Listing of the recordings below a folder."""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

from speechbrain_mifuse.utils.audio_files import ENDINGS, FOREIGN, has_ffmpeg
from speechbrain_mifuse.utils.texts import shown

logger = logging.getLogger(__name__)

# Tables of labels, in any case: the corpus of a folder reads them, so they are not passed over.
TABLES = ("labels.csv", "labels.tsv")


def recordings_below(root: str | Path) -> list[Path]:
    """List the recordings below a folder, and log in one line what is passed over."""
    root = Path(root)
    by_file: dict[str, Path] = {}
    passed_over: Counter[str] = Counter()
    for path, real in _files_below(root):
        if path.suffix.lower() in ENDINGS + FOREIGN:
            # In order: first what has this name itself.
            passed_over["links to listed recordings"] += by_file.setdefault(real, path) is not path
        elif path.name.lower() not in TABLES:
            passed_over[path.suffix.lower() or "without ending"] += 1
    _log_passed_over(root, passed_over)
    found = sorted(by_file.values())
    foreign = [path for path in found if path.suffix.lower() in FOREIGN]
    if not foreign or has_ffmpeg():
        return found
    logger.warning(
        "%s: %d recordings are left out (first: %s), because only ffmpeg reads their format. Install ffmpeg, or "
        "convert them to WAV.",
        root,
        len(foreign),
        shown(foreign[0].relative_to(root)),
    )
    return [path for path in found if path.suffix.lower() in ENDINGS]


def _files_below(root: Path) -> Iterator[tuple[Path, str]]:
    """Walk a folder; give each file that is not hidden with its real path, links after all others."""
    # Above the folder lies the folder itself: a link there is a loop.
    seen = {os.path.realpath(above) for above in root.resolve().parents}
    links: list[tuple[Path, str]] = []
    linked_folders = [root]
    while linked_folders:
        folders = deque([linked_folders.pop(0)])
        while folders:
            folder = folders.popleft()
            real = os.path.realpath(folder)
            if real in seen:
                continue
            seen.add(real)
            for entry in _entries(folder):
                path = folder / entry.name
                if _is_folder(entry):
                    (linked_folders if entry.is_symlink() else folders).append(path)
                # Whatever has the name of a recording: that it is none is said when it is read.
                if not _is_folder(entry) or path.suffix.lower() in ENDINGS:
                    if entry.is_symlink():
                        links.append((path, os.path.realpath(path)))
                    else:
                        yield path, os.path.join(real, entry.name)
    yield from links


def _entries(folder: Path) -> list[os.DirEntry]:
    """Give what is in a folder and not hidden, by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted((one for one in entries if not one.name.startswith(".")), key=lambda one: one.name)
    except OSError as error:
        logger.warning("%s: cannot be opened (%s); its recordings are left out.", shown(folder), error.strerror)
        return []


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _log_passed_over(root: Path, passed_over: Counter[str]) -> None:
    kinds = ", ".join(f"{shown(kind)} {count}" for kind, count in passed_over.most_common() if count)
    if kinds:
        logger.warning("%s: %d other files were passed over: %s", root, passed_over.total(), kinds)
