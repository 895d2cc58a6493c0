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
    """Write `results.json` and, where there are labels, `confusion.png` of one method from what `evaluate` gives.

    Parameters
    ----------
    folder : str or pathlib.Path
        Folder of the method.
    scored : mapping
        What `evaluate` gives: scores in [0, 1], `None` without labels, and `counts`, the confusion matrix.
    labels : sequence of str
        Class names in their order.
    **about
        The `FIELDS` that `scored` does not have, and whatever else is known.

    Returns
    -------
    dict
        What was written.

    Raises
    ------
    KeyError
        If one of `FIELDS` is missing.

    Example
    -------
    >>> import tempfile
    >>> about = {**dict.fromkeys(FIELDS, "toy"), "seed": 1, "n_train": 8, "n_test": 4}
    >>> record = write_results(tempfile.mkdtemp(), {"UA": None}, ("angry", "sad"), **about)
    >>> record["UA"], record["labels"], list(record)[0]
    (None, ['angry', 'sad'], 'method')
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
