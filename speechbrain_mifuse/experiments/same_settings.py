"""Settings kept beside results: work that was done with the same ones is skipped, and with others refused."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write, json_object

logger = logging.getLogger(__name__)

# What a digest among the settings is of.
DIGESTS = {
    "train_manifest": "the recordings to train on",
    "manifests": "the recordings",
    "data": "the recordings to adapt to, or the teacher's answers about them,",
    "source": "the source recognizer",
    "encoder": "the encoder",
    "adapter": "the adapter",
}


class SettingsError(UserError):
    """A folder holds work that was done with other settings."""


def same_settings(path: str | Path, settings: Mapping) -> bool:
    """Tell whether a folder's finished or begun work was done with these settings."""
    path, settings = Path(path), json.loads(json.dumps(settings))
    found = _read_settings(path)
    if found is None:
        atomic_write(path, json.dumps(settings, indent=1))
        return False
    require_unchanged(path, {**dict.fromkeys(found), **settings}, found)
    return True


def completed(folder: Path, settings: Mapping, *files: str, what: str) -> bool:
    """Tell whether a folder's work was done with these settings up to its last files; log what is done if so."""
    if not (same_settings(folder / "settings.json", settings) and all((folder / file).exists() for file in files)):
        return False
    logger.info("%s: %s", folder, what)
    return True


def require_unchanged(path: str | Path, wanted: Mapping, found: Mapping | None = None) -> None:
    """Refuse a folder whose work was done with other settings."""
    path = Path(path)
    found = _read_settings(path) if found is None else found
    if found is None:
        return
    differs = _changes(found, json.loads(json.dumps(wanted)))
    if differs:
        raise SettingsError(
            f"{path.parent} holds work of other settings ({'; '.join(differs)}). Pass another --output_folder, delete "
            "that one, or go back to the old settings."
        )


def _read_settings(path: Path) -> dict | None:
    """Read a settings file; `None` where there is none."""
    try:
        return json_object(path) if path.exists() else None
    except ValueError as error:
        raise SettingsError(f"{path}: damaged ({error}). Delete the folder {path.parent}.") from None


def _changes(found: Mapping, wanted: Mapping, prefix: str = "") -> list[str]:
    """Say which of the wanted settings differ, `old -> new`; of a digest only what it is of."""
    lines = []
    for key in sorted(wanted):
        old, new = found.get(key), wanted[key]
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += _changes(old, {**dict.fromkeys(old), **new}, f"{prefix}{key}: ")
        elif any(map(_is_digest, (old, new))):
            lines.append(f"{prefix}{DIGESTS.get(key, key)} changed")
        else:
            lines.append(f"{prefix}{key}: {json.dumps(old)} -> {json.dumps(new)}")
    return lines


def _is_digest(value) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_is_digest, value))
    return isinstance(value, str) and bool(re.fullmatch(r"[0-9a-f]{16}|[0-9a-f]{64}", value))
