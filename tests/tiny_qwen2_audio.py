"""A Qwen2-Audio of random weights and a few thousand parameters: it takes real audio and answers gibberish.

    python tests/tiny_qwen2_audio.py FOLDER
    transformers serve FOLDER --port 8000

needs no network. It tells whether audio passes through a server, and nothing about emotions.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")


def build(folder: str | Path, seed: int = 0) -> Path:
    """Write configuration, weights and processor of a model whose tokens are bytes."""
    torch.manual_seed(seed)
    vocabulary = {character: number for number, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL), "eos_token": "<|im_end|>"})
    config = transformers.Qwen2AudioConfig(
        audio_config={
            "d_model": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "num_mel_bins": 128,
            "max_source_positions": 1500,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            # Large weights: with small ones the last token decides alone, and audio is heard but changes nothing.
            "initializer_range": 0.7,
        },
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    config.initializer_range = 0.7
    model = transformers.Qwen2AudioForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    features = transformers.WhisperFeatureExtractor(feature_size=128)
    transformers.Qwen2AudioProcessor(feature_extractor=features, tokenizer=tokenizer).save_pretrained(folder)
    return Path(folder)


if __name__ == "__main__":
    print(build(sys.argv[1]))
