"""Every figure: PNG files beside results, and inline SVG that follows the colors of the report's page.

Matplotlib takes a second to import, so only the functions that draw import it.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch

from speechbrain_mifuse.evaluation.aggregate import Comparison
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.utils.texts import printable

# Colors of Okabe and Ito, which color-blind readers can distinguish, each with its own marker.
STYLES = (
    *(("#999999", "s"), ("#E69F00", "^"), ("#56B4E9", "v"), ("#009E73", "o")),
    *(("#D55E00", "D"), ("#000000", "*"), ("#CC79A7", "P"), ("#0072B2", "X")),
)
GREY, ORANGE, RED, BLUE = STYLES[0][0], STYLES[1][0], STYLES[4][0], STYLES[7][0]
# Colors of SVG figures, and the variables of the page's style sheet that replace them.
COLORS = ("#0072b2", "#d55e00", "#00795a", "#b8558f", "#a87400", "#3b3b3b")
FAINT, RULE, PAGE = "#57606a", "#d0d7de", "#ffffff"
VARIABLES = {FAINT: "--faint", RULE: "--line", PAGE: "--page"} | {c: f"--c{n}" for n, c in enumerate(COLORS)}
# A bin of fewer utterances says little about how often an answer is right; figures show it hollow.
FEW = 10


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _as_names(figure) -> None:
    """Draw names as they are: dollar signs are no formula, and what no font takes is drawn as its code."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_text(printable(text.get_text()))
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        names = [text.get_text() for text in axis.get_ticklabels()]
        # Drawing takes these names from the axis again.
        if not all(printable(name) == name for name in names):
            axis.set_ticklabels([printable(name) for name in names])


def _save(figure, path: str | Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    _as_names(figure)
    figure.set_dpi(130)
    buffer = io.BytesIO()
    # `Figure.savefig` draws a figure with a layout twice.
    FigureCanvasAgg(figure).print_png(buffer)
    atomic_write(path, buffer.getvalue())


# Tables of numbers.


@functools.lru_cache(maxsize=2)
def _confusion_figure(labels: tuple[str, ...], columns: tuple[str, ...]) -> tuple:
    """Make the empty figure: laying it out takes longer than drawing it, and all methods of a run share it."""
    figure = _figure(1.6 + 0.85 * len(columns), 1.4 + 0.75 * len(labels))
    axes = figure.add_subplot()
    image = axes.imshow(np.zeros((len(labels), len(columns))), cmap="Blues", vmin=0, vmax=1)
    cells = [
        axes.text(column, row, "", ha="center", va="center") for row, column in np.ndindex(len(labels), len(columns))
    ]
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="predicted", ylabel="reference")
    title = axes.set_title(" ", fontsize=10)
    _as_names(figure)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure, image, cells, title


def plot_confusion(path: str | Path, counts: torch.Tensor, labels: Sequence[str], title: str) -> None:
    """Draw a confusion matrix: counts, shaded by each class's recall."""
    columns = (*labels, "no answer")[: len(labels) + int(counts[:, -1].sum() > 0)]
    counts = counts[:, : len(columns)]
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure, image, cells, heading = _confusion_figure(tuple(labels), columns)
    image.set_data(share)
    heading.set_text(title)
    for cell, count, shade in zip(cells, counts.flatten().tolist(), share.flatten().tolist(), strict=True):
        cell.set(text=str(int(count)), color="white" if shade > 0.55 else "black")
    _save(figure, path)


def plot_grid(
    path: str | Path, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str, mean: bool = False
) -> None:
    """Draw a table of numbers, each cell shaded by its value; the last column may be the mean of the others."""
    width, height = (0.95, 0.36) if mean else (0.9, 0.6)
    figure = _figure(2.4 + width * len(columns), 1.4 + height * len(rows))
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="cividis", aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        style = {"color": "white" if image.norm(value) < 0.5 else "black", "fontsize": 9}
        style["weight"] = "bold" if mean and column == len(columns) - 1 else "normal"
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", **style)
    if mean:
        axes.axvline(len(columns) - 1.5, color="white", linewidth=4)
    axes.set_xticks(range(len(columns)), columns, fontsize=9)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=10)
    _save(figure, path)


