"""Progress bars that stay readable in a log file."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress(iterable=None, **options) -> tqdm:
    """Show progress on standard error: ten times a second on a terminal, else one line every ten seconds.

    Parameters
    ----------
    iterable : iterable, optional
        What is gone through; without it, call `update` on the bar.
    **options
        As for `tqdm.tqdm` (`desc`, `total`, `unit`, ...).

    Returns
    -------
    tqdm.tqdm
        The bar.

    Example
    -------
    >>> list(progress([1, 2], disable=True))
    [1, 2]
    """
    on_terminal = sys.stderr.isatty()
    return tqdm(iterable, mininterval=0.1 if on_terminal else 10.0, dynamic_ncols=on_terminal, **options)
