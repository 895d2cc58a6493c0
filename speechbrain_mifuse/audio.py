"""Reading of audio: any format libsndfile knows, mixed down, resampled, trimmed by energy."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import soundfile
import torch
from torchaudio.functional import resample

from speechbrain_mifuse.errors import UserError


class BadAudio(UserError):
    """A recording that cannot be read, holds nothing, or holds values that are no sound."""


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
        If the file is missing, unreadable, empty, or holds NaN or infinite samples. The message names the file.

    Example
    -------
    >>> import tempfile, soundfile, numpy
    >>> path = tempfile.mkdtemp() + "/stereo.wav"
    >>> soundfile.write(path, numpy.zeros((8000, 2)), 8000)
    >>> load_audio(path).shape
    torch.Size([16000])
    """
    try:
        with soundfile.SoundFile(str(path)) as file:
            rate = file.samplerate
            first = int((start or 0.0) * rate)
            file.seek(min(first, file.frames))
            count = -1 if stop is None else max(int(stop * rate) - first, 0)
            samples = file.read(count, dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:
        raise BadAudio(f"{path}: cannot be read as audio ({error}). Remove or replace the file.") from None
    if len(samples) == 0:
        raise BadAudio(f"{path}: holds no samples. Remove or replace the file.")
    if not np.isfinite(samples).all():
        raise BadAudio(f"{path}: holds NaN or infinite samples. Remove or replace the file.")
    wave = torch.from_numpy(samples.mean(axis=1))
    return wave if rate == sample_rate else resample(wave, rate, sample_rate)


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
        If the header cannot be read or announces no samples.

    Example
    -------
    >>> import tempfile, soundfile, numpy
    >>> path = tempfile.mkdtemp() + "/one_second.wav"
    >>> soundfile.write(path, numpy.zeros(8000), 8000)
    >>> duration(path)
    1.0
    """
    try:
        info = soundfile.info(str(path))
    except (OSError, RuntimeError) as error:
        raise BadAudio(f"{path}: cannot be read as audio ({error}). Remove or replace the file.") from None
    if info.frames == 0:
        raise BadAudio(f"{path}: holds no samples. Remove or replace the file.")
    return info.frames / info.samplerate


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
    power = wave[:whole].view(-1, frame).square().mean(dim=1)
    loud = torch.nonzero(power > power.max() * 10 ** (-threshold_db / 10)).flatten()
    if len(loud) == 0:
        return wave
    last = int(loud[-1]) + 1
    stop = len(wave) if last * frame == whole else last * frame
    return wave[int(loud[0]) * frame : stop]


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
