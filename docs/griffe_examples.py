"""Reads the section `Example` of the package's docstrings as NumPy's `Examples`, the only form that griffe knows."""

import re

import griffe

SECTION = re.compile(r"^([ \t]*)Example\n[ \t]*-+$", re.MULTILINE)


class Examples(griffe.Extension):
    """Renames the section in every docstring before it is parsed."""

    def on_object(self, *, obj, **kwargs):
        """Rename the section in one docstring."""
        if obj.docstring:
            obj.docstring.value = SECTION.sub(r"\1Examples\n\1--------", obj.docstring.value)
