"""Figures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import cm
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.text import Text

from speechbrain_mifuse.evaluation.aggregate import Comparison
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.utils.texts import printable

# Colours of Okabe and Ito, told apart by colour-blind readers too, each with a marker of its own.
STYLES = (
    *(("#999999", "s"), ("#E69F00", "^"), ("#56B4E9", "v"), ("#009E73", "o")),
    *(("#D55E00", "D"), ("#000000", "*"), ("#CC79A7", "P"), ("#0072B2", "X")),
)


def plot_confusion(path: str | Path, counts: torch.Tensor, labels: Sequence[str], title: str) -> None:
    """Draw a confusion matrix: counts, shaded by each class's recall."""
    columns = [*labels, "no answer"][: len(labels) + int(counts[:, -1].sum() > 0)]
    counts = counts[:, : len(columns)]
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(1.6 + 0.85 * len(columns), 1.4 + 0.75 * len(labels)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in torch.cartesian_prod(torch.arange(len(labels)), torch.arange(len(columns))).tolist():
        colour = "white" if share[row, column] > 0.55 else "black"
        axes.text(column, row, int(counts[row, column]), ha="center", va="center", color=colour)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="predicted", ylabel="reference")
    axes.set_title(title, fontsize=10)
    save_figure(figure, path)


def plot_grid(path: str | Path, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str) -> None:
    """Draw a table of numbers, each cell shaded by its value."""
    figure = Figure(figsize=(1.6 + 0.9 * len(columns), 1.4 + 0.6 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="cividis", aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        dark = image.norm(value) < 0.5
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(title, fontsize=10)
    save_figure(figure, path)


def plot_heatmap(path: str | Path, comparison: Comparison) -> None:
    """Draw UA of every method on every transfer, printed in the cells, with the mean as a column of its own."""
    values = np.column_stack([comparison.accuracy.mean(2).T, comparison.means])  # [methods, transfers + 1]
    rows, columns = values.shape
    shade = cm.ScalarMappable(Normalize(values.min(), max(values.max(), values.min() + 1)), "cividis")
    figure = Figure(figsize=(2.4 + 0.95 * columns, 1.3 + 0.36 * rows), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(values, cmap=shade.cmap, norm=shade.norm, aspect="auto")
    for row, column in np.ndindex(values.shape):
        red, green, blue, _ = shade.to_rgba(values[row, column])
        colour = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.45 else "white"
        weight = "bold" if column == columns - 1 else "normal"
        text = f"{values[row, column]:.1f}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9, weight=weight)
    axes.axvline(columns - 1.5, color="white", linewidth=4)
    axes.set_xticks(
        range(columns), [*(name.replace(" to ", " to\n") for name in comparison.transfers), "mean"], fontsize=9
    )
    axes.set_yticks(range(rows), comparison.methods, fontsize=9)
    axes.tick_params(length=0)
    axes.set_title(f"UA %, mean over {len(comparison.seeds)} seeds", fontsize=10)
    save_figure(figure, path)


def plot_transfers(path: str | Path, comparison: Comparison, methods: Sequence[str]) -> None:
    """Draw UA per transfer of a few methods, with speaker-clustered 95 % intervals."""
    unknown = [name for name in methods if name not in comparison.methods]
    if unknown or len(methods) > len(STYLES):
        raise UserError(
            f"--figure_methods: name {len(STYLES)} methods at most, out of {', '.join(comparison.methods)}; "
            f"given: {', '.join(methods)}."
        )
    columns = len(comparison.transfers)
    figure = Figure(figsize=(1.2 + 1.45 * columns, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, (colour, marker)) in enumerate(zip(methods, STYLES, strict=False)):
        row = comparison.methods.index(name)
        x = np.arange(columns) + (place - (len(methods) - 1) / 2) * 0.8 / max(len(methods), 1)
        mean = comparison.accuracy[:, row].mean(1)
        low, high = comparison.intervals[:, :, row]
        bars = np.maximum([mean - low, high - mean], 0)
        axes.errorbar(x, mean, bars, fmt=marker, color=colour, markersize=6, elinewidth=1.6, label=name)
    for edge in range(1, columns):
        axes.axvline(edge - 0.5, color="0.88", linewidth=1)
    axes.set_xticks(range(columns), [name.replace(" to ", " to\n") for name in comparison.transfers])
    axes.set(xlim=(-0.5, columns - 0.5), ylabel="UA %, 95 % interval")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    save_figure(figure, path)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure."""
    for text in figure.findobj(Text):
        # The dollar signs of a name are no formula, which could be one that cannot be set.
        text.set_parse_math(False)
        # Fonts do not take bytes that are not text.
        text.set_text(printable(text.get_text()))
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        names = [text.get_text() for text in axis.get_ticklabels()]
        # Drawing takes these names from the axis again.
        if not all(printable(name) == name for name in names):
            axis.set_ticklabels([printable(name) for name in names])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    atomic_write(path, buffer.getvalue())
