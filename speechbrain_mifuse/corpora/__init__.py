"""Corpora: facts, label maps, speaker-independent splits and manifests."""
