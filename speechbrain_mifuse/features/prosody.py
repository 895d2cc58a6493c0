"""Prosodic functionals of a recording: pitch, voice quality and spectral shape over the whole of it."""

from __future__ import annotations

import torch
from speechbrain.lobes.features import VocalFeatures

from speechbrain_mifuse.audio import trim_silence

# What is taken of each curve: it stands in a store's fingerprint.
FUNCTIONALS = ("mean", "deviation", "10 %", "50 %", "90 %", "slope")
SHORTEST_S, STEP_S = 0.1, 0.02


def functionals(curves: torch.Tensor) -> torch.Tensor:
    """Summarise curves over time.

    Parameters
    ----------
    curves : torch.Tensor
        `[frames, curves]`.

    Returns
    -------
    torch.Tensor
        `[6 curves]`: mean, standard deviation, three percentiles, slope over the whole length.

    Example
    -------
    >>> print(functionals(torch.arange(11.0).unsqueeze(1)))
    tensor([ 5.0000,  3.1623,  1.0000,  5.0000,  9.0000, 10.0000])
    """
    mean = curves.mean(0)
    time = torch.linspace(-0.5, 0.5, len(curves)).unsqueeze(1)
    slope = (time * (curves - mean)).sum(0) / time.square().sum().clamp(min=1e-6)
    percentiles = curves.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=0)
    return torch.cat([mean, curves.std(0, correction=0), *percentiles, slope])


class ProsodyReader:
    """Stands in the place of a `FrameReader`: one "frame" per recording, made of SpeechBrain's `VocalFeatures`.

    So functionals are extracted, stored and fingerprinted as encoder frames are.

    Parameters
    ----------
    trim_db : float or None
        Silence threshold of `trim_silence`.
    max_f0_hz : int
        Highest fundamental: excited speech lies well above VocalFeatures' own limit of 300.

    Example
    -------
    >>> ProsodyReader().encode(torch.randn(16000)).shape
    torch.Size([1, 1, 102])
    """

    sample_rate = 16000

    def __init__(self, trim_db: float | None = 40.0, max_f0_hz: int = 500):
        self.trim_db, self.max_f0_hz = trim_db, max_f0_hz
        self.curves = VocalFeatures(max_f0_Hz=max_f0_hz, step_size=STEP_S, sample_rate=self.sample_rate)
        # `encode_file` asks its reader's encoder for the rate.
        self.encoder = self

    def fingerprint(self) -> dict:
        """Describe what decides the functionals.

        Returns
        -------
        dict
            Of JSON's types.
        """
        size = len(FUNCTIONALS) * 17
        about = {"prosody": "speechbrain VocalFeatures, signed log", "functionals": list(FUNCTIONALS)}
        return {**about, "max_f0_hz": self.max_f0_hz, "trim_db": self.trim_db, "layers": [0], "dim": size}

    def encode(self, wave: torch.Tensor) -> torch.Tensor:
        """Compute the functionals of a waveform.

        Parameters
        ----------
        wave : torch.Tensor
            `[samples]` at 16 kHz.

        Returns
        -------
        torch.Tensor
            `[1, 1, 102]`.
        """
        wave = trim_silence(wave, self.trim_db)
        short = int(SHORTEST_S * self.sample_rate) - len(wave)
        wave = torch.nn.functional.pad(wave, (0, max(short, 0)))
        curves = self.curves(wave.unsqueeze(0))[0].nan_to_num()
        # Hertz, decibels and kurtosis side by side: on a logarithmic scale all fit half precision.
        return functionals(curves.sign() * curves.abs().log1p()).view(1, 1, -1)
