"""Settings of a recipe: its YAML file with the flags of the command line, checked before anything is computed or paid.

Every recipe and command reads its settings here, so a flag is understood, and refused, in the same way everywhere.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import speechbrain as sb
import yaml
from hyperpyyaml import load_hyperpyyaml, resolve_references
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.scalarstring import DoubleQuotedScalarString
from speechbrain.utils.run_opts import RunOptions

from speechbrain_mifuse.experiments.registry import current_names
from speechbrain_mifuse.utils.command_line import file_arguments
from speechbrain_mifuse.utils.errors import UserError

# Largest seed that NumPy takes.
MAX_SEED = 2**32 - 1
# Values that are text whatever they look like: a path may be a date, and a name may be "yes". `null` still means none.
PATHS = (
    *("target_manifests", "source_manifests", "teacher_manifests", "manifests", "label_store", "lalm_card"),
    *("source_recogniser", "teacher_alm", "teacher_prompts", "prompts", "captions", "dual_encoder_recipe"),
)
NAMES = (
    *("target", "source", "teacher", "encoder", "text_encoder", "alm", "alm_window", "specialist", "protocol"),
    *("features", "speaker_norm", "speaker_embedding", "lalm_base_url", "lalm_model", "lalm_answer_form"),
)
LISTS_OF_NAMES = ("method", "arm", "pretraining", "compare_to", "labels", "folds", "lalm_prompts", "pretrain_on")
MAY_BE_NULL = ("lalm_card", "source_recogniser", "teacher_alm", "lalm_base_url", "lalm_model")
# Settings that have checks of their own, and keys that mean other things.
CHECKED_ELSEWHERE = ("lalm_profile",)


@dataclass(frozen=True)
class Rule:
    """What the value of a key must be."""

    wanted: str
    fits: Callable[[object], bool]
    optional: bool = False
    reason: str = ""

    def fault(self, value) -> str:
        """Say what is wrong with a value; empty if nothing is."""
        if self.fits(value) or (self.optional and value is None):
            return ""
        or_null = " or null" if self.optional else ""
        return f"must be {self.wanted}{or_null}{f', because {self.reason}' if self.reason else ''}"


def _whole(least: int, most: float = math.inf, **more) -> Rule:
    """Rule of a whole number."""
    wanted = f"a whole number from {least} to {most}" if most < math.inf else f"a whole number of at least {least}"
    return Rule(wanted, lambda value: _is(value, int) and least <= value <= most, **more)


def _number(wanted: str, fits: Callable[[float], bool], **more) -> Rule:
    """Rule of a finite number."""
    return Rule(wanted, lambda value: _is(value, int, float) and math.isfinite(value) and fits(value), **more)


def _list_of(rule: Rule, wanted: str, single: bool = False) -> Rule:
    """Rule of a list that is not empty, or of a single value where that is allowed."""

    def fits(value) -> bool:
        if isinstance(value, list):
            return bool(value) and all(map(rule.fits, value))
        return single and rule.fits(value)

    return Rule(wanted, fits)


def _is(value, *kinds: type) -> bool:
    """Tell whether a value of YAML is of one of some kinds; `true` is no number."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def _are_labels(value) -> bool:
    """Tell whether a value lists at least two classes."""
    texts = isinstance(value, list) and all(isinstance(label, str) and label.strip() for label in value)
    return texts and len(value) >= 2 and len(set(value)) == len(value)


def _are_layers(value) -> bool:
    """Tell whether a value is a layer, or lists different ones."""
    layers = value if isinstance(value, list) else [value]
    return bool(layers) and all(_is(layer, int) for layer in layers) and len(set(layers)) == len(layers)


COUNT = _whole(1)
SEED = _whole(0, MAX_SEED)
POSITIVE = _number("a finite number above 0", lambda value: value > 0)
NOT_NEGATIVE = _number("a finite number of at least 0", lambda value: value >= 0)
SHARE = _number("a number from 0 to 1", lambda value: 0 <= value <= 1)
BELOW_ONE = _number("a number from 0 up to, but not including, 1", lambda value: 0 <= value < 1)
LAYER = Rule("a layer of the encoder: a whole number", lambda value: _is(value, int), optional=True)
PAIR = _whole(2, reason="batch normalization and the diversity term need two recordings in a batch")
AMOUNT = Rule("'all' or a whole number of at least 1", lambda value: value == "all" or COUNT.fits(value))
BUDGET = _number("a finite number above 0", lambda value: value > 0, optional=True)
DEADLINE = _number("a finite number of seconds above 0", lambda value: value > 0, optional=True)
LOUDNESS = _number("a finite number of decibels above 0", lambda value: value > 0, optional=True)

