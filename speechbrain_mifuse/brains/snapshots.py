"""Snapshots of a run: label-free criteria and test predictions at each moment that the log shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save

from speechbrain_mifuse.adaptation.selection import chosen_snapshot, known_rule
from speechbrain_mifuse.corpora.manifest import atomic_write


class Snapshots:
    """Snapshots in a method's folder, one file each; the preferred one so far has its weights kept beside them.

    A file is a function of its step alone, so a killed run that passes a step again writes the same file.

    Parameters
    ----------
    folder : str or pathlib.Path
        The method's output folder; snapshots go to `snapshots` below it.
    rule : str
        Which one is preferred: a key of `adaptation.selection.RULES`.

    Raises
    ------
    UserError
        If the rule is unknown.

    Example
    -------
    >>> import tempfile, torch
    >>> snapshots = Snapshots(tempfile.mkdtemp(), "entropy")
    >>> for step, entropy in ((60, -0.2), (120, -0.3)):
    ...     snapshots.keep({"step": step, "entropy": entropy, "predictions": {}}, torch.nn.Linear(1, 1))
    >>> snapshots.chosen()["step"], [found["step"] for found in snapshots.saved()]
    (60, [60, 120])
    """

    def __init__(self, folder: str | Path, rule: str):
        known_rule(rule)
        self.folder, self.rule = Path(folder) / "snapshots", rule

    @property
    def weights(self) -> Path:
        """File of the preferred student."""
        return self.folder / "student.safetensors"

    def keep(self, snapshot: Mapping, student) -> None:
        """Write a snapshot, and the student's weights if it is preferred to all earlier ones.

        Parameters
        ----------
        snapshot : mapping
            `step`, the criteria and `predictions`, of JSON's types.
        student : torch.nn.Module
            As it is at this step.
        """
        atomic_write(self.folder / f"{snapshot['step']:07d}.json", json.dumps(snapshot))
        earlier = [found for found in self.saved() if found["step"] <= snapshot["step"]]
        if chosen_snapshot(earlier, self.rule)["step"] == snapshot["step"]:
            atomic_write(self.weights, save({name: value.cpu() for name, value in student.state_dict().items()}))

    def saved(self) -> list[dict]:
        """Every snapshot.

        Returns
        -------
        list of dict
            By step; empty for a method that trains nothing.
        """
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))]

    def chosen(self) -> Mapping:
        """Give the preferred snapshot.

        Returns
        -------
        mapping
            One of `saved`.
        """
        return chosen_snapshot(self.saved(), self.rule)
