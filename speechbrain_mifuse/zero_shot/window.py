"""What an audio-text model hears of a clip that is repeated N times: built deterministically, and said in numbers.

Models such as CLAP hear a fixed window of 10 s. The feature extractor of transformers fills it by itself: it repeats a
shorter clip as often as it fits whole and appends silence (`repeatpad`), and cuts anything longer at a place drawn from
NumPy's global generator. So repeating a clip before it gets there may change nothing, add silence, or move a random
crop. Here the window is made first, and the extractor gets just as many samples as it wants.

Of a clip of n samples, the first `filled` samples of its endless repetition are heard, and silence after them. That
number is all that a policy decides, and two windows of one clip are the same bit by bit when it is the same.

- `native` (default): what CLAP's extractor does with N copies in a row: as many whole runs of N copies as fit, then
  silence; N copies that are longer than the window are cut, always from the start. It is what CLAP was trained with,
  and what published repeat counts mean. N changes how much silence there is, and nothing else.
- `repeat`: repetition fills the window to its end, the last copy cut. No silence; N changes nothing.
- `pad`: N copies and no more, then silence: N is the number of copies heard, as far as they fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from speechbrain_mifuse.utils.errors import UserError


def native_fill(asked: int, size: int) -> int:
    """Whole runs of the N copies that fit, or as much of one as fits."""
    return size if asked > size else size // asked * asked


# From the samples of the N copies and those of the window to how many are filled.
WINDOWS: dict[str, Callable[[int, int], int]] = {
    "native": native_fill,
    "repeat": lambda asked, size: size,
    "pad": min,
}


def known_window(name: str) -> str:
    """Check the name of a policy."""
    if name not in WINDOWS:
        raise UserError(f"--alm_window: '{name}' is none of {', '.join(WINDOWS)}.")
    return name


def known_repeats(repeats: int, flag: str) -> int:
    """Check a number of repeats."""
    if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
        raise UserError(f"{flag}: {repeats} must be a whole number, 1 or more; 1 repeats nothing.")
    return repeats


@dataclass(frozen=True)
class HeardWindow:
    """What a model's window holds of one clip; `copies` whole ones, a part of one, and silence fill it exactly.

    `clip` samples, `repeats` asked for, `size` of the window, `filled` of it; see `heard_window`.
    """

    clip: int
    repeats: int
    size: int
    filled: int
    sample_rate: int

    @property
    def copies(self) -> int:
        """Whole copies of the clip."""
        return self.filled // self.clip

    @property
    def part_s(self) -> float:
        """Seconds of one more copy, which is cut off."""
        return self.filled % self.clip / self.sample_rate

    @property
    def silence_s(self) -> float:
        """Seconds of zeros at the end."""
        return (self.size - self.filled) / self.sample_rate

    @property
    def cropped_s(self) -> float:
        """Seconds of the N copies for which there is no room."""
        return max(self.clip * self.repeats - self.size, 0) / self.sample_rate

    @property
    def key(self) -> tuple[int, int, int]:
        """Windows of the same clip with equal keys are bit-identical."""
        return (self.clip, self.size, self.filled)


def heard_window(
    clip: int, repeats: int, size: int | None = 480_000, sample_rate: int = 48_000, policy: str = "native"
) -> HeardWindow:
    """Say what the window of a clip holds.

    Parameters
    ----------
    clip : int
        Samples of the clip.
    repeats : int
        N.
    size : int, optional
        Samples of the window; None for a model without one, which takes the N copies.
    sample_rate : int
        In Hz.
    policy : str
        A key of `WINDOWS`; the module's docstring tells them apart.

    Returns
    -------
    HeardWindow
        Copies, silence and what is cut off.

    Raises
    ------
    UserError
        If `repeats` is not a whole number of 1 or more, or the policy is unknown.

    Example
    -------
    >>> heard = heard_window(3 * 48_000, repeats=2)  # 3 s, twice: 6 of the 10 s
    >>> heard.copies, heard.silence_s, heard_window(3 * 48_000, 2, policy="repeat").part_s
    (2, 4.0, 1.0)
    """
    asked = clip * known_repeats(repeats, "--audio_repeats")
    size = asked if size is None else size
    return HeardWindow(clip, repeats, size, WINDOWS[known_window(policy)](asked, size), sample_rate)


def build_window(wave: torch.Tensor, heard: HeardWindow) -> torch.Tensor:
    """Make the samples `[size]` that a `HeardWindow` describes, from those of the clip `[clip]`.

    Example
    -------
    >>> build_window(torch.tensor([1.0, 2.0]), heard_window(2, 1, size=5)).tolist()
    [1.0, 2.0, 1.0, 2.0, 0.0]
    """
    sound = wave.repeat(heard.copies + 1)[: heard.filled]
    return torch.nn.functional.pad(sound, (0, heard.size - heard.filled))


def audit_windows(
    lengths_s: Iterable[float],
    repeats: Sequence[int],
    size_s: float | None = 10.0,
    sample_rate: int = 48_000,
    policy: str = "native",
) -> list[dict]:
    """Tell for clips of some lengths what each number of repeats makes the model hear.

    Parameters
    ----------
    lengths_s : iterable of float
        Seconds of the clips.
    repeats : sequence of int
        Values of N.
    size_s : float, optional
        Seconds of the window.
    sample_rate, policy
        As for `heard_window`.

    Returns
    -------
    list of dict
        One for each length and N; `same_as` names a smaller N whose window is bit-identical.

    Example
    -------
    >>> [row["same_as"] for row in audit_windows([3.0], [1, 2, 3])]
    [None, None, 1]
    """
    size = None if size_s is None else round(size_s * sample_rate)
    rows = []
    for length in lengths_s:
        first: dict[tuple, int] = {}
        for times in repeats:
            heard = heard_window(max(round(length * sample_rate), 1), times, size, sample_rate, policy)
            same = first.setdefault(heard.key, times)
            figures = {name: getattr(heard, name) for name in ("copies", "part_s", "silence_s", "cropped_s")}
            same_as = None if same == times else same
            rows.append({"length_s": length, "repeats": times, **figures, "same_as": same_as})
    return rows


def summarise_windows(rows: Iterable[Mapping]) -> list[dict]:
    """Sum up an audit of a whole corpus: one row for each number of repeats."""
    grouped: dict[int, list[Mapping]] = {}
    for row in rows:
        grouped.setdefault(row["repeats"], []).append(row)
    return [
        {
            "repeats": times,
            "copies": sum(row["copies"] for row in group) / len(group),
            "silence_s": sum(row["silence_s"] for row in group) / len(group),
            "cropped": sum(row["cropped_s"] > 0 for row in group) / len(group),
            "same": sum(row["same_as"] is not None for row in group) / len(group),
        }
        for times, group in grouped.items()
    ]


def audit_table(rows: Sequence[Mapping]) -> str:
    """Lay out rows of equal keys as a table of plain text."""
    lines = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.rjust(w) for text, w in zip(line, widths, strict=True)) for line in lines)


def cell(value) -> str:
    """Text of one value of a table."""
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".")
    return "-" if value is None else str(value)
