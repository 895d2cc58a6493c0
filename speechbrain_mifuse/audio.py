"""Reading of audio: any format libsndfile knows, mixed down, resampled, trimmed by energy.

A recording is a stranger's file: what its header says is believed only as far as the samples bear it out.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import torch
from torchaudio.functional import resample

from speechbrain_mifuse.errors import UserError

# Of files that are looked for in folders.
ENDINGS = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".au", ".caf", ".sph", ".w64")

# Hz. Speech is not heard below; above are no recordings but headers that make a second of anything.
LOWEST_RATE, HIGHEST_RATE = 1_000, 1_000_000

# Seconds. A whole recording is held in memory, and a few kilobytes can announce, or unpack to, any length.
LONGEST = 24 * 3600.0

# Full scale of 32-bit integers, which some programs write as floating point; above, squares begin to overflow.
LOUDEST = 2.0**31

# Values that are decoded at a time: a header's count is no reason to set memory aside. Few recordings are longer, and
# compressed ones are best read in one go.
BLOCK = 2**27

# Entries of the table of filters that torchaudio makes; 44100 Hz needs 2**16, and 44101 Hz half of all memory.
MOST_FILTERS = 2**24

# As torchaudio's own defaults: zero crossings on each side, and the share of the band that passes.
_CROSSINGS, _ROLLOFF = 6, 0.99
_AT_A_TIME = 2**20


class BadAudio(UserError):
    """A recording that cannot be read, holds nothing, or holds values that are no sound."""


def shown(path: str | Path) -> str:
    r"""Give a path in one line that every terminal and file can hold.

    Parameters
    ----------
    path : str or pathlib.Path
        A path; names may hold line breaks, and bytes that are no text.

    Returns
    -------
    str
        The path itself wherever it can be printed.

    Example
    -------
    >>> shown("żółw 1.wav"), shown("a\nb.wav")
    ('żółw 1.wav', 'a\\nb.wav')
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))


def load_audio(path, sample_rate: int = 16000, start: float | None = None, stop: float | None = None):
    """Read one recording, or a segment of it, as a mono waveform.

    Parameters
    ----------
    path : str or pathlib.Path
        Any file that libsndfile reads (WAV, FLAC, OGG, MP3, ...). Channels are averaged.
    sample_rate : int
        Rate in Hz that the waveform is resampled to.
    start, stop : float, optional
        Segment in seconds; the whole file by default.

    Returns
    -------
    torch.Tensor
        Waveform `[samples]`, float32, full scale 1.0.

    Raises
    ------
    BadAudio
        If the file is missing, no regular file, unreadable, empty, of a sample rate that is none, longer than a day, or
        holds samples that are NaN, infinite or beyond any scale. The message names the file.

    Example
    -------
    >>> import tempfile, soundfile, numpy
    >>> path = tempfile.mkdtemp() + "/stereo.wav"
    >>> soundfile.write(path, numpy.zeros((8000, 2)), 8000)
    >>> load_audio(path).shape
    torch.Size([16000])
    """
    with opened(path) as file:
        rate = file.samplerate
        first = int((start or 0.0) * rate)
        file.seek(min(first, file.frames))
        count = file.frames if stop is None else max(int(stop * rate) - first, 0)
        wave = torch.from_numpy(read_mono(file, count, path))
    return resampled(wave, rate, sample_rate)


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[soundfile.SoundFile]:
    """Open a recording; what libsndfile says against it becomes an error that names it.

    Parameters
    ----------
    path : str or pathlib.Path
        Any file that libsndfile reads.

    Yields
    ------
    soundfile.SoundFile
        With a sample rate and a length that a recording may have.

    Raises
    ------
    BadAudio
        If it cannot be opened or read, or its header is none of a recording.

    Example
    -------
    >>> with opened("/tmp"):
    ...     pass
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.audio.BadAudio: /tmp: cannot be read as audio (no regular file). Remove or replace the file.
    """
    try:
        # Opening a named pipe would wait for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("no regular file")
        # Stores and tables hold text.
        os.fspath(path).encode()
        with soundfile.SoundFile(str(path)) as file:
            seconds = file.frames / file.samplerate
            if not LOWEST_RATE <= file.samplerate <= HIGHEST_RATE:
                raise BadAudio(f"{shown(path)}: its header says {file.samplerate} Hz. Remove or replace the file.")
            if seconds > LONGEST:
                raise BadAudio(f"{shown(path)}: its header says {seconds / 3600:.3g} hours. Cut, or write it again.")
            yield file
    except UnicodeEncodeError:
        raise BadAudio(f"{shown(path)}: its name is no text. Rename the file.") from None
    except BadAudio:
        raise
    # A name that ends in .raw is a TypeError, one with a zero byte a ValueError.
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        reason = shown(getattr(error, "strerror", None) or str(error))
        raise BadAudio(f"{shown(path)}: cannot be read as audio ({reason}). Remove or replace the file.") from None


