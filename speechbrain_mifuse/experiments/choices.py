"""Names on the command line: methods, and the labels that some need."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from speechbrain_mifuse.adaptation.method import AdaptationMethod
from speechbrain_mifuse.corpora.manifest import read_manifest
from speechbrain_mifuse.evaluation.results import labelled
from speechbrain_mifuse.experiments.features import CorpusSettings
from speechbrain_mifuse.utils.errors import UserError


def chosen_methods(value, methods: Mapping[str, AdaptationMethod]) -> list[str]:
    """Names of the methods that `--method` asks for: one, or a list."""
    return known_ones(value, methods, "--method")


def known_ones(value, known: Collection, flag: str) -> list:
    """Read a flag that takes one of several things, or a list of them."""
    chosen = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    unknown = [one for one in chosen if one not in known]
    if unknown:
        raise UserError(f"{flag}: {', '.join(map(str, unknown))} is none of {', '.join(map(str, known))}.")
    return chosen


def chosen_among(value, known: Collection, flag: str) -> list:
    """Read a flag as `known_ones` does, or as `all` of them."""
    return list(known) if isinstance(value, str) and value == "all" else known_ones(value, known, flag)


def require_labels(methods: Mapping[str, AdaptationMethod], target: CorpusSettings) -> None:
    """Refuse a method that uses the target's labels where there are none, before anything long is begun."""
    wanting = [name for name, method in methods.items() if method.uses_labels]
    if not wanting:
        return
    manifest = target.manifests / "adapt.json"
    if not labelled(read_manifest(manifest)):
        raise UserError(
            f"--method: {', '.join(wanting)} is trained on the target's labels, and '{target.name}' has none "
            f"({manifest}). Leave it out of --method, or give the recordings labels."
        )
