"""Opening of recordings: by libsndfile, with a corrected length where the header has none, else through ffmpeg."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import soundfile

from speechbrain_mifuse.utils.errors import WriteError, writing

# What to do where nothing can be unpacked.
TEMPORARY = "Free some space there, or set TMPDIR to another folder, then run the same command again."
# Endings of what libsndfile reads. Not `.mat`, of which few are recordings, and none without a header but these two:
# GSM frames are recognized, and `.vox` means one encoding.
ENDINGS = (
    *(".wav", ".wave", ".bwf", ".rf64", ".w64", ".aif", ".aiff", ".aifc", ".afc", ".au", ".snd", ".caf", ".flac"),
    *(".ogg", ".oga", ".opus", ".mp3", ".mp2", ".mp1", ".mpa", ".mpga", ".sph", ".nist", ".sf", ".ircam", ".voc"),
    *(".gsm", ".vox", ".paf", ".fap", ".pvf", ".avr", ".svx", ".8svx", ".16sv", ".htk", ".xi", ".sds", ".sd2", ".wve"),
)
# Endings of what ffmpeg reads, among them containers of video.
FOREIGN = (
    *(".m4a", ".m4b", ".aac", ".mp4", ".m4v", ".mov", ".3gp", ".3gpp", ".3g2", ".amr", ".awb", ".webm", ".weba"),
    *(".mka", ".mkv", ".wma", ".wmv", ".asf", ".avi", ".flv", ".mpg", ".mpeg", ".ac3", ".ape", ".wv", ".tta"),
)
# Samples and nothing else: neither rate nor encoding can be known.
HEADERLESS = (".raw", ".pcm", ".sln", ".al", ".alaw", ".ul", ".ulaw")

# ffmpeg's demuxers that may open a file: containers of sound alone, and neither playlists, which name other files and
# addresses, nor text and pictures, which some demuxers show as video.
_DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,aac,amr,amrnb,amrwb,matroska,webm,asf,avi,flv,mpeg,mpegts,ac3,eac3,ape,wv,tta,"
    "wav,w64,aiff,au,caf,nistsphere,ogg,mp3,flac,loas,dts,tak,mpc,mpc8,rm,dsf,sox"
)
# Seconds, and bytes of 32-bit samples, after which ffmpeg is stopped: small files can unpack to any length.
_DECODING_S, _DECODED_BYTES = 600.0, 8 * 2**30

# libsndfile's number for an error of the operating system: nothing that another decoder would change.
_SYSTEM_ERROR = 2
# libsndfile gives the largest number there is for a FLAC file that does not know its length.
_UNKNOWN = 2**62


class Unreadable(Exception):
    """Says why a recording cannot be opened, and what to do."""

    def __init__(self, reason: str, remedy: str = "Remove or replace the file."):
        super().__init__(reason)
        self.remedy = remedy


class _Sequential(soundfile.SoundFile):
    """A file that says it can seek, and cannot."""

    def seekable(self) -> bool:
        return False


@contextlib.contextmanager
def open_recording(path: str, longest: float) -> Iterator[soundfile.SoundFile]:
    """Open a recording by the first decoder that knows its content; the ending of its name decides nothing."""
    # Opening a named pipe would wait forever.
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable("no regular file")
    if status.st_size == 0:
        raise Unreadable("an empty file")
    try:
        file = _by_libsndfile(path)
    except soundfile.LibsndfileError as error:
        if error.code == _SYSTEM_ERROR:
            raise
        if Path(path).suffix.lower() in HEADERLESS:
            raise _without_header(path) from None
        with _by_ffmpeg(path, error.error_string.rstrip("."), longest) as file:
            yield file
        return
    with file:
        yield file


def length_is_estimated(file: soundfile.SoundFile) -> bool:
    """Whether the number of frames must be counted by reading: it is unknown, or estimated from the bit rate."""
    return length_is_unknown(file) or file.subtype.startswith("MPEG")


def length_is_unknown(file: soundfile.SoundFile) -> bool:
    """Whether the header gives no number of frames, as in a FLAC file that was written to a pipe."""
    return file.frames >= _UNKNOWN


def has_ffmpeg() -> bool:
    """Whether there is an ffmpeg to decode what libsndfile cannot."""
    return shutil.which("ffmpeg") is not None


def _by_libsndfile(path: str) -> soundfile.SoundFile:
    try:
        # soundfile asks for rate and encoding of whatever is called `.raw`, and for nothing where it sees no name.
        raw = path.lower().endswith(".raw")
        file = soundfile.SoundFile(os.open(path, os.O_RDONLY) if raw else path)
    except soundfile.LibsndfileError:
        corrected = _corrected(path)
        if corrected is None:
            raise
        return corrected
    if file.format == "RAW" and not _is_known_raw(path):
        file.close()
        raise _without_header(path)
    if file.subtype.startswith("DWVW") or length_is_unknown(file):
        file.close()
        return _Sequential(path)
    if file.frames and file.format != "W64":
        return file
    corrected = _corrected(path)
    if corrected is None:
        return file
    file.close()
    return corrected


def _without_header(path: str) -> Unreadable:
    name = Path(path)
    return Unreadable(
        "it has no header, so its rate and encoding are unknown",
        f"Write it as WAV, for 16-bit samples at 16 kHz: ffmpeg -f s16le -ar 16000 -i {name.name} {name.stem}.wav",
    )


def _is_known_raw(path: str) -> bool:
    """Whether samples without a header are what the name says; libsndfile takes the name's word."""
    ending = Path(path).suffix.lower()
    if ending != ".gsm":
        return ending == ".vox"
    with open(path, "rb") as file:
        frames = file.read(33 * 16)
    # A GSM 6.10 frame has 33 bytes and begins with 1101.
    return bool(frames) and all(byte >> 4 == 0xD for byte in frames[::33])


