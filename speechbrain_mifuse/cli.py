"""The console script `speechbrain-mifuse`. Imports of what a command needs happen in the command: help is instant."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

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
    options = parser.parse_args(arguments)
    with one_clear_error():
        options.run(options)


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
