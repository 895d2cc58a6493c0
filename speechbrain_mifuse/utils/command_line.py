"""Words of a command line that name files, whatever they begin with."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.texts import shown

# What flags look like: `-h`, and words of letters, with a value behind `=` or without.
_FLAG = re.compile(r"-h|--[A-Za-z_][A-Za-z0-9_-]*(=.*)?", re.DOTALL)


def file_arguments(words: Sequence[str]) -> list[str]:
    """Give words of a command line with `./` before each existing file whose name begins with a dash."""
    words = list(words)
    end = words.index("--") if "--" in words else len(words)
    return [*(_file_or_flag(word) for word in words[:end]), *words[end:]]


def _file_or_flag(word: str) -> str:
    if not word.startswith("-") or word == "-" or word.startswith("- ") or _is_number(word):
        return word
    is_flag, is_file = _FLAG.fullmatch(word), _exists(word)
    if is_file and is_flag and not is_flag[1]:
        raise UserError(
            f"{shown(word)}: a flag, and a file in this folder. For the file write ./{shown(word)}; for the flag "
            "run in another folder, or rename the file."
        )
    if not is_file and not is_flag:
        raise UserError(f"{shown(word)}: neither a flag nor an existing file. For a file write ./{shown(word)}")
    # A name such as `--csv=a.wav` would make a glob write to a.wav.
    return os.path.join(".", word) if is_file else word


def _exists(word: str) -> bool:
    try:
        return os.path.lexists(word)
    except ValueError:  # a zero byte
        return False


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
