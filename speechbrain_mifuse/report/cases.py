"""What a run or a sweep left on disk, arranged for its report: transfers, runs, methods.

The test set's labels are opened here, after adaptation; nothing of this goes back into it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from speechbrain_mifuse.corpora.manifest import read_manifest
from speechbrain_mifuse.evaluation.aggregate import LOWER, UPPER
from speechbrain_mifuse.evaluation.scoring import labelled
from speechbrain_mifuse.features.dataset import label_index
from speechbrain_mifuse.report.result_files import FIELDS
from speechbrain_mifuse.utils.errors import UserError

RESULTS = "results.json"
# The method that is the API teacher itself.
TEACHER = "lalm_zero_shot"
# What a result with scores holds beside UA.
SCORED = ("WA", "macro_F1", "by_speaker")
# From a folder to the results of its methods: a run, one pair of a sweep, a sweep.
DEPTHS = ("*", "*/*", "*/*/*")


@dataclass(frozen=True, eq=False)
class Outcome:
    """One method of one run."""

    folder: Path
    record: Mapping

    @cached_property
    def predictions(self) -> dict[str, list[float]]:
        """Probabilities `[C]` by utterance id; empty when the file is not there."""
        return _read_json(self.folder / "predictions.json") or {}

    @cached_property
    def saved_weights(self) -> dict | None:
        """What `AdaptationBrain.teacher_weights` gave at the end of the run, if it was asked."""
        return _read_json(self.folder / "weighing.json")

    @cached_property
    def embeddings(self) -> dict | None:
        """What `brains.adaptation.plane` gave, with `ids`, if it was asked."""
        return _read_json(self.folder / "embeddings.json")

    @cached_property
    def temperature(self) -> float:
        """That of the recogniser that was exported; 1 where none was. `predictions` are at 1 in any case."""
        about = _read_json(self.folder / "recogniser" / "about.json") or {}
        return about.get("temperature", 1.0)

    @cached_property
    def log(self) -> dict[str, list[float]]:
        """Columns of `train_log.txt`, `epoch` among them; empty without training."""
        path = self.folder / "train_log.txt"
        return read_log(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_log(text: str) -> dict[str, list[float]]:
    r"""Read what SpeechBrain's `FileTrainLogger` wrote."""
    rows: dict[float, dict[str, float]] = {}
    for line in text.splitlines():
        found = dict(re.findall(r"(?:^|train |, )([\w]+): ([-+.\w]+)", line))
        if "epoch" in found:
            values = {name: float(value) for name, value in found.items()}
            rows[values["epoch"]] = values
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    return {name: [row.get(name, math.nan) for _, row in sorted(rows.items())] for name in names}


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}). Delete it and run again.") from None


@dataclass(frozen=True, eq=False)
class Run:
    """One run: one transfer with one seed, some methods."""

    folder: Path
    outcomes: Mapping[str, Outcome]

    @property
    def record(self) -> Mapping:
        """The first method's record, for what all methods of a run share."""
        return next(iter(self.outcomes.values())).record

    @property
    def manifest(self) -> Path:
        """Of the test utterances; a page can do without."""
        return self.folder / "manifests" / "target" / "test.json"

    @cached_property
    def _rows(self) -> dict[str, dict]:
        return read_manifest(self.manifest) if self.manifest.is_file() else {}

    @cached_property
    def ids(self) -> list[str]:
        """Test utterances: those of the manifest, or without it all that any method predicted."""
        found = self._rows or dict.fromkeys(key for o in self.outcomes.values() for key in o.predictions)
        return list(found)

    @cached_property
    def reference(self) -> np.ndarray | None:
        """`[N]`, class indices in the order of `ids`; `None` without labels."""
        if not self._rows or not labelled(self._rows):
            return None
        labels = self.record["labels"]
        return np.array([label_index(labels, row, key) for key, row in self._rows.items()])

    @cached_property
    def verdict(self) -> dict | None:
        """What `judge` said of the student without labels, if it was asked."""
        return _read_json(self.folder / "verdict.json")

    def probs(self, method: str) -> np.ndarray:
        """`[N, C]`, a method's answers in the order of `ids`; zeros where there is none."""
        found, silent = self.outcomes[method].predictions, [0.0] * len(self.record["labels"])
        return np.array([found.get(key, silent) for key in self.ids]).reshape(-1, len(silent))

    def chosen(self, method: str) -> np.ndarray:
        """`[N]`, class indices of a method's answers; -1 where there is none."""
        probs = self.probs(method)
        return np.where(probs.sum(1) > 0, probs.argmax(1), -1)


