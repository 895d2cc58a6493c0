"""The console script `speechbrain-mifuse`. Imports of what a command needs happen in the command: help is instant."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from speechbrain_mifuse import __version__
from speechbrain_mifuse.cli.extract import add_extract
from speechbrain_mifuse.cli.labels import add_batch, add_labels
from speechbrain_mifuse.cli.recognizer import add_adapt, add_device, add_predict, load, require_recogniser
from speechbrain_mifuse.inference.http_limits import Limits
from speechbrain_mifuse.utils.command_line import file_arguments
from speechbrain_mifuse.utils.errors import UserError, one_clear_error, stopped_by_ctrl_c


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(prog="speechbrain-mifuse", description="Speech emotion recognition tools.")
    parser.add_argument("--version", action="version", version=f"speechbrain-mifuse {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_serve(commands)
    add_predict(commands)
    add_adapt(commands)
    recipes = commands.add_parser("recipes", help="list the registered recipes with their commands")
    recipes.add_argument("--match", default="", metavar="TEXT", help="only those whose lines contain this text")
    recipes.set_defaults(run=run_recipes)
    add_sweep(commands)
    add_report(commands)
    add_probe(commands)
    add_extract(commands)
    add_collect(commands)
    add_labels(commands)
    add_batch(commands)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    flags: list[str] = []
    if arguments[:1] == ["sweep"] and "--" in arguments:
        place = arguments.index("--")
        arguments, flags = arguments[:place], arguments[place + 1 :]
    with one_clear_error():
        arguments = [*arguments[:1], *file_arguments(arguments[1:])]
    options, others = parser.parse_known_args(arguments, argparse.Namespace(flags=flags, recipe_flags=False))
    if others and not options.recipe_flags:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    options.flags += others
    with one_clear_error():
        options.run(options)


def add_serve(commands) -> None:
    """Add the command `serve`."""
    serve = commands.add_parser(
        "serve",
        help="serve a recogniser behind an OpenAI-compatible API",
        description="Serves a recogniser until SIGTERM or Ctrl-C: /v1/chat/completions, /v1/models, /health, and "
        "/metrics for Prometheus. If the environment variable MIFUSE_SERVE_KEY is set, clients must send that key; "
        "/health needs none.",
    )
    serve.add_argument("source", help="folder of a recogniser, as a classifier recipe writes it")
    add_device(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to bind to (default: this machine only)")
    serve.add_argument("--port", type=int, default=8000, help="port (default: 8000)")
    serve.add_argument("--model", default="served-classifier", help="model name that it answers to")
    serve.add_argument(
        "--max_concurrent",
        type=positive,
        default=Limits.max_concurrent,
        metavar="N",
        help="requests at a time, answered or waiting for the model; more get status 503 (default: %(default)s)",
    )
    serve.add_argument(
        "--max_connections",
        type=positive,
        default=Limits.max_connections,
        metavar="N",
        help="open connections; the one that keeps waiting longest makes room for one more (default: %(default)s)",
    )
    serve.add_argument(
        "--max_body_mib",
        type=positive,
        default=Limits.max_body_bytes // 2**20,
        metavar="MIB",
        help="largest request; larger ones get status 413 (default: %(default)s)",
    )
    serve.add_argument(
        "--max_seconds",
        type=float,
        default=Limits.max_seconds,
        metavar="SECONDS",
        help="longest recording; longer ones get status 400 (default: %(default)g)",
    )
    serve.add_argument(
        "--read_timeout",
        type=float,
        default=Limits.read_timeout,
        metavar="SECONDS",
        help="for the first head of a connection, and for a body that stops coming (default: %(default)g)",
    )
    serve.add_argument(
        "--idle_timeout",
        type=float,
        default=Limits.idle_timeout,
        metavar="SECONDS",
        help="from a reply to the next request of a connection (default: %(default)g)",
    )
    serve.add_argument(
        "--grace",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="for requests that have begun when it is stopped (default: %(default)g)",
    )
    serve.set_defaults(run=run_serve)


def add_sweep(commands) -> None:
    """Add the command `sweep`."""
    sweep = commands.add_parser(
        "sweep",
        help="run pairs x methods x seeds and write the tables",
        usage="%(prog)s PAIR... [options] [-- FLAGS OF THE RECIPE]",
        description="Runs every pair with every seed, all methods, each run in a process of its own, and writes the "
        "tables. What is done is skipped; the same command goes on after a stop.",
    )
    sweep.add_argument("pairs", nargs="+", metavar="PAIR", help="name of a YAML file, as nemo2rav; see `recipes`")
    sweep.add_argument("--methods", default="", metavar="A,B", help="default: those of the YAML's table")
    sweep.add_argument("--seeds", default="1-5", help="as 1-5 or 1,2,3 (default: 1-5)")
    sweep.add_argument("--jobs", type=positive, help="runs at a time (default: as many as fill the usable cores)")
    sweep.add_argument(
        "--threads",
        type=positive,
        default=1,
        help="threads of a run (default: 1, whatever --jobs is, because results depend on it)",
    )
    sweep.add_argument("--data_folder", type=Path, metavar="DIR", help="the corpora (default: MIFUSE_CORPORA)")
    sweep.add_argument("--name", default="sweep", help="name of the tables (default: sweep)")
    sweep.add_argument("--output", type=Path, metavar="DIR", help="the runs (default: results/NAME in the repository)")
    sweep.add_argument("--table", type=Path, metavar="DIR", help="the tables (default: the folder of the runs)")
    sweep.add_argument("--baselines", default="", metavar="A,B", help="methods to compare with, beside the best one")
    sweep.add_argument("--figure_methods", default="", metavar="A,B", help="methods of the figure of transfers")
    instead = sweep.add_mutually_exclusive_group()
    instead.add_argument("--commands", type=Path, metavar="FILE", help="run nothing; write one command per line")
    instead.add_argument("--collect", action="store_true", help="run nothing; write the tables of what is done")
    sweep.set_defaults(run=run_sweep)


def add_report(commands) -> None:
    """Add the command `report`."""
    report = commands.add_parser(
        "report",
        help="write one HTML page about a run or a sweep",
        description="Writes one page about what a run or a sweep left in its folder: tables, confusion matrices, "
        "training curves, weights of the teachers, agreement, calibration, speakers. It holds all it needs, loads "
        "nothing, and opens from disk on any screen.",
    )
    report.add_argument("folder", type=Path, metavar="FOLDER", help="output folder of a run or of a sweep")
    report.add_argument("--output", type=Path, metavar="FILE", help="file to write (default: FOLDER/report.html)")
    report.set_defaults(run=run_report)


def add_collect(commands) -> None:
    """Add the command `collect`."""
    collect = commands.add_parser(
        "collect",
        help="ask a language model for the answers that a recipe needs, or only plan it",
        usage="%(prog)s YAML [--dry_run] [--budget MONEY] [--deadline SECONDS] [FLAGS OF THE RECIPE]",
        description="Prepares the target corpus of a recipe and fills its label store: what the recipe does before it "
        "trains, on a machine that need not train. The plan comes first: one question, calls, tokens, cost, time. What "
        "is stored is not asked again; the same command goes on after a stop. The key comes from OPENAI_API_KEY.",
        allow_abbrev=False,
    )
    collect.add_argument("yaml", type=Path, metavar="YAML", help="of the recipe, as hparams/nemo2rav.yaml; comes first")
    collect.add_argument("--dry_run", action="store_true", help="print the plan and ask nothing")
    collect.add_argument("--budget", metavar="MONEY", help="same as --lalm_budget: stop before more is spent")
    collect.add_argument("--deadline", metavar="SECONDS", help="same as --lalm_deadline: stop after this time")
    collect.set_defaults(run=run_collect, recipe_flags=True)


def add_probe(commands) -> None:
    """Add the command `probe`."""
    probe = commands.add_parser(
        "probe",
        help="ask an API about itself: does it hear audio, honour n, seed, constraints, ...",
        description="Asks an API about itself in some thirty calls on real audio, prints what was found, and ends with "
        "status 2 if a collection with this profile needs what the API lacks. The key comes from OPENAI_API_KEY.",
    )
    probe.add_argument("--profile", type=Path, metavar="YAML", help="a file as in hparams/lalm")
    probe.add_argument("--lalm_base_url", metavar="URL", help="address (default: that of the profile)")
    probe.add_argument("--lalm_model", metavar="NAME", help="model (default: that of the profile)")
    probe.add_argument("--audio", type=Path, metavar="FILE", help="a recording of speech (default: a synthetic one)")
    probe.add_argument("--samples", type=positive, default=5, help="answers per recording that are wanted (default: 5)")
    probe.add_argument("--temperature", type=float, default=1.0, help="of the collection (default: 1)")
    probe.add_argument("--longest", type=float, metavar="SECONDS", help="longest recording of the collection")
    probe.add_argument("--json", type=Path, metavar="FILE", help="write the card there too")
    probe.set_defaults(run=run_probe)


def positive(text: str) -> int:
    """Read a number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of at least 1")
    return int(text)


