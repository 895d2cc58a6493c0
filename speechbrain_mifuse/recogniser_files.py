"""Names that the `hyperparams.yaml` of version 0.1 calls; SpeechBrain's `foreign_class` looks for them here."""

from speechbrain_mifuse.inference.recognizer_folder import FolderPretrainer, load_weights

__all__ = ["FolderPretrainer", "load_weights"]