@dataclass(frozen=True, eq=False)
class Case:
    """All runs of one transfer: one for each seed."""

    runs: Sequence[Run]

    @property
    def record(self) -> Mapping:
        """The first record, for what all runs of a case share."""
        return self.runs[0].record

    @property
    def name(self) -> str:
        """Source and target."""
        return f"{self.record['source']} to {self.record['target']}"

    @property
    def labels(self) -> list[str]:
        """Class names."""
        return self.record["labels"]

    @property
    def records(self) -> list[Mapping]:
        """Of every method and run."""
        return [outcome.record for run in self.runs for outcome in run.outcomes.values()]

    @property
    def scored(self) -> bool:
        """Whether the test set has labels."""
        return all(record["UA"] is not None for record in self.records)

    @cached_property
    def methods(self) -> list[str]:
        """Methods of any run, in the order of `ranked`."""
        return ranked(self.records)

    @property
    def figured(self) -> list[str]:
        """Methods in the order of figures: source, API teacher, then from the best."""
        first = [name for name in (LOWER, TEACHER) if name in self.methods]
        return [*first, *(name for name in reversed(self.methods) if name not in first)]

    def runs_of(self, *methods: str) -> list[Run]:
        """Give the runs that hold all the methods that are named."""
        return [run for run in self.runs if all(method in run.outcomes for method in methods)]

    def outcomes(self, method: str) -> list[Outcome]:
        """Give a method's outcomes, by seed."""
        return [run.outcomes[method] for run in self.runs_of(method)]

    def scores(self, method: str, score: str) -> list[float]:
        """Give a score of each run, in [0, 1]."""
        return [outcome.record[score] for outcome in self.outcomes(method)]

    def mean(self, method: str) -> float:
        """Mean UA in percent."""
        return 100 * float(np.mean(self.scores(method, "UA")))

    def by_speaker(self, method: str) -> np.ndarray:
        """Confusion counts of each test speaker, summed over the runs."""
        return np.sum([list(outcome.record["by_speaker"].values()) for outcome in self.outcomes(method)], axis=0)


def ranked(records: Iterable[Mapping]) -> list[str]:
    """Order methods for a report: the lower bound, then by ascending mean UA, then the upper bound."""
    found: dict[str, list[float]] = {}
    for record in records:
        found.setdefault(record["method"], []).append(record["UA"] or 0.0)
    return sorted(found, key=lambda name: ((name == UPPER) - (name == LOWER), np.mean(found[name]), name))


def read_cases(folder: str | Path) -> list[Case]:
    """Find the results of a run or a sweep."""
    found = sorted(path for depth in DEPTHS for path in Path(folder).glob(f"{depth}/{RESULTS}"))
    cases = cases_of(found)
    if not cases:
        raise UserError(f"{folder}: no results of an adaptation below it. Name the output folder of a run or a sweep.")
    return cases


def cases_of(paths: Iterable[str | Path]) -> list[Case]:
    """Arrange results by transfer and run."""
    runs: dict[Path, dict[str, Outcome]] = {}
    for path in map(Path, paths):
        record = _read_json(path)
        if not _is_record(path, record):
            continue
        runs.setdefault(path.parent.parent, {})[record["method"]] = Outcome(path.parent, record)
    cases: dict[tuple, list[Run]] = {}
    for folder, outcomes in runs.items():
        run = Run(folder, outcomes)
        _require_complete(run)
        cases.setdefault(tuple(run.record[key] for key in ("target", "source", "teacher")), []).append(run)
    return [Case(sorted(cases[key], key=lambda run: run.record["seed"])) for key in sorted(cases)]


def _is_record(path: Path, record) -> bool:
    if not isinstance(record, dict) or "method" not in record:
        if (path.parent / "predictions.json").is_file():
            raise UserError(f"{path}: not the result of a method. Delete it and run again.")
        return False
    # A run of one method has a copy of its record in the run's own folder.
    if (path.parent / record["method"] / RESULTS).is_file():
        return False
    wanted = [*FIELDS, "labels", "UA", *(SCORED if record.get("UA") is not None else ())]
    missing = [field for field in wanted if field not in record]
    if missing or not isinstance(record["labels"], list):
        raise UserError(f"{path}: no whole result of one method ({', '.join(missing)}). Delete it and run again.")
    wrong = [field for field in (*SCORED[:2], "UA") if not _is_share(record.get(field))]
    if record["UA"] is not None and (not isinstance(record["by_speaker"], dict) or not record["by_speaker"]):
        wrong.append("by_speaker")
    if wrong:
        raise UserError(f"{path}: not a score: {', '.join(wrong)}. Delete it and run again.")
    return True


def _is_share(value) -> bool:
    """Tell whether a score can be one; a target without labels has none."""
    return value is None or (isinstance(value, int | float) and 0 <= value <= 1)


def _require_complete(run: Run) -> None:
    """Refuse a run whose files do not belong together: its page would be wrong."""
    known = run._rows
    # A page can do without any predictions, and not with those of some methods alone.
    predicted = any((outcome.folder / "predictions.json").is_file() for outcome in run.outcomes.values())
    for outcome in run.outcomes.values():
        record, path = outcome.record, outcome.folder / "predictions.json"
        if (record["labels"], record["seed"]) != (run.record["labels"], run.record["seed"]):
            raise UserError(f"{outcome.folder / RESULTS}: has other labels or another seed than the methods beside it.")
        if not predicted:
            continue
        found, size = _read_json(path), len(record["labels"])
        if not isinstance(found, dict) or len(found) != record["n_test"] - record.get("unanswered", 0):
            raise UserError(f"{path}: does not hold the predictions that {RESULTS} is about. Run the method again.")
        strange = next((key for key, row in found.items() if not isinstance(row, list) or len(row) != size), None)
        if strange is not None:
            raise UserError(f"{path}: '{strange}' has not {size} probabilities. Delete it and run again.")
        if known and (unknown := found.keys() - known.keys()):
            raise UserError(f"{path}: '{min(unknown)}' is not a recording of {run.manifest}. Run the method again.")