# A program that writes to a pipe learns the length too late to put it into the header: it leaves 0 or the largest
# number there. libsndfile corrects this in some formats; those below it reads as empty or malformed.


class _Patched(io.FileIO):
    """A file of which some bytes read as others."""

    def __init__(self, path: str, patches: dict[int, bytes]):
        super().__init__(path)
        self._patches = patches

    def readinto(self, buffer) -> int:
        begin = self.tell()
        count = super().readinto(buffer)
        view = memoryview(buffer).cast("B")
        for offset, new in self._patches.items():
            for place, byte in enumerate(new, offset - begin):
                if 0 <= place < count:
                    view[place] = byte
        return count

    def seek(self, offset: int, whence: int = 0) -> int:
        # Damaged files make libsndfile seek to where nothing is, and no exception can pass through it.
        if whence == os.SEEK_SET and not 0 <= offset <= _UNKNOWN:
            return self.tell()
        return super().seek(offset, whence)


def _corrected(path: str) -> soundfile.SoundFile | None:
    """Open a recording with another header in place of one that lies or is misunderstood; `None` if neither is so."""
    with open(path, "rb") as file:
        patches = _patches(file, os.path.getsize(path))
    if not patches:
        return None
    patched = _Patched(path, patches)
    try:
        return soundfile.SoundFile(patched)
    except soundfile.LibsndfileError:
        patched.close()
        return None


def _patches(file: BinaryIO, size: int) -> dict[int, bytes]:
    """Find what is wrong in a header, by position, and the bytes to be read in its place."""
    kind = file.read(4)
    if kind == b"riff":
        # W64. libsndfile takes floating point in the extensible format, as ffmpeg writes it, for integers.
        file.seek(64)
        format_chunk = file.read(26)
        extensible = format_chunk[:2] == b"\xfe\xff" and format_chunk[24:] == b"\3\0"
        return {64: b"\3\0"} if extensible else {}
    if kind in (b"RIFF", b"RIFX", b"RF64"):
        order = "big" if kind == b"RIFX" else "little"
        chunks = _chunks(file, 12, size, 4, order)
        if "data" not in chunks:
            return {}
        data, length = chunks["data"]
        if kind == b"RF64" and "ds64" in chunks:
            return {chunks["ds64"][0] + 8: (size - data).to_bytes(8, "little")}
        if length or _ends_with_chunks(file, data, size, order):
            return {}
        return {data - 4: min(size - data, 0xFFFFFFFF).to_bytes(4, order)}
    if kind == b"caff":
        data, _ = _chunks(file, 8, size, 8, "big").get("data", (size, 0))
        return {data - 8: (size - data).to_bytes(8, "big")} if size - data > 4 else {}
    return {8: b"\xff" * 4} if kind == b".snd" and size > 24 else {}


