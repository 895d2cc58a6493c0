"""Captions of labelled utterances: what a dual encoder is trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.zero_shot.prompts import PLACE, PromptSet, checked_lists, checked_texts, read_texts

WHO, UNKNOWN = "{who}", "unknown"
KEYS = ("forms", "people", "words")


@dataclass(frozen=True)
class CaptionSet:
    """Sentences about an utterance: forms x people x words.

    Parameters
    ----------
    name : str
        Where they come from, for messages.
    forms : tuple of str
        Sentences with `{who}` and `{e}`.
    people : mapping of str to tuple of str
        What a speaker is called, by gender; `unknown` fits everyone.
    words : mapping of str to tuple of str
        By label.

    Example
    -------
    >>> people = {"unknown": ("someone",), "female": ("a woman",)}
    >>> captions = CaptionSet("mine", ("{who} is {e}.",), people, {"sad": ("sad", "gloomy")})
    >>> captions.texts("sad", "female")
    ['Someone is sad.', 'Someone is gloomy.', 'A woman is sad.', 'A woman is gloomy.']
    """

    name: str
    forms: tuple[str, ...]
    people: Mapping[str, tuple[str, ...]]
    words: Mapping[str, tuple[str, ...]]

    def texts(self, label: str, gender: str | None = None) -> list[str]:
        """Every caption that fits an utterance, with names of the speaker's gender if `people` has some."""
        if label not in self.words:
            raise UserError(f"{self.name}: words: nothing for '{label}'. Add a line '{label}: [...]'.")
        people = self.people[UNKNOWN] + self.people.get(gender, ())
        return [_sentence(form, who, word) for form in self.forms for who in people for word in self.words[label]]


def _sentence(form: str, who: str, word: str) -> str:
    """Fill a form; its first letter is a capital."""
    text = form.replace(WHO, who).replace(PLACE, word)
    return text[:1].upper() + text[1:]


def draw_caption(count: int, seed: int, epoch: int, utt_id: str) -> int:
    """Choose one of an utterance's captions; what is drawn depends on the arguments alone."""
    digest = hashlib.sha256(f"{seed} {epoch} {utt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % count


def read_captions(path: str | Path, prompts: PromptSet) -> CaptionSet:
    r"""Read a file of captions and add the words of prompts, which stand first.

    Parameters
    ----------
    path : str or pathlib.Path
        Plain YAML: `forms`, sentences with `{who}` and `{e}`; `people`, names of a speaker by gender, `unknown` among
        them; `words`, a list for each label.
    prompts : PromptSet
        What the model is to be scored with: it gives words, and no caption may be one of its sentences.

    Returns
    -------
    CaptionSet
        Named after the file.

    Raises
    ------
    UserError
        If the file cannot be read, a key does not fit, or a form is one of the prompts'.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "mine.yaml"
    >>> text = "forms: ['{who} is {e}.']\npeople:\n  unknown: [someone]\nwords:\n  sad: [gloomy]\n"
    >>> _ = path.write_text(text)
    >>> read_captions(path, PromptSet("p", ("I am {e}!",), {"sad": ("sad",)})).texts("sad")
    ['Someone is sad.', 'Someone is gloomy.']
    """
    content = read_texts(path, KEYS, "hparams/captions/*.yaml")
    forms = checked_texts(content["forms"], f"{path}: forms")
    for form in forms:
        if WHO not in form or PLACE not in form:
            raise UserError(f"{path}: forms: '{form}' needs {WHO}, where the speaker goes, and {PLACE}, the emotion.")
    people, words = (checked_lists(content[key], f"{path}: {key}") for key in ("people", "words"))
    if UNKNOWN not in people:
        raise UserError(f"{path}: people: needs '{UNKNOWN}', names of a speaker of whom nothing is known.")
    words = {
        label: tuple(dict.fromkeys((*prompts.words.get(label, ()), *words.get(label, ()))))
        for label in {**prompts.words, **words}
    }
    found = CaptionSet(str(path), forms, people, words)
    _refuse_prompts(found, prompts)
    return found


def _refuse_prompts(captions: CaptionSet, prompts: PromptSet) -> None:
    """Make sure that no sentence is trained on that the model is scored with."""
    asked = {_plain(text) for label in prompts.words for text in prompts.texts(label)}
    for gender in captions.people:
        for label in captions.words:
            both = asked & {_plain(text) for text in captions.texts(label, gender)}
            if both:
                raise UserError(
                    f"{captions.name}: forms: gives '{min(both)}', which is a prompt of {prompts.name}. "
                    "Captions must be other sentences than those the model is scored with: change the form."
                )


def _plain(text: str) -> str:
    """Text without what makes no difference between sentences."""
    return text.strip(" .!?").lower()
