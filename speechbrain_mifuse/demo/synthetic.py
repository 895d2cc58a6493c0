"""Three SYNTHETIC emotional-speech domains for the demo and the tests, rendered on the spot with eSpeak NG.

Everything in here is synthetic: a formant synthesiser reads neutral sentences while its prosody is moved by rule. No
human voice and no listener took part, so **no number measured on these clips says anything about human speech**; they
show that the programs run, that a domain gap exists, and that adaptation moves a score.

Domains: A, source (General American, studio); B, target (Scottish English, telephone: 300-3400 Hz, mu-law, noise); C,
the teacher's corpus (Received Pronunciation, reverberant room). Each has ten speakers, voice variants that no other
domain uses, who say seven of ten sentences in four emotions: 280 clips of about 1 to 3 s, 16 kHz, mono, 16 bit. A
speaker says the same sentences in every emotion, so that words carry no emotion.

Prosody: the direction of each cue follows the reviews of Juslin & Laukka (2003, Psychological Bulletin 129, 770-814,
doi 10.1037/0033-2909.129.5.770) and Scherer (2003, Speech Communication 40, 227-256, doi
10.1016/S0167-6393(02)00084-5): anger fast, loud, high and variable pitch, much high-frequency energy, irregular;
happiness fast, high and very variable pitch, rising, regular; sadness slow with pauses, soft, low, flat and falling
pitch, little high-frequency energy. Speakers and clips deviate from them, and each domain stresses the cues
differently. The sizes are ours, tuned while looking at accuracies on all three domains, the target included, until
the task was neither trivial nor hopeless: one more reason not to take a number from here for evidence.

Reproducibility: a clip's bytes depend on its id, the seed, these settings, the platform and the versions of eSpeak NG
and NumPy, never on what was rendered before.
Licence: eSpeak NG is GPL-3.0-or-later software, loaded at run time from the package `espeakng-loader` and no part of
this one; the sound it makes is free of that licence. The sentences are ours.
Split policy: speaker-independent. Speakers are dealt to the splits in numerical order, which alternates the sexes.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile

from speechbrain_mifuse.corpora.corpus import Corpus
from speechbrain_mifuse.corpora.manifest import LABELS, CorpusError, Utterance
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.utils.progress import progress

SAMPLE_RATE = 16000
ESPEAK_RATE = 22050
TAKES = 7
# Raised whenever unchanged settings would give other samples, so that old folders are not continued.
RENDERING = 1

# rate, range: per cent; pitch, contour (end against start): semitones; level: dB; tilt: dB per octave around 1 kHz;
# pause: 10 ms after each word; tremor: per cent of the pitch. All against the speaker's neutral voice.
CUES = ("rate", "pitch", "range", "level", "tilt", "pause", "contour", "tremor")
PROSODY = {
    "angry": (20.0, 2.0, 30.0, 7.0, 3.0, 0.0, 0.0, 4.0),
    "happy": (12.0, 7.0, 80.0, 3.0, 1.5, 0.0, 3.0, 0.0),
    "neutral": (0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.5),
    "sad": (-18.0, -2.5, -60.0, -6.0, -2.0, 1.5, -3.0, 1.0),
}
SPEAKER_SPREAD = (4.0, 1.0, 8.0, 1.5, 0.8, 0.3, 0.3, 0.2)
CLIP_SPREAD = (3.5, 0.8, 8.0, 1.2, 0.5, 0.4, 0.5, 0.3)
# Logarithmic spread of how strongly a speaker uses each cue, and of how intense the emotion of one clip is.
HABIT_SPREAD = 0.2
INTENSITY_SPREAD = 0.2

SENTENCES = (
    "The letter is on the kitchen table.",
    "They will come back on Monday morning.",
    "The meeting starts at half past nine.",
    "She left her coat in the other room.",
    "The train to the coast is at the station.",
    "We moved the boxes to the second floor.",
    "He has put the keys next to the door.",
    "The shop on the corner opens at ten.",
    "I will call you about it this evening.",
    "The water in the glass is for the plants.",
)


@dataclass(frozen=True)
class Domain:
    """One synthetic domain: who speaks which accent over which channel, and how emotions are expressed."""

    language: str
    voices: tuple[str, ...]
    channel: str
    rate: float
    style: tuple[float, ...]


DOMAINS = {
    "A": Domain(
        language="en-us",
        voices=("m1", "f1", "m4", "f4", "Alex", "Annie", "Mike", "linda", "john", "steph"),
        channel="studio",
        rate=210,
        style=(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    ),
    "B": Domain(
        language="en-gb-scotland",
        voices=("m2", "f2", "m6", "steph2", "Denis", "grandma", "Gene2", "belinda", "robert", "shelby"),
        channel="telephone",
        rate=215,
        style=(1.1, 0.9, 1.0, 0.9, 1.1, 1.1, 0.9, 1.0),
    ),
    "C": Domain(
        language="en-gb-x-rp",
        voices=("m3", "f3", "m7", "f5", "Hugo", "anika", "ed", "aunty", "gustave", "steph3"),
        channel="room",
        rate=210,
        style=(1.2, 1.2, 1.1, 1.0, 1.1, 1.2, 1.1, 1.1),
    ),
}


@dataclass(frozen=True)
class Clip:
    """One clip of a synthetic domain, described before it is rendered."""

    clip_id: str
    speaker: str
    emo: str
    voice: str
    text: str


def speakers(domain: str) -> list[str]:
    """Speakers of a domain, in the fixed order in which they are dealt to splits."""
    _known(domain)
    return [f"{domain.lower()}{number:02d}" for number in range(1, len(DOMAINS[domain].voices) + 1)]


def _known(domain: str) -> None:
    if domain not in DOMAINS:
        raise CorpusError(f"No synthetic domain '{domain}'; there are {', '.join(DOMAINS)}.")


def list_clips(domain: str) -> list[Clip]:
    """List every clip of a domain, balanced over speakers and emotions.

    Example
    -------
    >>> clips = list_clips("A")
    >>> len(clips), clips[0].clip_id
    (280, 'syna-a01-angry-0')
    """
    clips = []
    for number, speaker in enumerate(speakers(domain)):
        spec = DOMAINS[domain]
        voice = f"{spec.language}+{spec.voices[number]}"
        for emo in LABELS:
            for take in range(TAKES):
                # Shifted by speaker: all sentences occur, and a speaker says the same ones in every emotion.
                text = SENTENCES[(take + number) % len(SENTENCES)]
                clips.append(Clip(f"syn{domain.lower()}-{speaker}-{emo}-{take}", speaker, emo, voice, text))
    return clips


def generator(seed: int, name: str) -> np.random.Generator:
    """Random numbers that belong to a name, whatever was drawn for other names."""
    return np.random.default_rng([seed, *name.encode()])


def draw_prosody(clip: Clip, style: Iterable[float], seed: int) -> dict[str, float]:
    """Prosody of a clip: the emotion's correlates in the domain's style, as this speaker uses them, plus variation."""
    own, now = generator(seed, clip.speaker), generator(seed, f"{clip.clip_id} prosody")
    voice = own.normal(0.0, SPEAKER_SPREAD)
    habit = np.exp(own.normal(0.0, HABIT_SPREAD, len(CUES)))
    intensity = np.exp(now.normal(0.0, INTENSITY_SPREAD))
    emotion = intensity * habit * np.asarray(tuple(style)) * np.asarray(PROSODY[clip.emo])
    return dict(zip(CUES, (voice + emotion + now.normal(0.0, CLIP_SPREAD)).tolist(), strict=True))


def _loader():
    try:
        import espeakng_loader
    except ImportError:
        raise CorpusError(
            "The synthetic domains need eSpeak NG, which the package 'espeakng-loader' brings along. "
            'Install the demo extra: pip install "speechbrain-mifuse[demo]"'
        ) from None
    return espeakng_loader


@contextmanager
def fresh_espeak() -> Iterator[ctypes.CDLL]:
    """Load eSpeak NG with untouched state, and unload it afterwards."""
    import _ctypes

    package = _loader()
    try:
        library = ctypes.CDLL(package.get_library_path())
    except OSError as error:
        raise CorpusError(f"eSpeak NG cannot be loaded ({error}). Reinstall the package 'espeakng-loader'.") from None
    try:
        synchronous, no_exit = 2, 0x8000
        rate = library.espeak_Initialize(synchronous, 0, str(package.get_data_path()).encode(), no_exit)
        if rate != ESPEAK_RATE:
            raise CorpusError(f"eSpeak NG did not start (answer {rate}). Reinstall the package 'espeakng-loader'.")
        yield library
    finally:
        library.espeak_Terminate()
        close = getattr(_ctypes, "dlclose", None) or _ctypes.FreeLibrary
        close(library._handle)


def speak(text: str, voice: str, rate: int, pitch: int, pitch_range: int, pause: int, seed: int) -> np.ndarray:
    """Synthesise one sentence with eSpeak NG."""
    pieces = []
    receiver = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

    @receiver
    def receive(samples, count, _events):
        if samples and count > 0:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).astype(np.float64))
        return 0

    settings = {1: rate, 3: pitch, 4: pitch_range, 7: pause}
    with fresh_espeak() as library:
        library.espeak_SetSynthCallback(receive)
        library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise CorpusError(f"eSpeak NG has no voice '{voice}'. Reinstall the package 'espeakng-loader'.")
        for parameter, value in settings.items():
            library.espeak_SetParameter(parameter, value, 0)
        data, utf8 = text.encode() + b"\0", 1
        library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 1, 0, utf8, None, None)
    if not pieces:
        raise CorpusError(f"eSpeak NG made no sound for '{text}'. Reinstall the package 'espeakng-loader'.")
    return np.concatenate(pieces) / 32768


def warp(wave: np.ndarray, contour: float, tremor: float, rng: np.random.Generator) -> np.ndarray:
    """Bend the pitch over an utterance by reading it at a varying speed."""
    place = np.arange(len(wave)) / len(wave)
    knots = max(len(wave) // (ESPEAK_RATE // 40), 2)
    irregular = np.interp(place, np.linspace(0, 1, knots), rng.normal(0, max(tremor, 0.0) / 100, knots))
    speed = np.exp2(contour / 12 * (place - 0.5)) * (1 + irregular)
    position = np.cumsum(speed) - speed[0]
    return np.interp(position[position < len(wave)], np.arange(len(wave)), wave)


def resample(wave: np.ndarray) -> np.ndarray:
    """Bring eSpeak NG's 22,050 Hz to 16,000 Hz by cutting the spectrum."""
    # 22,050 : 16,000 = 441 : 320, so whole blocks keep both lengths integer and the cut is exact.
    blocks = -(-len(wave) // 441)
    spectrum = np.fft.rfft(wave, blocks * 441)[: blocks * 160 + 1]
    return np.fft.irfft(spectrum, blocks * 320) * (320 / 441)


def tilt(wave: np.ndarray, slope: float) -> np.ndarray:
    """Slope the spectrum around 1 kHz."""
    frequency = np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE)
    gain = 10 ** (slope * np.log2(np.maximum(frequency, 250) / 1000) / 20)
    return np.fft.irfft(np.fft.rfft(wave) * gain, len(wave))


