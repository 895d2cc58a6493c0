"""From the `results.json` of many runs to one table: every transfer, mean, deviation, intervals, paired differences."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from speechbrain_mifuse.corpora.manifest import atomic_write
from speechbrain_mifuse.errors import UserError

COLUMNS = ("source", "target", "teacher", "method", "seed", "UA", "WA", "macro_F1", "n_test")


def read_records(folder: str | Path, methods: Sequence[str]) -> list[dict]:
    """Collect the methods' `results.json` anywhere below a folder.

    Parameters
    ----------
    folder : str or pathlib.Path
        Holds the runs' output folders.
    methods : sequence of str
        Methods wanted.

    Returns
    -------
    list of dict
        Records, ordered by target, source, method, seed.

    Raises
    ------
    UserError
        If there is none.

    Example
    -------
    >>> import tempfile
    >>> read_records(tempfile.mkdtemp(), ["mi_fuse"])
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.errors.UserError: ...: no results.json of mi_fuse below it.
    """
    paths = [path for name in methods for path in sorted(Path(folder).glob(f"**/{name}/results.json"))]
    records = [json.loads(path.read_text()) for path in paths]
    if not records:
        raise UserError(f"{folder}: no results.json of {', '.join(methods)} below it.")
    order = {name: place for place, name in enumerate(methods)}
    return sorted(records, key=lambda r: (r["target"], r["source"], order[r["method"]], r["seed"]))


def write_csv(path: str | Path, records: Sequence[dict]) -> None:
    """Write one row per record, fractions in [0, 1].

    Parameters
    ----------
    path : str or pathlib.Path
        CSV to write.
    records : sequence of dict
        As `read_records` gives.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "table.csv"
    >>> write_csv(path, [dict.fromkeys(COLUMNS, 0.123456)])
    >>> path.read_text().splitlines()[1][:14]
    '0.1235,0.1235,'
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for record in records:
        writer.writerow([f"{v:.4f}" if isinstance(v := record[name], float) else v for name in COLUMNS])
    atomic_write(path, buffer.getvalue())


def transfer_counts(records: Sequence[dict], methods: Sequence[str]) -> dict[tuple[str, str], np.ndarray]:
    """Arrange the confusion counts of each transfer.

    Parameters
    ----------
    records : sequence of dict
        Every method with the same seeds on every transfer.
    methods : sequence of str
        Order of the first axis.

    Returns
    -------
    dict of tuple to numpy.ndarray
        `[methods, seeds, speakers, C, C + 1]` by (source, target).

    Raises
    ------
    UserError
        If a method lacks a seed that another has.

    Example
    -------
    >>> record = dict(source="a", target="b", method="m", seed=1, by_speaker={"s": [[3, 1, 0], [0, 2, 0]]})
    >>> transfer_counts([record], ["m"])["a", "b"].shape
    (1, 1, 1, 2, 3)
    """
    found: dict[tuple[str, str], dict] = {}
    for record in records:
        place = found.setdefault((record["source"], record["target"]), {})
        place[record["method"], record["seed"]] = list(record["by_speaker"].values())
    arrays = {}
    for pair, place in found.items():
        seeds = sorted({seed for _, seed in place})
        missing = [(m, s) for m in methods for s in seeds if (m, s) not in place]
        if missing:
            raise UserError(f"{pair[0]} to {pair[1]}: no result of (method, seed) {missing}. Run what is missing.")
        arrays[pair] = np.array([[place[m, s] for s in seeds] for m in methods])
    return arrays


def unweighted_accuracy(counts: np.ndarray) -> np.ndarray:
    """Mean recall over the classes that occur.

    Parameters
    ----------
    counts : numpy.ndarray
        `[..., C, C + 1]`.

    Returns
    -------
    numpy.ndarray
        `[...]`, in [0, 1].

    Example
    -------
    >>> float(unweighted_accuracy(np.array([[3, 1, 0], [0, 2, 0]])))
    0.875
    """
    total = counts.sum(-1)
    hits = np.diagonal(counts[..., :-1], axis1=-2, axis2=-1)
    with np.errstate(invalid="ignore"):
        return np.nanmean(np.where(total > 0, hits / np.maximum(total, 1), np.nan), axis=-1)


