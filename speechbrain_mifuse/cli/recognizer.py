"""The commands `speechbrain-mifuse predict ...` and `speechbrain-mifuse adapt ...`."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from speechbrain_mifuse.utils.errors import UserError, require_device, stopped_by_ctrl_c, terminated_like_ctrl_c
from speechbrain_mifuse.utils.texts import csv_text, shown

# In place of a label where the answer is below the threshold, or nothing is to be heard.
UNSURE = "unsure"


def add_predict(commands) -> None:
    """Add the command `predict`."""
    predict = commands.add_parser(
        "predict",
        help="recognise the emotion of recordings",
        description="Recognises the emotion of recordings: one line of file, emotion and probability for each, or a "
        "table with all probabilities. A file that cannot be read is named and passed over; status 1 if none could be "
        "read. Ctrl-C leaves the answers that there are, with status 130.",
    )
    predict.add_argument("paths", nargs="+", type=Path, metavar="FILE_OR_FOLDER", help="recordings, or folders of them")
    predict.add_argument("--source", required=True, help="folder of a recogniser, as a recipe or `adapt` writes it")
    instead = predict.add_mutually_exclusive_group()
    instead.add_argument("--csv", type=Path, metavar="FILE", help="write a table there in place of the lines")
    instead.add_argument("--json", type=Path, metavar="FILE", help="write JSON there in place of the lines")
    add_device(predict)
    predict.add_argument("--window_s", type=float, metavar="S", help="answer over time, in windows of so many seconds")
    predict.add_argument("--hop_s", type=float, metavar="S", help="seconds between windows (default: half a window)")
    predict.add_argument(
        "--abstain_below", type=float, metavar="P", help=f"answers of a smaller probability are called '{UNSURE}'"
    )
    predict.add_argument(
        "--channel", type=int, metavar="N", help="use channel N of each recording; 1 is the left (default: average all)"
    )
    predict.set_defaults(run=run_predict)


def add_device(command: argparse.ArgumentParser) -> None:
    """Add the flags `--device` and `--precision`."""
    command.add_argument("--device", metavar="NAME", help="as cpu or cuda:0 (default: a GPU if there is one)")
    command.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the encoder; bf16 is for GPUs (default: fp32)"
    )


def add_adapt(commands) -> None:
    """Add the command `adapt`."""
    adapt = commands.add_parser(
        "adapt",
        help="adapt a recogniser to a folder of unlabelled recordings",
        usage="%(prog)s --source FOLDER --teacher URL_OR_FOLDER WAV_FOLDER [--output_folder DIR] [FLAGS OF THE RECIPE]",
        description="Adapts a recogniser to your own recordings without labels, exports the adapted one, and says what "
        "can be said of it without labels. It is the Folder recipe (hparams/rav2folder.yaml), whose keys are flags "
        "here too, as --lalm_model or --number_of_steps. What is done is skipped: the same command goes on after a "
        "stop. Where some classes are known to be rare, --method mi_fuse_product_prior is safer. The key of an API "
        "comes from OPENAI_API_KEY.",
        allow_abbrev=False,
    )
    adapt.add_argument("wav_folder", type=Path, metavar="WAV_FOLDER", help="recordings, at any depth")
    adapt.add_argument("--source", required=True, metavar="FOLDER", help="recogniser to start from")
    adapt.add_argument(
        "--teacher", required=True, metavar="URL_OR_FOLDER", help="API that hears audio, or another recogniser's folder"
    )
    adapt.add_argument("--output_folder", metavar="DIR", help="default: results/adapted/NAME OF WAV_FOLDER")
    adapt.set_defaults(run=run_adapt, recipe_flags=True)


def run_predict(options: argparse.Namespace) -> None:
    """Recognise recordings and print or write what was found."""
    # What cannot be used is said before anything is loaded, and not when all the work is done.
    require_recogniser(options.source)
    require_target(options)
    files = recordings(options.paths)
    found: list = []
    stopped = False
    try:
        with terminated_like_ctrl_c():
            recogniser = load(options)
            gather(recogniser, files, options, found)
    except KeyboardInterrupt:
        stopped = True
    if has_table(options) and found:
        write_table(options, recogniser.labels, found)
        tell_table(options, found, len(files))
    if stopped:
        print(f"stopped: {len(files) - len(found)} of {len(files)} recordings are missing", file=sys.stderr)
        raise SystemExit(130)
    if all(one.error is not None for one in found):
        raise SystemExit(1)


def has_table(options: argparse.Namespace) -> bool:
    """Whether a table is written in place of the lines."""
    return options.csv is not None or options.json is not None


def gather(recogniser, files: Sequence[Path], options: argparse.Namespace, found: list) -> None:
    """Recognise recordings one after the other, and print what was found unless a table is asked for."""
    table = has_table(options)
    answers = recogniser.classify_files(files, options.window_s, options.hop_s, show_progress=table)
    with contextlib.closing(answers):
        # One by one: what came before a stop stays in the list.
        found.extend(answers if table else printed(answers))


def tell_table(options: argparse.Namespace, found: Sequence, wanted: int) -> None:
    """Say on standard error which recordings a table leaves out, how many it holds, and where it is."""
    unreadable = [one for one in found if one.error is not None]
    for one in unreadable:
        print(f"left out: {shown(one.error)}", file=sys.stderr)
    print(
        f"{len(found) - len(unreadable)} of {wanted} recordings: {shown(options.csv or options.json)}", file=sys.stderr
    )


def require_recogniser(source: str) -> None:
    """Refuse what is no folder of a recogniser on this machine."""
    from speechbrain_mifuse.inference.recognizer_folder import recogniser_digest

    if not Path(source).is_dir():
        raise UserError(
            f"{source}: no folder of a recogniser here. Name a local folder: a recipe leaves one in "
            "<output_folder>/<method>/recogniser, `speechbrain-mifuse adapt` prints where it left one, and one of a "
            "hub has to be downloaded first."
        )
    recogniser_digest(source)


def require_target(options: argparse.Namespace) -> None:
    """Refuse a table's target that cannot be written; folders above it are made."""
    for flag, path in (("--csv", options.csv), ("--json", options.json)):
        if path is None:
            continue
        try:
            # A device or a pipe would be replaced by the file: what is there must be one.
            other = path.exists() and not path.is_file()
            path.parent.mkdir(parents=True, exist_ok=True)
            # Modes do not say what a read-only disk or the superuser may do; a file does.
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise UserError(f"{flag}: {path} cannot be written there ({error.strerror}). Name another file.") from None
        if other:
            raise UserError(f"{flag}: {path} is no file. Name the file to write.")


