"""What an API teacher is worth: how often it answers, how sure it is, whether that is deserved, and what it cost.

Everything but the comparison with labels is known before adaptation. Labels, where there are any, are opened here by
the evaluator, after adaptation, and nothing of this report goes back into it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from speechbrain_mifuse import __version__
from speechbrain_mifuse.adaptation.uncertainty import masked_mean, mutual_information
from speechbrain_mifuse.corpora.manifest import read_manifest
from speechbrain_mifuse.evaluation.aggregate import Table
from speechbrain_mifuse.evaluation.metrics import kappa, reliability, scores
from speechbrain_mifuse.evaluation.scoring import labelled
from speechbrain_mifuse.features.dataset import label_index
from speechbrain_mifuse.inference.recognizer import EmotionRecognizer
from speechbrain_mifuse.inference.recognizer_folder import recogniser_digest
from speechbrain_mifuse.lalm.answer import KINDS, SAMPLE_KINDS
from speechbrain_mifuse.lalm.hashes import HashCache
from speechbrain_mifuse.lalm.plan import read_known
from speechbrain_mifuse.lalm.profile import Price, Tokens
from speechbrain_mifuse.lalm.store import LabelStore, Query, QuerySummary, Samples
from speechbrain_mifuse.report.figures import plot_answers, plot_calibration, plot_uncertainty
from speechbrain_mifuse.report.templating import environment
from speechbrain_mifuse.utils.audio import load_audio
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.utils.progress import progress

# A sample this sure of one label counts as a single label.
ONE_HOT = 0.999


class Bill(NamedTuple):
    """What a collection used and cost."""

    tokens: Tokens
    batch_tokens: Tokens
    samples: int
    price: Price | None = None

    @classmethod
    def of(cls, summary: QuerySummary, price: Price | None) -> Bill:
        """Read it from a store."""
        samples = sum(summary.counts[kind] for kind in SAMPLE_KINDS)
        return cls(summary.tokens, summary.batch_tokens, samples, price)

    @property
    def cost(self) -> float | None:
        """Price of all tokens, in the currency of the price; `None` if there is none."""
        return self.price and self.price.cost(self.tokens, self.batch_tokens)


def teacher_figures(
    samples: Samples,
    labels: Sequence[str],
    reference: torch.Tensor | None = None,
    source: torch.Tensor | None = None,
    bill: Bill | None = None,
) -> dict:
    """Measure a teacher."""
    utterances, k = samples.mask.shape
    if not utterances:
        raise UserError("teacher report: no utterance. Name a manifest whose recordings the store knows.")
    for name, tensor in (("labels", reference), ("source classifier", source)):
        if tensor is not None and len(tensor) != utterances:
            raise UserError(f"teacher report: the {name} has {len(tensor)} utterances and the teacher {utterances}")
    mean, answered = masked_mean(samples.probs, samples.mask), samples.mask.any(1)
    predicted = torch.where(answered, mean.argmax(1), -1)
    uncertain = mutual_information(samples.probs, samples.mask)
    several = samples.mask.sum(1) > 1
    found = {
        "utterances": utterances,
        "k": k,
        "answered": int(answered.sum()),
        "samples": int(samples.mask.sum()),
        "kinds": {kind: int((samples.kinds == code).sum()) for code, kind in enumerate(KINDS)},
        "never_asked": int((samples.kinds < 0).sum()),
        "one_hot": _share((samples.probs.amax(-1) > ONE_HOT)[samples.mask]),
        "mutual_information": _middle(uncertain[several]),
        "classes": {
            label: {
                "predicted": int((predicted == place).sum()),
                "mean_probability": _mean(mean[answered, place]),
                "mutual_information": _middle(uncertain[several & (predicted == place)]),
                **_rejected(samples.kinds[predicted == place]),
            }
            for place, label in enumerate(labels)
        },
        "no_prediction": {"utterances": int((~answered).sum()), **_rejected(samples.kinds[~answered])},
    }
    if reference is not None:
        found["scores"] = {
            **scores(predicted, reference, len(labels)),
            "calibration": reliability(mean.amax(1)[answered], (predicted == reference)[answered])._asdict(),
        }
        for place, label in enumerate(labels):
            found["classes"][label] |= _against_labels(mean, samples.kinds, predicted, reference, place)
    if source is not None:
        found["source"] = _against_source(predicted, answered, source, reference, len(labels))
    if bill is not None:
        found["cost"] = _cost(bill)
    return found


def write_teacher_report(
    folder: str | Path,
    samples: Samples,
    labels: Sequence[str],
    about: str,
    reference: torch.Tensor | None = None,
    source: torch.Tensor | None = None,
    bill: Bill | None = None,
) -> str:
    """Write `teacher.md`, `teacher.json` and the figures `teacher_*.png` into a folder."""
    folder = Path(folder)
    found = teacher_figures(samples, labels, reference, source, bill)
    uncertain = {"teacher": mutual_information(samples.probs, samples.mask)[samples.mask.sum(1) > 1]}
    if source is not None and source.shape[1] > 1:
        uncertain["source classifier"] = mutual_information(source)
    figures = ["teacher_answers.png", "teacher_uncertainty.png"]
    plot_answers(folder / figures[0], found["classes"])
    plot_uncertainty(folder / figures[1], uncertain)
    if reference is not None:
        figures.append("teacher_calibration.png")
        plot_calibration(folder / figures[2], {name: row["calibration"] for name, row in found["classes"].items()})
    text = (
        environment()
        .get_template("teacher.md")
        .render(about=about, figures=figures, tables=_tables(found), percent=_percent, median=_median, **found)
    )
    atomic_write(folder / "teacher.json", json.dumps({"about": about, **found, "code_version": __version__}, indent=1))
    atomic_write(folder / "teacher.md", text)
    return text


def report_store(
    store: LabelStore,
    summary: QuerySummary,
    manifest: str | Path,
    folder: str | Path,
    source: str | Path | None = None,
    price: Price | None = None,
    passes: int = 16,
    show_progress: bool = True,
) -> str:
    """Report on the answers to one query about the utterances of a manifest."""
    rows, query = read_manifest(manifest), summary.query
    hashes = _hashes(store, query, rows, show_progress)
    samples = store.load(query, [hashes[key] for key in rows], summary.k)
    if not (samples.kinds >= 0).any():
        raise UserError(f"{manifest}: the store {store.path} has no answer about any of its utterances to this query")
    classified = None if source is None else _classified(source, query.labels, rows, passes, show_progress)
    about = f"{query.model} at {query.endpoint}, about {Path(manifest).name}"
    reference = reference_of(rows, query.labels)
    return write_teacher_report(folder, samples, query.labels, about, reference, classified, Bill.of(summary, price))


def _hashes(store: LabelStore, query: Query, rows: Mapping[str, Mapping], show_progress: bool) -> dict[str, str]:
    hashes = store.recordings(query)
    unknown = [key for key in rows if key not in hashes]
    with HashCache.beside(store.path) as cache:
        for key in progress(unknown, desc="looking up recordings", unit="utt", disable=not (show_progress and unknown)):
            wav = rows[key]["wav"]
            hashes[key] = cache.of(wav, functools.partial(read_known, wav)).audio
    return hashes


def _classified(
    source: str | Path, labels: Sequence[str], rows: Mapping[str, Mapping], passes: int, show_progress: bool
) -> torch.Tensor:
    """`[N, P, C]` of the source recogniser."""
    recogniser_digest(source)
    recogniser = EmotionRecognizer.from_hparams(source)
    if list(recogniser.labels) != list(labels):
        raise UserError(
            f"{source}: knows the labels {list(recogniser.labels)}, the teacher was asked for {list(labels)}"
        )
    bar = progress(rows.values(), desc="source classifier", unit="utt", disable=not show_progress)
    waves = (load_audio(row["wav"], recogniser.sample_rate) for row in bar)
    return torch.stack([recogniser.predict_proba(wave, passes, stochastic=True, seed=0) for wave in waves])


def reference_of(rows: Mapping[str, Mapping], labels: Sequence[str]) -> torch.Tensor | None:
    """Class indices of a manifest's utterances, if they have labels."""
    if not labelled(rows):
        return None
    return torch.tensor([label_index(labels, row, key) for key, row in rows.items()])