def _chunks(file: BinaryIO, begin: int, size: int, width: int, order: str) -> dict[str, tuple[int, int]]:
    """Where the content of each chunk begins and how long it says to be, up to the chunk of the data."""
    found: dict[str, tuple[int, int]] = {}
    while begin + 4 + width <= size and "data" not in found:
        file.seek(begin)
        name, length = file.read(4).decode("latin-1"), int.from_bytes(file.read(width), order)
        begin += 4 + width
        found[name] = begin, length
        begin += length + (length % 2 if width == 4 else 0)
    return found


def _ends_with_chunks(file: BinaryIO, begin: int, size: int, order: str) -> bool:
    """Whether nothing but other chunks follows, such as a title: the recording is truly empty."""
    while begin + 8 <= size:
        file.seek(begin)
        name, length = file.read(4), int.from_bytes(file.read(4), order)
        if not all(32 <= byte < 127 for byte in name):
            return False
        begin += 8 + length + length % 2
    return begin >= size and begin - size <= 1


@contextlib.contextmanager
def _by_ffmpeg(path: str, reason: str, longest: float) -> Iterator[soundfile.SoundFile]:
    """Decode a recording into a temporary file: its length is then known, and any part of it can be read."""
    program = shutil.which("ffmpeg")
    if program is None:
        if Path(path).suffix.lower() in FOREIGN:
            raise Unreadable(reason, "Install ffmpeg, through which such files are read, or convert it to WAV.")
        raise Unreadable(reason, "Remove or replace the file, or install ffmpeg, which may read it.")
    with contextlib.ExitStack() as held:
        with writing("the folder of temporary files", TEMPORARY):
            folder = held.enter_context(tempfile.TemporaryDirectory(prefix="mifuse-"))
        target = os.path.join(os.path.abspath(folder), "decoded.wav")
        # `file:` and an absolute path: no name can be taken for a flag or an address.
        source = f"file:{os.path.abspath(path)}"
        read = ["-protocol_whitelist", "file,pipe", "-format_whitelist", _DEMUXERS, "-i", source]
        bounds = ["-t", str(longest + 1), "-fs", str(_DECODED_BYTES)]
        write = ["-map", "0:a:0", *bounds, "-c:a", "pcm_f32le", "-f", "wav", "-rf64", "auto", f"file:{target}"]
        command = [program, "-nostdin", "-v", "error", "-threads", "1", *read, *write]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_DECODING_S)
        except subprocess.TimeoutExpired:
            raise Unreadable(f"ffmpeg takes longer than {_DECODING_S:.0f} s") from None
        said = done.stderr.decode(errors="replace").strip().splitlines()
        if any(os.strerror(errno.ENOSPC) in line for line in said):
            # The recording is not to blame, and must not be left out.
            raise WriteError.of(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), folder, TEMPORARY)
        if any("matches no streams" in line for line in said):
            raise Unreadable("it holds no audio")
        if done.returncode != 0 or not os.path.exists(target):
            raise Unreadable(f"{reason}; ffmpeg: {said[-1] if said else done.returncode}")
        if os.path.getsize(target) >= _DECODED_BYTES:
            raise Unreadable(f"it unpacks to more than {_DECODED_BYTES >> 30} GB", "Cut it into parts.")
        with soundfile.SoundFile(target) as file:
            yield file
