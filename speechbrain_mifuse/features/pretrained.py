"""Pretrained models of transformers' form, from a folder or the hub: checked before transformers builds anything.

A repository of the hub is downloaded first and then treated as a folder.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from pydantic import BaseModel
from transformers import AutoModel, FeatureExtractionMixin, PretrainedConfig

from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import held_bytes
from speechbrain_mifuse.utils.progress import quiet_loading
from speechbrain_mifuse.utils.schemas import (
    MAX_JSON_BYTES,
    WEIGHT_SUFFIXES,
    FeatureExtractorConfig,
    ModelConfig,
    TokenizerConfig,
    TokenizerFile,
    WeightIndex,
    checked,
    plain_json,
)

# Written by transformers itself into a configuration: these change with its version or the folder, never with what a
# model computes, so no fingerprint holds them.
VOLATILE = ("_name_or_path", "_commit_hash", "architectures", "dtype", "torch_dtype", "transformers_version")
# How many weights may be described for each byte of files of weights: a folder may lack a decoder.
MIN_WEIGHTS, MAX_WEIGHTS_PER_BYTE = 10_000_000, 4

# What is downloaded: files beside the weights, and weights in the first of these forms that the repository has.
BESIDE_WEIGHTS = ["*.json", "*.txt", "*.model"]
WEIGHT_FORMS = (["model.safetensors", "model-*.safetensors"], ["pytorch_model*.bin", "*.ckpt"])

# Files that transformers reads as JSON; the processor's can replace the feature extractor's.
SCHEMAS: dict[str, type[BaseModel] | None] = {
    "preprocessor_config.json": FeatureExtractorConfig,
    "processor_config.json": None,
    "model.safetensors.index.json": WeightIndex,
    "pytorch_model.bin.index.json": WeightIndex,
}
TOKENIZER_SCHEMAS: dict[str, type[BaseModel] | None] = {
    "tokenizer_config.json": TokenizerConfig,
    "tokenizer.json": TokenizerFile,
    "vocab.json": None,
    "added_tokens.json": None,
    "special_tokens_map.json": None,
}
# Of one file of a tokenizer; those of 250,000 tokens have 20 MB.
MAX_TOKENIZER_BYTES = 100_000_000
SAVE_AGAIN, USE_ANOTHER = "Save the model there again.", "Use another model."


def local_folder(source: str | Path) -> Path | None:
    """Tell a folder from a hub id."""
    source = str(source)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    # A hub id is "name" or "owner/name".
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source:
        raise FileNotFoundError(f"{source!r}: no such folder; pass a Hugging Face folder or a hub id")
    return None


def model_folder(source: str | Path) -> Path:
    """Give the folder of a model; download it first if the source is a hub id."""
    folder = local_folder(source)
    if folder is not None:
        return folder
    for form in WEIGHT_FORMS:
        folder = Path(snapshot_download(str(source), allow_patterns=[*BESIDE_WEIGHTS, *form]))
        if any(path.suffix in WEIGHT_SUFFIXES for path in folder.iterdir()):
            break
    return folder


def check_files(folder: Path, schema: type[BaseModel] = ModelConfig, with_tokenizer: bool = False) -> None:
    """Refuse a folder whose files are not plain data of sensible sizes."""
    # Where PEFT is installed, transformers would change the weights by this file.
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder / 'adapter_config.json'}: adapters of PEFT are not supported; merge it first")
    for path in folder.iterdir():
        if not path.is_file() and (path.suffix in WEIGHT_SUFFIXES or not path.is_dir()):
            raise ValueError(f"{path}: not a regular file")
    for name, part in {"config.json": schema, **SCHEMAS}.items():
        _check_json(folder / name, part, MAX_JSON_BYTES)
    if not with_tokenizer:
        return
    for name, part in TOKENIZER_SCHEMAS.items():
        _check_json(folder / name, part, MAX_TOKENIZER_BYTES)
    for path in folder.iterdir():
        # Vocabularies, merges, and models of SentencePiece.
        if path.suffix in (".txt", ".model") and path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise ValueError(f"{path}: more than {MAX_TOKENIZER_BYTES} bytes")


def _check_json(path: Path, schema: type[BaseModel] | None, max_bytes: int) -> None:
    if not path.exists():
        return
    try:
        content = plain_json(path, max_bytes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if schema is not None:
        checked(schema, content, path, UserError, SAVE_AGAIN)


def check_architecture(config: PretrainedConfig, folder: Path, schema: type[BaseModel] = ModelConfig) -> None:
    """Refuse an architecture whose weights the folder cannot hold: missing ones would be made up, at any size."""
    content = {**json.loads(config.to_json_string()), "attn_implementation": config._attn_implementation}
    checked(schema, content, folder / "config.json", UserError, USE_ANOTHER)
    with quiet_loading(), torch.device("meta"):
        model = AutoModel.from_config(config)
    count = sum(tensor.numel() for tensor in itertools.chain(model.parameters(), model.buffers()))
    held = sum(held_bytes(path) for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    if count > MIN_WEIGHTS + MAX_WEIGHTS_PER_BYTE * held:
        raise ValueError(
            f"{folder / 'config.json'}: describes {count} weights, and the folder has {held} bytes of them"
        )


def check_extractor(folder: Path) -> None:
    """Compare the settings of the feature extractor, from whichever file transformers prefers, with their schema."""
    content, _ = FeatureExtractionMixin.get_feature_extractor_dict(str(folder))
    checked(FeatureExtractorConfig, content, f"{folder}: feature extractor", UserError, USE_ANOTHER)


def refuse_missing(names: Iterable[str], parts: Iterable[str] = ("",)) -> None:
    """Refuse weights that files lack: transformers has drawn them at random."""
    parts = tuple(parts)
    missing = sorted(name for name in names if name.startswith(parts))
    if missing:
        raise UserError(f"it lacks weights ({', '.join(missing[:3])}{', ...' * (len(missing) > 3)}). Save all of them.")


@contextlib.contextmanager
def no_panic() -> Iterator[None]:
    """Turn a panic of the tokenizer's Rust code, which is no `Exception`, into a `UserError`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"its tokenizer fails ({error}). {USE_ANOTHER}") from None


def tokens_of(tokenizer, texts: Sequence[str], vocabulary: float) -> Mapping[str, list[list[int]]]:
    """Turn texts into tokens; none is cut or padded."""
    with no_panic():
        encoded = tokenizer(list(texts), truncation=False, padding=False)
    highest = max(itertools.chain.from_iterable(encoded["input_ids"]), default=0)
    if highest >= vocabulary:
        raise UserError(f"its tokenizer gives the token {highest}, and the model knows {vocabulary}. {USE_ANOTHER}")
    return encoded
