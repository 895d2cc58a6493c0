"""Model cards of recognisers: who trained what on what, how well it does, and what it is no good for.

Every number comes from the result files that the card is made of; what they do not say, the card does not.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from speechbrain_mifuse import corpora
from speechbrain_mifuse.utils.texts import code_span, markdown

# What an encoder is called in results, where its flag does not say.
ENCODERS = {"demo": "Whisper tiny.en (trained for English speech recognition)"}


def encoder_told(source: str | Path) -> str:
    """Name an encoder in results and on cards."""
    local = Path(source).is_absolute() or Path(source).is_dir()
    return ENCODERS.get(str(source), Path(source).name if local else str(source))


# Labeled recordings, and of each class, from which a calibration or an interval is spoken of. With fewer than 50, the
# 95 % interval of an accuracy is wider than 14 points to either side; the accuracy is a mean over the classes.
MIN_LABELED, MIN_PER_CLASS = 50, 5

CARD = """---
library_name: speechbrain
pipeline_tag: audio-classification
tags: [speech-emotion-recognition, speechbrain, speechbrain-mifuse]
license: other
---

# {title}

{what}

```python
from speechbrain_mifuse.inference.recognizer import EmotionRecognizer

recogniser = EmotionRecognizer.from_hparams("path/to/this/folder")
label, probabilities = recogniser.predict_file("recording.wav")
```

`speechbrain-mifuse predict --source path/to/this/folder RECORDINGS` does the same for files and folders.
Answers: {labels}.

## Training

{training}

## How well it does

{scores}

{calibration}

## Limits

{limits}

## Intended use

Research on speech emotion recognition, and a first look at one's own recordings. Not for decisions about people: not
for hiring, policing, border control, medical diagnosis, insurance, or watching pupils and employees.

## Licence of the recordings it learned from

{licences}

