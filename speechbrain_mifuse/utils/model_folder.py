"""The folder of a trained model: recognizers, adapters and dual encoders have the same files, read by the same checks.

- `hyperparams.yaml` builds the model in a recipe of SpeechBrain; our own loaders run nothing of it.
- `*.safetensors` holds the weights.
- `about.json` says what it was trained on, and its sizes (`utils.schemas.ModelAbout`).
- `README.md` is the model card.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from safetensors import safe_open
from safetensors.torch import load_file, save

from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write, bounded_bytes, refuse_unreadable
from speechbrain_mifuse.utils.schemas import MAX_YAML_BYTES, ModelAbout, checked, plain_json
from speechbrain_mifuse.utils.texts import markdown

SETTINGS, ABOUT, CARD = "hyperparams.yaml", "about.json", "README.md"
# What the frames that a model was trained on and those that it is to read must share.
SAME_FRAMES = ("encoder", "dim", "trim_db", "frame_average", "preprocessing_version", "speaker_norm")
# The largest absolute value of a weight. Beyond it products leave float32, and the answers are not numbers.
MAX_WEIGHT = 1e6
# Bytes of a safetensors header; a classifier's has a few thousand.
MAX_HEADER_BYTES = 10_000_000


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """The folders of one kind of model: names, schema, and the error that says what to do about a bad one."""

    kind: str
    weights: str
    schema: type[ModelAbout]
    problem: type[UserError]
    advice: str
    # What to do about bad weights, if that differs.
    weights_advice: str | None = None
    # Files whose content is the model's identity.
    identity: tuple[str, ...] = ()
    # Files that are the same in each folder.
    more: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def write(
        self,
        folder: str | Path,
        weights: bytes | Mapping[str, torch.Tensor],
        settings: str,
        about: Mapping,
        card: str | None = None,
    ) -> None:
        """Write a folder; its card may come later."""
        if not isinstance(weights, bytes):
            weights = save({name: value.detach().cpu().contiguous() for name, value in weights.items()})
        files = {self.weights: weights, SETTINGS: settings, **self.more, **({CARD: card} if card else {})}
        # Last, because its presence means that the folder is complete.
        for name, content in {**files, ABOUT: json.dumps(about, indent=1)}.items():
            atomic_write(Path(folder) / name, content)

    def about(self, folder: str | Path) -> ModelAbout:
        """Read and check what a folder says of itself."""
        return self.checked_about(Path(folder) / ABOUT)

    def checked_about(self, path: Path) -> ModelAbout:
        """Read and check an `about.json`."""
        try:
            content = plain_json(path)
        except ValueError as error:
            raise self._incomplete(path.parent, f" ({path.name}: {error})") from None
        return checked(self.schema, content, path, self.problem, self.advice)

    def build(self, build: Callable[[], torch.nn.Module], path: str | Path) -> torch.nn.Module:
        """Build a module with its weights; their shapes are compared before memory for them is allocated."""
        try:
            with torch.device("meta"):
                described = build().state_dict()
            _compare_header(path, described)
        except Exception as error:
            raise _unloadable(path, error, self.problem, self.weights_advice or self.advice) from None
        module = build()
        self.load_weights(module, path)
        return module

    def load_weights(self, module: torch.nn.Module, path: str | Path, end_of_epoch: bool = False) -> None:
        """Load safetensors into a module: a hook for SpeechBrain's `Pretrainer`."""
        load_all_weights(module, path, self.problem, self.weights_advice or self.advice)

    def digest(self, folder: str | Path) -> str:
        """Identity of a model: the first 16 hexadecimal digits of a SHA-256."""
        found = hashlib.sha256()
        try:
            for name in self.identity:
                found.update(bounded_bytes(Path(folder) / name, MAX_YAML_BYTES if name == SETTINGS else None))
        except (OSError, ValueError):
            raise self._incomplete(folder) from None
        return found.hexdigest()[:16]

    def _incomplete(self, folder: str | Path, reason: str = "") -> UserError:
        return self.problem(f"{folder}: no whole {self.kind} there{reason}. {self.advice}")


def object_yaml(name: str, built: str, settings: Mapping) -> str:
    """Write the part of a YAML file from which HyperPyYAML builds an object."""
    return f"{name}: !new:{built}\n" + "".join(f"    {key}: {json.dumps(value)}\n" for key, value in settings.items())


def pretrainer_yaml(name: str, path: str, hook: str, built="speechbrain.utils.parameter_transfer.Pretrainer") -> str:
    """Write the part of a YAML file that loads the weights of an object."""
    parts = {"loadables": f"!ref <{name}>", "paths": f"!ref {path}", "custom_hooks": f"!name:{hook}"}
    return f"pretrainer: !new:{built}\n" + "".join(f"    {key}:\n        {name}: {to}\n" for key, to in parts.items())


def card_text(pipeline_tag: str, title: str, opening: str, sections: Mapping[str, str], about: Mapping) -> str:
    """Write a model card; no name from elsewhere reaches its front matter."""
    tags = ["speech-emotion-recognition", "speechbrain", "speechbrain-mifuse"]
    data = ModelCardData(library_name="speechbrain", pipeline_tag=pipeline_tag, tags=tags, license="other")
    parts = [f"---\n{data.to_yaml()}\n---", f"# {title}", opening]
    parts += [f"## {heading}\n\n{text}" for heading, text in sections.items()]
    return "\n\n".join([*parts, f"Written by speechbrain-mifuse {markdown(about['code_version'])}.\n"])


def bullets(lines: Iterable[str]) -> str:
    """Format a list."""
    return "\n".join(f"- {line}" for line in lines) or "- not recorded"


def load_all_weights(module: torch.nn.Module, path: str | Path, problem: type[UserError], advice: str) -> None:
    """Load safetensors into a module; all must fit, and be numbers that training can give."""
    try:
        _compare_header(path, module.state_dict())
        module.load_state_dict(load_file(str(path)))
        for name, weight in module.state_dict().items():
            # A variance is divided by, so it may be large, and must not be negative.
            low, high = (0.0, torch.inf) if name.endswith("running_var") else (-MAX_WEIGHT, MAX_WEIGHT)
            # Integers count batches.
            if weight.is_floating_point() and not bool(((weight >= low) & (weight <= high) & weight.isfinite()).all()):
                raise ValueError(f"{name} holds values that are not finite numbers from {low:g} to {high:g}")
    except Exception as error:
        raise _unloadable(path, error, problem, advice) from None


def _unloadable(path: str | Path, error: Exception, problem: type[UserError], advice: str) -> UserError:
    return problem(f"{path}: cannot be loaded ({' '.join(str(error).split())[:500]}). {advice}")


def _compare_header(path: str | Path, wanted: Mapping[str, torch.Tensor]) -> None:
    """Compare names and shapes in the header of a safetensors file with those of a module."""
    shapes = _header_shapes(path)
    for name in [*wanted, *shapes]:
        if name not in shapes:
            raise ValueError(f"{name} is missing")
        if name not in wanted:
            raise ValueError(f"{ascii(name)[:100]} is not part of this architecture")
        if shapes[name] != list(wanted[name].shape):
            raise ValueError(f"{name} has the shape {shapes[name]}, and {list(wanted[name].shape)} is expected")


def _header_shapes(path: str | Path) -> dict[str, list[int]]:
    refuse_unreadable(path)
    with open(path, "rb") as file:
        if int.from_bytes(file.read(8), "little") > MAX_HEADER_BYTES:
            raise ValueError(f"a header of more than {MAX_HEADER_BYTES} bytes")
    with safe_open(str(path), "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
