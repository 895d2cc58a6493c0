"""Cross-validation: a corpus cut into stated groups of speakers or sessions, each of which is the test set once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from speechbrain_mifuse.corpora.manifest import CorpusError


def fold_splits(folds: Sequence[Sequence[str]], fold: int) -> dict[str, list[str]]:
    """Split of one fold: its own groups test, all others train.

    Example
    -------
    >>> fold_splits([["Ses01"], ["Ses02"], ["Ses03"]], 2)
    {'train': ['Ses01', 'Ses03'], 'test': ['Ses02']}
    """
    groups = [name for part in folds for name in part]
    doubled = [str(name) for name, times in Counter(groups).items() if times > 1]
    if len(folds) < 2 or not all(folds) or doubled:
        raise CorpusError(
            f"--folds: needs two or more folds, none of them empty and no group in two; given: {list(folds)}."
        )
    if fold not in range(1, len(folds) + 1):
        raise CorpusError(f"--fold: {fold} is none of 1 to {len(folds)}.")
    train = [name for number, part in enumerate(folds, start=1) if number != fold for name in part]
    return {"train": train, "test": list(folds[fold - 1])}


def fold_folder(save_folder: str | Path, fold: int) -> Path:
    """Where the manifests of one fold lie."""
    return Path(save_folder) / f"fold_{fold}"


def prepare_folds(
    prepare: Callable, data_folder: str | Path | None, save_folder: str | Path, folds: Sequence[Sequence[str]]
) -> None:
    """Write the manifests of every fold, each into a folder of its own, unless they are there."""
    for fold in range(1, len(folds) + 1):
        prepare(data_folder, fold_folder(save_folder, fold), fold_splits(folds, fold))
