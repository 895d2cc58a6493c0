"""Figures of the teacher report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from speechbrain_mifuse.report.plots import STYLES, save_figure

BLUE, RED, GREY, ORANGE = STYLES[7][0], STYLES[4][0], STYLES[0][0], STYLES[1][0]


def plot_calibration(path: str | Path, classes: Mapping[str, Mapping], few: int) -> None:
    """Draw for each class how often it is right against the probability that the teacher gives it."""
    columns = min(len(classes), 4)
    rows = math.ceil(len(classes) / columns)
    figure = Figure(figsize=(0.8 + 2.6 * columns, 0.9 + 2.7 * rows), layout="constrained")
    for place, (label, found) in enumerate(classes.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        stated, frequency, count = (np.array(found[name]) for name in ("stated", "frequency", "count"))
        axes.plot([0, 1], [0, 1], color="0.75", linewidth=1)
        axes.plot(stated, frequency, color=BLUE, linewidth=1.2)
        many = count >= few
        axes.scatter(stated[many], frequency[many], s=34, color=BLUE, zorder=3)
        axes.scatter(stated[~many], frequency[~many], s=34, facecolor="white", edgecolor=BLUE, zorder=3)
        axes.set_title(f"{label}: error {100 * found['error']:.1f} %", fontsize=10)
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
        _tidy(axes)
        for side, percent in ((axes.xaxis, 1), (axes.yaxis, 1)):
            side.set_major_formatter(PercentFormatter(percent, symbol=""))
    figure.supxlabel("probability that the teacher states, %", fontsize=10)
    figure.supylabel("share that is so, %", fontsize=10)
    figure.suptitle(f"Calibration by class (hollow: fewer than {few} utterances)", fontsize=11)
    save_figure(figure, path)


def plot_uncertainty(path: str | Path, teachers: Mapping[str, torch.Tensor]) -> None:
    """Draw histograms of mutual information, one below the other on the same axis."""
    figure = Figure(figsize=(6.4, 0.9 + 1.9 * len(teachers)), layout="constrained")
    values = {name: tensor.double().numpy() for name, tensor in teachers.items()}
    widest = max([0.1, *(float(np.quantile(found, 0.995)) for found in values.values() if len(found))])
    edges = np.linspace(0, min(1.0, math.ceil(20 * widest) / 20), 41)
    for place, ((name, found), colour) in enumerate(zip(values.items(), (RED, BLUE), strict=False), start=1):
        axes = figure.add_subplot(len(values), 1, place)
        axes.hist(
            np.clip(found, 0, edges[-1]), edges, weights=np.full(len(found), 1 / max(len(found), 1)), color=colour
        )
        told = f"median {np.median(found):.3f}" if len(found) else "needs two samples of an utterance"
        axes.set_title(f"{name}: {len(found)} utterances, {told}", fontsize=10, loc="left")
        axes.set(xlim=(0, edges[-1]), ylabel="utterances, %")
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
        _tidy(axes)
    axes.set_xlabel("mutual information of the samples (0: they agree, 1: the most that is possible)")
    save_figure(figure, path)


def plot_answers(path: str | Path, classes: Mapping[str, Mapping]) -> None:
    """Draw the teacher's classes: how often it chooses each, beside the labels where known, and how often it fails."""
    names, height = list(classes), 0.38
    place = np.arange(len(names))
    figure = Figure(figsize=(8.2, 1.3 + 0.62 * len(names)), layout="constrained")
    chosen, failed = figure.subplots(1, 2, sharey=True)
    bars = {"teacher says": ([row["predicted"] for row in classes.values()], RED)}
    if all("reference" in row for row in classes.values()):
        bars["labels say"] = ([row["reference"] for row in classes.values()], GREY)
    _bars(chosen, place, bars, height, "{:.0f}")
    chosen.set(yticks=place, yticklabels=names, xlabel="utterances")
    shares = {
        f"{name} %": ([100 * (row[key] or 0) for row in classes.values()], colour)
        for name, key, colour in (("refused", "refusal", ORANGE), ("invalid", "invalid", BLUE))
    }
    _bars(failed, place, shares, height, "{:.1f}")
    failed.set(xlabel="% of the answers received, by the teacher's class")
    chosen.invert_yaxis()
    for axes in (chosen, failed):
        _tidy(axes)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=9)
    save_figure(figure, path)


def _bars(axes, place: np.ndarray, bars: Mapping[str, tuple], height: float, form: str) -> None:
    for row, (name, (values, colour)) in enumerate(bars.items()):
        drawn = axes.barh(place + (row - (len(bars) - 1) / 2) * height, values, height, color=colour, label=name)
        axes.bar_label(drawn, [form.format(value) for value in values], padding=3, fontsize=8)
    axes.set_xlim(0, 1.18 * max([1, *(value for values, _ in bars.values() for value in values)]))


def _tidy(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
