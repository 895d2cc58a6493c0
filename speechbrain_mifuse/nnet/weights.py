"""Weights from safetensors files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from speechbrain_mifuse.errors import UserError


def load_all_weights(module: torch.nn.Module, path: str | Path, problem: type[UserError], advice: str) -> None:
    """Load safetensors into a module; all must fit.

    Parameters
    ----------
    module : torch.nn.Module
        Receives the weights.
    path : str or pathlib.Path
        A safetensors file.
    problem : type
        Class of the error.
    advice : str
        What to do about it, for the message.

    Raises
    ------
    UserError
        Of the class `problem`, if the file is missing, damaged, or of another architecture.

    Example
    -------
    >>> load_all_weights(torch.nn.Linear(1, 1), "missing.safetensors", UserError, "Train it again.")
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.errors.UserError: missing.safetensors: cannot be loaded (...). Train it again.
    """
    try:
        module.load_state_dict(load_file(str(path)))
    except Exception as error:
        raise problem(f"{path}: cannot be loaded ({error}). {advice}") from None
