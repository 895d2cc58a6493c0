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
    """Tell a folder from a hub id.

    Parameters
    ----------
    source : str or pathlib.Path
        Either.

    Returns
    -------
    pathlib.Path or None
        The folder; `None` for a hub id.

    Raises
    ------
    FileNotFoundError
        If it can only be meant as a folder, and there is none.

    Example
    -------
    >>> local_folder("facebook/hubert-base-ls960") is None
    True
    """
    source = str(source)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    # A hub id is "name" or "owner/name".
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source:
        raise FileNotFoundError(f"{source!r}: no such folder; pass a Hugging Face folder or a hub id")
    return None


def model_folder(source: str | Path, cache_dir: str | None = None) -> Path:
    """Give the folder of a model; download it first if the source is a hub id.

    Parameters
    ----------
    source : str or pathlib.Path
        Folder, or hub id.
    cache_dir : str, optional
        Where downloads go. Default: Hugging Face's own cache.

    Returns
    -------
    pathlib.Path
        The folder.

    Raises
    ------
    FileNotFoundError
        If the source can only be meant as a folder, and there is none.

    Example
    -------
    >>> model_folder(".")
    PosixPath('.')
    """
    folder = local_folder(source)
    if folder is not None:
        return folder
    for form in WEIGHT_FORMS:
        folder = Path(snapshot_download(str(source), cache_dir=cache_dir, allow_patterns=[*BESIDE_WEIGHTS, *form]))
        if any(path.suffix in WEIGHT_SUFFIXES for path in folder.iterdir()):
            break
    return folder


def check_files(folder: Path, schema: type[BaseModel] = ModelConfig, with_tokenizer: bool = False) -> None:
    """Refuse a folder whose files are not plain data of sensible sizes.

    Parameters
    ----------
    folder : pathlib.Path
        Of a model.
    schema : type
        Of its `config.json`.
    with_tokenizer : bool
        Whether the tokenizer is used as well.

    Raises
    ------
    ValueError
        Naming the file.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "config.json").write_text('{"model_type": "bert", "vocab_size": 1000000000000}')
    >>> check_files(folder)
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.utils.errors.UserError: ...config.json: vocab_size: 1000000000000 is beyond 10000000. Save ...
    """
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
    """Refuse an architecture whose weights the folder cannot hold: missing ones would be made up, at any size.

    Parameters
    ----------
    config : transformers.PretrainedConfig
        With the defaults of its kind.
    folder : pathlib.Path
        Of the model.
    schema : type
        Of the configuration.

    Raises
    ------
    ValueError
        Naming `config.json`.

    Example
    -------
    >>> import tempfile
    >>> from transformers import BertConfig
    >>> check_architecture(BertConfig(), Path(tempfile.mkdtemp()))
    Traceback (most recent call last):
    ...
    ValueError: ...config.json: describes 109... weights, and the folder has 0 bytes of them
    """
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
    """Compare the settings of the feature extractor, from whichever file transformers prefers, with their schema.

    Parameters
    ----------
    folder : pathlib.Path
        Of a model.

    Raises
    ------
    UserError
        Naming the key.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "preprocessor_config.json").write_text('{"sampling_rate": 0}')
    >>> check_extractor(folder)
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.utils.errors.UserError: ...: feature extractor: sampling_rate: ... (given: 0). Use another model.
    """
    content, _ = FeatureExtractionMixin.get_feature_extractor_dict(str(folder))
    checked(FeatureExtractorConfig, content, f"{folder}: feature extractor", UserError, USE_ANOTHER)


def refuse_missing(names: Iterable[str], parts: Iterable[str] = ("",)) -> None:
    """Refuse weights that files lack: transformers has drawn them at random.

    Parameters
    ----------
    names : iterable of str
        Weights that were in no file.
    parts : iterable of str
        How the names of those that matter begin; all by default.

    Raises
    ------
    UserError
        If one is among them.

    Example
    -------
    >>> refuse_missing(["decoder.bias"], ["encoder."])
    >>> refuse_missing(["encoder.bias", "decoder.bias"], ["encoder."])
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.utils.errors.UserError: it lacks weights (encoder.bias). Save all of them.
    """
    parts = tuple(parts)
    missing = sorted(name for name in names if name.startswith(parts))
    if missing:
        raise UserError(f"it lacks weights ({', '.join(missing[:3])}{', ...' * (len(missing) > 3)}). Save all of them.")


@contextlib.contextmanager
def no_panic() -> Iterator[None]:
    """Turn a panic of the tokenizer's Rust code, which is no `Exception`, into a `UserError`.

    Example
    -------
    >>> with no_panic():
    ...     raise type("PanicException", (BaseException,), {})("index out of bounds")
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.utils.errors.UserError: its tokenizer fails (index out of bounds). Use another model.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"its tokenizer fails ({error}). {USE_ANOTHER}") from None


def tokens_of(tokenizer, texts: Sequence[str], vocabulary: float) -> Mapping[str, list[list[int]]]:
    """Turn texts into tokens; none is cut or padded.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's.
    texts : sequence of str
        One or more.
    vocabulary : float
        How many tokens the model knows; infinity if unknown.

    Returns
    -------
    mapping
        `input_ids` and what else the model takes, with a list for each text.

    Raises
    ------
    UserError
        If the tokenizer does not fit the model.

    Example
    -------
    >>> tokens_of(lambda texts, **_: {"input_ids": [[7] for text in texts]}, ["sad"], vocabulary=5)
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.utils.errors.UserError: its tokenizer gives the token 7, and the model ...
    """
    with no_panic():
        encoded = tokenizer(list(texts), truncation=False, padding=False)
    highest = max(itertools.chain.from_iterable(encoded["input_ids"]), default=0)
    if highest >= vocabulary:
        raise UserError(f"its tokenizer gives the token {highest}, and the model knows {vocabulary}. {USE_ANOTHER}")
    return encoded
