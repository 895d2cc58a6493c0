"""Words for emotions, as folders and tables name them: which class they are, or that they are outside the four."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection

# Emotion by language; those that are not among the four classes are left out under their name.
LANGUAGES = {
    "English": {
        "angry": ("angry", "anger"),
        "happy": ("happy", "happiness", "joy"),
        "neutral": ("neutral", "neutrality"),
        "sad": ("sad", "sadness"),
        "fearful": ("fear", "fearful"),
        "disgust": ("disgust", "disgusted"),
        "surprised": ("surprise", "surprised", "pleasant surprise", "pleasant surprised"),
        "calm": ("calm",),
        "bored": ("boredom", "bored"),
        "excited": ("excited", "excitement"),
        "frustrated": ("frustration", "frustrated"),
        "contempt": ("contempt",),
        "other": ("other", "others"),
    },
    "German": {
        "angry": ("wut", "ärger", "aerger", "wütend", "ärgerlich"),
        "happy": ("freude", "glücklich", "fröhlich"),
        "neutral": ("neutral",),
        "sad": ("trauer", "traurig", "traurigkeit"),
        "fearful": ("angst", "ängstlich"),
        "disgust": ("ekel",),
        "surprised": ("überraschung", "ueberraschung", "überrascht"),
        "bored": ("langeweile", "gelangweilt"),
    },
    "Polish": {
        "angry": ("złość", "gniew", "zlosc"),
        "happy": ("radość", "szczęście", "radosc"),
        "neutral": ("neutralny", "neutralność", "neutralne"),
        "sad": ("smutek",),
        "fearful": ("strach",),
        "disgust": ("wstręt",),
        "surprised": ("zaskoczenie", "zdziwienie"),
    },
    "French": {
        "angry": ("colère", "colere"),
        "happy": ("joie",),
        "neutral": ("neutre",),
        "sad": ("tristesse",),
        "fearful": ("peur",),
        "disgust": ("dégoût", "degout"),
        "surprised": ("surprise",),
    },
    "Italian": {
        "angry": ("rabbia",),
        "happy": ("gioia", "felicità"),
        "neutral": ("neutrale", "neutro", "neutralità"),
        "sad": ("tristezza",),
        "fearful": ("paura",),
        "disgust": ("disgusto",),
        "surprised": ("sorpresa",),
    },
    "Spanish": {
        "angry": ("ira", "enfado", "enojo"),
        "happy": ("alegría", "alegria", "felicidad"),
        "neutral": ("neutral", "neutro"),
        "sad": ("tristeza",),
        "fearful": ("miedo",),
        "disgust": ("asco",),
        "surprised": ("sorpresa",),
    },
    "Chinese": {
        "angry": ("生气", "愤怒"),
        "happy": ("快乐", "高兴", "开心"),
        "neutral": ("中立", "中性"),
        "sad": ("伤心", "悲伤"),
        "fearful": ("恐惧", "害怕"),
        "disgust": ("厌恶",),
        "surprised": ("惊喜", "惊讶"),
    },
    "abbreviated": {
        "angry": ("ang",),
        "happy": ("hap",),
        "neutral": ("neu",),
        "sad": ("sad",),
        "fearful": ("fea",),
        "disgust": ("dis",),
        "surprised": ("sur",),
        "excited": ("exc",),
        "frustrated": ("fru",),
        "other": ("oth", "xxx"),
    },
}


def plain(name: str) -> str:
    """Give a name in the form in which names are compared."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFC", name)).strip().casefold()


WORDS = {
    language: {plain(word): emotion for emotion, words in emotions.items() for word in words}
    for language, emotions in LANGUAGES.items()
}


def emotion_of(word: str) -> str | None:
    """Translate one word that is said to be an emotion, as in a column of labels."""
    return next((words[plain(word)] for words in WORDS.values() if plain(word) in words), None)


def all_emotions(names: Collection[str]) -> dict[str, str] | None:
    """Translate names of which nobody said that they are emotions: all of them, in one language, or none."""
    for words in WORDS.values():
        if all(plain(name) in words for name in names):
            found = {name: words[plain(name)] for name in names}
            return found if len(set(found.values())) > 1 else None
    return None


def resembling(names: Collection[str]) -> dict[str, str]:
    """Find the names that look like emotions, to say so where they are not enough to go by."""
    alone, parts = {}, {}
    for name in names:
        emotion = emotion_of(name)
        if emotion not in (None, "other") and (plain(name) == "sad" or plain(name) not in WORDS["abbreviated"]):
            alone[name] = emotion
        tokens = re.split(r"[\W\d_]+", plain(name))
        held = [emotion_of(token) for token in tokens if emotion_of(token)]
        parts |= {name: held[-1]} if held else {}
    return parts | alone if len(set(parts.values())) > 1 else alone
