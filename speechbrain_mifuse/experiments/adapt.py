"""Adapt a recogniser to a folder of one's own recordings, without labels: the Folder recipe as one call.

Importing this module loads no torch; the call does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from speechbrain_mifuse.experiments.recipes import load_recipe, shipped
from speechbrain_mifuse.utils.errors import UserError, require_device, writing

SETTINGS = shipped("hparams/rav2folder.yaml")

# The best on the open transfers, with and without class skew (docs/results); the recipe's own default is the paper's.
# Nothing warns of skew: on evenly spread recordings, too, a source and a teacher of other corpora miss some classes.
METHOD = "mi_fuse_plus"

# Beside the method: what it has to be compared with.
TEACHERS = ("source_only", "lalm_zero_shot")


class Adapted(NamedTuple):
    """Result of `adapt`.

    Attributes
    ----------
    recogniser : pathlib.Path
        Folder of the adapted recognizer, for `EmotionRecognizer.from_hparams`.
    results : dict
        The method's `results.json`, with scores if the recordings have labels.
    verdict : dict
        What can be said without labels: see `judge`.
    """

    recogniser: Path
    results: dict
    verdict: dict


def adapt(
    source_checkpoint: str | Path,
    wav_folder: str | Path,
    teacher: str | Path,
    output_folder: str | Path | None = None,
    run_opts: Mapping | None = None,
    **overrides,
) -> Adapted:
    """Adapt a recognizer to unlabelled recordings, and export the adapted one.

    It does what `recipes/Folder/mifuse/train.py` does with `hparams/rav2folder.yaml`: lists the recordings, stores
    encoder frames, asks the teacher, adapts, exports. Completed steps are skipped, so the same call resumes after a
    stop. Encoder, layer, labels and preprocessing are the source's.

    Parameters
    ----------
    source_checkpoint : str or pathlib.Path
        Folder of the recognizer to start from.
    wav_folder : str or pathlib.Path
        Recordings, at any depth. With a `labels.csv`, or folders named like labels, about four in ten recordings of
        each class, by whole speakers, are scored and not adapted to (see `corpora/folder.py`).
    teacher : str or pathlib.Path
        Base URL of an OpenAI-compatible API that hears audio (the key is read from `OPENAI_API_KEY`; name its model
        with `lalm_model=`), or the folder of another recognizer, which is served on this machine during the call.
    output_folder : str or pathlib.Path, optional
        `results/adapted/<name of wav_folder>` by default.
    run_opts : mapping, optional
        SpeechBrain's run options, such as `{"device": "cuda"}`.
    **overrides
        Any other key of `hparams/rav2folder.yaml`, such as `number_of_steps=100`, or `method="mi_fuse_product_prior"`,
        which gains less on the mean and loses least where some classes are rare.

    Returns
    -------
    Adapted
        `verdict.md` and `verdict.json` in the output folder hold the same verdict; `report.html` and the recognizer's
        model card repeat its warnings.

    Raises
    ------
    UserError
        If a folder or a setting cannot be used, the API is down or its model has no name, or nothing can be adapted to.

    Example
    -------
    >>> adapt("/nowhere", "recordings", teacher="http://127.0.0.1:8000/v1")
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.inference.recognizer_folder.RecogniserError: /nowhere: no whole recogniser there ...
    """
    from speechbrain_mifuse.experiments.settings import overrides_of

    return run(source_checkpoint, wav_folder, teacher, output_folder, overrides_of(overrides), run_opts)


def run(
    source: str | Path,
    wav_folder: str | Path,
    teacher: str | Path,
    output_folder: str | Path | None,
    overrides: Mapping,
    run_opts: Mapping | None,
) -> Adapted:
    """Do what `adapt` does, with overrides as a command line gives them."""
    import speechbrain as sb

    from speechbrain_mifuse.experiments.adaptation import AdaptationExperiment
    from speechbrain_mifuse.experiments.preflight import require_adaptation
    from speechbrain_mifuse.experiments.run_report import summary
    from speechbrain_mifuse.experiments.settings import overrides_of, read_hparams
    from speechbrain_mifuse.inference.recognizer_folder import read_about

    about = read_about(source)
    require_recordings(wav_folder, overrides)
    if run_opts and run_opts.get("device"):
        require_device(run_opts["device"])
    folder = Path(output_folder or Path("results") / "adapted" / Path(wav_folder).resolve().name)
    flags = {**source_settings(source, about), **teacher_settings(teacher, source, about["labels"])}
    flags |= {"data_folder": str(Path(wav_folder).resolve()), "output_folder": str(folder), "method": METHOD}
    served = flags.pop("teacher_recogniser", None)
    require_model(flags.get("lalm_base_url"), overrides)
    overrides = {**overrides_of(flags), **overrides}
    hparams = read_hparams(SETTINGS, overrides)
    method = trained_method(hparams)
    experiment = AdaptationExperiment.of(hparams, [*TEACHERS, method], served)
    require_adaptation(experiment, run_opts)
    hook = sys.excepthook
    with writing(hparams["output_folder"]):
        sb.create_experiment_directory(hparams["output_folder"], SETTINGS, overrides, save_env_desc=False)
    sys.excepthook = hook
    load_recipe("recipes/RAVDESS/mifuse/train.py").run(experiment, run_opts)
    folder = experiment.output_folder
    summary(folder, experiment.methods, experiment.adaptation["methods"])
    results = json.loads((folder / method / "results.json").read_text())
    verdict = judged(folder, method, hparams["labels"])
    keep_verdict(folder, method, results, verdict)
    return Adapted(folder / method / "recogniser", results, verdict)


def require_recordings(wav_folder: str | Path, given: Collection[str]) -> None:
    """Refuse recordings that are not there, before anything is paid for."""
    if "data_folder" in given:
        raise UserError("--data_folder: the recordings are named once, as the first argument.")
    if not Path(wav_folder).is_dir():
        raise UserError(f"{wav_folder}: no such folder of recordings.")


def source_settings(folder: str | Path, about: Mapping) -> dict:
    """Take the settings of a run from the recogniser that it starts from."""
    from speechbrain_mifuse.experiments.run_report import corpus_of
    from speechbrain_mifuse.inference.recognizer_folder import read_settings

    values = read_settings(Path(folder) / "hyperparams.yaml")
    layers = values.encoder.layers
    if layers is None:
        raise UserError(
            f"{folder}: its encoder was trained along with it, and adaptation needs frames that stay the same. Start "
            "from a recogniser with stored features."
        )
    layers = [layers] if isinstance(layers, int) else layers
    return {
        "source_recogniser": str(Path(folder).resolve()),
        "source": corpus_of(folder, about),
        "labels": list(about["labels"]),
        "encoder": values.encoder.source,
        "encoder_layers": layers,
        "layer": layers[0] if len(layers) == 1 else None,
        "trim_db": values.trim_db,
        "frame_average": values.frame_average,
        "speaker_norm": values.speaker_norm or "none",
    }


def teacher_settings(teacher: str | Path, source: str | Path, labels: list) -> dict:
    """Say how the teacher is reached."""
    from speechbrain_mifuse.experiments.run_report import corpus_of
    from speechbrain_mifuse.inference.recognizer_folder import read_about, recogniser_digest

    if str(teacher).startswith(("http://", "https://")):
        return {"lalm_base_url": str(teacher)}
    if not Path(teacher).is_dir():
        raise UserError(f"--teacher: {teacher} is neither a base URL (https://HOST/v1) nor the folder of a recogniser.")
    about = read_about(teacher)
    if recogniser_digest(teacher) == recogniser_digest(source):
        raise UserError(f"--teacher: {teacher} is the source itself, which has nothing to add. Name another one.")
    if set(about["labels"]) != set(labels):
        raise UserError(
            f"--teacher: {teacher} knows {', '.join(about['labels'])}, and the source {', '.join(labels)}. "
            "Both must know the same classes."
        )
    return {"teacher_recogniser": Path(teacher), "teacher": corpus_of(teacher, about)}


def require_model(base_url: str | None, given: Collection[str]) -> None:
    """Refuse to ask an API elsewhere for the model that a recogniser served on this machine is called."""
    from speechbrain_mifuse.lalm.store import is_loopback

    # A provider's profile may name its model.
    named = {"lalm_model", "lalm_profile"} & set(given)
    if base_url is not None and not named and not is_loopback(base_url):
        raise UserError(f"--lalm_model: name the model that {base_url} is to be asked for.")


def trained_method(hparams: Mapping) -> str:
    """Name of the one method that is asked for, if it trains a student."""
    from speechbrain_mifuse.experiments.settings import chosen_methods

    names = chosen_methods(hparams)
    if len(names) != 1 or not hparams["adaptation"]["methods"][names[0]].trains:
        raise UserError(f"--method: name one method that trains a student, not {', '.join(names)}.")
    return names[0]


def judged(folder: Path, method: str, labels: list) -> dict:
    """Judge an adaptation without labels, and write what was found."""
    import torch

    from speechbrain_mifuse.evaluation.verdict import judge, scored, verdict_text
    from speechbrain_mifuse.utils.files import atomic_write

    student, source, teacher = (
        json.loads((folder / name / "predictions.json").read_text()) for name in (method, *TEACHERS)
    )
    silent = [0.0] * len(labels)
    rows = [[said.get(key, silent) for key in student] for said in (student, source, teacher)]
    verdict = judge(*(torch.tensor(said) for said in rows), labels)
    records = [folder / name / "results.json" for name in (method, *TEACHERS)]
    accuracy = [json.loads(path.read_text())["UA"] for path in records if path.exists()]
    if len(accuracy) == 3 and None not in accuracy:
        verdict = scored(verdict, dict(zip(("student", "source", "teacher"), accuracy, strict=True)))
    atomic_write(folder / "verdict.json", json.dumps(verdict, indent=1))
    atomic_write(folder / "verdict.md", verdict_text(verdict))
    return verdict


def keep_verdict(folder: Path, method: str, results: Mapping, verdict: Mapping) -> None:
    """Put a verdict where people look: on the run's page and on the model card of what was exported."""
    from speechbrain_mifuse.inference.recognizer_folder import write_card
    from speechbrain_mifuse.report.page import write_report

    write_report(folder, results=folder.glob("*/results.json"))
    write_card(folder / method / "recogniser", {**results, "warnings": verdict["warnings"]})
