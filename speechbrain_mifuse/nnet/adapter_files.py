"""The folder of a pretrained adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from speechbrain_mifuse import __version__
from speechbrain_mifuse.features.store import difference
from speechbrain_mifuse.nnet.wap_transformer import WAPTransformer
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.model_folder import (
    SAME_FRAMES,
    ModelFolder,
    bullets,
    card_text,
    object_yaml,
    pretrainer_yaml,
)
from speechbrain_mifuse.utils.schemas import AdapterAbout

# The same of frames of one layer.
SAME_LAYER = (*SAME_FRAMES, "layer")

HEAD = """# A pretrained adapter. In a recipe of your own, include this file or copy it; then
#   run_on_main(hparams["pretrainer"].collect_files); hparams["pretrainer"].load_collected()
# and hparams["adapter"](frames, lengths) adapts frames [batch, frames, {input_size}] of layer {layer} of its encoder.
adapter_folder: .
"""
USE = """Transformer layers between a frozen speech encoder and a classifier of emotions.

```python
from speechbrain_mifuse.nnet.adapter_files import load_adapter

adapter = load_adapter("path/to/this/folder")
```"""


class AdapterError(UserError):
    """An adapter's folder that is not whole, or does not fit what is asked of it."""


ADAPTER = ModelFolder(
    "adapter",
    "adapter.safetensors",
    AdapterAbout,
    AdapterError,
    "Pretrain the adapter again.",
    identity=("adapter.safetensors",),
)
# Identity of the adapter in a folder.
adapter_digest = ADAPTER.digest
# The hook that its YAML names.
load_adapter_weights = ADAPTER.load_weights


def export_adapter(folder: str | Path, adapter: WAPTransformer, features: Mapping, about: Mapping) -> None:
    """Write an adapter, its weights in half precision.

    Parameters
    ----------
    folder : str or pathlib.Path
        Target folder.
    adapter : WAPTransformer
        Trained.
    features : mapping
        Fingerprint of the frames it was trained on, with their `layer`.
    about : mapping
        Provenance, of JSON's types.

    Example
    -------
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> export_adapter(folder, WAPTransformer(8, n_heads=2), {"dim": 8, "layer": 2}, {"seed": 1})
    >>> sorted(path.name for path in Path(folder).iterdir())
    ['README.md', 'about.json', 'adapter.safetensors', 'hyperparams.yaml']
    """
    weights = {name: value.half() for name, value in adapter.state_dict().items()}
    text = HEAD.format(input_size=adapter.sizes["input_size"], layer=features["layer"])
    text += object_yaml("adapter", "speechbrain_mifuse.nnet.wap_transformer.WAPTransformer", adapter.sizes)
    hook = "speechbrain_mifuse.nnet.adapter_files.load_adapter_weights"
    text += pretrainer_yaml("adapter", "<adapter_folder>/adapter.safetensors", hook)
    about = {"adapter": adapter.sizes, "features": dict(features), **about, "code_version": __version__}
    ADAPTER.write(folder, weights, text, about, adapter_card(about))


def adapter_card(about: Mapping) -> str:
    """Write the card of a pretrained adapter."""
    count = about.get("utterances")
    sections = {
        "Training": "Pretrained without labels" + (f" on {count} recordings." if count else "."),
        "Limits": bullets(["It fits only the encoder, the layer and the preprocessing that `about.json` names."]),
    }
    return card_text("feature-extraction", "Speech emotion adapter", USE, sections, about)


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
    about = ADAPTER.about(folder)
    if features is not None:
        differs = difference(*({key: part.get(key) for key in SAME_LAYER} for part in (about.features, features)))
        if differs:
            raise AdapterError(f"{folder}: was trained on other frames ({differs}). Pass the same --encoder.")
    sizes = about.adapter.model_dump()
    return ADAPTER.build(lambda: WAPTransformer(**sizes), Path(folder) / ADAPTER.weights)
