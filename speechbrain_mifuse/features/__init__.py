"""Frozen encoders and the store of the frames they produce."""

import os
import pathlib


def cache_folder():
    """Folder for what is made once and reused: the demo encoder, extracted frames.

    ``MIFUSE_CACHE`` if it is set, else ``speechbrain_mifuse`` in the user's cache folder (``XDG_CACHE_HOME``, by
    default ``~/.cache``). The folder is not created here.

    Returns
    -------
    pathlib.Path

    Example
    -------
    >>> import os
    >>> from unittest import mock
    >>> with mock.patch.dict(os.environ, {"MIFUSE_CACHE": "/data/cache"}):
    ...     cache_folder().as_posix()
    '/data/cache'
    """
    chosen = os.environ.get("MIFUSE_CACHE")
    if chosen:
        return pathlib.Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "speechbrain_mifuse"
