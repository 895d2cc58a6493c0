"""Snapshots of a run: label-free criteria and test predictions at each moment that the log shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save

from speechbrain_mifuse.adaptation.selection import chosen_snapshot, known_rule
from speechbrain_mifuse.utils.files import atomic_write


class Snapshots:
    """Snapshots of a run in its method's folder, one file each, with the weights of the preferred one so far.

    Parameters
    ----------
    folder : str or pathlib.Path
        Folder of the method's results.
    rule : str
        Label-free rule that prefers one; `last` takes the last step.

    Example
    -------
    >>> import tempfile, torch
    >>> snapshots = Snapshots(tempfile.mkdtemp(), rule="last")
    >>> for step in (10, 20):
    ...     snapshots.keep({"step": step, "predictions": {}}, torch.nn.Linear(1, 1))
    >>> snapshots.chosen()["step"]
    20
    """

    def __init__(self, folder: str | Path, rule: str):
        known_rule(rule)
        self.folder, self.rule = Path(folder) / "snapshots", rule

    @property
    def weights(self) -> Path:
        """File of the preferred student."""
        return self.folder / "student.safetensors"

    def keep(self, snapshot: Mapping, student) -> None:
        """Write a snapshot, and the student's weights if it is preferred to all earlier ones."""
        atomic_write(self.folder / f"{snapshot['step']:07d}.json", json.dumps(snapshot))
        earlier = [found for found in self.saved() if found["step"] <= snapshot["step"]]
        if chosen_snapshot(earlier, self.rule)["step"] == snapshot["step"]:
            atomic_write(self.weights, save({name: value.cpu() for name, value in student.state_dict().items()}))

    def saved(self) -> list[dict]:
        """Every snapshot."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))]

    def chosen(self) -> Mapping:
        """Give the preferred snapshot."""
        return chosen_snapshot(self.saved(), self.rule)
