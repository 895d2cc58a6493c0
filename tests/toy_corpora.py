"""Small corpora in the form of the true ones, and a tiny encoder: enough to train on, made in a second."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import soundfile
import torch
import transformers

RATE = 16000
LABELS = ("angry", "happy", "neutral", "sad")
RAVDESS_CODES = {"angry": "05", "happy": "03", "neutral": "01", "sad": "04"}
NEMO_CODES = {"angry": "anger", "happy": "happiness", "neutral": "neutral", "sad": "sadness"}
EMODB_CODES = {"angry": "W", "happy": "F", "neutral": "N", "sad": "T"}
# Fundamental in Hz, warble in Hz, share of noise: three cues, so that an untrained encoder keeps at least one.
VOICES = {"angry": (520, 9.0, 0.5), "happy": (780, 6.0, 0.05), "neutral": (330, 0.0, 0.05), "sad": (190, 2.0, 0.2)}
DULL = 0.25


def utterance(emo: str, speaker: int, take: int, shift: float = 0.0) -> np.ndarray:
    """Make a third of a second of a warbling, noisy tone that no other arguments give.

    `shift` moves a corpus away from the others, in octaves.
    """
    pitch, warble, noise = VOICES[emo]
    rng = np.random.default_rng([LABELS.index(emo), speaker, take, round(1000 * (1 + shift))])
    time = np.arange(int(RATE * rng.uniform(0.28, 0.4))) / RATE
    tone = pitch * 2 ** (shift + 0.08 * (speaker % 5 - 2) + rng.normal(0, 0.08))
    phase = 2 * np.pi * tone * time + np.sin(2 * np.pi * warble * time) * 3
    wave = np.sin(phase) + DULL * np.sin(2 * phase) + noise * rng.normal(size=len(time))
    return 0.2 * wave


def write_wav(path: Path, wave: np.ndarray, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate, subtype="PCM_16")
    return path


def write_ravdess(root: Path, actors=range(1, 6), takes: int = 3, shift: float = 0.1) -> Path:
    """`Actor_NN/MM-VV-EE-II-SS-RR-AA.wav`; takes differ in the repetition field."""
    for actor in actors:
        for emo, code in RAVDESS_CODES.items():
            for take in range(1, takes + 1):
                name = f"03-01-{code}-01-01-{take:02d}-{actor:02d}.wav"
                write_wav(root / f"Actor_{actor:02d}" / name, utterance(emo, actor, take, shift))
    return root


def write_nemo(root: Path, speakers=("IC0", "KD0", "MK0", "SM0", "TP0"), takes: int = 3, shift: float = 0.0) -> Path:
    """`samples/<speaker>_<emotion>_<sentence>.wav` and `data.tsv`."""
    rows = []
    for number, speaker in enumerate(speakers):
        for emo, code in NEMO_CODES.items():
            for take in range(1, takes + 1):
                name = f"{speaker}_{code}_{take}.wav"
                write_wav(root / "samples" / name, utterance(emo, number, take, shift))
                rows.append({"file_id": name, "emotion": code, "raw_text": "Tak.", "speaker_id": speaker})
    with (root / "data.tsv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        table.writeheader()
        table.writerows(rows)
    return root


def write_emodb(root: Path, speakers=("03", "08", "10", "09", "11"), takes: int = 3, shift: float = -0.1) -> Path:
    """`wav/SSttEv.wav`; takes differ in the version letter."""
    for speaker in speakers:
        for emo, code in EMODB_CODES.items():
            for take in range(takes):
                name = f"{speaker}a01{code}{'abc'[take]}.wav"
                write_wav(root / "wav" / name, utterance(emo, int(speaker), take, shift))
    return root


def write_corpora(root: Path) -> Path:
    """All three, as `--data_folder` wants them."""
    write_ravdess(root / "ravdess")
    write_nemo(root / "nemo")
    write_emodb(root / "emodb_2s")
    return root


def write_encoder(folder: Path, dim: int = 16) -> Path:
    """Write an untrained Whisper encoder of two layers as a Hugging Face folder."""
    torch.manual_seed(0)
    small = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_layers": 1, "decoder_ffn_dim": 8}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    config = transformers.WhisperConfig(
        d_model=dim,
        encoder_layers=2,
        encoder_ffn_dim=32,
        vocab_size=8,
        max_target_positions=4,
        suppress_tokens=[],
        begin_suppress_tokens=[],
        **small,
        **special,
    )
    transformers.WhisperModel(config).save_pretrained(folder)
    transformers.WhisperFeatureExtractor().save_pretrained(folder)
    return folder