def _share(which: torch.Tensor) -> float | None:
    return _mean(which.float())


def _mean(values: torch.Tensor) -> float | None:
    return round(float(values.mean()), 6) if len(values) else None


def _middle(values: torch.Tensor) -> dict | None:
    if not len(values):
        return None
    median = float(values.double().quantile(0.5))
    return {"mean": _mean(values), "median": round(median, 6), "utterances": len(values)}


def _rejected(kinds: torch.Tensor) -> dict:
    """Shares of refused and of invalid answers among those received for some utterances, `[n, K]`."""
    received = kinds[kinds >= 0]
    return {name: _share(received == KINDS.index(name)) for name in ("refusal", "invalid")}


def _against_labels(
    mean: torch.Tensor, kinds: torch.Tensor, predicted: torch.Tensor, reference: torch.Tensor, place: int
) -> dict:
    is_class, says_class, answered = reference == place, predicted == place, predicted >= 0
    return {
        "reference": int(is_class.sum()),
        "recall": _share(says_class[is_class]),
        "precision": _share(is_class[says_class]),
        "calibration": reliability(mean[answered, place], is_class[answered])._asdict(),
        "of_reference": _rejected(kinds[is_class]),
    }


def _against_source(
    predicted: torch.Tensor,
    answered: torch.Tensor,
    source: torch.Tensor,
    reference: torch.Tensor | None,
    classes: int,
) -> dict:
    other = source.mean(1).argmax(1)
    agree = (predicted == other)[answered]
    beyond_chance = kappa(predicted[answered], other[answered], classes) if len(agree) else None
    found = {
        "agreement": _share(agree),
        "kappa": beyond_chance and round(beyond_chance, 6),
        "passes": source.shape[1],
        "mutual_information": _middle(mutual_information(source)) if source.shape[1] > 1 else None,
    }
    if reference is not None:
        right, other_right = (predicted == reference)[answered], (other == reference)[answered]
        found |= {
            "scores": scores(other, reference, classes),
            "right_where_they_agree": _share(right[agree]),
            "teacher_right_where_they_differ": _share(right[~agree]),
            "source_right_where_they_differ": _share(other_right[~agree]),
        }
    return found


