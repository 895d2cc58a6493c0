"""Progress bars and logs that stay readable."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings

from tqdm import tqdm


def progress(iterable=None, **options) -> tqdm:
    """Show progress on standard error: ten times a second on a terminal, else one line every ten seconds."""
    on_terminal = sys.stderr.isatty()
    return tqdm(iterable, mininterval=0.1 if on_terminal else 10.0, dynamic_ncols=on_terminal, **options)


@contextlib.contextmanager
def quiet(*loggers: str):
    """Pass only warnings of some loggers inside the block: what they say of every epoch or request hides the rest."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in levels:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def quiet_loading():
    """Hide the bar for copying weights and the notes of transformers and SpeechBrain; downloads keep their bar."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    # Each of SpeechBrain's wrappers warns that the model is frozen, as it was asked to be.
    names = ("huggingface", "whisper")
    wrappers = [logging.getLogger(f"speechbrain.integrations.huggingface.{name}") for name in names]
    shown, downloads_shown = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    if downloads_shown:
        enable_progress_bars()
    for logger in wrappers:
        logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger in wrappers:
            logger.disabled = False
        if shown:
            transformers_logging.enable_progress_bar()
