"""The files of one result: `results.json` and the confusion matrix."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from speechbrain_mifuse import __version__
from speechbrain_mifuse.report.figures import plot_confusion
from speechbrain_mifuse.utils.files import atomic_write

FIELDS = ("method", "source", "target", "teacher", "seed", "encoder", "protocol", "selection", "n_train", "n_test")


def write_results(folder: str | Path, scored: Mapping, labels: Sequence[str], **about) -> dict:
    """Write `results.json` and, where there are labels, `confusion.png` of one method.

    Parameters
    ----------
    folder : str or pathlib.Path
        The method's folder.
    scored : mapping
        As `evaluate` gives.
    labels : sequence of str
        Class names.
    **about
        `method, source, target, teacher, seed, encoder, protocol, selection, n_train`, and whatever else is known.

    Returns
    -------
    dict
        What was written: fractions in [0, 1], or `None` for scores without labels.

    Example
    -------
    >>> import tempfile
    >>> counts = torch.tensor([[3, 1, 0], [0, 2, 0]])
    >>> scored = {**scores_of(counts), "ci95": [0.5, 1.0], "n_test": 6, "counts": counts}
    >>> about = dict(method="oracle", source="a", target="b", teacher="c", seed=1, encoder="toy", n_train=9)
    >>> found = write_results(tempfile.mkdtemp(), scored, ["x", "y"], protocol="toy", selection="last", **about)
    >>> found["UA"], found["n_test"]
    (0.875, 6)
    """
    record = {**about, **{key: value for key, value in scored.items() if key != "counts"}, "labels": list(labels)}
    if "counts" in scored:
        record["confusion"] = scored["counts"].tolist()
        title = f"{record['method']}: {record['source']} to {record['target']}, UA {100 * record['UA']:.1f} %"
        plot_confusion(Path(folder) / "confusion.png", scored["counts"], labels, title)
    record["code_version"] = __version__
    record = {**{field: record[field] for field in FIELDS}, **record}
    atomic_write(Path(folder) / "results.json", json.dumps(record, indent=1))
    return record