def names(text: str) -> list[str]:
    """Split a list of names at commas."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def run_recipes(options: argparse.Namespace) -> None:
    """Print the registered recipes."""
    from speechbrain_mifuse.experiments.registry import listing, repository_root

    print(listing(repository_root(), options.match))


def run_sweep(options: argparse.Namespace) -> None:
    """Run a sweep and write its tables, or do one half of it."""
    from speechbrain_mifuse.experiments import sweep
    from speechbrain_mifuse.experiments.registry import repository_root

    seeds, root, flags = sweep.parse_seeds(options.seeds), repository_root(), list(options.flags)
    if options.data_folder is not None:
        flags.insert(0, f"--data_folder={options.data_folder.resolve()}")
    output = options.output or root / "results" / options.name
    plan = sweep.make_plan(root, options.pairs, output, seeds, names(options.methods), flags, options.threads)
    baselines, figure_methods = names(options.baselines), names(options.figure_methods)
    sweep.require_methods(plan, "--baselines", baselines)
    sweep.require_methods(plan, "--figure_methods", figure_methods)
    if options.commands is not None:
        print(sweep.write_commands(options.commands, plan))
        return
    if not options.collect:
        sweep.require_settings(plan)
        sweep.run_plan(plan, options.jobs or max(sweep.usable_cores() // plan.threads, 1))
    print(sweep.collect(plan, options.table or plan.output, options.name, baselines, figure_methods))


def run_report(options: argparse.Namespace) -> None:
    """Write the page of a run or a sweep, and print its path."""
    from speechbrain_mifuse.report.page import write_report

    print(write_report(options.folder, options.output))


def run_collect(options: argparse.Namespace) -> None:
    """Collect the answers that a recipe needs, or only plan it."""
    if not options.yaml.is_file():
        raise UserError(f"{options.yaml}: no such file. The recipe's YAML file comes first, as hparams/nemo2rav.yaml")
    from speechbrain_mifuse.experiments.features import CorpusSettings, EncoderSettings, open_reader
    from speechbrain_mifuse.experiments.settings import chosen_methods, load_hparams
    from speechbrain_mifuse.experiments.source import prepare_labelled, trained_recogniser
    from speechbrain_mifuse.experiments.teacher import TeacherSettings, collect_answers

    given = {"lalm_budget": options.budget, "lalm_deadline": options.deadline}
    flags = [f"--{key}={value}" for key, value in given.items() if value is not None]
    hparams, run_opts = load_hparams(options.yaml, [*options.flags, *flags])

    def train() -> Path:
        corpus = CorpusSettings.teacher_of(hparams)
        prepare_labelled(corpus)
        return trained_recogniser(corpus, open_reader(EncoderSettings.of(hparams), run_opts), run_opts)

    with stopped_by_ctrl_c():
        methods, target = hparams["adaptation"]["methods"], CorpusSettings.target_of(hparams)
        chosen = {name: methods[name] for name in chosen_methods(hparams)}
        collect_answers(TeacherSettings.of(hparams), chosen, target, train, options.dry_run)


def run_probe(options: argparse.Namespace) -> None:
    """Probe an API, print its card, and hold it against what a collection needs."""
    from speechbrain_mifuse.lalm import probe
    from speechbrain_mifuse.lalm.card import Needs, check
    from speechbrain_mifuse.lalm.client import LalmClient
    from speechbrain_mifuse.lalm.profile import read_profile
    from speechbrain_mifuse.utils.audio import load_audio
    from speechbrain_mifuse.utils.files import atomic_write

    given = {"base_url": options.lalm_base_url, "model": options.lalm_model}
    profile = read_profile(options.profile, **{key: value for key, value in given.items() if value is not None})
    if options.profile is not None and profile.base_url is None:
        raise UserError(f"--lalm_base_url: {options.profile} names no address; give the one that the server prints")
    client = LalmClient.of(dataclasses.replace(profile, max_retries=min(profile.max_retries, 2)))
    speech = probe.speech_like() if options.audio is None else load_audio(options.audio, probe.SAMPLE_RATE)
    lengths = probe.lengths_up_to(options.longest)
    asked = probe.questions(profile, options.temperature, lengths)
    seconds = probe.seconds_sent(asked)
    print(f"{len(asked)} calls with {seconds:.0f} s of audio in all to {client.model} at {client.base_url}", flush=True)
    card = probe.probe(client, profile, speech, options.temperature, lengths)
    print(card.text())
    if options.json is not None:
        atomic_write(options.json, card.to_json() + "\n")
    longest = None if profile.longest_audio else options.longest
    untold = check(card, Needs(profile, options.samples, options.temperature, longest))
    print(
        "\nNothing that a collection with this profile needs is missing. Not known:", *(untold or ["nothing"]), sep="\n"
    )


def run_serve(options: argparse.Namespace) -> None:
    """Serve a recogniser until SIGTERM or Ctrl-C."""
    import logging

    from speechbrain_mifuse.inference.http_limits import check_seconds, checked_key
    from speechbrain_mifuse.inference.server import KEY_VARIABLE, EmotionServer, serve_until_stopped
    from speechbrain_mifuse.lalm.store import is_loopback

    require_recogniser(options.source)
    limits = Limits(
        max_concurrent=options.max_concurrent,
        max_connections=options.max_connections,
        max_body_bytes=options.max_body_mib * 2**20,
        read_timeout=options.read_timeout,
        idle_timeout=options.idle_timeout,
        max_seconds=options.max_seconds,
    )
    grace = check_seconds("grace", options.grace)
    key = checked_key(os.environ.get(KEY_VARIABLE), KEY_VARIABLE)
    recogniser = load(options)
    logging.basicConfig(level=logging.WARNING)  # a failing recogniser is told of here, and not to the client
    server = EmotionServer(recogniser, options.model, options.host, options.port, limits, key)
    if key is None and not is_loopback(server.base_url):
        print(f"warning: whoever reaches {server.base_url} may ask; {KEY_VARIABLE} sets a key", file=sys.stderr)
    serve_until_stopped(server, grace)
