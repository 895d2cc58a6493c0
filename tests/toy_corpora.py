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
IEMOCAP_CODES = {"angry": "ang", "happy": "hap", "neutral": "neu", "sad": "sad"}
MSP_CODES = {"angry": "A", "happy": "H", "neutral": "N", "sad": "S"}
CREMA_D_CODES = {"angry": "ANG", "happy": "HAP", "neutral": "NEU", "sad": "SAD"}
# What macOS writes beside a file on a disk of another system: a resource fork, no text and no audio.
MACOS_TWIN = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        [\xff\xb0"
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


def write_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
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


def write_iemocap(root: Path, sessions=range(1, 6), takes: int = 2, shift: float = 0.05) -> Path:
    """`SessionN/...` with annotators' lines, other classes, the subfolders that are not read, and macOS twins."""
    for session in sessions:
        tables = root / f"Session{session}" / "dialog" / "EmoEvaluation"
        dialogue = f"Ses{session:02d}F_impro01"
        wavs = root / f"Session{session}" / "sentences" / "wav" / dialogue
        lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
        turns = [(emo, code) for emo, code in IEMOCAP_CODES.items() for _ in range(takes)] + [("sad", "fru")]
        for sex in "FM":
            for number, (emo, code) in enumerate(turns):
                # Every second happy turn is an excited one.
                code = "exc" if code == "hap" and number % 2 else code
                name = f"{dialogue}_{sex}{number:03d}"
                write_wav(wavs / f"{name}.wav", utterance(emo, 2 * session + (sex == "M"), number, shift))
                (wavs / f"._{name}.wav").write_bytes(MACOS_TWIN)
                lines += [f"[{number}.0000 - {number}.9000]\t{name}\t{code}\t[2.5000, 2.5000, 2.5000]"]
                lines += ["C-E2:\tAnger; Sadness;\t()", "A-E3:\tval 3; act 2; dom  2;\t()", ""]
        write_text(tables / f"{dialogue}.txt", "\n".join(lines))
        (tables / f"._{dialogue}.txt").write_bytes(MACOS_TWIN)
        decoy = f"[0.0 - 1.0]\t{dialogue}_F999\tang\t[2.5, 2.5, 2.5]\n"
        for folder in ("Attribute", "Categorical", "Self-evaluation"):
            write_text(tables / folder / f"{dialogue}_e2.txt", decoy)
    return root


def write_msp_improv(
    root: Path, sessions=range(1, 7), takes: int = 2, shift: float = -0.05, table="Evalution.txt", audio=""
) -> Path:
    """Sessions (below `audio`, if given) and a label file that names videos, with annotators' lines."""
    lines = []
    for session in sessions:
        for sex in "FM":
            for emo, code in MSP_CODES.items():
                for take in range(1, takes + 1):
                    name = f"S01{code}-{sex}{session:02d}-P-{sex}M{take:02d}"
                    wav = root / audio / f"session{session}" / f"S01{code}" / "P" / f"MSP-IMPROV-{name}.wav"
                    write_wav(wav, utterance(emo, 2 * session + (sex == "M"), take, shift))
                    lines += [f"UTD-IMPROV-{name}.avi; {code}; A:2.800000; V:3.000000; D:3.200000 ; N:3.900000;"]
                    lines += ["A_01; Angry; Frustrated; A:3.000; V:3.000; D:3.000; N:4.000;", ""]
    for number, code in enumerate("OX", start=90):
        lines += [f"UTD-IMPROV-S01A-F01-P-FM{number}.avi; {code}; A:2.8; V:3.0; D:NaN ; N:3.9;", ""]
    write_text(root / table, "\n".join(lines))
    return root


def write_msp_podcast(root: Path, takes: int = 2, shift: float = 0.0, audio: str = "Audios") -> Path:
    """Four labelled partitions, each with one recording of an unknown speaker, and the unlabelled Test3."""
    rows, number = [], 0
    speakers = {"Train": (1, 2, 3, 4, 5), "Development": (6, 7), "Test1": (8, 9), "Test2": (10,)}
    for partition, known in speakers.items():
        for speaker in known:
            for emo, code in MSP_CODES.items():
                for take in range(takes):
                    number += 1
                    name = f"MSP-PODCAST_{number:04d}_{take:04d}.wav"
                    write_wav(root / audio / name, utterance(emo, speaker, take, shift))
                    unknown = speaker == known[-1] and emo == "sad" and take == 0
                    rows.append((name, code, "Unknown" if unknown else str(speaker), partition))
    rows += [("MSP-PODCAST_9000_0000.wav", code, "1", "Train") for code in "UFDCOX"]
    rows += [("MSP-PODCAST_9100_0000.wav", "", "", "Test3")]
    table = [f"{name},{code},3.0,4.0,3.0,{who},Female,{partition}" for name, code, who, partition in rows]
    header = "FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set"
    write_text(root / "Labels" / "labels_consensus.csv", "\n".join([header, *table]) + "\n")
    return root


def write_crema_d(root: Path, actors=range(1001, 1006), takes: int = 3, shift: float = 0.15) -> Path:
    """`AudioWAV/1001_DFA_ANG_XX.wav`; takes differ in the sentence."""
    for actor in actors:
        for emo, code in CREMA_D_CODES.items():
            for take in range(takes):
                name = f"{actor}_{('DFA', 'IEO', 'ITH')[take]}_{code}_XX.wav"
                write_wav(root / "AudioWAV" / name, utterance(emo, actor, take, shift))
    return root


def write_tess(root: Path, takes: int = 2) -> Path:
    """`OAF_angry/OAF_back_angry.wav`, all seven emotions; takes differ in the word."""
    folders = ("angry", "disgust", "Fear", "happy", "neutral", "Pleasant_surprise", "sad")
    for number, speaker in enumerate(("OAF", "YAF")):
        for place, folder in enumerate(folders):
            code = {"Fear": "fear", "Pleasant_surprise": "ps"}.get(folder, folder)
            for take in range(takes):
                name = f"{speaker}_{('back', 'bar', 'base')[take]}_{code}.wav"
                emo = code if code in LABELS else LABELS[place % 4]
                write_wav(root / f"{speaker}_{folder}" / name, utterance(emo, number, take, place / 10))
    return root


def write_corpora(root: Path) -> Path:
    """All three, as `--data_folder` wants them."""
    write_ravdess(root / "ravdess")
    write_nemo(root / "nemo")
    write_emodb(root / "emodb_2s")
    return root


def write_paper_corpora(root: Path) -> Path:
    """IEMOCAP, MSP-IMPROV and MSP-Podcast, as `--data_folder` wants them."""
    write_iemocap(root / "IEMOCAP_full_release")
    write_msp_improv(root / "MSP-IMPROV")
    write_msp_podcast(root / "MSP-PODCAST-Publish-1.12")
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


def write_hubert(folder: Path, dim: int = 16, **options) -> Path:
    """Write an untrained HuBERT of two layers as a Hugging Face folder; its layers are 0 to 2."""
    torch.manual_seed(0)
    config = transformers.HubertConfig(
        hidden_size=dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        vocab_size=8,
        **options,
    )
    transformers.HubertModel(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    return folder
