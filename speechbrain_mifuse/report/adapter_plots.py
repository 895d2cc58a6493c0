"""Figures that look inside an adapter: its codebook, its layers, its attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from speechbrain_mifuse.report.plots import STYLES, save_figure


def plot_codebook(path: str | Path, rows: Sequence[Mapping]) -> None:
    """Draw perplexity and used codes of the local attributes over time, above the losses."""
    figure = Figure(figsize=(7.6, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    codes = [name for name in ("codebook_perplexity", "codes_used") if name in rows[-1]]
    _curves(above, rows, codes)
    above.set(ylabel="codes", ylim=(0, None))
    other = ("epoch", "step", "learning_rate", "codes_reseeded", *codes)
    _curves(below, rows, [name for name in rows[-1] if name not in other and not name.startswith("layer_")])
    below.set(xlabel="step", ylabel="loss")
    save_figure(figure, path)


def plot_layer_weights(path: str | Path, rows: Sequence[Mapping]) -> None:
    """Draw the weights of the adapter's layers over time."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    _curves(axes, rows, [name for name in rows[-1] if name.startswith("layer_")])
    axes.set(xlabel="step", ylabel="weight in the average", ylim=(0, None))
    save_figure(figure, path)


def _curves(axes: Axes, rows: Sequence[Mapping], names: Sequence[str]) -> None:
    steps = [row["step"] for row in rows]
    for place, name in enumerate(names):
        colour, marker = STYLES[place % len(STYLES)]
        every = max(1, len(rows) // 8)
        axes.plot(steps, [row[name] for row in rows], color=colour, marker=marker, markevery=every, label=name)
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    if names:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def plot_attention(path: str | Path, wave: torch.Tensor, attention: torch.Tensor, rate: int, title: str) -> None:
    """Draw the pooling's attention over an utterance above its waveform."""
    seconds = len(wave) / rate
    edges = np.linspace(0, seconds, len(attention) + 1)
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.stairs(attention.numpy() * len(attention), edges, fill=True, color=STYLES[-1][0])
    above.axhline(1.0, color="0.5", linewidth=0.8)
    above.set(ylabel="attention, 1 = even")
    below.plot(np.arange(len(wave)) / rate, wave.numpy(), color="0.3", linewidth=0.5)
    below.set(xlabel="seconds", ylabel="amplitude", xlim=(0, seconds))
    above.set_title(title, fontsize=10)
    save_figure(figure, path)
