"""Files of a model folder that may come from a stranger: read as plain data and compared with a schema.

Nothing here builds what a file names. HyperPyYAML is not used: it runs what its tags name, and takes text in round
brackets for a Python expression.
"""

from __future__ import annotations

import base64
import itertools
import math
import operator
import os
import re
import unicodedata
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import bounded_bytes, json_object
from speechbrain_mifuse.utils.texts import shown

# Bounds on one file: bytes (PyYAML reads about 50 kB a second), and lists or mappings inside each other.
MAX_YAML_BYTES, MAX_JSON_BYTES, MAX_DEPTH = 100_000, 1_000_000, 30
# Characters of a number in YAML: `1:1:1` has base 60, and long ones take long.
MAX_SCALAR_LENGTH = 40
# Larger than any real model, and small enough that a module of this size can be described on torch's meta device.
MAX_SIZE, MAX_LAYERS, MAX_CLASSES = 100_000, 200, 1000
# Of any whole number in the configuration of a model.
MAX_CONFIG_INT = 10_000_000

PLAIN = "tag:yaml.org,2002:"
LOAD_WEIGHTS = ("speechbrain_mifuse.inference.load_weights", "speechbrain_mifuse.recogniser_files.load_weights")
# All tags in the YAML of an exported recognizer. Version 0.1 had other names.
TAGS = {
    "!ref",
    "!new:speechbrain_mifuse.features.encoder.FrozenEncoder",
    "!new:speechbrain_mifuse.nnet.classifier.EmotionClassifier",
    "!new:speechbrain_mifuse.inference.FolderPretrainer",
    "!new:speechbrain_mifuse.recogniser_files.FolderPretrainer",
    "!new:speechbrain.utils.parameter_transfer.Pretrainer",
    *(f"!name:{name}" for name in LOAD_WEIGHTS),
}
# The part of that YAML that only SpeechBrain's own loader needs.
MODULES = {"encoder": "<encoder>", "classifier": "<classifier>"}
PRETRAINER = {
    "loadables": {"classifier": "<classifier>"},
    "paths": {"classifier": "<pretrained_path>/classifier.safetensors"},
    "custom_hooks": {"classifier": ""},
}


class PlainYamlLoader(yaml.SafeLoader):
    """Reads YAML of bounded depth into plain data, without anchors and without tags other than those given."""

    def __init__(self, text: str, tags: Collection[str] = ()):
        super().__init__(text)
        self.tags, self.depth = tags, 0

    def compose_node(self, parent, index):
        """Refuse anchors, which can multiply a small file into a large value, and deep nesting."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _refused("anchors and aliases are not allowed", event)
        if self.depth == MAX_DEPTH:
            raise _refused(f"more than {MAX_DEPTH} levels", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        """Refuse duplicate keys, of which YAML would keep the last."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if not all(isinstance(key, str | int | float | None) for key in keys):
            raise _refused("a key must be a string or a number", node)
        twice = [key for number, key in enumerate(keys) if key in keys[:number]] if len(set(keys)) < len(keys) else []
        if twice:
            raise _refused(f"duplicate key {twice[0]!r}", node)
        return dict(zip(keys, (self.construct_object(value, deep=True) for _, value in node.value), strict=True))

    def _untagged(self, node):
        if isinstance(node, yaml.MappingNode):
            return self.construct_mapping(node)
        return self.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else node.value

    def _tagged(self, node):
        if node.tag not in self.tags:
            raise _refused(f"the tag '{node.tag}' is not allowed", node)
        return self._untagged(node)

    def _scalar(self, node):
        if isinstance(node.value, str) and len(node.value) > MAX_SCALAR_LENGTH:
            raise _refused(f"a number of {len(node.value)} characters", node)
        kind = node.tag.removeprefix(PLAIN)
        try:
            return getattr(self, f"construct_yaml_{kind}")(node)
        except (KeyError, ValueError, OverflowError):
            raise _refused(f"{node.value!r} is not of the type {kind}", node) from None


