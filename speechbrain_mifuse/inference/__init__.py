"""Recognizing emotions with a trained model: files, long recordings, the model's folder, a server."""

import importlib

# Looked up when asked for: the command line reads the server's defaults without waiting for torch.
_HOMES = {
    "EmotionRecognizer": "recognizer",
    "Recognition": "recognizer",
    "FolderPretrainer": "recognizer_folder",
    "load_weights": "recognizer_folder",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Import what is asked for from the module that holds it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