def noise(length: int, level: float, rng: np.random.Generator) -> np.ndarray:
    """White noise."""
    return rng.normal(0.0, 10 ** (level / 20), length)


def band_pass(wave: np.ndarray, low: float, high: float) -> np.ndarray:
    """Keep a band, with edges that fall off over 50 Hz at the bottom and 150 Hz at the top."""
    frequency = np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE)
    gain = np.interp(frequency, [low - 50, low, high, high + 150], [0.0, 1.0, 1.0, 0.0])
    return np.fft.irfft(np.fft.rfft(wave) * gain, len(wave))


def studio(wave: np.ndarray, own: np.random.Generator, now: np.random.Generator) -> np.ndarray:
    """Close microphone in a quiet room: nothing but a noise floor."""
    return wave + noise(len(wave), own.uniform(-64.0, -54.0), now)


def telephone(wave: np.ndarray, own: np.random.Generator, now: np.random.Generator) -> np.ndarray:
    """Telephone: treble-lifting handset, 300-3400 Hz, line noise, eight-bit mu-law (mu = 255), recorder noise."""
    line = band_pass(tilt(wave, 3.0), 300, 3400) + noise(len(wave), own.uniform(-52.0, -46.0), now)
    line = np.clip(line, -1.0, 1.0)
    compressed = np.sign(line) * np.log1p(255 * np.abs(line)) / np.log(256)
    steps = np.round(compressed * 127) / 127
    expanded = np.sign(steps) * np.expm1(np.abs(steps) * np.log(256)) / 255
    return band_pass(expanded, 300, 3400) + noise(len(wave), -72.0, now)


