"""Builds a tiny CLAP with random weights: the whole path from a recording to a score is real, in milliseconds.

Its window is 10 s at 48 kHz as in the published checkpoints, but its spectrogram has a frame each 0.1 s. Its tokens are
bytes, and what it hears in audio says nothing about emotions.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Give a tokenizer of bytes, between `<s>` and `</s>`."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *characters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    )
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **names)


def build(folder: str | Path, fusion: bool = False, seed: int = 0) -> Path:
    """Write configuration, weights, feature extractor and tokenizer; `fusion` as in the fused checkpoints."""
    torch.manual_seed(seed)
    fused = {"enable_fusion": True, "fusion_type": "aff_2d"} if fusion else {}
    audio = {
        "spec_size": 64,
        "num_mel_bins": 16,
        "window_size": 4,
        "patch_embeds_hidden_size": 8,
        "hidden_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "num_hidden_layers": 2,
        **fused,
    }
    text = {
        "vocab_size": 300,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 514,
    }
    config = transformers.ClapConfig(audio_config=audio, text_config=text, projection_dim=16)
    model = transformers.ClapModel(config)
    with torch.no_grad():
        # As initialised, it gives much the same vector for everything; with larger weights in the text's attention, the
        # first token would decide alone.
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not (name.startswith("text") and "attention" in name):
                parameter.mul_(8)
    model.save_pretrained(folder)
    transformers.ClapFeatureExtractor(
        feature_size=16,
        hop_length=4800,
        truncation="fusion" if fusion else "rand_trunc",
    ).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return Path(folder)


if __name__ == "__main__":
    print(build(sys.argv[1]))
