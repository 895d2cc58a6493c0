"""The pages' templates: text from elsewhere is escaped in HTML and Markdown, and its control characters are visible."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import jinja2

from speechbrain_mifuse.utils.texts import markdown, markdown_cell, printable

FOLDER = Path(__file__).with_name("templates")


@functools.cache
def environment() -> jinja2.Environment:
    """Templates, of which those in HTML escape every value."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER, encoding="utf-8"),
        autoescape=jinja2.select_autoescape(["html"], default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # Markup is a subclass of `str` and made of values that have been here already.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    made.filters |= {"markdown": markdown, "cell": markdown_cell}
    return made


def percent(value: float | None) -> str:
    """Write a fraction in percent; nothing where it is not known."""
    return "" if value is None or math.isnan(value) else f"{100 * value:.1f}"
