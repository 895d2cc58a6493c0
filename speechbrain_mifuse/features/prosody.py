"""Prosodic functionals of a recording: pitch, voice quality and spectral shape over the whole of it."""

from __future__ import annotations

import torch
from speechbrain.lobes.features import VocalFeatures

from speechbrain_mifuse.utils.audio import trim_silence

# What is taken of each curve: it stands in a store's fingerprint.
FUNCTIONALS = ("mean", "deviation", "10 %", "50 %", "90 %", "slope")
SHORTEST_S, STEP_S, MAX_F0_HZ = 0.1, 0.02, 500


def functionals(curves: torch.Tensor) -> torch.Tensor:
    """Summarise curves over time."""
    mean = curves.mean(0)
    time = torch.linspace(-0.5, 0.5, len(curves)).unsqueeze(1)
    slope = (time * (curves - mean)).sum(0) / time.square().sum().clamp(min=1e-6)
    percentiles = curves.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=0)
    return torch.cat([mean, curves.std(0, correction=0), *percentiles, slope])


class ProsodyReader:
    """Stands in the place of a `FrameReader`: one "frame" per recording, made of SpeechBrain's `VocalFeatures`."""

    sample_rate = 16000

    def __init__(self, trim_db: float | None = 40.0):
        self.trim_db = trim_db
        self.curves = VocalFeatures(max_f0_Hz=MAX_F0_HZ, step_size=STEP_S, sample_rate=self.sample_rate)
        # Extraction asks its reader's encoder for the rate.
        self.encoder = self

    def fingerprint(self) -> dict:
        """Describe what decides the functionals."""
        size = len(FUNCTIONALS) * 17
        about = {"prosody": "speechbrain VocalFeatures, signed log", "functionals": list(FUNCTIONALS)}
        return {**about, "max_f0_hz": MAX_F0_HZ, "trim_db": self.trim_db, "layers": [0], "dim": size}

    def encode(self, wave: torch.Tensor) -> torch.Tensor:
        """Compute the functionals of a waveform."""
        wave = trim_silence(wave, self.trim_db)
        short = int(SHORTEST_S * self.sample_rate) - len(wave)
        wave = torch.nn.functional.pad(wave, (0, max(short, 0)))
        curves = self.curves(wave.unsqueeze(0))[0].nan_to_num()
        # Hertz, decibels and kurtosis side by side: on a logarithmic scale all fit half precision.
        return functionals(curves.sign() * curves.abs().log1p()).view(1, 1, -1)