def room(wave: np.ndarray, own: np.random.Generator, now: np.random.Generator) -> np.ndarray:
    """Distant microphone: exponentially decaying reverberation (0.2 to 0.5 s to -60 dB) and background noise."""
    decay, direct_to_reverb = own.uniform(0.2, 0.5), own.uniform(3.0, 9.0)
    seconds = np.arange(320 * round(decay * SAMPLE_RATE / 320)) / SAMPLE_RATE
    tail = own.normal(size=len(seconds)) * 10 ** (-3 * seconds / decay)
    tail *= 10 ** (-direct_to_reverb / 20) / np.sqrt(np.sum(tail**2))
    tail[0] += 1.0
    size = len(wave) + len(tail)
    wet = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(tail, size), size)[: len(wave)]
    return wet + noise(len(wave), own.uniform(-54.0, -46.0), now)


CHANNELS: dict[str, Callable] = {"studio": studio, "telephone": telephone, "room": room}


def render_clip(clip: Clip, domain: Domain, seed: int = 0) -> np.ndarray:
    """Render one clip: draw its prosody, synthesise, shape, and send it through the domain's channel."""
    cue, now = draw_prosody(clip, domain.style, seed), generator(seed, clip.clip_id)
    wave = speak(
        clip.text,
        clip.voice,
        rate=round(domain.rate * (1 + np.clip(cue["rate"], -30, 40) / 100)),
        pitch=int(np.clip(round(50 + 50 / 12 * cue["pitch"]), 0, 99)),
        pitch_range=int(np.clip(round(50 * (1 + cue["range"] / 100)), 5, 99)),
        pause=int(np.clip(round(cue["pause"]), 0, 4)),
        seed=int(now.integers(1, 2**31)),
    )
    wave = tilt(resample(warp(wave, cue["contour"], cue["tremor"], now)), cue["tilt"])
    wave *= 10 ** ((cue["level"] - 26.0) / 20) / np.sqrt(np.mean(wave**2))
    # Whole blocks of 320 samples: a Fourier transform of a prime length takes many times as long.
    wave = np.pad(wave, 320 * now.integers(3, 8, 2))
    wave = CHANNELS[domain.channel](wave, generator(seed, f"{clip.speaker} {domain.channel}"), now)
    wave *= min(1.0, 0.99 / np.abs(wave).max())
    return np.round(wave * 32767).astype(np.int16)


