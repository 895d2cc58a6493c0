"""Frozen encoders and the store of the frames they produce."""