def plot_heatmap(path: str | Path, comparison: Comparison) -> None:
    """Draw UA of every method on every transfer, and the mean in the last column."""
    columns = [*(name.replace(" to ", " to\n") for name in comparison.transfers), "mean"]
    title = f"UA %, mean over {len(comparison.seeds)} seeds"
    plot_grid(path, comparison.grid, comparison.methods, columns, title, mean=True)


def plot_transfers(path: str | Path, comparison: Comparison, methods: Sequence[str]) -> None:
    """Draw UA per transfer of a few methods, with speaker-clustered 95 % intervals."""
    unknown = [name for name in methods if name not in comparison.methods]
    if unknown or len(methods) > len(STYLES):
        raise UserError(
            f"--figure_methods: name {len(STYLES)} methods at most, out of {', '.join(comparison.methods)}; "
            f"given: {', '.join(methods)}."
        )
    columns = len(comparison.transfers)
    figure = _figure(1.2 + 1.45 * columns, 4.2)
    axes = figure.add_subplot()
    for index, (name, (color, marker)) in enumerate(zip(methods, STYLES, strict=False)):
        row = comparison.methods.index(name)
        x = np.arange(columns) + (index - (len(methods) - 1) / 2) * 0.8 / max(len(methods), 1)
        mean = comparison.accuracy[:, row].mean(1)
        low, high = comparison.intervals[:, :, row]
        bars = np.maximum([mean - low, high - mean], 0)
        axes.errorbar(x, mean, bars, fmt=marker, color=color, markersize=6, elinewidth=1.6, label=name)
    for edge in range(1, columns):
        axes.axvline(edge - 0.5, color="0.88", linewidth=1)
    axes.set_xticks(range(columns), [name.replace(" to ", " to\n") for name in comparison.transfers])
    axes.set(xlim=(-0.5, columns - 0.5), ylabel="UA %, 95 % interval")
    _tidy(axes, "y")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    _save(figure, path)


def _tidy(axes, grid: str = "both") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="0.9")
    axes.set_axisbelow(True)


# An adapter: its codebook, its layers, its attention.


def plot_codebook(path: str | Path, rows: Sequence[Mapping]) -> None:
    """Draw perplexity and used codes of the local attributes over time, above the losses."""
    figure = _figure(7.6, 5.2)
    above, below = figure.subplots(2, 1, sharex=True)
    codes = [name for name in ("codebook_perplexity", "codes_used") if name in rows[-1]]
    _columns(above, rows, codes)
    above.set(ylabel="codes", ylim=(0, None))
    other = ("epoch", "step", "learning_rate", "codes_reseeded", *codes)
    _columns(below, rows, [name for name in rows[-1] if name not in other and not name.startswith("layer_")])
    below.set(xlabel="step", ylabel="loss")
    _save(figure, path)


def plot_layer_weights(path: str | Path, rows: Sequence[Mapping]) -> None:
    """Draw the weights of the adapter's layers over time."""
    figure = _figure(7.2, 3.2)
    axes = figure.add_subplot()
    _columns(axes, rows, [name for name in rows[-1] if name.startswith("layer_")])
    axes.set(xlabel="step", ylabel="weight in the average", ylim=(0, None))
    _save(figure, path)