def fingerprint(domain: str, seed: int) -> dict[str, object]:
    """Summarise what the samples of a domain depend on: equal fingerprints, equal clips."""
    spreads = (SPEAKER_SPREAD, CLIP_SPREAD, HABIT_SPREAD, INTENSITY_SPREAD)
    settings = json.dumps([RENDERING, TAKES, SENTENCES, asdict(DOMAINS[domain]), PROSODY, spreads])
    return {
        "synthetic": True,
        "domain": domain,
        "seed": seed,
        "settings": hashlib.sha256(settings.encode()).hexdigest()[:16],
    }


def render_domain(output_folder: str | Path, domain: str, seed: int = 0) -> list[Clip]:
    """Render the clips of a domain that are not there yet, then write the label table."""
    clips = list_clips(domain)
    folder = Path(output_folder) / domain
    _claim(folder, fingerprint(domain, seed))
    missing = [clip for clip in clips if not (folder / f"{clip.clip_id}.wav").exists()]
    for clip in progress(missing, desc=f"synthetic {domain}", unit="clip", disable=not missing):
        file = io.BytesIO()
        soundfile.write(file, render_clip(clip, DOMAINS[domain], seed), SAMPLE_RATE, format="WAV", subtype="PCM_16")
        atomic_write(folder / f"{clip.clip_id}.wav", file.getvalue())
    table = [{"file": f"{clip.clip_id}.wav", "speaker": clip.speaker, "emo": clip.emo} for clip in clips]
    atomic_write(folder / "clips.json", json.dumps(table, indent=1))
    return clips


