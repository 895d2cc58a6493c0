"""Folders as runs and sweeps leave them, small enough to reckon by hand, and a reader of the page."""

import json
from html.parser import HTMLParser

import numpy as np

from speechbrain_mifuse.corpora.manifest import read_manifest
from speechbrain_mifuse.evaluation.metrics import scores_of
from speechbrain_mifuse.evaluation.scoring import counts_by_speaker
from speechbrain_mifuse.utils.files import atomic_write

LABELS = ("angry", "happy", "sad")
METHODS = {"source_only": 0.5, "lalm_zero_shot": 0.6, "mi_fuse": 0.75, "oracle": 0.95}
SPEAKERS, TAKES = 4, 5
VOID = {"meta", "wbr", "br", "link", "img", "input"}


def toy_predictions(ids, truth, skill, seed, classes):
    """Answers that are right with a probability of `skill`."""
    generator = np.random.default_rng(seed)
    found = {}
    for key in ids:
        chosen = truth[key] if generator.random() < skill else int(generator.integers(classes))
        probs = generator.dirichlet(np.ones(classes)) * 0.5
        probs[chosen] += 0.5
        found[key] = probs.tolist()
    return found


def toy_run(folder, seed=1, methods=METHODS, labels=LABELS, scored=True, **about):
    """A run's folder: manifest, predictions, logs, what the teachers weigh, and the results made of them."""
    truth = {f"t-{s}-{n}": n % len(labels) for s in range(SPEAKERS) for n in range(TAKES)}
    rows = {
        key: {"wav": f"{key}.wav", "speaker": f"s{key[2]}", **({"emo": labels[c]} if scored else {})}
        for key, c in truth.items()
    }
    manifest = folder / "manifests" / "target" / "test.json"
    atomic_write(manifest.with_name("corpus.json"), '{"data_root": "/toy"}')
    atomic_write(manifest, json.dumps(rows))
    for place, (method, skill) in enumerate(methods.items()):
        found = toy_predictions(rows, truth, skill, 100 * seed + place, len(labels))
        write_method(folder / method, method, found, manifest, labels, scored, seed, about)
    return folder


def write_method(folder, method, predictions, manifest, labels, scored, seed, about):
    """One method's folder; `results.json` holds what `write_results` writes."""
    trains = method not in ("source_only", "lalm_zero_shot")
    steps = (10, 20) if trains else ()
    record = {
        **{"method": method, "source": "nemo", "target": "ravdess", "teacher": "emodb", "seed": seed},
        **{"encoder": "toy encoder", "protocol": "speaker-independent", "selection": "last step, no label"},
        **{"n_train": 9, "n_test": len(predictions), "diversity_weight": 1.0, "temperature": 0.2},
        **{"steps": 20 if trains else 0, "labels": list(labels), "code_version": "0.0.toy", "UA": None},
        "snapshots": [{"step": step, "UA": 0.5 + step / 100 if scored else None, "snd": 1.0} for step in steps],
        **about,
    }
    if scored:
        rows = read_manifest(manifest)
        counts = counts_by_speaker(predictions, rows, labels)
        record |= {**scores_of(counts.sum(0)), "ci95": [0.25, 0.85], "test_speakers": SPEAKERS, "unanswered": 0}
        record["by_speaker"] = {f"s{place}": found for place, found in enumerate(counts.tolist())}
        record["confusion"] = counts.sum(0).tolist()
    atomic_write(folder / "results.json", json.dumps(record))
    atomic_write(folder / "predictions.json", json.dumps(predictions))
    if trains:
        log = "epoch: 1 - train loss: 2.00e+00{0}\nepoch: 2 - train loss: 1.50e+00{0}\n"
        atomic_write(folder / "train_log.txt", log.format(", train lalm_weight: 5.10e-01" * (method == "mi_fuse")))
        points = np.random.default_rng(seed).normal(size=(len(predictions), 2)).tolist()
        moments = {"ids": list(predictions), "before": points, "after": points, "explained": [0.5, 0.2]}
        atomic_write(folder / "embeddings.json", json.dumps(moments))
    if method == "mi_fuse":
        weighing = {"measure": "mi", "ids": ["a", "b", "c"], "lalm_weight": [0.2, 0.7, 0.0]}
        atomic_write(
            folder / "weighing.json", json.dumps({**weighing, "lalm": [0.3, 0.1, None], "classifier": [0.2] * 3})
        )


def toy_sweep(folder, pairs=(("nemo", "ravdess"), ("emodb", "ravdess")), seeds=(1, 2), **options):
    """A sweep's folder."""
    for source, target in pairs:
        for seed in seeds:
            about = {"source": source, "target": target, "teacher": "third"}
            toy_run(folder / f"{source}2{target}" / str(seed), seed, **{**options, **about})
    return folder


class Read(HTMLParser):
    """A page as a browser takes it: elements, attributes, text by element; fails on what is not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.text = [], [], {}
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def tables_of(text):
    """Cells of each table by its caption."""
    tables, rows, cell = {}, None, None

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            nonlocal rows, cell
            if tag == "table":
                rows = []
            elif tag == "tr":
                rows.append([])
            elif tag in ("th", "td", "caption"):
                cell = []

        def handle_endtag(self, tag):
            nonlocal cell
            if tag == "caption":
                tables["".join(cell)] = rows
            elif tag in ("th", "td"):
                rows[-1].append("".join(cell))
            if tag in ("th", "td", "caption"):
                cell = None

        def handle_data(self, data):
            if cell is not None:
                cell.append(data)

    Reader().feed(text)
    return tables
