"""The commands `speechbrain-mifuse labels ...` and `speechbrain-mifuse batch ...`."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

from speechbrain_mifuse.utils.errors import UserError, stopped_by_ctrl_c


def add_labels(commands) -> None:
    """Add the command `labels`."""
    labels = commands.add_parser("labels", help="look into, check, export, import and merge stores of answers")
    steps = labels.add_subparsers(required=True, metavar="WHAT")
    show = _step(steps, "show", run_show, "list what was asked, with counts, refusals and tokens")
    show.add_argument("store", type=Path, help="label store, as a collection writes it")
    check = _step(steps, "check", run_check, "check that a store is whole; status 1 if it is not")
    check.add_argument("store", type=Path, help="label store")
    export = _step(steps, "export", run_export, "write answers to JSON lines, without audio and without keys")
    export.add_argument("store", type=Path, help="label store")
    export.add_argument("file", type=Path, help="to write, as labels.jsonl or labels.jsonl.gz")
    export.add_argument(
        "--query", default="", metavar="ID", help="one query, by the beginning of its id (default: all)"
    )
    export.add_argument("--no_ids", action="store_true", help="leave utterance ids out; training does not need them")
    import_ = _step(steps, "import", run_import, "take over exports; status 1 if a sample differs from a stored one")
    import_.add_argument("files", type=Path, nargs="+", help="exports")
    import_.add_argument("--into", type=Path, required=True, metavar="STORE", help="label store, made if missing")
    merge = _step(steps, "merge", run_merge, "bring stores of several machines together; status 1 if samples differ")
    merge.add_argument("shards", type=Path, nargs="+", help="label stores; they stay as they are")
    merge.add_argument("--into", type=Path, required=True, metavar="STORE", help="label store, made if missing")
    report = _step(steps, "report", run_report, "report on the teacher: answers, uncertainty, calibration, cost")
    report.add_argument("store", type=Path, help="label store")
    report.add_argument(
        "--manifest",
        type=Path,
        required=True,
        metavar="JSON",
        help="the utterances; its labels are opened, if it has any: give adapt_unlabelled.json before adaptation",
    )
    report.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the report")
    report.add_argument("--query", default="", metavar="ID", help="which query, by the beginning of its id")
    report.add_argument("--source", type=Path, metavar="DIR", help="a recogniser to compare with; hears the recordings")
    report.add_argument("--profile", type=Path, metavar="YAML", help="with prices, as in hparams/lalm")


def add_batch(commands) -> None:
    """Add the command `batch`."""
    batch = commands.add_parser(
        "batch",
        help="collect answers by the Batch API: within a day, at half the price",
        usage="%(prog)s STEP YAML [--every SECONDS] [FLAGS OF THE RECIPE]",
        description="Does what `collect` does by files of requests. make: write them, and send nothing. submit: upload "
        "them and start batches. poll: look how far they are. ingest: store the answers of those that have ended. run: "
        "go on from wherever the job stands until every answer is stored. Every step can be stopped and repeated; no "
        "batch is started twice. The key comes from OPENAI_API_KEY.",
        allow_abbrev=False,
    )
    batch.add_argument("step", choices=list(STEPS), metavar="STEP", help=", ".join(STEPS))
    batch.add_argument("yaml", type=Path, metavar="YAML", help="of the recipe, as hparams/nemo2rav.yaml")
    batch.add_argument("--every", type=float, default=60.0, metavar="SECONDS", help="between two looks (default: 60)")
    batch.set_defaults(run=run_batch, recipe_flags=True)


def _step(steps, name: str, run, about: str) -> argparse.ArgumentParser:
    step = steps.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
    step.set_defaults(run=run)
    return step


def chosen(store, prefix: str):
    """Find the query that a user means."""
    known = store.queries()
    found = [summary for summary in known if summary.query.digest.startswith(prefix)]
    if len(found) != 1:
        ids = ", ".join(f"{summary.query.digest[:8]} ({summary.query.model})" for summary in known)
        which = f"{len(found) or 'none'} of the {len(known)} queries of {store.path}"
        raise UserError(f"--query {prefix!r} fits {which}: {ids or 'empty'}")
    return found[0]


def described(summary) -> str:
    """Describe a query and what is stored of it, in a few lines."""
    query, counts = summary.query, summary.counts
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "no answer"
    total = sum(counts.values())
    refused = f", {100 * counts['refusal'] / total:.1f} % refused" if total and counts.get("refusal") else ""
    lines = [
        f"query {query.digest[:8]}: {query.model} at {query.endpoint}",
        f"  labels {', '.join(query.labels)}; sampling {query.sampling_json}; prompt {query.prompt_hash[:8]}",
        f"  {summary.recordings} recordings, up to {summary.k} samples: {kinds}{refused}; {summary.attempts} answers "
        "received in all",
    ]
    for name, tokens in (("live", summary.tokens), ("Batch API", summary.batch_tokens)):
        if tokens.total:
            lines.append(f"  tokens {name}: {tokens.text:,} text, {tokens.audio:,} audio, {tokens.output:,} output")
    if summary.first is not None:
        times = (datetime.datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M") for at in (summary.first, summary.last))
        lines.append(f"  asked {' to '.join(times)}")
    return "\n".join([*lines, *(f"  > {line}" for line in query.prompt.splitlines())])


def _opened(path: Path):
    from speechbrain_mifuse.lalm.store import LabelStore

    return LabelStore.existing(path, read_only=True)


def run_show(options: argparse.Namespace) -> None:
    """Print every query of a store."""
    with _opened(options.store) as store:
        print("\n\n".join(map(described, store.queries())) or f"{options.store}: nothing was asked yet")


def run_check(options: argparse.Namespace) -> None:
    """Print what is wrong with a store."""
    from speechbrain_mifuse.lalm.integrity import check

    with _opened(options.store) as store:
        found = check(store)
    print(found.summary())
    if found.problems:
        raise SystemExit(1)


def run_export(options: argparse.Namespace) -> None:
    """Export a store."""
    from speechbrain_mifuse.lalm.exchange import export

    with _opened(options.store) as store:
        queries = [chosen(store, options.query).query] if options.query else None
        written = export(store, options.file, queries, not options.no_ids)
    print(f"{written} answers written to {options.file}")


def run_import(options: argparse.Namespace) -> None:
    """Import exports, each whole or not at all."""
    from speechbrain_mifuse.lalm.exchange import import_file
    from speechbrain_mifuse.lalm.store import LabelStore

    conflicts = 0
    with LabelStore(options.into) as store:
        for path in options.files:
            taken = import_file(path, store)
            print(f"{path}: {taken.summary()}")
            conflicts += len(taken.conflicts)
    if conflicts:
        raise SystemExit(1)


def run_merge(options: argparse.Namespace) -> None:
    """Merge stores."""
    from speechbrain_mifuse.lalm.exchange import merge

    taken = merge(options.shards, options.into)
    print(f"{options.into}: {taken.summary()}")
    if taken.conflicts:
        raise SystemExit(1)


def run_report(options: argparse.Namespace) -> None:
    """Write the teacher report and print its table."""
    from speechbrain_mifuse.lalm.profile import read_profile
    from speechbrain_mifuse.report.teacher_report import report_store

    price = None if options.profile is None else read_profile(options.profile).price
    with _opened(options.store) as store:
        summary = chosen(store, options.query)
        print(report_store(store, summary, options.manifest, options.output, options.source, price))


# What each step of a batch job does, and says of it.
STEPS = {
    "make": lambda job, wavs, k, every: f"{job.make(wavs, k)} requests made",
    "submit": lambda job, wavs, k, every: job.submit() or "submitted",
    "poll": lambda job, wavs, k, every: "all have ended" if job.poll() else "not all have ended",
    "ingest": lambda job, wavs, k, every: job.ingest().summary(),
    "run": lambda job, wavs, k, every: job.run(wavs, k, every=every).summary(),
}


def run_batch(options: argparse.Namespace) -> None:
    """Do one step of a recipe's batch job, or go on to its end."""
    if not options.yaml.is_file():
        raise UserError(
            f"{options.yaml}: no such file. The recipe's YAML file comes after the step, as hparams/nemo2rav.yaml"
        )
    from speechbrain_mifuse.experiments.settings import chosen_methods, load_hparams
    from speechbrain_mifuse.experiments.teacher import EVERY_REQUEST, TeacherSettings, wanted_recordings
    from speechbrain_mifuse.lalm.batch import BatchJob
    from speechbrain_mifuse.lalm.store import LabelStore
    from speechbrain_mifuse.utils.progress import quiet

    hparams, _ = load_hparams(options.yaml, options.flags)
    teacher, known = TeacherSettings.of(hparams), hparams["adaptation"]["methods"]
    methods = [known[name] for name in chosen_methods(hparams)]
    if teacher.is_local:
        raise UserError(
            "batch: the teacher is a classifier on this machine, which has no Batch API. Name a provider by a file of "
            "hparams/lalm, or by --lalm_base_url and --lalm_model."
        )
    hparams["prepare_target"]()
    wavs = list(wanted_recordings(Path(hparams["target_manifests"]), methods).items())
    path = teacher.label_store
    path.parent.mkdir(parents=True, exist_ok=True)
    query = teacher.query(teacher.base_url)
    with LabelStore(path) as store, quiet(*EVERY_REQUEST):
        client = teacher.client(teacher.base_url, store, query)
        with BatchJob(teacher.prompt, client, store, query) as job:
            try:
                with stopped_by_ctrl_c():
                    print(STEPS[options.step](job, wavs, teacher.samples, options.every))
            finally:
                print(job.status(), flush=True)