PlainYamlLoader.yaml_constructors = {
    None: PlainYamlLoader._tagged,
    # A date is text, as no schema has one.
    **dict.fromkeys((f"{PLAIN}{kind}" for kind in ("map", "seq", "str", "timestamp")), PlainYamlLoader._untagged),
    **dict.fromkeys((f"{PLAIN}{kind}" for kind in ("int", "float", "bool", "null")), PlainYamlLoader._scalar),
}
# Python writes a small number without a point, which YAML 1.1 takes for text.
PlainYamlLoader.add_implicit_resolver(
    f"{PLAIN}float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _refused(reason: str, at: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=reason, problem_mark=at.start_mark)


def plain_yaml(path: str | Path, tags: Collection[str] = ()) -> Any:
    """Read a YAML file as plain data."""
    try:
        return PlainYamlLoader(bounded_bytes(path, MAX_YAML_BYTES).decode("utf-8"), tags).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(where + _shortened(error.problem or error.context)) from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(_shortened(error)) from None


def _shortened(reason: object) -> str:
    """One short line, whatever the file holds."""
    line = shown(" ".join(str(reason).split()))
    return line if len(line) <= 300 else f"{line[:300]}..."


def plain_json(path: str | Path, max_bytes: int = MAX_JSON_BYTES) -> dict:
    """Read a JSON object of bounded size and depth."""
    try:
        content = json_object(Path(path), max_bytes)
    except FileNotFoundError as error:
        raise ValueError(error.strerror) from None
    except ValueError as error:
        raise ValueError(_shortened(error)) from None
    level, depth = [content], 0
    while level:
        if depth == MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} levels")
        level = [part for each in level for part in (each.values() if isinstance(each, dict) else each)]
        level, depth = [part for part in level if isinstance(part, dict | list)], depth + 1
    return content


def checked(
    schema: type[BaseModel], content: Any, place: str | Path, problem: type[UserError], advice: str
) -> BaseModel:
    """Compare data with a schema."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    # A check of several keys names them itself.
    of_several = first["type"] == "value_error" and not first["loc"]
    key = [] if of_several else [".".join(str(part) for part in first["loc"]) or "content"]
    given = ascii(first["input"])
    given = "" if of_several or first["type"] == "missing" else f" (given: {given[:80]}{'...' * (len(given) > 80)})"
    reason = first["msg"].removeprefix("Value error, ")
    raise problem(": ".join([str(place), *(ascii(each)[1:-1][:200] for each in key), f"{reason}{given}. {advice}"]))


def _plain_text(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in text):
        raise ValueError("must not hold control characters")
    # Labels and names reach the YAML of recipes, where HyperPyYAML runs such text, in quotes too.
    if text.startswith("!") or (text.startswith("(") and text.endswith(")")):
        raise ValueError("must not begin with '!' or stand in round brackets, which YAML files of recipes run as code")
    return text


def _different(values: list) -> list:
    if len(set(values)) < len(values):
        raise ValueError("must be different from each other")
    return values


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _as_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


Text = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_plain_text)]
Source = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_plain_text), BeforeValidator(_as_text)]
Labels = Annotated[
    list[Text], Field(min_length=2, max_length=MAX_CLASSES), AfterValidator(_different), BeforeValidator(_as_list)
]
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Layer = Annotated[int, Field(ge=-MAX_LAYERS - 1, le=MAX_LAYERS)]
Layers = Annotated[
    list[Layer], Field(min_length=1, max_length=MAX_LAYERS + 1), AfterValidator(_different), BeforeValidator(_as_list)
]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Temperature = Annotated[float, Field(ge=1e-4, le=1e4)]
TrimDb = Annotated[float, Field(gt=0, le=1000)] | None
FrameAverage = Annotated[int, Field(ge=1, le=1000)]
Values = dict[str, Any]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Open(BaseModel):
    """What a recipe records besides is kept."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class AdapterSizes(_Strict):
    """Sizes of a `WAPTransformer`."""

    input_size: Size
    d_model: Size | None = None
    n_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)] = 3
    n_heads: Annotated[int, Field(ge=1, le=1000)] = 8
    d_ffn: Size | None = None
    dropout: Dropout = 0.1

    @model_validator(mode="after")
    def _heads_fit(self):
        if (self.d_model or self.input_size) % self.n_heads:
            raise ValueError(f"n_heads: {self.n_heads} heads do not divide {self.d_model or self.input_size}")
        return self


class ClassifierSizes(_Strict):
    """Sizes of an `EmotionClassifier`."""

    input_size: Size
    n_classes: Annotated[int, Field(ge=2, le=MAX_CLASSES)]
    hidden_size: Size = 256
    dropout: Dropout = 0.5
    n_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS + 1)] = 1
    attention_size: Size = 64
    adapter: AdapterSizes | None = None


class DualEncoderSizes(_Strict):
    """Sizes of a `DualEncoder`."""

    audio_size: Size
    text_size: Size
    size: Size = 128
    hidden_size: Size = 256
    dropout: Dropout = 0.3


class EncoderSettings(_Strict):
    """Which encoder a recognizer uses."""

    source: Source
    layers: Layers | Layer | None = None


def _one_class_each(labels: list, sizes: ClassifierSizes) -> None:
    if sizes.n_classes != len(labels):
        raise ValueError(f"labels: {len(labels)} labels, but classifier.n_classes is {sizes.n_classes}")