# By the name of the key, wherever it stands in a recipe's settings.
RULES: dict[str, Rule] = {
    **dict.fromkeys(("number_of_steps", "number_of_epochs", "finetuning_steps", "log_interval", "limit"), COUNT),
    **dict.fromkeys(("passes", "lalm_samples", "lalm_concurrency", "frame_average", "frames_per_batch"), COUNT),
    **dict.fromkeys(("hidden_size", "size", "d_model", "n_heads", "n_layers", "codes", "mask_width", "span"), COUNT),
    "d_ffn": _whole(1, optional=True),
    **dict.fromkeys(("batch_size", "finetuning_batch_size"), PAIR),
    **dict.fromkeys(("learning_rate", "finetuning_learning_rate", "adapter_learning_rate", "lr"), POSITIVE),
    **dict.fromkeys(("temperature", "ema_window"), POSITIVE),
    **dict.fromkeys(("lalm_temperature", "diversity_weight", "weight_decay", "speaker_norm_strength"), NOT_NEGATIVE),
    **dict.fromkeys(("mask_weight", "frame_weight", "utterance_weight", "attribute_weight"), NOT_NEGATIVE),
    **dict.fromkeys(("dropout", "adapter_dropout", "pretraining_dropout", "codebook_decay"), BELOW_ONE),
    **dict.fromkeys(("warmup", "mask_share", "ema_start", "ema_end"), SHARE),
    "trim_db": LOUDNESS,
    "seed": SEED,
    "seeds": _list_of(SEED, f"a list of whole numbers from 0 to {MAX_SEED}"),
    **dict.fromkeys(("layer", "teacher_layer"), LAYER),
    "encoder_layers": Rule("a list of different layers of the encoder", _are_layers, optional=True),
    **dict.fromkeys(("audio_repeats", "text_repeats"), _list_of(COUNT, "a list of whole numbers of at least 1")),
    "labels_per_class": _list_of(AMOUNT, "'all', a whole number of at least 1, or a list of these", single=True),
    "labels": Rule("a list of at least two different classes", _are_labels),
    "lalm_budget": BUDGET,
    "lalm_deadline": DEADLINE,
    "speaker_clusters": _whole(1, optional=True),
    **{
        key: Rule("true or false", lambda value: isinstance(value, bool))
        for key in ("class_balanced", "lalm_shuffle_labels", "teacher_alm_trust_remote_code", "alm_trust_remote_code")
    },
    "output_folder": Rule("the path of a folder", lambda value: isinstance(value, str)),
    **{key: Rule("text", lambda value: isinstance(value, str)) for key in (*PATHS, *NAMES) if key not in MAY_BE_NULL},
}


def parse_arguments(arguments: Sequence[str]) -> tuple[str, Mapping, dict]:
    """Read the command line of a recipe, as SpeechBrain's `parse_arguments` does, but paths and names literally."""
    arguments = [*file_arguments(arguments[:1]), *arguments[1:]]
    if {"-h", "--help"}.intersection(arguments):
        sb.parse_arguments(["--help"])
    if not arguments or arguments[0].startswith("--"):
        raise UserError("The recipe's YAML file comes first, such as hparams/nemo2rav.yaml; flags follow it.")
    options, flags = [], {}
    known = RunOptions().as_dict()
    for name, words in _flags(arguments[1:]):
        if name in known:
            options += [f"--{name}", *words]
        elif name in flags:
            raise UserError(f"--{name}: is given twice. Give it once.")
        elif not " ".join(words).strip():
            raise UserError(f"--{name}: a value is missing. Pass --{name} VALUE, or leave the flag out.")
        else:
            flags[name] = " ".join(words)
    hparams_file, run_opts, _ = sb.parse_arguments([arguments[0], *options])
    return hparams_file, run_opts, overrides_of(flags)