def load(options: argparse.Namespace):
    """Load the recogniser on the device that is asked for."""
    from speechbrain_mifuse.inference.recognizer import EmotionRecognizer

    abstain_below = getattr(options, "abstain_below", None)
    if abstain_below is not None and not 0 <= abstain_below <= 1:
        raise UserError(f"--abstain_below: {abstain_below} is no probability from 0 to 1.")
    channel = getattr(options, "channel", None)
    if channel is not None and channel < 1:
        raise UserError(f"--channel: {channel} must be 1 or more; 1 is the left channel of a stereo recording.")
    run_opts = {"precision": options.precision}
    if options.device is not None:
        run_opts["device"] = options.device
        require_device(options.device)
    recogniser = EmotionRecognizer.from_hparams(options.source, run_opts=run_opts, abstain_below=abstain_below)
    recogniser.channel = channel
    return recogniser


def recordings(paths: Sequence[Path]) -> list[Path]:
    """Put the recordings below folders in the place of these."""
    from speechbrain_mifuse.inference.recognizer import recordings_in

    found = [file for path in paths for file in (recordings_in(path) if path.is_dir() else [path])]
    return list(dict.fromkeys(found))


def printed(answers: Iterable) -> Iterator:
    r"""Print each answer as it comes: file, (start, end,) emotion, probability, separated by tabs."""
    for one in answers:
        # A line break or a tab in a name would make other lines and columns.
        path = shown(one.path)
        if one.error is not None:
            print(f"{path}\tnone\t{shown(one.error)}", flush=True)
        elif one.timeline is None:
            print(f"{path}\t{shown(one.label or UNSURE)}\t{one.probs.max():.3f}", flush=True)
        else:
            for part in one.timeline.segments:
                span = f"{part.start:.2f}\t{part.end:.2f}"
                print(f"{path}\t{span}\t{shown(part.label or UNSURE)}\t{part.probs.max():.3f}", flush=True)
        yield one


def write_table(options: argparse.Namespace, labels: Sequence[str], found: Sequence) -> None:
    r"""Write all answers at once, so that a file is never half there."""
    from speechbrain_mifuse.utils.files import atomic_write

    read = [one for one in found if one.error is None]
    if options.csv is not None:
        atomic_write(options.csv, as_csv(labels, read))
        return
    content = {
        "labels": list(labels),
        "recordings": [as_json(one, labels) for one in read],
        "unreadable": {str(one.path): one.error for one in found if one.error is not None},
    }
    atomic_write(options.json, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def as_csv(labels: Sequence[str], read: Sequence) -> str:
    r"""Write answers as a table: a row for each recording, or for each stretch of it."""
    rows = [["file", "start", "end", "label", "probability", *labels]]
    for one in read:
        for start, end, label, probs in one.timeline.segments if one.timeline else [(0.0, one.seconds, *one[1:3])]:
            numbers = [f"{value:.4f}" for value in (probs.max(), *probs)]
            rows.append([str(one.path), f"{start:.2f}", f"{end:.2f}", label or UNSURE, *numbers])
    return csv_text(rows)


def as_json(one, labels: Sequence[str]) -> dict:
    """Put an answer into JSON's types; an unsure label is `None`."""
    found = {
        "file": str(one.path),
        "seconds": one.seconds,
        "label": one.label,
        "probabilities": named(one.probs, labels),
    }
    if one.timeline is not None:
        found["segments"] = [
            {"start": part.start, "end": part.end, "label": part.label, "probabilities": named(part.probs, labels)}
            for part in one.timeline.segments
        ]
    return found


def named(probs, labels: Sequence[str]) -> dict[str, float]:
    """Probabilities by class, with six digits."""
    return {label: round(value, 6) for label, value in zip(labels, probs.tolist(), strict=True)}


def run_adapt(options: argparse.Namespace) -> None:
    """Adapt a recogniser and print what came of it."""
    from speechbrain_mifuse.evaluation.verdict import verdict_text
    from speechbrain_mifuse.experiments.adapt import SETTINGS, run
    from speechbrain_mifuse.experiments.settings import parse_arguments

    require_recogniser(options.source)
    _, run_opts, overrides = parse_arguments([str(SETTINGS), *options.flags])
    with stopped_by_ctrl_c():
        found = run(options.source, options.wav_folder, options.teacher, options.output_folder, overrides, run_opts)
    table = (found.recogniser.parent.parent / "results.md").read_text(encoding="utf-8")
    print(f"\n{table}\n{verdict_text(found.verdict)}")
    print(f"speechbrain-mifuse predict --source {shlex.quote(str(found.recogniser))} FILE_OR_FOLDER")