class RecognizerSettings(_Strict):
    """The YAML of a recognizer."""

    pretrained_path: Source = "."
    labels: Labels
    sample_rate: Literal[16000]
    temperature: Temperature = 1.0
    trim_db: TrimDb
    frame_average: FrameAverage
    encoder: EncoderSettings
    classifier: ClassifierSizes
    modules: Values = Field(MODULES, exclude=True)
    pretrainer: Values = Field(PRETRAINER, exclude=True)
    speaker_norm: Text | None = None
    abstain_below: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _parts_fit(self):
        _one_class_each(self.labels, self.classifier)
        for name, wanted in (("modules", MODULES), ("pretrainer", PRETRAINER)):
            if getattr(self, name) != wanted:
                raise ValueError(f"{name}: differs from that of an exported recognizer")
        return self


class ModelAbout(_Open):
    """`about.json` of any model: the frames that it reads, sizes, and what else a recipe records of its training."""

    features: Values
    code_version: Text | None = None


class RecognizerAbout(ModelAbout):
    """`about.json` of a recognizer."""

    labels: Labels
    classifier: ClassifierSizes
    corpus: Text | None = None
    temperature: Temperature | None = None

    @model_validator(mode="after")
    def _labels_fit(self):
        _one_class_each(self.labels, self.classifier)
        return self


class AdapterAbout(ModelAbout):
    """`about.json` of an adapter."""

    adapter: AdapterSizes


class FrameSettings(_Open):
    """How the frames that a dual encoder reads were made."""

    layer: Layer
    layers: Layers
    trim_db: TrimDb
    frame_average: FrameAverage


class TextEncoderSettings(_Open):
    """Which text encoder a dual encoder uses."""

    source: Source
    text_encoder: Text
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)]


class DualEncoderAbout(ModelAbout):
    """`about.json` of a dual encoder."""

    dual_encoder: DualEncoderSizes
    classes_known: Annotated[list[Text], Field(min_length=1, max_length=MAX_CLASSES), AfterValidator(_different)]
    encoder: Source
    features: FrameSettings
    text_encoder: TextEncoderSettings
    trained_on: dict[Text, Any] | list[Text] = []


# Bounds on what an encoder computes of each second: real ones have 50 frames, up to 20 heads, and 102 channels for each
# sample behind their first convolution.
MAX_HEADS, MIN_SAMPLES_PER_FRAME, MAX_CHANNELS_PER_SAMPLE = 64, 160, 1024
# Endings of files of weights.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt")
# Of whole numbers that count modules or names.
MAX_BY_KEY = {"layer|depth": MAX_LAYERS, "num_labels": MAX_CLASSES * 100}
# Of a tokenizer: steps of a kind, and how many times as long they make a text.
MAX_STEPS, MAX_GROWTH = 10, 1000
# Attention that needs no code from elsewhere: transformers takes other names for repositories of kernels.
OWN_ATTENTION = (None, "eager", "sdpa")
Convolution = Annotated[list[Annotated[int, Field(ge=1, le=10_000)]], Field(min_length=1, max_length=100)]
LayerCount = Annotated[int, Field(ge=0, le=MAX_LAYERS)]
FourierSize = Annotated[int, Field(ge=2, le=10_000)]
Seconds = Annotated[int, Field(ge=1, le=3600)]
Heads = Annotated[int, Field(ge=1, le=MAX_HEADS)]


class ModelConfig(_Open):
    """`config.json` of a model of transformers' form."""

    model_type: Text

    @model_validator(mode="after")
    def _is_plain(self):
        if (self.model_extra or {}).get("configuration_files") is not None:
            raise ValueError("configuration_files: only config.json is read")
        _check_values(self.model_extra)
        return self


class EncoderConfig(ModelConfig):
    """`config.json` of a speech encoder."""

    hidden_size: Size = 1
    d_model: Size = 1
    intermediate_size: Size = 1
    num_hidden_layers: LayerCount = 1
    encoder_layers: LayerCount = 1
    decoder_layers: LayerCount = 1
    num_adapter_layers: LayerCount = 1
    num_attention_heads: Heads = 1
    encoder_attention_heads: Heads = 1
    conv_dim: Convolution = [1]
    conv_kernel: Convolution = [1]
    conv_stride: Convolution = [1]

    @model_validator(mode="after")
    def _runs_here(self):
        if math.prod(self.conv_stride) > 100_000:
            raise ValueError("conv_stride: more than 100000 samples a frame")
        if "conv_stride" in self.model_fields_set and math.prod(self.conv_stride) < MIN_SAMPLES_PER_FRAME:
            raise ValueError(f"conv_stride: fewer than {MIN_SAMPLES_PER_FRAME} samples a frame")
        strides = itertools.accumulate(self.conv_stride, operator.mul)
        # Of different lengths when one of the two is left to its default.
        if any(size > MAX_CHANNELS_PER_SAMPLE * stride for size, stride in zip(self.conv_dim, strides, strict=False)):
            raise ValueError(f"conv_dim: more than {MAX_CHANNELS_PER_SAMPLE} channels a sample")
        return self