def read_mono(file: soundfile.SoundFile, count: int, path: str | Path) -> np.ndarray:
    """Read frames from where a file stands, and average their channels.

    Parameters
    ----------
    file : soundfile.SoundFile
        Open.
    count : int
        Frames that are wanted; there may be fewer.
    path : str or pathlib.Path
        For the message.

    Returns
    -------
    numpy.ndarray
        `[samples]`, float32.

    Raises
    ------
    BadAudio
        If there is no frame, or a sample is none.

    Example
    -------
    >>> import io
    >>> buffer = io.BytesIO()
    >>> soundfile.write(buffer, np.ones((5, 2)), 8000, format="WAV", subtype="FLOAT")
    >>> read_mono(soundfile.SoundFile(io.BytesIO(buffer.getvalue())), 3, "a.wav").tolist()
    [1.0, 1.0, 1.0]
    """
    parts: list[np.ndarray] = []
    # libsndfile takes twice as long to make the very same floats of 16-bit integers.
    whole = file.subtype == "PCM_16"
    while count > 0:
        some = min(count, max(BLOCK // file.channels, 1))
        samples = file.read(some, dtype="int16" if whole else "float32", always_2d=True)
        if len(samples) == 0:
            break
        if whole:
            samples = np.multiply(samples, np.float32(1 / 32768), dtype=np.float32)
        peak = max(samples.max(), -samples.min())
        if not peak <= LOUDEST:
            what = "samples beyond any scale" if np.isfinite(peak) else "NaN or infinite samples"
            raise BadAudio(f"{shown(path)}: holds {what}. Remove or replace the file.")
        parts.append(samples[:, 0] if file.channels == 1 else samples.mean(axis=1))
        count -= len(samples)
    if not parts:
        raise BadAudio(f"{shown(path)}: holds no samples. Remove or replace the file.")
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def resampled(wave: torch.Tensor, rate: int, new_rate: int) -> torch.Tensor:
    """Bring a waveform to another rate.

    torchaudio makes a filter for every sample of the rates' common period; where that is long (44101 Hz to 16 kHz), the
    same filters are made one by one instead.

    Parameters
    ----------
    wave : torch.Tensor
        `[samples]`, float32.
    rate, new_rate : int
        In Hz.

    Returns
    -------
    torch.Tensor
        `[ceil(samples * new_rate / rate)]`.

    Example
    -------
    >>> resampled(torch.zeros(44101), 44101, 16000).shape
    torch.Size([16000])
    """
    if rate == new_rate:
        return wave
    period = math.gcd(rate, new_rate)
    # One row for each sample of the period, each as long as the period is at the old rate.
    if rate // period * (new_rate // period) <= MOST_FILTERS:
        return resample(wave, rate, new_rate)
    reach = math.ceil(_CROSSINGS * rate / (min(rate, new_rate) * _ROLLOFF))
    padded = torch.nn.functional.pad(wave, (reach, reach + 1))
    places = torch.arange(math.ceil(len(wave) * new_rate / rate))
    return torch.cat([_filtered(padded, some, rate, new_rate, reach) for some in places.split(_AT_A_TIME // reach)])


def _filtered(padded: torch.Tensor, places: torch.Tensor, rate: int, new_rate: int, reach: int) -> torch.Tensor:
    """Compute some samples of the new rate by a windowed sinc, as `torchaudio.functional.resample`."""
    near = (places * rate // new_rate)[:, None] + torch.arange(-reach, reach + 2)
    cutoff = min(rate, new_rate) * _ROLLOFF
    # Whole numbers first: their difference is small, and both are large.
    time = (near * new_rate - places[:, None] * rate).double() / (rate * new_rate) * cutoff
    time = time.clamp(-_CROSSINGS, _CROSSINGS)
    weights = torch.sinc(time) * torch.cos(time * math.pi / _CROSSINGS / 2) ** 2 * (cutoff / rate)
    return (padded[near + reach] * weights.to(padded.dtype)).sum(dim=1)


def duration(path: str | Path) -> float:
    """Length of a recording in seconds, from its header alone.

    Parameters
    ----------
    path : str or pathlib.Path
        Any file that libsndfile reads.

    Returns
    -------
    float
        Seconds.

    Raises
    ------
    BadAudio
        If the header cannot be read, announces no samples, or is none of a recording.

    Example
    -------
    >>> import tempfile, soundfile, numpy
    >>> path = tempfile.mkdtemp() + "/one_second.wav"
    >>> soundfile.write(path, numpy.zeros(8000), 8000)
    >>> duration(path)
    1.0
    """
    with opened(path) as file:
        if file.frames == 0:
            raise BadAudio(f"{shown(path)}: holds no samples. Remove or replace the file.")
        return file.frames / file.samplerate


def trim_silence(wave: torch.Tensor, threshold_db: float | None = 40.0, frame: int = 400) -> torch.Tensor:
    """Cut leading and trailing frames that are far below the loudest one.

    Acted corpora hold up to a second of silence on each side of a clip; its share differs between corpora and would
    enter every pooled statistic. Pauses inside the utterance stay.

    Parameters
    ----------
    wave : torch.Tensor
        Waveform `[samples]`.
    threshold_db : float, optional
        Frames more than this many dB below the loudest frame count as silence; `None` cuts nothing.
    frame : int
        Frame length in samples (400 = 25 ms at 16 kHz).

    Returns
    -------
    torch.Tensor
        A view of the waveform, never empty.

    Example
    -------
    >>> wave = torch.cat([torch.zeros(4000), torch.ones(4000), torch.zeros(4000)])
    >>> trim_silence(wave).shape
    torch.Size([4000])
    """
    if threshold_db is None or len(wave) < 2 * frame:
        return wave
    whole = len(wave) // frame * frame
    level = torch.linalg.vector_norm(wave[:whole].view(-1, frame), dim=1)
    loud = (level > level.max() * 10 ** (-threshold_db / 20)).tolist()
    if True not in loud:
        return wave
    last = len(loud) - loud[::-1].index(True)
    stop = len(wave) if last * frame == whole else last * frame
    return wave[loud.index(True) * frame : stop]


def content_hash(wave: torch.Tensor) -> str:
    """SHA-256 of a waveform as 16-bit PCM: the identity of what is heard, whatever the container.

    Parameters
    ----------
    wave : torch.Tensor
        Waveform `[samples]`, full scale 1.0.

    Returns
    -------
    str
        64 hexadecimal digits.

    Example
    -------
    >>> content_hash(torch.zeros(10))[:8]
    'de47c9b2'
    """
    return hashlib.sha256(pcm16(wave).tobytes()).hexdigest()


def pcm16(wave: torch.Tensor) -> np.ndarray:
    """Waveform as little-endian 16-bit samples, clipped at full scale.

    Parameters
    ----------
    wave : torch.Tensor
        Waveform `[samples]`, full scale 1.0.

    Returns
    -------
    numpy.ndarray
        `[samples]` of dtype `<i2`.

    Example
    -------
    >>> pcm16(torch.tensor([0.5, 2.0])).tolist()
    [16384, 32767]
    """
    scaled = (wave.detach().cpu().double() * 32768).round().clamp(-32768, 32767)
    return scaled.numpy().astype("<i2")
