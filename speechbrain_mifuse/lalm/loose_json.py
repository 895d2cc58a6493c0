"""JSON as language models write it: among prose, with other quotes, commas too many, numbers with a comma or percent.

Strict JSON is read as it stands. Only where something remains that looks like the beginning of an object or a list are
the usual deviations repaired, each without a guess; what is still unreadable then is an error, because the part that
could be read may not be the whole answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

# Brackets that may begin no JSON value; more are tried in vain only in a text made to take long.
MAX_FALSE_BRACKETS = 100

_OPENING = re.compile(r"[{\[]")
_QUOTES, _ENDING = "'\"“”„«»‘’", r"(?=\s*[:,}\]])"
# The beginning of an object or a list of objects or strings that was not read.
_UNREAD = re.compile(rf"\{{\s*(?:[{_QUOTES}\\]|\w+\s*:)|\[\s*[{{{_QUOTES}\\]")
_DEVIATION = re.compile(
    rf"""
      (?P<kept>"(?:[^"\\]|\\.)*")
    | (?P<escaped_quote>\\")
    | (?P<surplus_comma>,(?=\s*[}}\]]))
    | (?<![\w'’])['“”„«»‘](?P<quoted>[^{_QUOTES}\\\n{{}}]*)['\"“”»«’‘]{_ENDING}
    | (?<=[{{,])\s*(?P<bare_key>[^\W\d]\w*)(?=\s*:)
    | (?<=:)\s*(?P<constant>None|True|False){_ENDING}
    | (?<=:)\s*(?P<number>\d+(?:[.,]\d+)?\s*%|\d+,\d+|\.\d+){_ENDING}
    """,
    re.VERBOSE,
)
_LINES = re.compile(r"[\n;]|,\s")
_CELLS = re.compile(r"[:=|\t]|\s[-–—→]+>?\s")
_MARKS = " \r*_`'\"•#>()~≈"
_NUMBER = re.compile(r"(?:\d+(?:[.,]\d*)?|\.\d+)(?:e-?\d+)?\s*%?")
_NUMBERING = re.compile(r"^(?:\d+[.)]|[-–+])\s+")
_CONSTANTS = {"None": "null", "True": "true", "False": "false"}
_REPAIRS = {
    "kept": str,
    "escaped_quote": lambda _: '"',
    "surplus_comma": lambda _: "",
    "quoted": json.dumps,
    "bare_key": json.dumps,
    "constant": _CONSTANTS.__getitem__,
    "number": json.dumps,
}


def json_values(text: str) -> tuple[list, str]:
    """Read all outermost JSON objects and lists of a text."""
    values, beside = _decoded(text)
    if not _UNREAD.search(beside):
        return values, beside
    values, beside = _decoded(_DEVIATION.sub(_repaired, text))
    if _UNREAD.search(beside):
        raise ValueError("JSON that is incomplete or cannot be read")
    return values, beside


def walk(values: Iterable) -> Iterator:
    """Give decoded values and all that they hold, however deep, also what is JSON in a string."""
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        yield value
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
            waiting += json_values(value)[0]


def number_lines(text: str) -> tuple[list[tuple[str, str]], str]:
    r"""Read lines (or clauses) that are a name and a number, as of a table or an enumeration."""
    pairs, beside = [], []
    for line in _LINES.split(text):
        cells = [cell for part in _CELLS.split(line.strip()) if (cell := part.strip(_MARKS))]
        cells = cells[0].rsplit(None, 1) if len(cells) == 1 else cells
        if len(cells) == 2 and _NUMBER.fullmatch(cells[1]):
            pairs.append((_NUMBERING.sub("", cells[0]).strip(_MARKS), cells[1]))
        else:
            beside.append(line)
    return pairs, " ".join(beside)


def distinct(pairs: Iterable[tuple[str, object]]) -> dict:
    """Make a dictionary of pairs."""
    made: dict = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"duplicate key {key[:40]!r}")
        made[key] = value
    return made


def unquoted(text: str) -> str:
    r"""Give the content of a text that is one JSON string, and any other text as it is."""
    if text[:1] != '"':
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value.strip()


def _repaired(match: re.Match) -> str:
    return _REPAIRS[match.lastgroup](match[match.lastgroup])


def _decoded(text: str) -> tuple[list, str]:
    """Give strict JSON values and what stands beside them."""
    decoder = json.JSONDecoder(object_pairs_hook=distinct)
    values, beside, end, position, false = [], [], 0, 0, 0
    while (opening := _OPENING.search(text, position)) is not None:
        try:
            value, position = decoder.raw_decode(text, opening.start())
        except (json.JSONDecodeError, RecursionError):
            position, false = opening.end(), false + 1
            if false > MAX_FALSE_BRACKETS:
                raise ValueError(f"more than {MAX_FALSE_BRACKETS} brackets that begin no JSON value") from None
        else:
            values.append(value)
            beside.append(text[end : opening.start()])
            end = position
    return values, " ".join([*beside, text[end:]])
