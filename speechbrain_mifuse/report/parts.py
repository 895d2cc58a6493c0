"""Parts of the report's page: markup that escapes what it is given, tables, and figures as inline SVG.

Figures take their colours from the page's style sheet (`report_template.html`), so that they follow its dark mode.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import matplotlib
import numpy as np

from speechbrain_mifuse.utils.texts import printable

# Colours and dashes of the style sheet: classes c0, c1, ...
COLOURS = 6
# A bin of fewer utterances says little about how often an answer is right; the figure shows it hollow.
FEW = 10
# Figures that a page shows of each kind before a click.
FIGURES = 6
WIDTH = 320


class Html(str):
    """Text that is markup already; every other text is escaped where it meets markup."""

    __slots__ = ()


def tag(name: str, *children, **attributes) -> Html:
    """Make an element."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(printable(str(value)))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>{joined(children)}</{name}>")


def joined(children: Iterable) -> Html:
    """Put markup and text together."""
    return Html("".join(c if isinstance(c, Html) else html.escape(printable(str(c)), quote=False) for c in children))


def bold(cell: str) -> Html:
    """Turn the `**...**` of an `aggregate.Table` into bold."""
    return Html(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", joined([cell])))


class Shaded(NamedTuple):
    """A cell of a table with a style of its own."""

    content: Html | str
    style: str | None = None
    kind: str | None = None


def table(caption: str, head: Sequence, rows: Iterable[Sequence], kind: str | None = None, sort: bool = True) -> Html:
    """Make a table that scrolls within its own box; a click on a head sorts it."""
    heads = [tag("th", cell, scope="col", class_="plain" if isinstance(cell, Html) else None) for cell in head]
    body = [tag("tr", tag("th", breakable(first), scope="row"), *map(_cell, rest)) for first, *rest in rows]
    classes = " ".join(name for name in ("sortable" if sort else None, kind) if name)
    inner = [tag("caption", tag("span", caption)), tag("thead", tag("tr", *heads)), tag("tbody", *body)]
    return tag("div", tag("table", *inner, class_=classes or None), class_="scroll", tabindex=0, role="region",
               aria_label=caption)  # fmt: skip


def breakable(name: str) -> Html:
    """Let a long name break after its underscores alone."""
    return Html(joined([name]).replace("_", "_<wbr>"))


def _cell(cell) -> Html:
    if isinstance(cell, Shaded):
        return tag("td", cell.content, style=cell.style, class_=cell.kind)
    return tag("td", cell)


def heat(value: float, low: float, high: float) -> str:
    """Colour a cell by its value, from dark blue to yellow, told apart by colour-blind readers too."""
    share = (value - low) / (high - low) if high > low else 1.0
    parts = matplotlib.colormaps["cividis"](min(max(share, 0.0), 1.0))[:3]
    # Relative luminance (WCAG 2): at 0.179 black and white text stand out equally.
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    colour = "#000" if np.dot((0.2126, 0.7152, 0.0722), linear) > 0.179 else "#fff"
    return f"background:#{''.join(f'{round(255 * part):02x}' for part in parts)};color:{colour}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Choose round numbers on an axis."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((power * factor for factor in (1, 2, 2.5, 5, 10)), key=lambda step: abs(step - rough))
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 10) for place in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Frame:
    """Axes of a figure."""

    x: tuple[float, float]
    y: tuple[float, float]
    height: int = 180
    x_label: str = ""
    y_label: str = ""

    left, right, top, bottom = 56, 8, 10, 34

    def across(self, value: float) -> float:
        """Horizontal place of a value."""
        low, high = self.x
        return self.left + (WIDTH - self.left - self.right) * (value - low) / (high - low)

    def up(self, value: float) -> float:
        """Vertical place of a value."""
        low, high = self.y
        return self.height - self.bottom - (self.height - self.top - self.bottom) * (value - low) / (high - low)

    def place(self, x: float, y: float) -> str:
        """Coordinates of a point in a path."""
        return f"{round(self.across(x), 1):g} {round(self.up(y), 1):g}"

    def path(self, xs: Iterable[float], ys: Iterable[float]) -> str:
        """Path through points; those that are not finite are left out."""
        points = [self.place(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
        return "M" + "L".join(points) if points else ""

    def drawn(self, told: str, *marks: Html) -> Html:
        """Give the whole figure: grid, numbers, names, and the marks above them."""
        parts = []
        floor, end = self.height - self.bottom, WIDTH - self.right
        for value in ticks(*self.y, 3 if self.height < 200 else 5):
            y = round(self.up(value), 1)
            parts.append(tag("path", d=f"M{self.left} {y}H{end}", class_="grid"))
            parts.append(tag("text", f"{value:g}", x=self.left - 5, y=y + 4, text_anchor="end"))
        for value in ticks(*self.x):
            x = round(self.across(value), 1)
            anchor = "end" if x > end - 8 else "middle"
            parts.append(tag("text", f"{value:g}", x=min(x, end), y=floor + 14, text_anchor=anchor))
        parts.append(tag("path", d=f"M{self.left} {floor}H{end}", class_="axis"))
        middle = (self.top + floor) / 2
        turned = f"rotate(-90 10 {middle:g})"
        parts.append(tag("text", self.x_label, x=(self.left + end) / 2, y=self.height - 4, text_anchor="middle"))
        parts.append(tag("text", self.y_label, x=10, y=middle, text_anchor="middle", transform=turned))
        return tag("svg", *parts, *marks, viewBox=f"0 0 {WIDTH} {self.height}", role="img", aria_label=told)


def ends(values: Iterable[float], least: float = 1e-3) -> tuple[float, float]:
    """Choose the ends of an axis: some room around the values."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return 0.0, 1.0
    low, high = min(known), max(known)
    room = max(0.08 * (high - low), (least - (high - low)) / 2)
    return low - room, high + room


class Line(NamedTuple):
    """A curve."""

    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    thin: bool = False


def curves(told: str, lines: Sequence[Line], x_label: str, y_label: str, y: tuple[float, float] | None = None) -> Html:
    """Draw curves."""
    xs = [value for line in lines for value in line.x]
    frame = Frame(
        (min(xs), max(xs)) if max(xs) > min(xs) else (xs[0] - 1, xs[0] + 1),
        y or ends(value for line in lines for value in line.y),
        150,
        x_label,
        y_label,
    )
    marks = []
    for line in sorted(lines, key=lambda line: not line.thin):
        classes = f"line c{line.colour % COLOURS}{' thin' * line.thin}"
        marks.append(tag("path", d=frame.path(line.x, line.y), class_=classes))
        if not line.thin:
            dots = ["M" + frame.place(x, y) + "h0" for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
            marks.append(tag("path", d="".join(dots), class_=f"dots m0 c{line.colour % COLOURS}"))
    return frame.drawn(told, *marks)


def histogram(told: str, groups: Sequence[Sequence[float]], x: tuple[float, float], x_label: str, bins: int) -> Html:
    """Draw how often values occur."""
    edges = np.linspace(*x, bins + 1)
    shares = [np.histogram(np.clip(group, *x), edges)[0] * 100 / max(len(group), 1) for group in groups]
    frame = Frame(x, (0.0, max(1.0, 1.05 * max(map(np.max, shares)))), 150, x_label, "share %")
    marks = []
    for place, share in enumerate(shares):
        xs = np.repeat(edges, 2).tolist()
        ys = [0.0, *np.repeat(share, 2).tolist(), 0.0]
        marks.append(tag("path", d=frame.path(xs, ys) + "Z", class_=f"area c{place % COLOURS}"))
    return frame.drawn(told, *marks)


def reliability_figure(told: str, stated: Sequence[float], frequency: Sequence[float], count: Sequence[int]) -> Html:
    """Draw a reliability diagram: how often an answer is right against how sure it was."""
    frame = Frame((0, 1), (0, 1), 230, "confidence", "right")
    dots = {few: "" for few in (False, True)}
    for x, y, n in zip(stated, frequency, count, strict=True):
        dots[n < FEW] += f"M{frame.place(x, y)}h0"
    marks = [
        tag("path", d=frame.path((0, 1), (0, 1)), class_="diagonal"),
        tag("path", d=frame.path(stated, frequency), class_="line c0"),
        tag("path", d=dots[False], class_="dots m0 c0") if dots[False] else "",
        tag("path", d=dots[True], class_="dots m0 c0") if dots[True] else "",
        tag("path", d=dots[True], class_="dots m0 hollow") if dots[True] else "",
    ]
    return frame.drawn(told, *marks)


# Marks of a scatter plot by class, drawn from a point: a zero-length stroke with round or square caps, and triangles.
SHAPES = (("m0", "h0"), ("m1", "h0"), ("m2", "m-3.4 2.4h6.8l-3.4-6z"), ("m2", "m-3.4-2.4h6.8l-3.4 6z"))


def scatter(told: str, points: np.ndarray, classes: np.ndarray, box: tuple[tuple[float, float], ...]) -> Html:
    """Draw points, each class with a colour and a mark of its own."""
    frame = Frame(*box, 250, "first component", "second component")
    marks = []
    for label in sorted(set(classes.tolist())):
        kind, shape = SHAPES[label % len(SHAPES)]
        path = "".join(f"M{frame.place(x, y)}{shape}" for x, y in points[classes == label].tolist())
        marks.append(tag("path", d=path, class_=f"dots small {kind} c{label % COLOURS}"))
    return frame.drawn(told, *marks)


def legend(names: Sequence[str], marks: bool = False) -> Html:
    """Say which colour, and which mark of a scatter plot, belongs to what."""
    items = []
    for place, name in enumerate(names):
        kind, shape = SHAPES[place % len(SHAPES)] if marks else SHAPES[1]
        dot = tag("path", d=f"M7 7{shape}", class_=f"dots {kind} c{place % COLOURS}")
        items.append(tag("li", tag("svg", dot, viewBox="0 0 14 14", aria_hidden="true", class_="key"), name))
    return tag("ul", *items, class_="legend")


def bar(mean: float, interval: Sequence[float], scale: tuple[float, float]) -> Html:
    """Draw a value with its interval, for a cell of a table."""
    low, high = scale
    x, a, b = (round(4 + 112 * (value - low) / max(high - low, 1e-9), 1) for value in (mean, *interval))
    whisker = tag("path", d=f"M{a} 8H{b}", class_="line c0")
    dot = tag("path", d=f"M{x} 8h0", class_="dots m0 c0")
    return tag("svg", whisker, dot, viewBox="0 0 120 16", class_="bar", aria_hidden="true")


def two_bars(down: float, up: float, most: float) -> Html:
    """Draw a loss to the left and a gain to the right of a line, for a cell of a table."""
    left, right = (round(58 * value / max(most, 1e-9), 1) for value in (down, up))
    parts = [
        tag("rect", x=60 - left, y=2, width=left, height=12, class_="fill c1"),
        tag("rect", x=60, y=2, width=right, height=12, class_="fill c0"),
        tag("path", d="M60 0V16", class_="axis"),
    ]
    return tag("svg", *parts, viewBox="0 0 120 16", class_="bar", aria_hidden="true")


def figure(caption: str, *parts: Html) -> Html:
    """Put parts under a caption."""
    return tag("figure", tag("figcaption", caption), *parts)


def grid(parts: Sequence[Html]) -> Html:
    """Put figures beside each other as far as the screen is wide; what is more than a screenful opens on a click."""
    shown, more = parts[:FIGURES], parts[FIGURES:]
    found = tag("div", *shown, class_="grid-of-figures")
    if not more:
        return found
    rest = tag("div", *more, class_="grid-of-figures")
    return joined([found, tag("details", tag("summary", f"{len(more)} more"), rest)])


def facts(found: Mapping[str, str]) -> Html:
    """List names with what they stand for."""
    rows = (tag("div", tag("dt", name), tag("dd", value)) for name, value in found.items() if value)
    return tag("dl", *rows)
