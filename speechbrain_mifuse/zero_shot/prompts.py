"""Prompts: what is said about each emotion, in a YAML file for each language (`hparams/prompts/`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import encodable
from speechbrain_mifuse.utils.schemas import plain_yaml
from speechbrain_mifuse.zero_shot.window import known_repeats

PLACE = "{e}"
KEYS = ("forms", "words")


@dataclass(frozen=True)
class PromptSet:
    """Sentences about a speaker with a place for the emotion, and words for each emotion.

    Parameters
    ----------
    name : str
        Where they come from, for messages.
    forms : tuple of str
        Sentences with `{e}`.
    words : mapping of str to tuple of str
        By label; several words of one label are synonyms.

    Example
    -------
    >>> prompts = PromptSet("mine", ("{e} voice.", "I am {e}!"), {"sad": ("sad", "gloomy")})
    >>> prompts.texts("sad")
    ['sad voice.', 'gloomy voice.', 'I am sad!', 'I am gloomy!']
    """

    name: str
    forms: tuple[str, ...]
    words: Mapping[str, tuple[str, ...]]

    def texts(self, label: str) -> list[str]:
        """Every form with every word of a label; without words it is an error."""
        if label not in self.words:
            raise UserError(
                f"{self.name}: words: nothing for the label '{label}'; there is {', '.join(self.words)}. "
                f"Add a line '{label}: [...]'."
            )
        return [form.replace(PLACE, word) for form in self.forms for word in self.words[label]]


def repeated(text: str, times: int) -> str:
    """Repeat a text, joined by one space (M of the paper's amplification)."""
    return " ".join([text] * known_repeats(times, "--text_repeats"))


def read_prompts(path: str | Path) -> PromptSet:
    r"""Read a file of prompts.

    Parameters
    ----------
    path : str or pathlib.Path
        Plain YAML: `forms`, a list of sentences with `{e}`, and `words`, a list of words for each label.

    Returns
    -------
    PromptSet
        Named after the file.

    Raises
    ------
    UserError
        If the file cannot be read or a key does not fit; the message names both.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "mine.yaml"
    >>> _ = path.write_text("forms: ['{e} voice.']\nwords:\n  sad: [sad]\n")
    >>> read_prompts(path).texts("sad")
    ['sad voice.']
    """
    content = read_texts(path, KEYS, "hparams/prompts/*.yaml")
    forms = checked_texts(content["forms"], f"{path}: forms")
    without = [form for form in forms if PLACE not in form]
    if without:
        raise UserError(f"{path}: forms: '{without[0]}' has no {PLACE}, where the emotion's word goes.")
    words = checked_lists(content["words"], f"{path}: words")
    return PromptSet(str(path), forms, words)


def read_texts(path: str | Path, keys: Sequence[str], example: str) -> Mapping:
    """Read a plain YAML file that must hold some keys and no others."""
    try:
        content = plain_yaml(path)
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as YAML ({error}). Name a file like {example}.") from None
    if not isinstance(content, Mapping) or set(content) != set(keys):
        raise UserError(f"{path}: must hold the keys {', '.join(keys[:-1])} and {keys[-1]}, and no others.")
    return content


def checked_lists(value, place: str) -> dict[str, tuple[str, ...]]:
    """Check that a value is lists of texts by name."""
    if not isinstance(value, Mapping) or not value:
        raise UserError(f"{place}: must be lists of texts by name, as 'sad: [sad, gloomy]'.")
    return {str(key): checked_texts(some, f"{place}: {key}") for key, some in value.items()}


def checked_texts(value, place: str) -> tuple[str, ...]:
    """Check that a value is a list of texts."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    fits = is_list and all(isinstance(text, str) and text.strip() and encodable(text) for text in value)
    if not fits or len(set(value)) < len(value):
        raise UserError(f"{place}: {repr(value)[:200]} must be a list of different texts, as [one, two].")
    return tuple(value)
