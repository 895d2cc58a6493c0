"""What an API teacher is worth: how often it answers, how sure it is, whether that is deserved, and what it cost.

Everything but the comparison with labels is known before adaptation. Labels, where there are any, are opened here by
the evaluator, after adaptation, and nothing of this report goes back into it. How a method weighs a teacher by its
mutual information stands in `adaptation/fusion.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from speechbrain_mifuse import __version__
from speechbrain_mifuse.adaptation.uncertainty import masked_mean, mutual_information
from speechbrain_mifuse.corpora.manifest import read_manifest
from speechbrain_mifuse.evaluation.metrics import kappa, reliability, scores
from speechbrain_mifuse.evaluation.scoring import labelled
from speechbrain_mifuse.features.dataset import label_index
from speechbrain_mifuse.inference.recognizer import EmotionRecognizer
from speechbrain_mifuse.inference.recognizer_folder import recogniser_digest
from speechbrain_mifuse.lalm.answer import KINDS, SAMPLE_KINDS
from speechbrain_mifuse.lalm.collect import known_recording
from speechbrain_mifuse.lalm.hashes import HashCache
from speechbrain_mifuse.lalm.profile import Price, Tokens
from speechbrain_mifuse.lalm.store import LabelStore, Query, QuerySummary, Samples
from speechbrain_mifuse.report.figures import plot_answers, plot_calibration, plot_uncertainty
from speechbrain_mifuse.report.templating import environment, percent
from speechbrain_mifuse.utils.audio import load_audio
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.utils.progress import progress

# A sample this sure of one label counts as a single label.
ONE_HOT = 0.999
# Dropout passes of the source classifier.
PASSES = 16


def teacher_figures(
    samples: Samples,
    labels: Sequence[str],
    reference: torch.Tensor | None = None,
    source: torch.Tensor | None = None,
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
        "mutual_information": _mean_and_median(uncertain[several]),
        "classes": {
            label: {
                "predicted": int((predicted == place).sum()),
                "mean_probability": _mean(mean[answered, place]),
                "mutual_information": _mean_and_median(uncertain[several & (predicted == place)]),
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
    return found


def write_teacher_report(
    folder: str | Path,
    samples: Samples,
    labels: Sequence[str],
    about: str,
    reference: torch.Tensor | None = None,
    source: torch.Tensor | None = None,
    cost: Mapping | None = None,
) -> str:
    """Write `teacher.md`, `teacher.json` and the figures `teacher_*.png` into a folder."""
    folder = Path(folder)
    found = teacher_figures(samples, labels, reference, source)
    found |= {} if cost is None else {"cost": cost}
    uncertain = {"teacher": mutual_information(samples.probs, samples.mask)[samples.mask.sum(1) > 1]}
    if source is not None and source.shape[1] > 1:
        uncertain["source classifier"] = mutual_information(source)
    figures = ["teacher_answers.png", "teacher_uncertainty.png"]
    plot_answers(folder / figures[0], found["classes"])
    plot_uncertainty(folder / figures[1], uncertain)
    if reference is not None:
        figures.append("teacher_calibration.png")
        plot_calibration(folder / figures[2], {name: row["calibration"] for name, row in found["classes"].items()})
    template = environment().get_template("teacher.md")
    text = template.render(about=about, figures=figures, percent=percent, **found)
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
) -> str:
    """Report on the answers to one query about the utterances of a manifest.

    Parameters
    ----------
    store : LabelStore
        Store of the answers.
    summary : QuerySummary
        One of `store.queries()`.
    manifest : str or pathlib.Path
        Utterances to report on; where they have labels, the teacher is scored.
    folder : str or pathlib.Path
        Where `teacher.md`, `teacher.json` and the figures go.
    source : str or pathlib.Path, optional
        Folder of a recognizer to compare with.
    price : Price, optional
        Prices of the provider's tokens.

    Returns
    -------
    str
        Text of `teacher.md`.

    Raises
    ------
    UserError
        If the store has no answer about the manifest, or the recognizer has other labels.
    """
    rows, query = read_manifest(manifest), summary.query
    hashes = _hashes(store, query, rows)
    samples = store.load(query, [hashes[key] for key in rows], summary.k)
    if not (samples.kinds >= 0).any():
        raise UserError(f"{manifest}: the store {store.path} has no answer about any of its utterances to this query")
    classified = None if source is None else _classified(source, query.labels, rows)
    about = f"{query.model} at {query.endpoint}, about {Path(manifest).name}"
    reference = reference_of(rows, query.labels)
    answers = sum(summary.counts[kind] for kind in SAMPLE_KINDS)
    cost = cost_figures(summary.tokens, summary.batch_tokens, answers, price)
    return write_teacher_report(folder, samples, query.labels, about, reference, classified, cost)


def _hashes(store: LabelStore, query: Query, rows: Mapping[str, Mapping]) -> dict[str, str]:
    hashes = store.recordings(query)
    unknown = [key for key in rows if key not in hashes]
    with HashCache.beside(store.path) as cache:
        for key in progress(unknown, desc="looking up recordings", unit="utt", disable=not unknown):
            wav = rows[key]["wav"]
            hashes[key] = known_recording(wav, cache).audio
    return hashes


def _classified(source: str | Path, labels: Sequence[str], rows: Mapping[str, Mapping]) -> torch.Tensor:
    """`[N, P, C]` of the source recogniser."""
    recogniser_digest(source)
    recogniser = EmotionRecognizer.from_hparams(source)
    if list(recogniser.labels) != list(labels):
        raise UserError(
            f"{source}: knows the labels {list(recogniser.labels)}, the teacher was asked for {list(labels)}"
        )
    bar = progress(rows.values(), desc="source classifier", unit="utt")
    waves = (load_audio(row["wav"], recogniser.sample_rate) for row in bar)
    return torch.stack([recogniser.predict_proba(wave, PASSES, stochastic=True, seed=0) for wave in waves])


def reference_of(rows: Mapping[str, Mapping], labels: Sequence[str]) -> torch.Tensor | None:
    """Class indices of a manifest's utterances, if they have labels."""
    if not labelled(rows):
        return None
    return torch.tensor([label_index(labels, row, key) for key, row in rows.items()])


def _share(which: torch.Tensor) -> float | None:
    return _mean(which.float())


def _mean(values: torch.Tensor) -> float | None:
    return round(float(values.mean()), 6) if len(values) else None


def _mean_and_median(values: torch.Tensor) -> dict | None:
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
        "mutual_information": _mean_and_median(mutual_information(source)) if source.shape[1] > 1 else None,
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


def cost_figures(tokens: Tokens, batch_tokens: Tokens, samples: int, price: Price | None) -> dict:
    """Say what a collection used, and what it cost where prices are known.

    Example
    -------
    >>> price = Price(2.0, 10.0, 20.0)  # US dollars for a million tokens of text, audio and output
    >>> cost_figures(Tokens(1000, 2000, 100), Tokens(), 6, price)["cost"]
    0.024
    """
    found = {"tokens": tokens._asdict(), "batch_tokens": batch_tokens._asdict(), "samples": samples}
    if price is None:
        return found
    cost = price.cost(tokens, batch_tokens)
    found |= {"currency": price.currency, "cost": round(cost, 6), "prices": price.source}
    return found | {"cost_per_1000_samples": round(1000 * cost / samples, 6) if samples else None}
