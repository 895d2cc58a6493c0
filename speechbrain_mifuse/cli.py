"""The console script `speechbrain-mifuse`. Imports of what a command needs happen in the command: help is instant."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from speechbrain_mifuse import __version__
from speechbrain_mifuse.errors import one_clear_error


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Parameters
    ----------
    arguments : sequence of str, optional
        Of the command line; the process's own by default.

    Raises
    ------
    SystemExit
        With status 2 after one clear error, 0 after `--help` or `--version`.

    Example
    -------
    >>> main(["--version"])
    Traceback (most recent call last):
    ...
    SystemExit: 0
    """
    parser = argparse.ArgumentParser(prog="speechbrain-mifuse", description="Speech emotion recognition tools.")
    parser.add_argument("--version", action="version", version=f"speechbrain-mifuse {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve a recogniser behind an OpenAI-compatible API")
    serve.add_argument("source", help="folder of a recogniser, as a classifier recipe writes it")
    serve.add_argument("--host", default="127.0.0.1", help="address to bind to (default: this machine only)")
    serve.add_argument("--port", type=int, default=8000, help="port (default: 8000)")
    serve.add_argument("--model", default="served-classifier", help="model name that it answers to")
    serve.set_defaults(run=run_serve)
    predict = commands.add_parser("predict", help="recognise the emotion of recordings")
    predict.add_argument("files", nargs="+", help="recordings, any format that libsndfile reads")
    predict.add_argument("--source", required=True, help="folder of a recogniser")
    predict.set_defaults(run=run_predict)
    recipes = commands.add_parser("recipes", help="list the registered recipes with their commands")
    recipes.add_argument("--match", default="", metavar="TEXT", help="only those whose lines contain this text")
    recipes.set_defaults(run=run_recipes)
    add_sweep(commands)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    flags: list[str] = []
    if arguments[:1] == ["sweep"] and "--" in arguments:
        place = arguments.index("--")
        arguments, flags = arguments[:place], arguments[place + 1 :]
    options = parser.parse_args(arguments, argparse.Namespace(flags=flags))
    with one_clear_error():
        try:
            options.run(options)
        except BrokenPipeError:
            # Whoever reads has read enough, as `head` does. What is left in the buffer must not raise again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def add_sweep(commands) -> None:
    """Add the command `sweep`.

    Parameters
    ----------
    commands : argparse action
        As `ArgumentParser.add_subparsers` gives.

    Example
    -------
    >>> parser = argparse.ArgumentParser()
    >>> add_sweep(parser.add_subparsers())
    >>> parser.parse_args(["sweep", "nemo2rav", "--seeds", "1-3"]).seeds
    '1-3'
    """
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


def positive(text: str) -> int:
    """Read a number of at least 1.

    Parameters
    ----------
    text : str
        Of the command line.

    Returns
    -------
    int
        The number.

    Raises
    ------
    argparse.ArgumentTypeError
        If it is none.

    Example
    -------
    >>> positive("2")
    2
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of at least 1")
    return int(text)


def names(text: str) -> list[str]:
    """Split a list of names at commas.

    Parameters
    ----------
    text : str
        Of the command line.

    Returns
    -------
    list of str
        Each once.

    Example
    -------
    >>> names("shot, nrc")
    ['shot', 'nrc']
    """
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def run_recipes(options: argparse.Namespace) -> None:
    """Print the registered recipes.

    Parameters
    ----------
    options : argparse.Namespace
        `match`.

    Example
    -------
    >>> run_recipes(argparse.Namespace(match="no such corpus"))
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.registry.RegistryError: --match: none of the ... recipes contains 'no such corpus'.
    """
    from speechbrain_mifuse.registry import listing, repository_root

    print(listing(repository_root(), options.match))


def run_sweep(options: argparse.Namespace) -> None:
    """Run a sweep and write its tables, or do one half of it.

    Parameters
    ----------
    options : argparse.Namespace
        As `add_sweep` defines, and `flags`, what stood after `--`.

    Example
    -------
    >>> run_sweep(argparse.Namespace(seeds="five", flags=[]))
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.errors.UserError: --seeds: 'five' is no list of seeds such as 1-5 or 1,2,3.
    """
    from speechbrain_mifuse import sweep
    from speechbrain_mifuse.registry import repository_root

    seeds, root, flags = sweep.parse_seeds(options.seeds), repository_root(), list(options.flags)
    if options.data_folder is not None:
        flags.insert(0, f"--data_folder={options.data_folder.resolve()}")
    output = options.output or root / "results" / options.name
    plan = sweep.make_plan(root, options.pairs, output, seeds, names(options.methods), flags, options.threads)
    baselines, figure_methods = names(options.baselines), names(options.figure_methods)
    sweep.require_methods(plan, "--baselines", baselines)
    sweep.require_methods(plan, "--figure_methods", figure_methods)
    if options.commands is not None:
        sweep.write_commands(options.commands, plan.runs())
        print(sweep.advice(options.commands, plan))
        return
    if not options.collect:
        sweep.run_plan(plan, options.jobs or max(sweep.usable_cores() // plan.threads, 1))
    print(sweep.collect(plan, options.table or plan.output, options.name, baselines, figure_methods))


def run_serve(options: argparse.Namespace) -> None:
    """Serve a recogniser until interrupted.

    Parameters
    ----------
    options : argparse.Namespace
        `source`, `host`, `port`, `model`.

    Example
    -------
    >>> run_serve(argparse.Namespace(source="/nowhere"))
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.inference.RecogniserError: /nowhere: no whole recogniser there. ...
    """
    import time

    from speechbrain_mifuse.inference import EmotionRecognizer, recogniser_digest
    from speechbrain_mifuse.lalm.serve import EmotionServer

    recogniser_digest(options.source)
    recogniser = EmotionRecognizer.from_hparams(options.source)
    with EmotionServer(recogniser, options.model, options.host, options.port) as server:
        print(f"{options.model} at {server.base_url}; Ctrl-C stops it", flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            print("stopped")


def run_predict(options: argparse.Namespace) -> None:
    """Print one tab-separated line per recording: file, emotion, probability; unreadable ones say why.

    Parameters
    ----------
    options : argparse.Namespace
        `source`, `files`.

    Example
    -------
    >>> run_predict(argparse.Namespace(source="/nowhere", files=[]))
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.inference.RecogniserError: /nowhere: no whole recogniser there. ...
    """
    from speechbrain_mifuse.audio import BadAudio
    from speechbrain_mifuse.inference import EmotionRecognizer, recogniser_digest

    recogniser_digest(options.source)
    recogniser = EmotionRecognizer.from_hparams(options.source)
    for path in options.files:
        try:
            label, probs = recogniser.classify_file(path)
            print(f"{path}\t{label}\t{probs.max():.3f}", flush=True)
        except BadAudio as error:
            print(f"{path}\tnone\t{error}", flush=True)