def _claim(folder: Path, wanted: Mapping[str, object]) -> None:
    """Mark a folder with what is rendered into it, or refuse one that holds something else."""
    mark = folder / "rendering.json"
    if not mark.exists():
        atomic_write(mark, json.dumps(wanted))
    elif json.loads(mark.read_text()) != wanted:
        raise CorpusError(f"{folder}: holds clips of another seed or other settings ({mark}). Delete the folder.")


def list_synthetic(data_folder: str | Path) -> list[Utterance]:
    """List the clips of one rendered synthetic domain."""
    folder = Path(data_folder)
    table = folder / "clips.json"
    try:
        rows = json.loads(table.read_text())
        return [Utterance(Path(r["file"]).stem, folder / r["file"], r["emo"], r["speaker"]) for r in rows]
    except FileNotFoundError:
        raise CorpusError(f"{table}: not there. Render the domain with render_domain first.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"{table}: not a label table ({error!r}). Delete it and render the domain again.") from None


# The clips' prefix, not clips.json, is the marker: another domain's folder must not pass for this one.
CORPORA = {
    key: Corpus(f"synthetic_{key}", key, f"syn{key.lower()}-*.wav", tuple(speakers(key)), list_synthetic)
    for key in DOMAINS
}


def prepare_synthetic(
    data_folder: str | Path | None,
    save_folder: str | Path,
    splits: Mapping[str, float],
    domain: str,
    keep: Mapping[str, float] | None = None,
) -> None:
    """Write speaker-independent manifests of one rendered synthetic domain, unless they are there already.

    Parameters
    ----------
    data_folder : str or pathlib.Path or None
        Folder that `render_domain` wrote, or the one above it.
    save_folder : str or pathlib.Path
        Where the manifests go.
    splits : mapping of str to float
        For each split its share of the speakers.
    domain : str
        `A`, `B` or `C`.
    keep : mapping of str to float, optional
        Simulated class skew: share of a class's recordings that stays in the first split.

    Raises
    ------
    CorpusError
        If there is no such domain, or it is not rendered.

    Example
    -------
    >>> prepare_synthetic(".", ".", {"train": 1.0}, "D")
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.corpora.manifest.CorpusError: No synthetic domain 'D'; there are A, B, C.
    """
    _known(domain)
    CORPORA[domain].prepare(data_folder, save_folder, splits, keep)


def render_and_prepare(
    data_folder: str | Path,
    save_folder: str | Path,
    splits: Mapping[str, float],
    domain: str,
    seed: int = 0,
    keep: Mapping[str, float] | None = None,
) -> None:
    """Render a synthetic domain where it is missing, then write its manifests."""
    render_domain(data_folder, domain, seed)
    prepare_synthetic(Path(data_folder) / domain, save_folder, splits, domain, keep)
