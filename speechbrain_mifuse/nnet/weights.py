"""Weights from safetensors files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import refuse_unreadable

# The largest absolute value of a weight. Beyond it products leave float32, and the answers are not numbers.
MAX_WEIGHT = 1e6
# Bytes of a safetensors header; a classifier's has a few thousand.
MAX_HEADER_BYTES = 10_000_000


def build_with_weights(
    build: Callable[[], torch.nn.Module], path: str | Path, problem: type[UserError], advice: str
) -> torch.nn.Module:
    """Build a module and load its safetensors, whose shapes are compared before memory is allocated."""
    try:
        with torch.device("meta"):
            described = build().state_dict()
        compare_header(path, described)
    except Exception as error:
        raise problem(_message(path, error, advice)) from None
    module = build()
    load_all_weights(module, path, problem, advice)
    return module


def load_all_weights(module: torch.nn.Module, path: str | Path, problem: type[UserError], advice: str) -> None:
    """Load safetensors into a module; all must fit and be finite.

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
        Of the class `problem`, if the file is missing, damaged, of another architecture, or holds values that no
        training gives.

    Example
    -------
    >>> load_all_weights(torch.nn.Linear(1, 1), "missing.safetensors", UserError, "Train it again.")
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.utils.errors.UserError: missing.safetensors: cannot be loaded (...). Train it again.
    """
    try:
        compare_header(path, module.state_dict())
        module.load_state_dict(load_file(str(path)))
        for name, weight in module.state_dict().items():
            _refuse_unusable(name, weight)
    except Exception as error:
        raise problem(_message(path, error, advice)) from None


def compare_header(path: str | Path, wanted: Mapping[str, torch.Tensor]) -> None:
    """Compare names and shapes in the header of a safetensors file with those of a `state_dict()`."""
    shapes = header_shapes(path)
    for name in [*wanted, *shapes]:
        if name not in shapes:
            raise ValueError(f"{name} is missing")
        if name not in wanted:
            raise ValueError(f"{ascii(name)[:100]} is not part of this architecture")
        if shapes[name] != list(wanted[name].shape):
            raise ValueError(f"{name} has the shape {shapes[name]}, and {list(wanted[name].shape)} is expected")


def header_shapes(path: str | Path) -> dict[str, list[int]]:
    """Read the shapes by name from the header of a safetensors file, and no weight."""
    refuse_unreadable(path)
    with open(path, "rb") as file:
        if int.from_bytes(file.read(8), "little") > MAX_HEADER_BYTES:
            raise ValueError(f"a header of more than {MAX_HEADER_BYTES} bytes")
    with safe_open(str(path), "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def _refuse_unusable(name: str, weight: torch.Tensor) -> None:
    # A variance is divided by, so it may be large, and must not be negative.
    low, high = (0.0, torch.inf) if name.endswith("running_var") else (-MAX_WEIGHT, MAX_WEIGHT)
    # Integers count batches.
    if weight.is_floating_point() and not bool(((weight >= low) & (weight <= high) & weight.isfinite()).all()):
        raise ValueError(f"{name} holds values that are not finite numbers from {low:g} to {high:g}")


def _message(path: str | Path, error: Exception, advice: str) -> str:
    return f"{path}: cannot be loaded ({' '.join(str(error).split())[:500]}). {advice}"
