"""Frozen encoders and the store of the frames they produce."""

import os
import pathlib


def cache_folder():
    """Folder for what is made once and reused: the demo encoder, extracted frames."""
    chosen = os.environ.get("MIFUSE_CACHE")
    if chosen:
        return pathlib.Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "speechbrain_mifuse"
