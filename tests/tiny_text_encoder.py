"""An untrained BERT with a vocabulary of single words, as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from tokenizers.implementations import BertWordPieceTokenizer
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

TEXTS = Path(__file__).parents[1] / "hparams"


def words_of(value) -> set[str]:
    """Words of every text in a piece of YAML."""
    if isinstance(value, dict):
        return words_of([*value, *value.values()])
    if isinstance(value, list):
        return set().union(*map(words_of, value))
    return set(value.lower().replace(".", "").replace("-", " ").replace("{who}", "").replace("{e}", "").split())


def write_text_encoder(folder: Path, dim: int = 64) -> Path:
    """Write it; it knows every word of the English prompts and captions."""
    texts = [TEXTS / part / "english.yaml" for part in ("prompts", "captions")]
    known = sorted(set().union(*(words_of(yaml.safe_load(path.read_text())) for path in texts)))
    vocabulary = {
        word: place for place, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "-", *known])
    }
    # Both versions of transformers take a tokenizer; how a BERT's vocabulary is given differs.
    specials = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    words = BertWordPieceTokenizer(vocab=vocabulary)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words._tokenizer, **specials)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=dim,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
