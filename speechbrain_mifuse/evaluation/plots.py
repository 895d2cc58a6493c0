"""Figures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from speechbrain_mifuse.corpora.manifest import atomic_write


def plot_confusion(path: str | Path, counts: torch.Tensor, labels: Sequence[str], title: str) -> None:
    """Draw a confusion matrix: counts, shaded by each class's recall.

    Parameters
    ----------
    path : str or pathlib.Path
        PNG to write.
    counts : torch.Tensor
        `[C, C + 1]`, as `confusion` gives; the last column is drawn only when it is not empty.
    labels : sequence of str
        C class names.
    title : str
        Above the matrix.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "confusion.png"
    >>> plot_confusion(path, torch.tensor([[3, 1, 0], [0, 2, 0]]), ["angry", "sad"], "toy")
    >>> path.stat().st_size > 1000
    True
    """
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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    atomic_write(path, buffer.getvalue())