Written by speechbrain-mifuse {version}.
"""
LIMITS = (
    "It tells how speech sounds, not what a person feels: people label the same recording differently.",
    "It knows the classes above and no other. Speech that is none of them gets one of them all the same; a threshold "
    "(`abstain_below`) leaves out what it is unsure of.",
    "Other languages, microphones, ages, or spontaneous in place of acted speech cost accuracy; by how much is not "
    "known before some of it is labelled and counted.",
    "Groups of speakers may fare differently; whoever uses it has to check that for theirs.",
)


def trained_card(about: Mapping) -> str:
    """Write the card of a classifier that was trained with labels."""
    corpus = markdown(about.get("corpus", "a corpus that is not recorded here"))
    counts = ", ".join(f"{count} {markdown(label)}" for label, count in (about.get("counts") or {}).items())
    training = [f"Trained with labels on {corpus}{f' ({counts})' if counts else ''}, speakers apart from those below."]
    training += [f"Encoder: {markdown(about['encoder'])}."] if "encoder" in about else []
    validation = about.get("validation") or {}
    scored = "Not scored."
    if "UA" in validation:
        scored = (
            f"Held-out speakers of {corpus}: {scores_told(validation)}, {validation['n']} recordings. "
            "Speech of another corpus is harder."
        )
    fitted = "fitted on the same held-out speakers, so the probabilities are calibrated for speech like theirs"
    if too_few(validation.get("n"), validation.get("counts")):
        fitted = (
            f"fitted on only {validation['n']} recordings of held-out speakers. Whether they are calibrated cannot be "
            f"told: that takes {MIN_LABELED} labeled recordings, and {MIN_PER_CLASS} of each class"
        )
    return CARD.format(
        title=f"Speech emotion recogniser: {corpus}",
        what=f"A classifier of emotions in speech, trained on {corpus}.",
        labels=", ".join(map(markdown, about["labels"])),
        training=" ".join(training),
        scores=scored,
        calibration=calibration_told(about, fitted),
        limits=bullets(LIMITS),
        licences=bullets(licence_told(name) for name in [about.get("corpus")] if name),
        version=markdown(about["code_version"]),
    )


def adapted_card(about: Mapping, record: Mapping) -> str:
    """Write the card of a student that was adapted to a target."""
    names = [record[role] for role in ("source", "teacher", "target")]
    source, teacher, target = map(markdown, names)
    labelled = record["method"] == "oracle"
    training = (
        f"Started from a classifier of {source} and adapted with the method {code_span(record['method'])} to "
        f"{record['n_train']} recordings of {target}, {'WITH' if labelled else 'without'} their labels; teacher: "
        f"{teacher}. Seed {record['seed']}; kept: {markdown(record['selection'])}. "
        f"Encoder: {markdown(record['encoder'])}."
    )
    scored = "Not scored: the recordings it was adapted to have no labels. Nothing is known of how well it does."
    if record["UA"] is not None:
        scored = (
            f"{target}: {scores_told(record)}, {record['n_test']} recordings. Protocol: {markdown(record['protocol'])}."
        )
    if record.get("warnings"):
        scored += f"\n\nSigns without labels that something went wrong:\n\n{bullets(map(markdown, record['warnings']))}"
    answers = markdown(about.get("temperature_fitted_to", "what both teachers say"))
    fitted = f"fitted without labels, to {answers} of the adaptation recordings: no calibration in the strict sense"
    limits = [
        *LIMITS,
        f"It was adapted to one kind of recordings ({target}) and may be worse than its source on others.",
    ]
    return CARD.format(
        title=f"Speech emotion recogniser: {source} adapted to {target}",
        what=f"A classifier of emotions in speech, trained on {source} and then adapted to {target}.",
        labels=", ".join(map(markdown, about["labels"])),
        training=training,
        scores=scored,
        calibration=calibration_told(about, fitted),
        limits=bullets(limits),
        licences=bullets(licence_told(name) for name in dict.fromkeys(names)),
        version=markdown(about["code_version"]),
    )


def too_few(count: int | None, by_class: Mapping[str, int] | None = None) -> bool:
    """Tell whether there are too few labeled recordings to speak of a calibration or an interval."""
    return (count is not None and count < MIN_LABELED) or any(n < MIN_PER_CLASS for n in (by_class or {}).values())


def scores_told(record: Mapping) -> str:
    """Say UA with its interval, and WA."""
    interval, speakers = "", record.get("test_speakers")
    if too_few(record.get("n_test", record.get("n"))):
        interval = " (too few recordings for an interval)"
    elif speakers == 1:
        interval = " (one speaker: no interval)"
    elif record.get("ci95"):
        low, high = (100 * bound for bound in record["ci95"])
        interval = f" (95 % interval over {f'{speakers} ' if speakers else ''}speakers {low:.1f} to {high:.1f})"
    return f"UA {100 * record['UA']:.1f} %{interval}, WA {100 * record['WA']:.1f} %"


def calibration_told(about: Mapping, fitted: str) -> str:
    """Say what the probabilities are worth."""
    temperature = about.get("temperature", 1.0)
    if temperature == 1.0:
        return "Probabilities are not calibrated (temperature 1): use their order, not their size."
    return f"Probabilities are taken at temperature {temperature:g}, {fitted}."


def licence_told(name: str) -> str:
    """Say what is known of a corpus's licence: the sentence about it at the head of its module."""
    folder = Path(corpora.__file__).parent
    for module in (folder / f"{name}.py", folder / f"{name.rpartition('_')[0]}.py"):
        if re.fullmatch(r"\w+", module.stem) and module.is_file():
            head = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
            told = [part for part in re.split(r"(?<=\.)\s+", head) if "licence" in part.lower()]
            return f"{name}: {' '.join(told[0].split())}" if told else f"{name}: recordings of the user's own."
    return f"{markdown(name)}: no corpus of this package; ask whoever gave it to you."


def bullets(lines: Iterable[str]) -> str:
    r"""Format a list."""
    return "\n".join(f"- {line}" for line in lines) or "- not recorded"