class WeightIndex(_Open):
    """`model.safetensors.index.json`: which file holds which weight."""

    weight_map: dict[str, str]

    @model_validator(mode="after")
    def _beside_it(self):
        for name in set(self.weight_map.values()):
            if "/" in name or "\\" in name or not name.endswith(WEIGHT_SUFFIXES):
                raise ValueError(f"weight_map: {ascii(name)[:100]} is not a file of weights in the same folder")
        return self


class FeatureExtractorConfig(_Open):
    """`preprocessor_config.json` of a model that takes speech."""

    sampling_rate: Annotated[int, Field(ge=1000, le=1_000_000)] = 16000
    feature_size: Annotated[int, Field(ge=1, le=1000)] = 1
    n_fft: FourierSize = 400
    fft_window_size: FourierSize = 400
    # A second convolution of Whisper halves the frames.
    hop_length: Annotated[int, Field(ge=MIN_SAMPLES_PER_FRAME // 2, le=MAX_SIZE)] = 160
    chunk_length: Seconds = 30
    max_length_s: Seconds = 30

    @model_validator(mode="after")
    def _runs_here(self):
        if "auto_map" in (self.model_extra or {}):
            raise ValueError("auto_map: code that comes with a model is not run")
        _check_values(self.model_extra)
        return self


class TokenizerConfig(_Open):
    """`tokenizer_config.json`."""

    model_max_length: Annotated[int, Field(ge=1)] | Annotated[float, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _is_read(self):
        if "fast_tokenizer_files" in (self.model_extra or {}):
            raise ValueError("fast_tokenizer_files: only tokenizer.json is read")
        return self


class SentenceConfig(_Open):
    """`sentence_bert_config.json`."""

    max_seq_length: Annotated[int, Field(ge=1)] | None = None


class TokenizerFile(_Open):
    """`tokenizer.json`, whose steps must not make much of a short text."""

    normalizer: Values | None = None
    pre_tokenizer: Values | None = None
    post_processor: Values | None = None

    @model_validator(mode="after")
    def _stays_short(self):
        for key in ("normalizer", "pre_tokenizer", "post_processor"):
            steps = _steps(getattr(self, key))
            if len(steps) > MAX_STEPS or sum(step.get("type") == "Precompiled" for step in steps) > 1:
                raise ValueError(f"{key}: more than {MAX_STEPS} steps, or several that are precompiled")
            if math.prod(_growth(step) for step in steps) > MAX_GROWTH:
                raise ValueError(f"{key}: makes a text more than {MAX_GROWTH} times as long")
        return self


def _steps(part: Any) -> list[dict]:
    """Flatten sequences of steps inside each other."""
    if not isinstance(part, dict):
        return []
    inside = [value for value in part.values() if part.get("type") == "Sequence" and isinstance(value, list)]
    return [step for value in inside for each in value for step in _steps(each)] if inside else [part]


def _growth(step: dict) -> int:
    """Bound how many times as long a text becomes by one step of a tokenizer."""
    charsmap = step.get("precompiled_charsmap")
    if isinstance(charsmap, str):
        # Its first four bytes say how many bytes of a table follow, and that much memory is set aside.
        content = base64.b64decode(charsmap)
        if int.from_bytes(content[:4], "little") > len(content):
            raise ValueError("precompiled_charsmap: shorter than it claims")
    parts = (step.get(key) for key in ("content", "prepend", "single"))
    return max((len(part) for part in parts if isinstance(part, str | list) and part), default=1)


def _check_values(value: Any, key: str = "") -> None:
    """Refuse values from which transformers would make tensors or modules of any number, or load code."""
    if key.endswith("attn_implementation") and value not in OWN_ATTENTION:
        raise ValueError(f"{key}: must be one of {', '.join(OWN_ATTENTION[1:])}")
    if key == "quantization_config" and value is not None:
        raise ValueError(f"{key}: models are not quantized here")
    if isinstance(value, dict):
        for name, part in value.items():
            _check_values(part, name)
    elif isinstance(value, list):
        for part in value:
            _check_values(part, key)
    elif isinstance(value, int):
        most = next((most for pattern, most in MAX_BY_KEY.items() if re.search(pattern, key)), MAX_CONFIG_INT)
        if abs(value) > most:
            raise ValueError(f"{ascii(key)[1:-1][:100]}: {value} is beyond {most}")
