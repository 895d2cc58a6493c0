"""Reading of audio: any format libsndfile knows, mixed down, resampled, trimmed by energy.

A recording is a stranger's file: what its header says is believed only as far as the samples bear it out.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import torch
from torchaudio.functional import resample

from speechbrain_mifuse.utils.audio_files import Unreadable, length_is_estimated, length_is_unknown, open_recording
from speechbrain_mifuse.utils.audio_warnings import warn_of
from speechbrain_mifuse.utils.errors import UserError, WriteError
from speechbrain_mifuse.utils.texts import shown

# Hz. Speech is not heard below; above are no recordings but headers that make a second of anything.
LOWEST_RATE, HIGHEST_RATE = 1_000, 1_000_000

# Seconds. A whole recording is held in memory, and a few kilobytes can announce, or unpack to, any length.
LONGEST = 24 * 3600.0
# Hz. Above, a recording may have only as many frames as the longest one at this rate.
_USUAL_RATE = 48_000

# Full scale of 32-bit integers, which some programs write as floating point; above, squares begin to overflow.
LOUDEST = 2.0**31

# Peaks of recordings in floating point, 18 dB above full scale; what is louder has the scale of integers. At theirs, a
# recording with so low a peak would be inaudible.
LOUDEST_FLOAT = 8.0

# Share of the energy of unrelated channels, 10 dB below, under which their average counts as cancelled.
CANCELLED = 0.1

# Values that are decoded at a time: a header's count is no reason to set memory aside. Few recordings are longer, and
# compressed ones are best read in one go.
BLOCK = 2**27

# Largest table of filters that torchaudio may compute: 44100 Hz to 16000 Hz needs 2**17 entries, and 44101 Hz 2**30.
MAX_FILTER_ENTRIES = 2**19

# The defaults of torchaudio: zero crossings on each side, and the share of the band that passes.
_CROSSINGS, _ROLLOFF = 6, 0.99
_AT_A_TIME = 2**20


class BadAudio(UserError):
    """A recording that cannot be read, holds nothing, or holds values that are no sound."""


def load_audio(
    path, sample_rate: int = 16000, start: float | None = None, stop: float | None = None, channel: int | None = None
):
    """Read one recording, or a segment of it, as a mono waveform.

    Floating-point samples at the scale of integers are brought to full scale 1.0 with a warning. A recording in which
    nothing varies (see `nothing_varies`) is read as zeros. A log line says where channels are averaged.

    Parameters
    ----------
    path : str or pathlib.Path
        Any file that libsndfile reads (WAV, FLAC, OGG, MP3, ...) or, where it is installed, ffmpeg (M4A, AMR, ...).
    sample_rate : int
        Rate in Hz that the waveform is resampled to.
    start, stop : float, optional
        Segment in seconds; the whole file by default.
    channel : int, optional
        Take this channel, from 1 (of a stereo file, the left one); by default, average all.

    Returns
    -------
    torch.Tensor
        Waveform `[samples]`, float32, full scale 1.0.

    Raises
    ------
    BadAudio
        If the file is missing, no regular file, unreadable, empty, of a sample rate that is none, longer than a day,
        lacks the channel, or holds samples that are NaN, infinite or beyond any scale. The message names the file.

    Example
    -------
    >>> import tempfile, soundfile, numpy
    >>> path = tempfile.mkdtemp() + "/stereo.wav"
    >>> soundfile.write(path, numpy.tile([[0.5, 0.25], [0.5, -0.25]], (4000, 1)), 8000)
    >>> load_audio(path, channel=2).shape, load_audio(path, 8000, channel=2)[:3].tolist()
    (torch.Size([16000]), [0.25, -0.25, 0.25])
    """
    with opened(path) as file:
        rate = file.samplerate
        if channel is not None and not 1 <= channel <= file.channels:
            raise BadAudio(f"{shown(path)}: has no channel {channel}. Its channels are 1 to {file.channels}.")
        first = int((start or 0.0) * rate)
        last = None if stop is None else max(int(stop * rate), first)
        wave, channels = _read(file, first, last, channel, path)
    if nothing_varies(wave, channels):
        wave = torch.zeros_like(wave)
    return resampled(wave, rate, sample_rate)


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[soundfile.SoundFile]:
    """Open a recording; what a decoder says against it becomes an error that names it."""
    remedy = "Remove or replace the file."
    try:
        # Stores and tables hold text.
        os.fspath(path).encode()
        with open_recording(str(path), LONGEST) as file:
            if not LOWEST_RATE <= file.samplerate <= HIGHEST_RATE:
                raise BadAudio(f"{shown(path)}: its header says {file.samplerate} Hz. Remove or replace the file.")
            if not length_is_unknown(file):
                _require_length(file.frames, file.samplerate, path)
            yield file
    except UnicodeEncodeError:
        raise BadAudio(f"{shown(path)}: its name is no text. Rename the file.") from None
    except (BadAudio, WriteError):
        raise
    except Unreadable as error:
        reason, remedy = str(error), error.remedy
    # A name with a zero byte is a ValueError.
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    else:
        return
    raise BadAudio(f"{shown(path)}: cannot be read as audio ({shown(reason)}). {shown(remedy)}")


def _require_length(frames: int, rate: int, path: str | Path) -> None:
    if frames > _max_frames(rate):
        hours, limit = frames / rate / 3600, _max_frames(rate) / rate / 3600
        raise BadAudio(
            f"{shown(path)}: {hours:.3g} hours at {rate} Hz, and at most {limit:.3g} are read. Cut, or write it again."
        )


def _max_frames(rate: int) -> int:
    return int(LONGEST * min(rate, _USUAL_RATE))


def _read(
    file: soundfile.SoundFile, first: int, last: int | None, channel: int | None, path: str | Path
) -> tuple[torch.Tensor, int]:
    """Read frames as a mono waveform at its own rate and full scale 1.0; also, how many channels it was made of."""
    # The scale is that of the whole recording; some formats cannot seek.
    whole = file.subtype in ("FLOAT", "DOUBLE") or not file.seekable()
    if first and not whole:
        file.seek(min(first, file.frames))
    parts, peak = [], 0.0
    mixed, separate = 0.0, 0.0
    chosen = file.channels if channel is None else 1
    for samples in _blocks(file, None if whole or last is None else last - first, path):
        peak = max(_peak(samples, path), peak)
        if chosen == 1:
            parts.append(samples[:, (channel or 1) - 1])
            continue
        parts.append(samples.mean(axis=1))
        mixed += float(np.vdot(parts[-1], parts[-1]))
        separate += float(np.vdot(samples, samples)) / chosen
    wave = parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, np.float32)])
    wave = wave[first:last] if whole else wave
    if not len(wave):
        raise BadAudio(f"{shown(path)}: holds no samples. Remove or replace the file.")
    if chosen > 1:
        _warn_of_channels(path, chosen, mixed, separate)
    return torch.from_numpy(_at_full_scale(np.ascontiguousarray(wave), peak, path)), chosen


def _peak(samples: np.ndarray, path: str | Path) -> float:
    peak = float(max(samples.max(), -samples.min()))
    if not peak <= LOUDEST:
        what = "samples beyond any scale" if math.isfinite(peak) else "NaN or infinite samples"
        raise BadAudio(f"{shown(path)}: holds {what}. Remove or replace the file.")
    return peak


def _blocks(file: soundfile.SoundFile, count: int | None, path: str | Path) -> Iterator[np.ndarray]:
    """Read `[frames, channels]`, float32, from where a file stands up to a number of frames or to the end."""
    # libsndfile takes twice as long to make the very same floats of 16-bit integers.
    integers = file.subtype == "PCM_16"
    # One more than there may be, so that what is too long is noticed.
    most = _max_frames(file.samplerate) + 1 if length_is_unknown(file) else file.frames
    wanted, read = most if count is None else min(count, most), 0
    while read < wanted:
        some = min(wanted - read, max(BLOCK // file.channels, 1))
        samples = file.read(some, dtype="int16" if integers else "float32", always_2d=True)
        if len(samples) == 0:
            return
        read += len(samples)
        _require_length(read, file.samplerate, path)
        yield np.multiply(samples, np.float32(1 / 32768), dtype=np.float32) if integers else samples


def _warn_of_channels(path: str | Path, channels: int, mixed: float, separate: float) -> None:
    """Say that channels were averaged, or that what is left is far less than what was in each."""
    if mixed * channels < CANCELLED * separate:
        what = "the channels cancel when they are averaged, and little or nothing is left. Choose one: --channel 1."
    else:
        what = f"{channels} channels, averaged. To take one of them: --channel 1."
    warn_of(shown(path), what)


def _at_full_scale(wave: np.ndarray, peak: float, path: str | Path) -> np.ndarray:
    """Divide samples that were written as floating point at the scale of integers."""
    if peak <= LOUDEST_FLOAT:
        return wave
    # Resampling and filters overshoot the largest integer a little.
    bits = next((bits for bits in (16, 24) if peak <= 2.0**bits), 32)
    warn_of(
        shown(path),
        f"floating-point samples far outside [-1, 1], at the scale of {bits}-bit integers; divided by 2**{bits - 1}. "
        "To be sure, write them as integers or in [-1, 1].",
    )
    return wave / np.float32(2.0 ** (bits - 1))


def nothing_varies(wave: torch.Tensor, channels: int = 1) -> bool:
    """Whether a waveform holds nothing to be heard: digital silence, a constant offset, or one bit of noise."""
    if not len(wave):
        return True
    # Unlike torch, numpy starts no threads for so little.
    samples = wave.detach().cpu().float().numpy()
    span = float(samples.max()) - float(samples.min())
    return span <= 2.01 / 2**15 or (span <= 2.01 / 2**7 and len(np.unique(samples)) <= 2 * channels + 1)


def resampled(wave: torch.Tensor, rate: int, new_rate: int) -> torch.Tensor:
    """Bring a waveform to another rate.

    Example
    -------
    >>> resampled(torch.zeros(44100), 44100, 16000).shape
    torch.Size([16000])
    """
    if rate == new_rate:
        return wave
    period = math.gcd(rate, new_rate)
    # One row for each sample of the period, each as long as the period is at the old rate.
    if rate // period * (new_rate // period) <= MAX_FILTER_ENTRIES:
        return resample(wave, rate, new_rate)
    return _resampled_by_phase(wave, rate, new_rate)


def _resampled_by_phase(wave: torch.Tensor, rate: int, new_rate: int) -> torch.Tensor:
    """Resample by the filter whose phase is nearest to that of each new sample, with an error of about -100 dB."""
    cutoff = min(rate, new_rate) * _ROLLOFF / rate
    reach = math.ceil(_CROSSINGS / cutoff)
    taps = 2 * reach + 1
    phases = MAX_FILTER_ENTRIES // taps
    offsets = torch.arange(-reach, reach + 1) - (torch.arange(phases)[:, None] + 0.5) / phases
    time = (offsets.double() * cutoff).clamp(-_CROSSINGS, _CROSSINGS)
    filters = (torch.sinc(time) * torch.cos(time * math.pi / _CROSSINGS / 2) ** 2 * cutoff).to(wave.dtype)
    windows = torch.nn.functional.pad(wave, (reach, reach + 1)).unfold(0, taps, 1)
    # Whole numbers: no length accumulates an error.
    positions = torch.arange(math.ceil(len(wave) * new_rate / rate)) * rate
    pieces = [
        (windows[some // new_rate] * filters[some % new_rate * phases // new_rate]).sum(dim=1)
        for some in positions.split(max(_AT_A_TIME // taps, 1))
    ]
    return torch.cat(pieces)


def duration(path: str | Path) -> float:
    """Measure a recording: from its header, or by reading it where the header only estimates.

    Example
    -------
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/clip.wav"
    >>> soundfile.write(path, np.zeros(4000), 16000)
    >>> duration(path)
    0.25
    """
    with opened(path) as file:
        frames = sum(map(len, _blocks(file, None, path))) if length_is_estimated(file) else file.frames
        if frames == 0:
            raise BadAudio(f"{shown(path)}: holds no samples. Remove or replace the file.")
        return frames / file.samplerate


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

    Example
    -------
    >>> content_hash(torch.zeros(4)) == content_hash(torch.full((4,), 1e-6))
    True
    """
    return hashlib.sha256(pcm16(wave).tobytes()).hexdigest()


def pcm16(wave: torch.Tensor) -> np.ndarray:
    """Waveform as little-endian 16-bit samples, clipped at full scale.

    Example
    -------
    >>> pcm16(torch.tensor([0.0, 0.5, 2.0])).tolist()
    [0, 16384, 32767]
    """
    scaled = (wave.detach().cpu().double() * 32768).round().clamp(-32768, 32767)
    return scaled.numpy().astype("<i2")
