"""Audio-text models: both an utterance and a sentence become a unit vector of one space.

A model is asked for three things: a reader, which `features.extract.extract` fills a feature store with; vectors of
what the reader stored; and vectors of texts. It is never a torch module: nothing can switch it to training.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoTokenizer

from speechbrain_mifuse.features.extract import PREPROCESSING_VERSION
from speechbrain_mifuse.features.pretrained import (
    check_architecture,
    check_extractor,
    check_files,
    model_folder,
    no_panic,
    refuse_missing,
    tokens_of,
)
from speechbrain_mifuse.utils.audio import trim_silence
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.progress import quiet_loading
from speechbrain_mifuse.zero_shot.window import HeardWindow, build_window, heard_window, known_repeats, known_window

# Written by transformers itself: they change with its version or with the folder, never with the vectors.
VOLATILE = ("_name_or_path", "_commit_hash", "architectures", "dtype", "torch_dtype", "transformers_version")
# Where a feature extractor says how many samples it makes of any clip.
WINDOW_SIZES = ("nb_max_samples", "n_samples")
# What CLAP's extractor calls the ways to fill its window, and what they are called here.
PADDINGS = {"repeatpad": "native", "repeat": "repeat", "pad": "pad"}


def refuse_known_corpus(trained_on: Collection[str], corpus: str, flag: str) -> None:
    """Make sure that a model which is to score a corpus without its labels was not trained with them."""
    if corpus in trained_on:
        raise UserError(f"{flag}: this model was trained with the labels of {corpus}. Give one trained on others.")


class AudioTextModel(ABC):
    """What scores audio against text.

    Attributes
    ----------
    name : str
        In reports and messages: letters, digits, `-`, `_` and `.`, so that a file can be named after it.
    classes_known : tuple of str or None
        Labels it was trained on; `None` for an open vocabulary.
    layer : int or None
        Which of a store's layers `audio_vectors` is fed; `None` where the store has but one.
    longest_text : int or None
        Most tokens of a text; `None` without a limit.
    trained_on : tuple of str
        Corpora whose labels it was trained with, as far as is known.
    size : int or None
        Samples of its input window at `sample_rate`; `None` without one.
    policy : str
        How repeats fill the window; see `zero_shot.window`.

    Example
    -------
    >>> sorted(AudioTextModel.__abstractmethods__)
    ['audio_vectors', 'fingerprint', 'reader', 'text_vectors']
    """

    name: str
    classes_known: tuple[str, ...] | None = None
    layer: int | None = None
    longest_text: int | None = None
    trained_on: tuple[str, ...] = ()
    size: int | None = None
    sample_rate: int = 16_000
    policy: str = "native"

    def to(self, device: str | torch.device) -> AudioTextModel:
        """Move the weights, if there are any; what is computed comes back to the CPU."""
        return self

    @abstractmethod
    def fingerprint(self) -> dict:
        """Describe what decides the vectors, in JSON's types."""

    @abstractmethod
    def reader(self, repeats: int):
        """Make what fills a feature store with recordings that are repeated: a `FrameReader` or the like.

        It has `encoder.sample_rate`, `encode(wave)` and `fingerprint()`, which names `repeats` where it is not 1.
        """

    @abstractmethod
    def audio_vectors(self, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Vectors `[batch, E]` of unit norm of what the reader stored, `[batch, frames, dim]`; `lengths` relative."""

    @abstractmethod
    def text_vectors(self, texts: Sequence[str]) -> torch.Tensor:
        """Vectors `[texts, E]` of unit norm; a text longer than `longest_text` is an error: nothing is ever cut off."""

    def text_lengths(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of texts as the model does; words, where it has no tokens."""
        return [len(text.split()) for text in texts]

    def hears_the_same(self, wave: torch.Tensor, repeats: int, others: int) -> bool:
        """Whether two numbers of repeats give one bit-identical input, so that one pass serves both."""
        return repeats == others


class EmbeddingReader:
    """Stands in the place of a `FrameReader`: one "frame" per recording, which is its embedding."""

    def __init__(self, model, repeats: int):
        self.model, self.repeats = model, known_repeats(repeats, "--audio_repeats")
        # `encode_file` asks its reader's encoder for the rate.
        self.encoder, self.sample_rate = self, model.sample_rate

    def fingerprint(self) -> dict:
        """Describe what decides the embeddings."""
        about = {**self.model.fingerprint(), "layers": [0], "dim": self.model.dim}
        return about if self.repeats == 1 else {**about, "repeats": self.repeats}

    def encode(self, wave: torch.Tensor) -> torch.Tensor:
        """Embed a waveform."""
        return self.model.embed(wave, self.repeats).view(1, 1, -1)


class GenericAudioTextModel(AudioTextModel):
    """Any model of Hugging Face's form that has `get_audio_features` and `get_text_features`.

    It is tried out when it is loaded: its vectors must be finite, of one dimension for audio and text, and the same for
    the same clip.

    Parameters
    ----------
    source : str or pathlib.Path
        A folder (weights, feature extractor, tokenizer), or a hub id.
    window : str
        How repeats fill its input window, see `zero_shot.window`.
    trim_db : float, optional
        Cut silence this far below the loudest frame off both ends; nothing is cut by default.
    trust_remote_code : bool
        Whether Python that comes with the model may run.
    flag : str
        Named in messages.

    Raises
    ------
    UserError
        If it cannot be loaded or does not pass.
    """

    layer = 0

    def __init__(
        self,
        source: str | Path,
        window: str = "native",
        trim_db: float | None = None,
        trust_remote_code: bool = False,
        flag: str = "--alm",
    ):
        self.name = name_of(source)
        self.policy, self.trim_db = known_window(window), trim_db
        with alm_errors(source, flag):
            self.model, self.extractor, self.tokenizer = load_parts(source, trust_remote_code)
            self.sample_rate = int(self.extractor.sampling_rate)
            self.size = window_size(self.extractor)
            if self.policy == "native" and self.size is not None:
                self.policy = native_policy(self.extractor)
            self.longest_text = self.text_limit()
            self._fingerprint = self._describe()
            self.dim = self._try_out()

    def to(self, device: str | torch.device) -> GenericAudioTextModel:
        """Move the weights; what a network is fed follows them; see `AudioTextModel.to`."""
        self.model.to(device)
        return self

    def text_limit(self) -> int | None:
        """Most tokens that the tokenizer and the text encoder's positions allow."""
        text_config = getattr(self.model.config, "text_config", self.model.config)
        limits = (self.tokenizer.model_max_length, getattr(text_config, "max_position_embeddings", None))
        # A tokenizer without a limit says so with an enormous number.
        return min((limit for limit in limits if limit and limit < 10**6), default=None)

    def _describe(self) -> dict:
        settings = {
            key: value
            for key, value in sorted(self.extractor.to_dict().items())
            if isinstance(value, int | float | str | None) and not key.endswith(("_type", "processor_class"))
        }
        raw = type(self.model.config).get_config_dict(self.model.name_or_path)[0]
        about = {"audio_text_model": self.model.config.model_type, "weights": weights_digest(self.model, raw)}
        about["tokenizer"] = tokenizer_digest(self.tokenizer)
        about |= {"input": settings, "window": {"policy": self.policy, "samples": self.size, "crop": "start"}}
        return {**about, "trim_db": self.trim_db, "preprocessing_version": PREPROCESSING_VERSION}

    def _try_out(self) -> int:
        """Embed a second of noise under two states of NumPy's global generator, and one text; give the dimension."""
        noise = torch.randn(self.sample_rate, generator=torch.Generator().manual_seed(0)) / 10
        before, found = np.random.get_state(), []
        try:
            for seed in (0, 1):
                np.random.seed(seed)
                found.append(self.embed(noise, 1))
        finally:
            np.random.set_state(before)
        if not torch.stack(found).isfinite().all():
            raise UserError("its vectors are not finite.")
        if not torch.equal(*found):
            raise UserError("its feature extractor or network is random: one clip twice gives two embeddings.")
        if self.text_vectors(["sad"]).shape[-1] != len(found[0]):
            raise UserError("its vectors of audio and of text are of different dimensions.")
        return len(found[0])

    def fingerprint(self) -> dict:
        """Describe what decides the vectors: weights, configuration, extractor, window, trimming."""
        return self._fingerprint

    def reader(self, repeats: int) -> EmbeddingReader:
        """Make what fills a feature store with embeddings of repeated recordings."""
        return EmbeddingReader(self, repeats)

    def window(self, wave: torch.Tensor, repeats: int) -> HeardWindow:
        """Say what the model hears of a waveform, silence at its ends already cut."""
        return heard_window(len(self._trimmed(wave)), repeats, self.size, self.sample_rate, self.policy)

    def _trimmed(self, wave: torch.Tensor) -> torch.Tensor:
        return trim_silence(wave, self.trim_db, frame=self.sample_rate // 40)

    def hears_the_same(self, wave: torch.Tensor, repeats: int, others: int) -> bool:
        """Whether the windows of two numbers of repeats are bit-identical."""
        return self.window(wave, repeats).key == self.window(wave, others).key

    @torch.no_grad()
    def embed(self, wave: torch.Tensor, repeats: int) -> torch.Tensor:
        """Embed one waveform: a = normalise(E_audio(repeat(x, N)))."""
        samples = build_window(self._trimmed(wave), self.window(wave, repeats))
        inputs = {key: value.to(self.model.device) for key, value in self.audio_inputs(samples).items()}
        return F.normalize(embedding_of(self.model.get_audio_features(**inputs))[0].float(), dim=-1).cpu()

    def audio_inputs(self, samples: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Turn a window into what the network takes."""
        return self.extractor(samples.numpy(), sampling_rate=self.sample_rate, return_tensors="pt")

    def audio_vectors(self, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Give embeddings, rounded by the store, their unit norm back."""
        return F.normalize(frames.float().squeeze(1), dim=-1)

    def text_lengths(self, texts: Sequence[str]) -> list[int]:
        """Count tokens, with those that begin and end a text."""
        return [len(ids) for ids in self._tokens(texts)["input_ids"]]

    def _tokens(self, texts: Sequence[str]) -> Mapping[str, list[list[int]]]:
        text_config = getattr(self.model.config, "text_config", self.model.config)
        return tokens_of(self.tokenizer, texts, getattr(text_config, "vocab_size", math.inf))

    @torch.no_grad()
    def text_vectors(self, texts: Sequence[str]) -> torch.Tensor:
        """Vectors of texts; none is cut or padded."""
        encoded = self._tokens(texts)
        same_length = defaultdict(list)
        for place, ids in enumerate(encoded["input_ids"]):
            self._check_length(texts[place], len(ids))
            same_length[len(ids)].append(place)
        vectors: list = [None] * len(texts)
        for places in same_length.values():
            inputs = {key: [values[place] for place in places] for key, values in encoded.items()}
            inputs = {key: torch.tensor(values, device=self.model.device) for key, values in inputs.items()}
            found = embedding_of(self.model.get_text_features(**inputs)).float().cpu()
            for place, vector in zip(places, F.normalize(found, dim=-1), strict=True):
                vectors[place] = vector
        return torch.stack(vectors)

    def _check_length(self, text: str, tokens: int) -> None:
        if self.longest_text is not None and tokens > self.longest_text:
            raise UserError(
                f"--text_repeats: a text of {tokens} tokens ('{text[:60]}...') is longer than the {self.longest_text} "
                f"that {self.name} reads. Lower --text_repeats, or shorten the prompt."
            )


class ClapModel(GenericAudioTextModel):
    """CLAP of LAION, as transformers has it (`laion/clap-htsat-unfused` and others): 10 s at 48 kHz, 77 tokens."""

    # What it was trained with; the text encoder has positions for 512.
    text_tokens = 77

    def text_limit(self) -> int:
        """77 tokens, or what the tokenizer allows if that is less."""
        return min(self.text_tokens, super().text_limit() or self.text_tokens)

    def audio_inputs(self, samples: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Turn a window into a spectrogram, with `is_longer` set."""
        return {**super().audio_inputs(samples), "is_longer": torch.zeros(1, 1, dtype=torch.bool)}


# By the `model_type` of a configuration; all others are `GenericAudioTextModel`.
FAMILIES: dict[str, type[GenericAudioTextModel]] = {"clap": ClapModel}


def name_of(source: str | Path) -> str:
    """Name a model after its folder or its hub id."""
    # Absolute, because `.` has no name; links are not followed: a hub's cache names what they lead to by a hash.
    return re.sub(r"[^\w.-]+", "-", os.path.basename(os.path.abspath(source)))


def open_audio_text_model(
    source: str | Path, trust_remote_code: bool = False, flag: str = "--alm", **options
) -> GenericAudioTextModel:
    """Load an audio-text model as what its configuration says it is.

    Parameters
    ----------
    source, trust_remote_code, flag
        As for `GenericAudioTextModel`.
    **options
        `window` and `trim_db` of `GenericAudioTextModel`.

    Returns
    -------
    GenericAudioTextModel
        `ClapModel` for CLAP.

    Raises
    ------
    UserError
        If it cannot be loaded; the message names the flag and what to pass.

    Example
    -------
    >>> open_audio_text_model("/no/such/folder")
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.utils.errors.UserError: --alm: '/no/such/folder' could not be loaded: ...
    """
    with alm_errors(source, flag):
        where = _checked_source(source, trust_remote_code)
        kind = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code).model_type
    family = FAMILIES.get(kind, GenericAudioTextModel)
    return family(source, trust_remote_code=trust_remote_code, flag=flag, **options)


@contextlib.contextmanager
def alm_errors(source: str | Path, flag: str = "--alm"):
    """Turn whatever goes wrong while a model is loaded into one error that names the flag."""
    source, remedy = str(source), "Pass a folder in Hugging Face format (weights, extractor, tokenizer), or a hub id."
    try:
        yield
    # The hub client's errors, and those of a model's own code, share no base class.
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
        if "trust_remote_code" in str(error):
            remedy = f"It brings Python of its own: read that, then allow it with {flag}_trust_remote_code True."
        raise UserError(f"{flag}: '{source}' could not be loaded: {reason}. {remedy}") from error


def load_parts(source: str | Path, trust_remote_code: bool):
    """Load network, feature extractor and tokenizer."""
    where, options = _checked_source(source, trust_remote_code), {"trust_remote_code": trust_remote_code}
    if not trust_remote_code:
        check_architecture(AutoConfig.from_pretrained(where, **options), Path(where))
        check_extractor(Path(where))
    with quiet_loading():
        model, report = AutoModel.from_pretrained(where, output_loading_info=True, **options)
    lacking = [name for name in ("get_audio_features", "get_text_features") if not hasattr(model, name)]
    if lacking:
        raise UserError(f"a model of type '{model.config.model_type}' has no {' and no '.join(lacking)}")
    refuse_missing(report["missing_keys"])
    extractor = AutoFeatureExtractor.from_pretrained(where, **options)
    with no_panic():
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    return model.float().eval().requires_grad_(False), extractor, tokenizer


def _checked_source(source: str | Path, trust_remote_code: bool) -> str:
    """Give the folder of a model that may not run code, its files checked; otherwise the source itself."""
    if trust_remote_code:
        return str(source)
    folder = model_folder(source)
    check_files(folder, with_tokenizer=True)
    return str(folder)


def tokenizer_digest(tokenizer) -> str:
    """Identity of what turns texts into tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def window_size(extractor) -> int | None:
    """Find how many samples a feature extractor makes of any clip."""
    sizes = [getattr(extractor, name) for name in WINDOW_SIZES if getattr(extractor, name, None)]
    return int(sizes[0]) if sizes else None


def native_policy(extractor) -> str:
    """Tell how a model's own feature extractor fills its window."""
    padding = getattr(extractor, "padding", "repeatpad")
    if padding not in PADDINGS:
        raise UserError(
            f"--alm_window native: the model's extractor fills its window by {padding!r}, which is not known here. "
            "Choose repeat or pad."
        )
    return PADDINGS[padding]


def embedding_of(output) -> torch.Tensor:
    """Take the embeddings out of what `get_audio_features` gives: a tensor in transformers 4, an object in 5."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def weights_digest(model: torch.nn.Module, config: Mapping) -> str:
    """Identify a network by its weights and configuration."""
    digest = hashlib.sha256(json.dumps(without_volatile(config), sort_keys=True, default=str).encode())
    tensors = [tensor.cpu() for tensor in model.state_dict().values() if tensor.is_floating_point()]
    parts = [hashlib.sha256(str(list(t.shape)).encode() + t.contiguous().numpy().tobytes()).digest() for t in tensors]
    for part in sorted(parts):
        digest.update(part)
    return digest.hexdigest()


def without_volatile(config):
    """Leave out, at every depth, what transformers writes about itself."""
    if not isinstance(config, Mapping):
        return config
    return {key: without_volatile(value) for key, value in config.items() if key not in VOLATILE}
