"""Tables of labels, as spreadsheets and people write them: separators, encodings, column names, empty rows."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from speechbrain_mifuse.corpora.manifest import CorpusError
from speechbrain_mifuse.utils.files import bounded_bytes
from speechbrain_mifuse.utils.texts import csv_value, shown

SEPARATORS = (",", ";", "\t")


def read_table(
    table: Path, columns: Mapping[str, Sequence[str]], optional: Sequence[str] = (), quoting: int = csv.QUOTE_MINIMAL
) -> list[tuple[int, dict[str, str]]]:
    r"""Read the rows of a table with a header.

    Parameters
    ----------
    table : pathlib.Path
        Table in UTF-8 or UTF-16, separated by comma, semicolon or tab.
    columns : mapping of str to sequence of str
        Wanted columns, each with other names that it may have.
    optional : sequence of str
        Columns that may be missing; their values are then empty.
    quoting : int
        As in Python's `csv`.

    Returns
    -------
    list of tuple
        Line number, and value by column, of each row that is not empty.

    Raises
    ------
    CorpusError
        If the file cannot be read, lacks a column, or has a row with too many values.

    Example
    -------
    >>> import tempfile
    >>> table = Path(tempfile.mkdtemp()) / "labels.csv"
    >>> _ = table.write_text("Filename;emotion\na.wav;sad\n")
    >>> read_table(table, {"file": ("filename",), "emo": ("emotion",)})
    [(2, {'file': 'a.wav', 'emo': 'sad'})]
    """
    text = _decoded(table)
    # A line by which Excel is told the separator.
    skipped = 1 if re.match(r"sep=.\r?\n", text, re.IGNORECASE) else 0
    text = text.split("\n", 1)[1] if skipped else text
    positions, separator = _layout(table, text, columns, optional)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=True)
    # Where quotation marks are text, no spreadsheet has written the table, and an apostrophe is text too.
    unquoted = str if quoting == csv.QUOTE_NONE else csv_value
    rows = []
    try:
        width = len(next(reader))
        for cells in reader:
            line = reader.line_num + skipped
            if any(cell.strip() for cell in cells[width:]):
                raise CorpusError(
                    f"{table}, line {line}: has {len(cells)} values, the header has {width}. "
                    f"Put a value that contains '{separator}' in double quotes."
                )
            if any(cell.strip() for cell in cells):
                values = {
                    name: unquoted(cells[at].strip()) if at < len(cells) else "" for name, at in positions.items()
                }
                rows.append((line, {name: values.get(name, "") for name in columns}))
    except csv.Error as error:
        raise CorpusError(
            f"{table}, line {reader.line_num + skipped}: cannot be read ({error}). Look for an unpaired quotation mark."
        ) from None
    return rows


def _decoded(table: Path) -> str:
    """Text of a table: UTF-8, or UTF-16 where a byte order mark says so."""
    try:
        data = bounded_bytes(table)
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CorpusError(
            f"{table}: cannot be read ({reason}). Save it in UTF-8 (in Excel: 'CSV UTF-8'), or restore it."
        ) from None
    # Excel can still write the line ends of old Macintoshes. Beside others, they are part of a name.
    return text if "\n" in text else text.replace("\r", "\n")


def _layout(table: Path, text: str, columns: Mapping[str, Sequence[str]], optional: Sequence[str]):
    """Position of each column, and the separator under which the header holds all that are needed."""
    header = text.split("\n", 1)[0].rstrip("\r")
    for separator in SEPARATORS:
        try:
            names = [_plain(cell) for cell in next(csv.reader([header], delimiter=separator), [])]
        except csv.Error as error:
            raise CorpusError(f"{table}, line 1: cannot be read ({error}). Write the names of the columns.") from None
        positions = {}
        for column, others in columns.items():
            accepted = {_plain(other) for other in (column, *others)}
            held = [at for at, name in enumerate(names) if name in accepted]
            exact = [at for at in held if names[at] == _plain(column)]
            if len(exact or held) > 1:
                raise CorpusError(f"{table}: its header names the column '{column}' twice ({shown(header)}). Keep one.")
            positions |= dict.fromkeys([column], *(exact or held)) if held else {}
        if set(columns).difference(optional) <= set(positions):
            return positions, separator
    lacking = [name for name in columns if name not in optional]
    accepted = "; ".join(f"{name}: {', '.join(others)}" for name, others in columns.items() if others)
    raise CorpusError(
        f"{table}: its first line lacks one of the columns {', '.join(lacking)}: '{shown(header[:200])}'. Separate "
        f"columns by comma, semicolon or tab.{f' Other names that are accepted: {accepted}.' if accepted else ''}"
    )


def _plain(name: str) -> str:
    """Name of a column without differences of case and separators."""
    return re.sub(r"[\s_-]+", "_", name.strip()).casefold()
