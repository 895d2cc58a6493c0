"""From predictions to scores: the one place that opens the target's labels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from speechbrain_mifuse.corpora.manifest import known_speakers, read_manifest, recordings_without_speaker
from speechbrain_mifuse.evaluation.aggregate import Table
from speechbrain_mifuse.evaluation.metrics import scores_of, speaker_counts, speaker_interval
from speechbrain_mifuse.features.dataset import label_index
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.utils.texts import markdown

SCORES = ("UA", "WA", "macro_F1", "ci95")


def evaluate(predictions: Mapping[str, Sequence[float]], manifest: str | Path, labels: Sequence[str]) -> dict:
    """Score predictions against a labelled manifest; one without any label is not scored.

    Parameters
    ----------
    predictions : mapping of str to sequence of float
        Probabilities `[C]` by utterance id. An utterance of the manifest without any counts as wrong.
    manifest : str or pathlib.Path
        The test manifest.
    labels : sequence of str
        The fixed label order.

    Returns
    -------
    dict
        `UA`, `WA`, `macro_F1`, `ci95` (of UA, over speakers), `n_test`, `test_speakers` (known ones),
        `test_recordings_without_speaker` (each counts as a speaker in the interval), `unanswered`, `counts`, the
        confusion tensor, and `by_speaker`, the same for each speaker. Without labels the scores are `None`, and
        `counts` and `by_speaker` are missing.

    Raises
    ------
    CorpusError
        If the manifest is missing or holds an unknown label, or labels for some utterances alone.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> atomic_write(folder / "corpus.json", '{"data_root": "/toy"}')
    >>> row = '{"wav": "a.wav", "speaker": "1", "emo": "sad"}'
    >>> atomic_write(folder / "test.json", '{"t-a": %s, "t-b": %s}' % (row, row))
    >>> evaluate({"t-a": [0.1, 0.9]}, folder / "test.json", ["angry", "sad"])["UA"]
    0.5
    """
    rows = read_manifest(manifest)
    speakers = sorted({row["speaker"] for row in rows.values()})
    about = {"n_test": len(rows), "test_speakers": len(known_speakers(rows))}
    about["test_recordings_without_speaker"] = recordings_without_speaker(rows)
    if not labelled(rows):
        return {**dict.fromkeys(SCORES), **about, "unanswered": len(rows.keys() - predictions.keys())}
    by_speaker = counts_by_speaker(predictions, rows, labels)
    counts = by_speaker.sum(0)
    return {
        **scores_of(counts),
        "ci95": list(speaker_interval(by_speaker)),
        **about,
        "unanswered": int(counts[:, -1].sum()),
        "counts": counts,
        "by_speaker": dict(zip(speakers, by_speaker.tolist(), strict=True)),
    }


def labelled(rows: Mapping[str, Mapping]) -> bool:
    """Tell whether any utterance of a manifest has a label."""
    return any(row.get("emo") is not None for row in rows.values())


def counts_by_speaker(
    predictions: Mapping[str, Sequence[float]], rows: Mapping[str, Mapping], labels: Sequence[str]
) -> torch.Tensor:
    """Confusion counts of each test speaker."""
    reference = torch.tensor([label_index(labels, row, key) for key, row in rows.items()])
    chosen = [torch.as_tensor(predictions[key]).argmax() if key in predictions else torch.tensor(-1) for key in rows]
    speakers = [row["speaker"] for row in rows.values()]
    return speaker_counts(torch.stack(chosen), reference, speakers, len(labels))


def score_snapshots(snapshots: Sequence[Mapping], manifest: str | Path, labels: Sequence[str]) -> list[dict]:
    """Put UA in the place of each snapshot's predictions."""
    if not snapshots:
        return []
    rows = read_manifest(manifest)
    found = []
    for snapshot in snapshots:
        counts = counts_by_speaker(snapshot["predictions"], rows, labels).sum(0) if labelled(rows) else None
        rest = {key: value for key, value in snapshot.items() if key not in ("step", "predictions")}
        found.append({"step": snapshot["step"], "UA": None if counts is None else scores_of(counts)["UA"], **rest})
    return found


def side_by_side(folder: str | Path, order: Sequence[str]) -> str:
    """Write `results.md`: every method that has results in a run's folder, side by side."""
    paths = [Path(folder) / name / "results.json" for name in order]
    records = [json.loads(path.read_text()) for path in paths if path.exists()]
    if not records:
        return ""
    first = records[0]
    lines = [
        f"# {markdown(first['source'])} to {markdown(first['target'])}, teacher {markdown(first['teacher'])}, "
        f"seed {first['seed']}",
        "",
        Table(["method", "UA %", "95 % interval", "WA %", "macro-F1 %"], list(map(_row, records))).markdown(),
    ]
    adapted = max(record["n_train"] for record in records)
    selection = "; ".join(dict.fromkeys(record["selection"] for record in records))
    lines += [
        markdown(
            f"Protocol: {first['protocol']}. Adapted on {adapted} utterances, tested on {first['n_test']}. "
            f"Selection: {selection}. Encoder: {first['encoder']}. "
            f"{_interval_told(first)}Code {first['code_version']}."
        ),
        "",
    ]
    text = "\n".join(lines)
    atomic_write(Path(folder) / "results.md", text)
    return text


def _interval_told(record: Mapping) -> str:
    """Say what the interval of UA is over, and what it is worth where speakers are not known."""
    if record["UA"] is None:
        return ""
    speakers, without = record["test_speakers"], record.get("test_recordings_without_speaker", 0)
    drawn = [f"the {speakers} test speakers"] if speakers or not without else []
    drawn += [f"{without} recordings without a known speaker, too narrow where these share one"] if without else []
    return f"Interval of UA: Student's t over {' and '.join(drawn)}. "


def _row(record: Mapping) -> list[str]:
    if record["UA"] is None:
        return [record["method"], "no labels, not scored", "", "", ""]
    low, high = (100 * bound for bound in record["ci95"])
    ua, wa, f1 = (f"{100 * record[name]:.1f}" for name in SCORES[:3])
    return [record["method"], ua, f"{low:.1f} to {high:.1f}", wa, f1]
