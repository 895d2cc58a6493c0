"""Model cards: who trained what on what, how well it does, and what it is no good for.

Every number comes from the result files that the card is made of; what they do not say, the card does not. No name from
elsewhere reaches the front matter, and in the text each one is escaped.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from speechbrain_mifuse import corpora, demo
from speechbrain_mifuse.utils.model_folder import bullets, card_text
from speechbrain_mifuse.utils.texts import code_span, markdown

# What an encoder is called in results, where its flag does not say.
ENCODERS = {"demo": "Whisper tiny.en (trained for English speech recognition)"}

# Labeled recordings, and of each class, from which a calibration or an interval is spoken of. With fewer than 50, the
# 95 % interval of an accuracy is wider than 14 points to either side; the accuracy is a mean over the classes.
MIN_LABELED, MIN_PER_CLASS = 50, 5

RECOGNIZE = """```python
from speechbrain_mifuse.inference import EmotionRecognizer

recogniser = EmotionRecognizer.from_hparams("path/to/this/folder")
label, probabilities = recogniser.predict_file("recording.wav")
```"""
SCORE = """```python
from speechbrain_mifuse.zero_shot.own_dual_encoder import load_dual_encoder

model = load_dual_encoder("path/to/this/folder")
```"""
COMMAND = """`speechbrain-mifuse predict --source path/to/this/folder RECORDINGS` does the same for files and folders.
Answers: {labels}."""
INTENDED = """\
Research on speech emotion recognition, and a first look at one's own recordings. Not for decisions about people: not
for hiring, policing, border control, medical diagnosis, insurance, or watching pupils and employees."""
LIMITS = (
    "It tells how speech sounds, not what a person feels: people label the same recording differently.",
    "It knows the classes above and no other. Speech that is none of them gets one of them all the same; a threshold "
    "(`abstain_below`) leaves out what it is unsure of.",
    "Other languages, microphones, ages, or spontaneous in place of acted speech cost accuracy; by how much is not "
    "known before some of it is labelled and counted.",
    "Groups of speakers may fare differently; whoever uses it has to check that for theirs.",
)


def encoder_told(source: str | Path) -> str:
    """Name an encoder in results and on cards."""
    return ENCODERS.get(str(source), _without_folder(source))


def _without_folder(source: str | Path) -> str:
    return Path(source).name if Path(source).is_absolute() or Path(source).is_dir() else str(source)


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
    title, what = f"Speech emotion recogniser: {corpus}", f"A classifier of emotions in speech, trained on {corpus}."
    names = [about["corpus"]] if about.get("corpus") else []
    return _recognizer_card(about, title, what, " ".join(training), scored, fitted, LIMITS, names)


def adapted_card(about: Mapping, record: Mapping) -> str:
    """Write the card of a student that was adapted to a target."""
    names = [record[role] for role in ("source", "teacher", "target")]
    source, teacher, target = map(markdown, names)
    # Results from before traits were recorded knew one upper bound.
    uses_labels = record.get("traits", {}).get("training") == "labels" or record["method"] == "oracle"
    training = (
        f"Started from a classifier of {source} and adapted with the method {code_span(record['method'])} to "
        f"{record['n_train']} recordings of {target}, {'WITH' if uses_labels else 'without'} their "
        f"labels; teacher: {teacher}. Seed {record['seed']}; kept: {markdown(record['selection'])}. "
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
    own = f"It was adapted to one kind of recordings ({target}) and may be worse than its source on others."
    title = f"Speech emotion recogniser: {source} adapted to {target}"
    what = f"A classifier of emotions in speech, trained on {source} and then adapted to {target}."
    return _recognizer_card(about, title, what, training, scored, fitted, [*LIMITS, own], dict.fromkeys(names))


def _recognizer_card(
    about: Mapping,
    title: str,
    what: str,
    training: str,
    scored: str,
    fitted: str,
    limits: Iterable[str],
    names: Iterable[str],
) -> str:
    temperature = about.get("temperature", 1.0)
    calibrated = f"Probabilities are taken at temperature {temperature:g}, {fitted}."
    if temperature == 1.0:
        calibrated = "Probabilities are not calibrated (temperature 1): use their order, not their size."
    use = f"{RECOGNIZE}\n\n{COMMAND.format(labels=', '.join(map(markdown, about['labels'])))}"
    sections = {
        "Training": training,
        "How well it does": f"{scored}\n\n{calibrated}",
        "Limits": bullets(limits),
        "Intended use": INTENDED,
        "Licence of the recordings it learned from": bullets(map(licence_told, names)),
    }
    return card_text("audio-classification", title, f"{what}\n\n{use}", sections, about)


def dual_encoder_card(about: Mapping) -> str:
    """Write the card of a dual encoder."""
    training = (
        f"Trained on captions made from labels. Speech encoder: {markdown(encoder_told(about['encoder']))}; "
        f"text encoder: {markdown(_without_folder(about['text_encoder']['source']))}."
    )
    classes = ", ".join(map(markdown, about["classes_known"]))
    known = f"It knows only these classes: {classes}. For another its scores say nothing."
    sections = {
        "Training": training,
        "Limits": bullets([known, *LIMITS[2:]]),
        "Intended use": INTENDED,
        "Licence of the recordings it learned from": bullets(map(licence_told, about.get("trained_on", ()))),
    }
    what = "Projections of frozen encoders of speech and text into one space."
    return card_text("audio-classification", "Dual encoder of speech and text", f"{what}\n\n{SCORE}", sections, about)


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


def licence_told(name: str) -> str:
    """Say what is known of a corpus's licence: the sentence about it at the head of its module."""
    # A part of a corpus, such as synthetic_A, is named after it.
    whole = name.rpartition("_")[0]
    for room, stem in ((corpora, name), (corpora, whole), (demo, whole)):
        module = Path(room.__file__).parent / f"{stem}.py"
        if re.fullmatch(r"\w+", module.stem) and module.is_file():
            head = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
            told = [part for part in re.split(r"(?<=\.)\s+", head) if "licence" in part.lower()]
            return f"{name}: {' '.join(told[0].split())}" if told else f"{name}: recordings of the user's own."
    return f"{markdown(name)}: no corpus of this package; ask whoever gave it to you."