def _flags(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Give each flag with its words; a list may be written with spaces, and so comes in several."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found.append((name, [value] if equals else []))
        elif not found:
            raise UserError(f"{word}: is not a flag. After the YAML file come flags, such as --seed 1.")
        else:
            found[-1][1].append(word)
    yield from found


def overrides_of(flags: Mapping[str, object]) -> dict:
    """Turn flags into values for a recipe's YAML."""
    return {key: _value(key, value) for key, value in flags.items()}


def _value(key: str, value):
    if not isinstance(value, str):
        return _literal(value)
    if value.startswith("!"):
        return _from_yaml(key, value)
    if key in (*PATHS, *NAMES) or key.endswith("_folder"):
        return None if value == "null" else _literal(value)
    if key in LISTS_OF_NAMES:
        return _literal(_from_yaml(key, value, lambda text: yaml.load(text, Loader=yaml.BaseLoader)))
    return _from_yaml(key, value)


def _from_yaml(key: str, value: str, load: Callable | None = None):
    try:
        return (load or YAML().load)(value)
    except (YAMLError, yaml.YAMLError, ValueError) as error:
        reason = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise UserError(f"--{key}: {value!r} cannot be read as YAML ({reason}). Put it in quotation marks.") from None


def _literal(value):
    """Mark all text of a value as text, so that no reader of YAML takes it for anything else."""
    if isinstance(value, Mapping):
        return {key: _literal(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_literal(part) for part in value]
    if not isinstance(value, str | Path):
        return value
    if re.search(r"<[^<>]*>", str(value)):
        raise UserError(f"{value}: holds <...>, which refers to a key in a recipe's settings. Use another name.")
    return DoubleQuotedScalarString(value)


def load_hparams(path: str | Path, flags: Sequence[str]) -> tuple[dict, Mapping]:
    """Read a recipe's YAML file with flags, as the recipe does.

    Parameters
    ----------
    path : str or pathlib.Path
        YAML file.
    flags : sequence of str
        Flags of the recipe.

    Returns
    -------
    hparams : dict
        The recipe's.
    run_opts : mapping
        SpeechBrain's run options.

    Raises
    ------
    UserError
        As `parse_arguments` and `read_hparams` do.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "toy.yaml"
    >>> _ = path.write_text("layer: 1")
    >>> load_hparams(path, ["--layer", "2"])[0]["layer"]
    2
    """
    hparams_file, run_opts, overrides = parse_arguments([str(path), *flags])
    return read_hparams(hparams_file, overrides), run_opts


def read_hparams(path: str | Path, overrides: Mapping) -> dict:
    """Read a recipe's YAML file and check its values before anything is made of them.

    Parameters
    ----------
    path : str or pathlib.Path
        YAML file.
    overrides : mapping
        Other values of its keys, as `overrides_of` gives.

    Returns
    -------
    dict
        The recipe's hparams.

    Raises
    ------
    UserError
        If the file cannot be read, a key is unknown or missing, or a value cannot be used; the message names it.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "toy.yaml"
    >>> _ = path.write_text("batch_size: 64")
    >>> read_hparams(path, {"batch_sise": 2})
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.utils.errors.UserError: --batch_sise: .../toy.yaml has no such key. Did you mean --batch_size?
    >>> read_hparams(path, {"batch_size": 1})
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.utils.errors.UserError: --batch_size 1: must be a whole number of at least 2, because ...
    """
    with _named(path), open(path, encoding="utf-8") as file:
        _check(path, file, overrides)
        file.seek(0)
        # What is loaded changes the overrides that it was given.
        return load_hyperpyyaml(file, copy.deepcopy(dict(overrides)))


def check_flags(path: str | Path, flags: Sequence[str]) -> None:
    """Do all the checks of `load_hparams`, and construct nothing."""
    hparams_file, _, overrides = parse_arguments([str(path), *flags])
    with _named(path), open(hparams_file, encoding="utf-8") as file:
        _check(path, file, overrides)


def _check(path: str | Path, file, overrides: Mapping) -> None:
    require_known(path, YAML().load(file), overrides)
    file.seek(0)
    check_values(YAML().load(resolve_references(file, copy.deepcopy(dict(overrides)))))


@contextlib.contextmanager
def _named(path: str | Path):
    """Put whatever HyperPyYAML raises into one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        if error.filename != str(path):
            raise UserError(f"{path}: {error.filename} is missing, which it includes.") from None
        raise UserError(
            f"{path}: no such file. The recipe's YAML file comes first, such as hparams/nemo2rav.yaml."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, ImportError, YAMLError) as error:
        raise UserError(f"{path}: {_reason(error)}") from None


def require_known(path: str | Path, values, overrides: Mapping) -> None:
    """Refuse keys that a recipe does not have, and name the nearest one that it has."""
    if not isinstance(values, Mapping):
        raise UserError(f"{path}: holds no keys, so it is not the YAML file of a recipe.")
    for key, value in overrides.items():
        if key not in values:
            hint = _nearest(key, [*values, *RunOptions().as_dict()], "--")
            raise UserError(f"--{key}: {path} has no such key.{hint}")
        tag = str(getattr(getattr(values[key], "tag", None), "value", ""))
        # HyperPyYAML would pass over what the included file does not have.
        if isinstance(value, Mapping) and isinstance(values[key], Mapping) and tag.startswith("!include:"):
            included = Path(path).resolve().parent / tag.removeprefix("!include:")
            known = [*values[key], *YAML().load(included.read_text(encoding="utf-8"))]
            for unknown in (name for name in value if name not in known):
                raise UserError(f"--{key}: {included.name} has no key '{unknown}'.{_nearest(unknown, known)}")


def _nearest(key: str, known: Sequence[str], dashes: str = "") -> str:
    """Suggest the key that was probably meant."""
    near = difflib.get_close_matches(key, known, 1)
    return f" Did you mean {dashes}{near[0]}?" if near else ""


def _reason(error: Exception) -> str:
    """Put an error of HyperPyYAML into one line."""
    text = " ".join(str(error).split())
    placeholder = re.search(r"'([^']*)' is a !PLACEHOLDER", text)
    if placeholder:
        return f"'{placeholder[1]}' has no value. Pass --{placeholder[1]} VALUE."
    return text


def check_values(values: Mapping, path: Sequence[str] = ()) -> None:
    """Hold every value of a recipe's settings against `RULES`."""
    inner = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            inner.append((key, value))
        elif key in RULES and (fault := RULES[key].fault(_plain(value))):
            raise UserError(f"{_flag([*path, key], _plain(value))}: {fault}.")
    # The flag itself comes before what is made of it.
    for key, part in inner:
        if key not in CHECKED_ELSEWHERE:
            check_values(part, [*path, key])
    _check_together(values)


def _plain(value):
    """Give the value behind a tag."""
    return getattr(value, "value", value)


def _flag(path: Sequence[str], value) -> str:
    """Write a setting as it is typed on a command line."""
    shown = {"None": "null", "True": "true", "False": "false"}.get(str(value), value)
    if len(path) == 1:
        return f"--{path[0]} {shown}"
    return f'--{path[0]} "{{{": {".join(path[1:])}: {shown}{"}" * (len(path) - 1)}"'


def _check_together(values: Mapping) -> None:
    """Hold values against each other."""
    require_layer("layer", values.get("layer"), values.get("encoder_layers"))
    width, heads = values.get("d_model"), values.get("n_heads")
    if COUNT.fits(width) and COUNT.fits(heads) and width % heads:
        raise UserError(f"--d_model {width}: must be a multiple of --n_heads, which is {heads}.")


def require_layer(key: str, used: int | None, stored: int | Sequence[int] | None) -> None:
    """Refuse a layer that is not among those whose frames are stored."""
    stored = [stored] if _is(stored, int) else stored
    # Only the encoder can tell what is meant by a negative number.
    if stored and _is(used, int) and min(used, *stored) >= 0 and used not in stored:
        raise UserError(f"--{key} {used}: is not stored. Add it to --encoder_layers, which is {list(stored)}.")


def known_ones(value, known: Collection, flag: str) -> list:
    """Read a flag that takes one of several things, or a list of them."""
    chosen = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    unknown = [one for one in chosen if one not in known]
    if unknown:
        raise UserError(f"{flag}: {', '.join(map(str, unknown))} is none of {', '.join(map(str, known))}.")
    return chosen


def chosen_methods(hparams: Mapping) -> list[str]:
    """Read `method` of a recipe's settings: names of adaptation methods, an earlier name as the current one."""
    settings, value = hparams["adaptation"], hparams["method"]
    names = [value] if isinstance(value, str) else value
    current = current_names(names, settings.get("renamed") or {}, "--method")
    return known_ones(current, settings["methods"], "--method")


def chosen_among(value, known: Collection, flag: str) -> list:
    """Read a flag as `known_ones` does, or as `all` of them."""
    return list(known) if isinstance(value, str) and value == "all" else known_ones(value, known, flag)