def bootstrap_means(arrays: dict[tuple[str, str], np.ndarray], draws: int = 2000, seed: int = 0) -> np.ndarray:
    """Draw test speakers and seeds with replacement; the mean UA over the transfers of each draw.

    Speakers and seeds are drawn once for all methods, so that differences of two columns are paired. The transfers
    themselves are fixed: the interval speaks of other speakers and seeds on these corpora, not of other corpora.

    Parameters
    ----------
    arrays : dict
        As `transfer_counts` gives.
    draws : int
        Bootstrap samples.
    seed : int
        Of the draws.

    Returns
    -------
    numpy.ndarray
        `[draws, methods]`.

    Example
    -------
    >>> perfect = np.array([[[[[2, 0, 0], [0, 2, 0]]] * 3]])
    >>> bootstrap_means({("a", "b"): perfect}, draws=4).ravel().tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    generator = np.random.default_rng(seed)
    totals = np.zeros((draws, len(next(iter(arrays.values())))))
    for counts in arrays.values():
        for draw in range(draws):
            seeds = generator.integers(0, counts.shape[1], counts.shape[1])
            speakers = generator.integers(0, counts.shape[2], counts.shape[2])
            picked = counts[:, seeds][:, :, speakers].sum(2)
            totals[draw] += unweighted_accuracy(picked).mean(1)
    return totals / len(arrays)


def transfer_table(records: Sequence[dict], methods: Sequence[str], baselines: Sequence[str]) -> str:
    """Write the table of all transfers in Markdown: mean and standard deviation over seeds, intervals, differences.

    Parameters
    ----------
    records : sequence of dict
        As `read_records` gives.
    methods : sequence of str
        Rows.
    baselines : sequence of str
        Methods that every row is compared with.

    Returns
    -------
    str
        Markdown.

    Example
    -------
    >>> record = dict(source="a", target="b", method="m", seed=1, by_speaker={"s": [[3, 1, 0], [0, 2, 0]]})
    >>> print(transfer_table([record], ["m"], []).splitlines()[2])
    | m | 87.5 ± 0.0 | **87.5** | 87.5 to 87.5 |
    """
    arrays = transfer_counts(records, methods)
    pairs = list(arrays)
    accuracy = np.stack([100 * unweighted_accuracy(arrays[pair].sum(2)) for pair in pairs])  # [pairs, methods, seeds]
    draws = 100 * bootstrap_means(arrays)
    head = ["UA %", *(f"{s} to {t}" for s, t in pairs), "mean", "95 % interval", *(f"above {b}" for b in baselines)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row, method in enumerate(methods):
        ddof = 1 if accuracy.shape[2] > 1 else 0
        cells = [f"{v.mean():.1f} ± {v.std(ddof=ddof):.1f}" for v in accuracy[:, row]]
        low, high = np.percentile(draws[:, row], [2.5, 97.5])
        cells += [f"**{accuracy[:, row].mean():.1f}**", f"{low:.1f} to {high:.1f}"]
        for baseline in baselines:
            cells.append(paired_difference(accuracy, draws, row, list(methods).index(baseline)))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def paired_difference(accuracy: np.ndarray, draws: np.ndarray, row: int, other: int) -> str:
    """Format the mean difference of two methods with its interval.

    Parameters
    ----------
    accuracy : numpy.ndarray
        `[pairs, methods, seeds]`, UA in percent.
    draws : numpy.ndarray
        `[draws, methods]`, in percent.
    row, other : int
        The two methods.

    Returns
    -------
    str
        `+difference (low to high)`; empty for a method against itself.

    Example
    -------
    >>> paired_difference(np.array([[[50.0], [60.0]]]), np.array([[50.0, 60.0]] * 2), 1, 0)
    '+10.0 (+10.0 to +10.0)'
    """
    if row == other:
        return ""
    low, high = np.percentile(draws[:, row] - draws[:, other], [2.5, 97.5])
    return f"{(accuracy[:, row] - accuracy[:, other]).mean():+.1f} ({low:+.1f} to {high:+.1f})"
