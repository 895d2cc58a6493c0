"""A pretrained adapter as files: safetensors, the YAML that builds and loads it, and what it was trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save

from speechbrain_mifuse import __version__
from speechbrain_mifuse.features.store import difference
from speechbrain_mifuse.nnet.wap_transformer import WAPTransformer
from speechbrain_mifuse.nnet.weights import build_with_weights, load_all_weights
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write, bounded_bytes
from speechbrain_mifuse.utils.schemas import AdapterAbout, checked, plain_json

WEIGHTS, ABOUT = "adapter.safetensors", "about.json"
PRETRAIN_AGAIN = "Pretrain the adapter again."
# What the frames an adapter was trained on and those it is to read must share.
DECISIVE = ("encoder", "dim", "trim_db", "frame_average", "preprocessing_version", "speaker_norm", "layer")

YAML = """# A pretrained adapter. In a recipe of your own, include this file or copy it; then
#   run_on_main(hparams["pretrainer"].collect_files); hparams["pretrainer"].load_collected()
# and hparams["adapter"](frames, lengths) adapts frames [batch, frames, {input_size}] of layer {layer} of its encoder.
adapter_folder: .
adapter: !new:speechbrain_mifuse.nnet.wap_transformer.WAPTransformer
    input_size: {input_size}
    d_model: {d_model}
    n_layers: {n_layers}
    n_heads: {n_heads}
    d_ffn: {d_ffn}
    dropout: {dropout}
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        adapter: !ref <adapter>
    paths:
        adapter: !ref <adapter_folder>/adapter.safetensors
    custom_hooks:
        adapter: !name:speechbrain_mifuse.nnet.adapter_files.load_adapter_weights
"""


class AdapterError(UserError):
    """An adapter's folder that is not whole, or does not fit what is asked of it."""


def export_adapter(folder: str | Path, adapter: WAPTransformer, features: Mapping, about: Mapping) -> None:
    """Write weights in half precision, the YAML that loads them, and last `about.json`."""
    folder = Path(folder)
    weights = {name: value.detach().cpu().half().contiguous() for name, value in adapter.state_dict().items()}
    atomic_write(folder / WEIGHTS, save(weights))
    atomic_write(folder / "hyperparams.yaml", YAML.format(**adapter.sizes, layer=features["layer"]))
    told = {"adapter": adapter.sizes, "features": dict(features), **about, "code_version": __version__}
    # Last, because its presence tells that the folder is whole.
    atomic_write(folder / ABOUT, json.dumps(told, indent=1))


def load_adapter_weights(module: torch.nn.Module, path: str | Path, end_of_epoch: bool = False) -> None:
    """Load safetensors into an adapter: a hook for SpeechBrain's `Pretrainer`."""
    load_all_weights(module, path, AdapterError, PRETRAIN_AGAIN)


def load_adapter(folder: str | Path, features: Mapping | None = None) -> WAPTransformer:
    """Build a pretrained adapter with its weights.

    Parameters
    ----------
    folder : str or pathlib.Path
        A folder that `export_adapter` wrote.
    features : mapping, optional
        Fingerprint of the frames that it is to read, with their `layer`; not compared by default.

    Returns
    -------
    WAPTransformer
        The adapter.

    Raises
    ------
    AdapterError
        If the folder is not whole, or the adapter was trained on other frames.

    Example
    -------
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> export_adapter(folder, WAPTransformer(8, n_heads=2), {"dim": 8, "layer": 2}, {"seed": 1})
    >>> load_adapter(folder, {"dim": 8, "layer": 2}).output_size
    8
    >>> load_adapter(folder, {"dim": 8, "layer": 3})
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.nnet.adapter_files.AdapterError: ...: was trained on other frames (layer: found 2, wanted 3). ...
    """
    folder = Path(folder)
    try:
        content = plain_json(folder / ABOUT)
    except ValueError as error:
        raise AdapterError(f"{folder}: no whole adapter there ({ABOUT}: {error}). {PRETRAIN_AGAIN}") from None
    about = checked(AdapterAbout, content, folder / ABOUT, AdapterError, PRETRAIN_AGAIN)
    if features is not None:
        differs = difference(*({key: part.get(key) for key in DECISIVE} for part in (about.features, features)))
        if differs:
            raise AdapterError(f"{folder}: was trained on other frames ({differs}). Pass the same --encoder.")
    sizes = about.adapter.model_dump()
    return build_with_weights(lambda: WAPTransformer(**sizes), folder / WEIGHTS, AdapterError, PRETRAIN_AGAIN)


def adapter_digest(folder: str | Path) -> str:
    """Give the first 16 hexadecimal digits of the SHA-256 of an adapter's weights."""
    try:
        return hashlib.sha256(bounded_bytes(Path(folder) / WEIGHTS)).hexdigest()[:16]
    except (OSError, ValueError):
        raise AdapterError(f"{folder}: no whole adapter there. {PRETRAIN_AGAIN}") from None
