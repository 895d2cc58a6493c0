"""Prompts: what is said about each emotion, in a YAML file for each language (`hparams/prompts/`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from speechbrain_mifuse.utils.errors import UserError
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
        """Every form with every word of a label.

        Parameters
        ----------
        label : str
            As the corpora name it.

        Returns
        -------
        list of str
            At least one.

        Raises
        ------
        UserError
            If there are no words for it.
        """
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
    try:
        content = plain_yaml(path)
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as YAML ({error}). Name a file like hparams/prompts/*.yaml.") from None
    if not isinstance(content, Mapping) or set(content) != set(KEYS):
        raise UserError(f"{path}: must hold the keys {' and '.join(KEYS)}, and no others.")
    forms = checked_texts(content["forms"], f"{path}: forms")
    without = [form for form in forms if PLACE not in form]
    if without:
        raise UserError(f"{path}: forms: '{without[0]}' has no {PLACE}, where the emotion's word goes.")
    if not isinstance(content["words"], Mapping) or not content["words"]:
        raise UserError(f"{path}: words: must be lists of words by label, as 'sad: [sad, gloomy]'.")
    words = {str(label): checked_texts(some, f"{path}: words: {label}") for label, some in content["words"].items()}
    return PromptSet(str(path), forms, words)


def checked_texts(value, place: str) -> tuple[str, ...]:
    """Check that a value is a list of texts."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    if not is_list or not all(isinstance(text, str) and text.strip() for text in value) or len(set(value)) < len(value):
        raise UserError(f"{place}: {repr(value)[:200]} must be a list of different texts, as [one, two].")
    return tuple(value)