def _cost(bill: Bill) -> dict:
    told = {"tokens": bill.tokens._asdict(), "batch_tokens": bill.batch_tokens._asdict(), "samples": bill.samples}
    if bill.cost is None:
        return told
    told |= {"currency": bill.price.currency, "cost": round(bill.cost, 6), "prices": bill.price.source}
    return told | {"cost_per_1000_samples": round(1000 * bill.cost / bill.samples, 6) if bill.samples else None}


# The tables of teacher.md; `templates/teacher.md` holds its text.


def _percent(*shares: float | None) -> str:
    """Write fractions in percent."""
    return " / ".join("" if share is None else f"{100 * share:.1f}" for share in shares)


def _median(found: Mapping | None) -> str:
    return "" if found is None else f"{found['median']:.3f}"


def _tables(found: Mapping) -> dict[str, str]:
    made = {"answers": _answers_table(found), "classes": _classes_table(found)}
    made |= {name: make(found) for name, make in _OPTIONAL.items() if name in found}
    return {name: table.markdown() for name, table in made.items()}


def _answers_table(found: Mapping) -> Table:
    kinds = {kind: count for kind, count in found["kinds"].items() if count} | {"never asked": found["never_asked"]}
    wanted = found["utterances"] * found["k"]
    rows = [[kind, str(count), _percent(count / wanted)] for kind, count in kinds.items()]
    return Table(["kind of answer", "answers", "%"], rows)


def _rejected_cells(found: Mapping) -> list[str]:
    return [_percent(found["refusal"]), _percent(found["invalid"])]


def _classes_table(found: Mapping) -> Table:
    head = ["teacher's class", "utterances", "mean probability %", "mutual information", "refused %", "invalid %"]
    rows = []
    for label, row in found["classes"].items():
        cells = [str(row["predicted"]), _percent(row["mean_probability"]), _median(row["mutual_information"])]
        rows.append([label, *cells, *_rejected_cells(row)])
    none = found["no_prediction"]
    return Table(head, [*rows, ["none", str(none["utterances"]), "", "", *_rejected_cells(none)]])


def _scores_table(found: Mapping) -> Table:
    head = ["class", "utterances", "recall %", "precision %", "calibration error %", "refused %", "invalid %"]
    rows = []
    for label, row in found["classes"].items():
        shares = (row["recall"], row["precision"], row["calibration"]["error"])
        rows.append([label, str(row["reference"]), *map(_percent, shares), *_rejected_cells(row["of_reference"])])
    return Table(head, rows)


def _source_table(found: Mapping) -> Table:
    told = found["source"]
    beyond_chance = "undefined" if told["kappa"] is None else f"{told['kappa']:.2f}"
    rows = [["same class %", _percent(told["agreement"])], ["Cohen's kappa", beyond_chance]]
    if told["mutual_information"] is not None:
        teacher, source = _median(found["mutual_information"]), _median(told["mutual_information"])
        passes = f"{found['k']} samples / {told['passes']} passes"
        rows.append([f"mutual information, {passes}", f"{teacher or 'unknown'} / {source}"])
    if "scores" in told:
        where_they_differ = told["teacher_right_where_they_differ"], told["source_right_where_they_differ"]
        rows += [
            ["UA %, teacher / source", _percent(found["scores"]["UA"], told["scores"]["UA"])],
            ["both right where they agree %", _percent(told["right_where_they_agree"])],
            ["right where they differ %, teacher / source", _percent(*where_they_differ)],
        ]
    return Table(["measure", "value"], rows)


def _cost_table(found: Mapping) -> Table:
    used = {"live": found["cost"]["tokens"], "Batch API": found["cost"]["batch_tokens"]}
    rows = [[name, *(f"{of[kind]:,}" for kind in ("text", "audio", "output"))] for name, of in used.items()]
    return Table(["tokens", "input text", "input audio", "output"], rows)


_OPTIONAL = {"scores": _scores_table, "source": _source_table, "cost": _cost_table}
