"""Files that stand where a recording is expected: damaged, odd, lying, or no recordings at all.

`write(folder)` writes all of them and tells of each what may come of it. No two that can be read sound the same.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

RATE = 16000
SECONDS = 0.3
TEN_MINUTES = 600.0
LONG_NAME = "n" * 251 + ".wav"
# Where lengths stand in files of one channel and 16 bits.
CAF_DATA, W64_DATA, AIFF_FRAMES = 4084, 96, 22


class Sample(NamedTuple):
    """A file, and the seconds of sound that it holds; `None` where it is none and has to be left out by name."""

    path: Path
    seconds: float | None


def sound(name: str, rate: int = RATE, seconds: float = SECONDS) -> np.ndarray:
    """Noise that no other name gives."""
    return 0.1 * np.random.default_rng(zlib.crc32(os.fsencode(name))).standard_normal(round(rate * seconds))


def whole(path: Path, wave: np.ndarray | None = None, rate: int = RATE, **options) -> bytes:
    """Write a recording as it should be; returns its bytes."""
    buffer = io.BytesIO()
    soundfile.write(buffer, sound(path.name) if wave is None else wave, rate, **{"format": "WAV", **options})
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def seconds_of(data: bytes) -> float:
    """Length of what is left of a WAV file of 16 bits and one channel behind its header of 44 bytes."""
    return (len(data) - 44) // 2 / RATE


def plain(**options) -> Callable[[Path], float]:
    """A recording of some form."""

    def write(path: Path) -> float:
        whole(path, **options)
        return SECONDS

    return write


def content(data: bytes) -> Callable[[Path], None]:
    """No recording, but these bytes."""
    return lambda path: (path.write_bytes(data), None)[1]


def with_value(value: float) -> Callable[[Path], None]:
    """One sample of a value that is no sound."""

    def write(path: Path) -> None:
        wave = sound(path.name)
        wave[100] = value
        whole(path, wave, subtype="DOUBLE" if abs(value) > 1e38 else "FLOAT")

    return write


def waves(make: Callable[[np.ndarray], np.ndarray], **options) -> Callable[[Path], float]:
    """A recording of other samples."""

    def write(path: Path) -> float:
        wave = make(sound(path.name))
        whole(path, wave, **options)
        return len(wave) / options.get("rate", RATE)

    return write


def at_rate(rate: int) -> Callable[[Path], float]:
    """A recording at another rate."""

    def write(path: Path) -> float:
        whole(path, sound(path.name, rate), rate)
        return SECONDS

    return write


def cut(share: float, **options) -> Callable[[Path], float | None]:
    """The beginning of a file; of a WAV file that is sound."""

    def write(path: Path) -> float | None:
        data = whole(path, **options)
        data = data[: round(share * len(data))]
        path.write_bytes(data)
        return None if options else seconds_of(data)

    return write


def patched(offset: int, data: bytes, seconds: float | None, **options) -> Callable[[Path], float | None]:
    """Other bytes at a place of the header."""

    def write(path: Path) -> float | None:
        old = whole(path, **options)
        path.write_bytes(old[:offset] + data + old[offset + len(data) :])
        return seconds

    return write


def chunks(order: str, seconds: float | None) -> Callable[[Path], float | None]:
    """A WAV file with its chunks in some order: f(ormat), d(ata), j(unk of odd length), J(unk without its padding)."""

    def write(path: Path) -> float | None:
        old = whole(path)
        parts = {"f": old[12:36], "d": old[36:], "j": b"LIST" + struct.pack("<I", 5) + b"INFOx\0"}
        parts["J"] = b"LIST" + struct.pack("<I", 5) + b"INFOx"
        body = b"WAVE" + b"".join(parts[letter] for letter in order)
        path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
        return seconds

    return write


def flac_frames(count: int, seconds: float | None = None) -> Callable[[Path], float | None]:
    """A FLAC file whose header says this length; 0 stands for an unknown one."""

    def write(path: Path) -> float | None:
        old = bytearray(whole(path, format="FLAC"))
        old[21] = (old[21] & 0xF0) | (count >> 32)
        old[22:26] = struct.pack(">I", count & 0xFFFFFFFF)
        path.write_bytes(old)
        return seconds

    return write


def ten_minutes(path: Path) -> float:
    """Long, and of a low rate and one byte a sample so that it is quickly written."""
    wave = np.tile(sound(path.name, 8000, 1.0), round(TEN_MINUTES))
    whole(path, wave, 8000, subtype="PCM_U8")
    return TEN_MINUTES


def unreadable(path: Path) -> float | None:
    """A file without permissions; root may read it all the same."""
    whole(path)
    path.chmod(0)
    return SECONDS if os.access(path, os.R_OK) else None


def link(target: str) -> Callable[[Path], None]:
    """A link to something that is not there."""
    return lambda path: path.symlink_to(target)


MADE: dict[str, Callable[[Path], float | None]] = {
    # Damaged.
    "empty.wav": content(b""),
    "header_only.wav": lambda path: path.write_bytes(whole(path)[:40] + b"\0\0\0\0") and None,
    "title_only.wav": lambda path: path.write_bytes(whole(path)[:40] + b"\0\0\0\0LIST\4\0\0\0INFO") and None,
    "cut_in_the_header.wav": lambda path: path.write_bytes(whole(path)[:20]) and None,
    "cut.wav": cut(0.3),
    "cut.flac": cut(0.5, format="FLAC"),
    "cut.ogg": cut(0.5, format="OGG"),
    "nan.wav": with_value(np.nan),
    "infinite.wav": with_value(np.inf),
    "beyond_any_scale.wav": with_value(1e30),
    "beyond_float32.wav": with_value(1e300),
    "text.wav": content(b"This is a letter and no recording.\n" * 50),
    "random.wav": content(bytes(range(256)) * 20),
    "page.wav": content(b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
    # Odd.
    "one_sample.wav": waves(lambda wave: wave[:1]),
    "silence.wav": waves(np.zeros_like),
    "eight_channels.wav": waves(lambda wave: np.stack([wave * n / 8 for n in range(8)], axis=1)),
    "192_kHz.wav": at_rate(192_000),
    "44101_Hz.wav": at_rate(44_101),
    "ten_minutes.wav": ten_minutes,
    "flac_called.wav": plain(format="FLAC"),
    "wav_called.flac": plain(),
    "wav_called.mp3": plain(),
    "8_bit.wav": plain(subtype="PCM_U8"),
    "24_bit.wav": plain(subtype="PCM_24"),
    "float64.wav": plain(subtype="DOUBLE"),
    "integers_as_float.wav": waves(lambda wave: np.round(wave * 32768), subtype="FLOAT"),
    "a_law.wav": plain(subtype="ALAW"),
    "dc_offset.wav": waves(lambda wave: wave + 0.8),
    "clipped.wav": waves(lambda wave: np.clip(wave * 50, -1, 1)),
    "quiet.wav": waves(lambda wave: wave * 1e-3),
    "big_endian.wav": plain(endian="BIG"),
    "upper_case.WAV": plain(),
    # Lying.
    "junk_between.wav": chunks("jfjdj", SECONDS),
    "data_first.wav": chunks("df", None),
    "no_format.wav": chunks("d", None),
    "format_only.wav": chunks("f", None),
    "data_of_no_length.wav": patched(40, b"\0\0\0\0", SECONDS),
    "data_of_no_length.au": patched(8, b"\0\0\0\0", SECONDS, format="AU"),
    "data_of_two_gigabytes.au": patched(8, b"\x7f\xff\xff\xff", SECONDS, format="AU"),
    "data_without_end.au": patched(8, b"\xff\xff\xff\xff", SECONDS, format="AU"),
    "data_of_no_length.rf64": patched(28, bytes(8), SECONDS, format="RF64"),
    "data_without_end.rf64": patched(28, b"\xff" * 8, SECONDS, format="RF64"),
    "data_of_no_length.caf": patched(CAF_DATA, bytes(8), SECONDS, format="CAF"),
    "data_without_end.caf": patched(CAF_DATA, b"\xff" * 8, SECONDS, format="CAF"),
    "data_of_no_length.w64": patched(W64_DATA, bytes(8), SECONDS, format="W64"),
    "data_of_no_length.aiff": patched(AIFF_FRAMES, bytes(4), SECONDS, format="AIFF"),
    "data_without_end.wav": patched(40, b"\xff\xff\xff\xff", SECONDS),
    "data_of_two_gigabytes.wav": patched(40, b"\xff\xff\xff\x7f", SECONDS),
    "riff_of_no_length.wav": patched(4, b"\0\0\0\0", SECONDS),
    "1_Hz.wav": patched(24, struct.pack("<I", 1), None),
    "0_Hz.wav": patched(24, struct.pack("<I", 0), None),
    "2_GHz.wav": patched(24, struct.pack("<I", 0x7FFFFFFF), None),
    "no_channel.wav": patched(22, b"\0\0", None),
    "65535_channels.wav": patched(22, b"\xff\xff", None),
    "flac_of_unknown_length.flac": flac_frames(0, SECONDS),
    "flac_of_sixty_billion_frames.flac": flac_frames(2**36 - 1),
    # No files, or hard to get at.
    "folder.wav": lambda path: path.mkdir(),
    "pipe.wav": lambda path: os.mkfifo(path),
    "unreadable.wav": unreadable,
    "link_to_nothing.wav": link("nothing.wav"),
    "link_to_itself.wav": link("link_to_itself.wav"),
    # Odd names.
    "line\nbreak\t.wav": plain(),
    "żółw 🐢 声.wav": plain(),
    "-rf.wav": plain(),
    "--help.wav": plain(),
    "quote'\"`$(x) ;&|.wav": plain(),
    "{data_root}.wav": plain(),
    "<img src=x onerror=alert(1)>.wav": plain(),
    "%s %d %(x)s.wav": plain(),
    LONG_NAME: plain(),
    "no_text_\udcff.wav": lambda path: whole(path) and None,
}


def write_one(folder: Path, name: str) -> Sample:
    """Write one of them."""
    path = folder / name
    return Sample(path, MADE[name](path))


def write(folder: Path) -> dict[str, Sample]:
    """Write all of them, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    return {name: write_one(folder, name) for name in MADE}
