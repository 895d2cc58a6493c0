"""Text from elsewhere (names of files, classes, models, replies), made harmless where it is printed or written."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence

# What a spreadsheet takes for the beginning of a formula.
_FORMULA = re.compile("'*[=+\\-@\t\r\n＝＋－＠]")
_NUMBER = re.compile(r"[-+]?((\d+\.?\d*|\.\d+)(e[-+]?\d+)?|inf|nan)", re.IGNORECASE)
# A backslash before one of these, and an underscore inside a word, mean what they are.
_INLINE = re.compile(r"[`*\[\]<>|~$]|\\(?=[^\w\s]|$)|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)")
# What makes a heading, a list, a quotation, a rule or a table of a line that begins with it.
_BLOCK = re.compile(r"^(?:(?=#+(?:\s|$)|[-+](?:\s|$)|--|=+\s*$)|(\d+)(?=[.)](?:\s|$)))")


def shown(text: object) -> str:
    r"""Give a text, such as a path, in one line that every terminal and file can hold."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable(text: str) -> str:
    r"""Give a text of several lines without what commands a terminal, or makes it show something else."""
    return re.sub(r"[^\n\t]+", lambda part: shown(part[0]), text)


def one_line(message: object) -> str:
    r"""Give an error message in one line; details, which the program indents by two spaces, stay below it."""
    return "\n".join(map(shown, re.split(r"\n(?=  )", str(message))))


def first_of(items: Sequence[str], more: str = "more", most: int = 20) -> list[str]:
    """Give lines of a list for people: the first items, and how many more there are."""
    rest = [f"  ... and {len(items) - most} {more}"] if len(items) > most else []
    return [f"  {item}" for item in items[:most]] + rest


def counted(counts: Mapping[str, int]) -> str:
    """List names with their counts, by name."""
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def markdown(text: object) -> str:
    r"""Escape text for a line, list or table of Markdown, where none of it is markup or HTML."""
    # Spaces before it would make code of it, and two behind it a line break.
    return _BLOCK.sub(lambda found: f"{found[1] or ''}\\", markdown_cell(str(text).strip(" ")))


def markdown_cell(text: object) -> str:
    r"""Escape text for the middle of a line or a cell of Markdown, where it can begin no heading, list or rule."""
    return _INLINE.sub(r"\\\g<0>", shown(text))


def code_span(text: object) -> str:
    r"""Write text as code within a line of Markdown."""
    text = shown(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if fence == "`" else f"{fence} {text} {fence}"


def csv_text(rows: Iterable[Sequence]) -> str:
    r"""Write a table as CSV in which no text is a formula to a spreadsheet."""
    text = io.StringIO()
    plain = csv.writer(text, lineterminator="\n")
    # The plain one leaves a carriage return outside quotes, where it ends a row.
    quoting = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in rows:
        cells = [_csv_cell(os.fspath(value) if isinstance(value, os.PathLike) else value) for value in row]
        (quoting if any("\r" in cell for cell in cells if isinstance(cell, str)) else plain).writerow(cells)
    return text.getvalue()


def _csv_cell(value):
    if isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def csv_value(cell: str) -> str:
    """Give the text that `csv_text` wrote into a cell."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell[1:]) else cell
