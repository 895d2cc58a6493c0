"""From a folder of recordings without labels to a recognizer of their emotions: `adapt`."""

from speechbrain_mifuse.experiments.adapt import Adapted, adapt

__all__ = ["Adapted", "adapt"]