def _columns(axes, rows: Sequence[Mapping], names: Sequence[str]) -> None:
    steps, every = [row["step"] for row in rows], max(1, len(rows) // 8)
    for index, name in enumerate(names):
        color, marker = STYLES[index % len(STYLES)]
        axes.plot(steps, [row[name] for row in rows], color=color, marker=marker, markevery=every, label=name)
    _tidy(axes, "y")
    if names:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def plot_attention(path: str | Path, wave: torch.Tensor, attention: torch.Tensor, rate: int, title: str) -> None:
    """Draw the pooling's attention over an utterance above its waveform."""
    seconds = len(wave) / rate
    figure = _figure(7.2, 3.8)
    above, below = figure.subplots(2, 1, sharex=True)
    edges = np.linspace(0, seconds, len(attention) + 1)
    above.stairs(attention.numpy() * len(attention), edges, fill=True, color=BLUE)
    above.axhline(1.0, color="0.5", linewidth=0.8)
    above.set(ylabel="attention, 1 = even")
    below.plot(np.arange(len(wave)) / rate, wave.numpy(), color="0.3", linewidth=0.5)
    below.set(xlabel="seconds", ylabel="amplitude", xlim=(0, seconds))
    above.set_title(title, fontsize=10)
    _save(figure, path)


# An API teacher: calibration, uncertainty, answers.


def plot_calibration(path: str | Path, classes: Mapping[str, Mapping]) -> None:
    """Draw for each class how often it is right against the probability that the teacher gives it."""
    columns = min(len(classes), 4)
    rows = math.ceil(len(classes) / columns)
    figure = _figure(0.8 + 2.6 * columns, 0.9 + 2.7 * rows)
    for number, (label, found) in enumerate(classes.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        stated, frequency, count = (np.array(found[name]) for name in ("stated", "frequency", "count"))
        axes.plot([0, 100], [0, 100], color="0.75", linewidth=1)
        axes.plot(100 * stated, 100 * frequency, color=BLUE, linewidth=1.2)
        fill = np.where(count < FEW, "white", BLUE)
        axes.scatter(100 * stated, 100 * frequency, s=34, c=fill, edgecolors=BLUE, zorder=3)
        axes.set_title(f"{label}: error {100 * found['error']:.1f} %", fontsize=10)
        ticks = range(0, 101, 20)
        axes.set(xlim=(-3, 103), ylim=(-3, 103), xticks=ticks, yticks=ticks, aspect="equal")
        _tidy(axes)
    figure.supxlabel("probability that the teacher states, %", fontsize=10)
    figure.supylabel("share that is so, %", fontsize=10)
    figure.suptitle(f"Calibration by class (hollow: fewer than {FEW} utterances)", fontsize=11)
    _save(figure, path)


def plot_uncertainty(path: str | Path, teachers: Mapping[str, torch.Tensor]) -> None:
    """Draw histograms of mutual information, one below the other on the same axis."""
    figure = _figure(6.4, 0.9 + 1.9 * len(teachers))
    values = {name: tensor.double().numpy() for name, tensor in teachers.items()}
    widest = max([0.1, *(float(np.quantile(found, 0.995)) for found in values.values() if len(found))])
    edges = np.linspace(0, min(1.0, math.ceil(20 * widest) / 20), 41)
    rows = figure.subplots(len(values), 1, squeeze=False)[:, 0]
    for axes, (name, found), color in zip(rows, values.items(), (RED, BLUE), strict=False):
        axes.stairs(_shares(found, edges), edges, fill=True, color=color)
        told = f"median {np.median(found):.3f}" if len(found) else "needs two samples of an utterance"
        axes.set_title(f"{name}: {len(found)} utterances, {told}", fontsize=10, loc="left")
        axes.set(xlim=(0, edges[-1]), ylabel="utterances, %")
        _tidy(axes)
    axes.set_xlabel("mutual information of the samples (0: they agree, 1: the most that is possible)")
    _save(figure, path)


def _shares(values: Sequence[float], edges: np.ndarray) -> np.ndarray:
    """Percent of the values in each bin; what lies beyond the last edge counts in the last bin."""
    return 100 * np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / max(len(values), 1)


def plot_answers(path: str | Path, classes: Mapping[str, Mapping]) -> None:
    """Draw the teacher's classes: how often it chooses each, beside the labels where known, and how often it fails."""
    rows = list(classes.values())
    figure = _figure(8.2, 1.3 + 0.62 * len(rows))
    chosen, failed = figure.subplots(1, 2, sharey=True)
    bars = {"teacher says": ([row["predicted"] for row in rows], RED)}
    if all("reference" in row for row in rows):
        bars["labels say"] = ([row["reference"] for row in rows], GREY)
    _bars(chosen, bars, "{:.0f}")
    chosen.set(yticks=range(len(rows)), yticklabels=list(classes), xlabel="utterances")
    shares = {
        "refused %": ([100 * (row["refusal"] or 0) for row in rows], ORANGE),
        "invalid %": ([100 * (row["invalid"] or 0) for row in rows], BLUE),
    }
    _bars(failed, shares, "{:.1f}")
    failed.set(xlabel="% of the answers received, by the teacher's class")
    chosen.invert_yaxis()
    _save(figure, path)


def _bars(axes, bars: Mapping[str, tuple], form: str) -> None:
    height = 0.38
    for row, (name, (values, color)) in enumerate(bars.items()):
        y = np.arange(len(values)) + (row - (len(bars) - 1) / 2) * height
        drawn = axes.barh(y, values, height, color=color, label=name)
        axes.bar_label(drawn, [form.format(value) for value in values], padding=3, fontsize=8)
    axes.set_xlim(0, 1.18 * max([1, *(value for values, _ in bars.values() for value in values)]))
    _tidy(axes)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=9)


# Figures of the page.


class Line(NamedTuple):
    """A curve."""

    x: Sequence[float]
    y: Sequence[float]
    thin: bool = False


def limits(values: Iterable[float], least: float = 1e-3) -> tuple[float, float]:
    """Limits of an axis: some room around the values."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return 0.0, 1.0
    low, high = min(known), max(known)
    room = max(0.08 * (high - low), (least - (high - low)) / 2)
    return low - room, high + room


def curves(told: str, lines: Sequence[Line], x: str, y: str, ylim: tuple[float, float] | None = None) -> str:
    """Draw curves: those of single seeds thin, below their mean."""

    def draw(axes) -> None:
        for line in lines:
            width, alpha = (1, 0.4) if line.thin else (2, None)
            axes.plot(line.x, line.y, color=COLORS[0], linewidth=width, alpha=alpha, clip_on=False)
            if not line.thin:
                _dots(axes, line.x, line.y, COLORS[0])

    xs = [value for line in lines for value in line.x]
    xlim = (min(xs), max(xs)) if max(xs) > min(xs) else (xs[0] - 1, xs[0] + 1)
    ylim = ylim or limits(value for line in lines for value in line.y)
    return _svg(told, 150, draw, (x, y), xlim, ylim)


def histogram(told: str, groups: Sequence[Sequence[float]], most: float, x: str) -> str:
    """Draw how often values from 0 to `most` occur."""
    edges = np.linspace(0, most, 21)
    shares = [_shares(group, edges) for group in groups]

    def draw(axes) -> None:
        for share, color in zip(shares, COLORS, strict=False):
            axes.stairs(share, edges, fill=True, color=color, alpha=0.18, clip_on=False)
            axes.stairs(share, edges, color=color, linewidth=1.5, clip_on=False)

    highest = max(1.0, 1.05 * max(map(np.max, shares)))
    return _svg(told, 150, draw, (x, "share %"), (0, most), (0, highest))


def reliability_figure(told: str, stated: Sequence[float], frequency: Sequence[float], count: Sequence[int]) -> str:
    """Draw how often an answer is right against how sure it was; bins of few answers are hollow."""
    few = [(x, y) for x, y, n in zip(stated, frequency, count, strict=True) if n < FEW]

    def draw(axes) -> None:
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle="--", clip_on=False)
        axes.plot(stated, frequency, color=COLORS[0], linewidth=2, clip_on=False)
        _dots(axes, stated, frequency, COLORS[0])
        _dots(axes, [x for x, _ in few], [y for _, y in few], PAGE, size=3)

    return _svg(told, 230, draw, ("confidence", "right"), (0, 1), (0, 1))


def scatter(told: str, points: np.ndarray, classes: np.ndarray, xlim: tuple, ylim: tuple) -> str:
    """Draw points, each class with a color and a mark: circle, square, and both of them hollow."""

    def draw(axes) -> None:
        for label in sorted(set(classes.tolist())):
            x, y = points[classes == label].T
            cap = "projecting" if label % 2 else "round"
            _dots(axes, x, y, COLORS[label % len(COLORS)], 4.5, cap)
            if label % 4 > 1:
                _dots(axes, x, y, PAGE, 2, cap)

    return _svg(told, 250, draw, ("first component", "second component"), xlim, ylim)


def _dots(axes, x: Sequence[float], y: Sequence[float], color: str, size: float = 6, cap: str = "round") -> None:
    """Draw all points as one path of strokes without length, a tenth of the size of markers in SVG."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    points = np.column_stack([x, y]).astype(float)
    points = np.repeat(points[np.isfinite(points).all(1)], 2, axis=0)
    if len(points):
        outline = Outline(points, [Outline.MOVETO, Outline.LINETO] * (len(points) // 2))
        style = {"edgecolor": color, "linewidth": size, "capstyle": cap, "clip_on": False, "zorder": 3}
        # Not `add_patch`, which looks for the limits of all points.
        axes.add_artist(PathPatch(outline, fill=False, **style))


# Size of a figure of the page, and the box of its axes, in pixels.
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 320, 56, 312, 10, 34


@functools.cache
def _page_axes(height: int) -> tuple:
    """Axes of a figure of the page, kept because they take longer to make than to draw."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72), frameon=False)
    box = (LEFT / WIDTH, BOTTOM / height, (RIGHT - LEFT) / WIDTH, (height - TOP - BOTTOM) / height)
    axes = figure.add_axes(box)
    axes.set_axis_off()
    return figure, axes


def _svg(told: str, height: int, draw: Callable, names: tuple[str, str], xlim: tuple, ylim: tuple) -> str:
    """Draw marks by matplotlib into a frame of our own, in colors of the page's style sheet."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    figure, axes = _page_axes(height)
    axes.set(xlim=xlim, ylim=ylim)
    draw(axes)
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer)
    for artist in [*axes.lines, *axes.patches]:
        artist.remove()
    svg = ElementTree.Element("svg", {"viewBox": f"0 0 {WIDTH} {height}", "role": "img", "aria-label": printable(told)})
    svg.extend(_frame(height, names, xlim, ylim))
    svg.extend(map(_mark, ElementTree.fromstring(buffer.getvalue()).iter("{http://www.w3.org/2000/svg}path")))
    return ElementTree.tostring(svg, encoding="unicode")


def _mark(element: ElementTree.Element) -> ElementTree.Element:
    """Give a path of matplotlib's SVG without what the page's style sheet says already."""
    path = re.sub(r"-?\d+\.\d+", lambda number: _short(float(number[0])), " ".join(element.get("d").split()))
    path = re.sub(r"M (\S+ \S+) L \1", r"M\1h0", path)
    style = re.sub("#[0-9a-f]{6}", lambda color: f"var({VARIABLES[color[0]]})", element.get("style"))
    return ElementTree.Element("path", {"d": path, "style": style})


def _frame(height: int, names: tuple[str, str], xlim: tuple, ylim: tuple) -> Iterator[ElementTree.Element]:
    """Write rules, numbers and names of both axes: matplotlib takes ten times as long to lay the same texts out."""
    bottom = height - BOTTOM
    for row in _ticks(*ylim, 3 if height < 200 else 5):
        y = np.interp(row, ylim, (bottom, TOP))
        yield _rule(y, "--line")
        yield _text(_number(row), LEFT - 3.5, y + 4.1, "end")
    for column in _ticks(*xlim, 4):
        yield _text(_number(column), np.interp(column, xlim, (LEFT, RIGHT)), bottom + 11.9)
    yield _rule(bottom, "--faint")
    yield _text(names[0], (LEFT + RIGHT) / 2, height - 7.6)
    x, y = 9.4, (TOP + bottom) / 2
    yield _text(names[1], x, y, transform=f"rotate(-90 {x} {_short(y)})")


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between two limits."""
    from matplotlib.ticker import MaxNLocator

    room = 1e-9 * (high - low)
    ticks = MaxNLocator(count + 1, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [tick for tick in ticks.tolist() if low - room <= tick <= high + room]


def _number(value: float) -> str:
    return f"{value + 0.0:g}".replace("-", "\N{MINUS SIGN}")


def _rule(y: float, variable: str) -> ElementTree.Element:
    return ElementTree.Element("path", {"d": f"M{LEFT} {_short(y)}H{RIGHT}", "style": f"stroke: var({variable})"})


def _text(text: str, x: float, y: float, anchor: str = "middle", **attributes: str) -> ElementTree.Element:
    made = ElementTree.Element("text", {"x": _short(x), "y": _short(y), "text-anchor": anchor, **attributes})
    made.text = printable(text)
    return made


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")
