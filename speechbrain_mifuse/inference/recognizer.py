"""Emotions of recordings: files, batches, folders, long recordings over time, and live audio."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from hyperpyyaml.core import recursive_update
from safetensors import SafetensorError
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.inference.interfaces import Pretrained
from speechbrain.utils.autocast import AMPConfig

from speechbrain_mifuse.corpora.recordings import recordings_below
from speechbrain_mifuse.features.dataset import pad_frames
from speechbrain_mifuse.features.encode_files import BATCH_S, ahead, similar
from speechbrain_mifuse.features.extract import ENCODING_THREADS, FrameReader, batched
from speechbrain_mifuse.inference.recognizer_folder import RecogniserError, open_recogniser, own_encoder
from speechbrain_mifuse.inference.windows import (
    Segment,
    Timeline,
    Windowing,
    checked_waveform,
    float_samples,
    heard_windows,
    loud_share,
    piece_powers,
    smoothed,
    stretches,
    window_starts,
)
from speechbrain_mifuse.utils.audio import BadAudio, content_hash, load_audio, nothing_varies, resampled
from speechbrain_mifuse.utils.audio_warnings import summarized
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.progress import progress

logger = logging.getLogger(__name__)

# Pooled vectors that a recogniser remembers: K stochastic answers to one recording then encode it once.
REMEMBERED = 256

# Recordings, or groups of them, that the threads may be ahead of what was handed out.
AHEAD = 4 * ENCODING_THREADS

# Clips that are read, encoded and classified together, step by step, and seconds that this may take: large encoders go
# clip by clip, or progress would seem to stand still.
GROUP, GROUP_S = 16, 0.5

# Seconds above which a recording is no utterance any more, and of the pieces in which an encoder hears such a one: it
# takes 16 MB and more for each second that it hears at once.
LONG, PIECE_S = 60.0, 30.0

# Seconds of which nobody could tell an emotion.
LEAST_S = 0.1

# Encoders that cut a long recording into pieces themselves.
CUTTING = {"whisper"}

# Arguments of `from_hparams` about the files.
FILE_OPTIONS = ("overrides_must_match", "hparams_file", "download_only", "savedir", "local_strategy", "fetch_config")

# Addresses of web, hub and cloud storage. `Path` makes one slash of two.
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")

# Held while threads that use one core each are started: meanwhile the process's number of cores is not the true one.
_starting = threading.Lock()

# Held while dropout masks are drawn: torch has one random state for all threads.
_drawing = threading.Lock()


class Recognition(NamedTuple):
    """What was recognized in one file.

    Parameters
    ----------
    path : pathlib.Path
        The file.
    label : str or None
        `None` where nothing is to be heard, the answer is below the threshold, or there is an `error`.
    probs : torch.Tensor or None
        `[C]`; `None` with an `error`.
    seconds : float or None
        Length of the recording.
    timeline : Timeline or None
        Emotions over time, where windows were asked for.
    error : str or None
        Why the file cannot be read.
    """

    path: Path
    label: str | None
    probs: torch.Tensor | None
    seconds: float | None = None
    timeline: Timeline | None = None
    error: str | None = None


class EmotionRecognizer(Pretrained):
    """Emotion of recordings, from a folder that a recipe exported.

    Recordings come without a speaker: nothing is subtracted from their frames, also where the classifier was trained
    on speaker-normalised ones, which is said in the log.

    `classify_file`, `classify_batch`, `encode_batch` and `load_audio` follow SpeechBrain's classifiers, and
    `hparams.label_encoder` translates between `labels` and their indices. All probabilities are on the CPU.

    All methods but `predict_proba` give probabilities at the folder's `temperature`. A classifier's was fitted on
    held-out speakers of its training corpus when it was exported. An adapted student's was fitted without any label: so
    that its probabilities on the adaptation recordings come nearest to what its two teachers, the source classifier and
    the language model, say of them (their mean, for `mi_fuse_plus` their product); without a language model it is 1.
    Folders of earlier versions have 1. A temperature changes no label. `predict_proba` gives them without it, since the
    recipes' teachers answer with it.

    Every clip is encoded at its true length, whatever it is batched with: clips run side by side on the cores instead
    of being padded to one batch. On a GPU they are padded, and the padding is masked out: what a clip gives is the same
    up to rounding. Above a minute an encoder hears pieces of at most 30 s, whose frames are put together.

    A recording in which nothing varies (digital silence, a constant offset, one bit of noise; see `nothing_varies`) has
    no emotion, nor has one shorter than a tenth of a second: the label is `None` and all probabilities are zero. Only
    `predict_proba` answers to it as to any other recording.

    Parameters
    ----------
    abstain_below : float, optional
        Answers whose probability is smaller have the label `None`; an attribute that may be changed at any time. By
        default what the folder's YAML says under this name, else 0: always answer.
    *args, **kwargs
        As for SpeechBrain's `Pretrained`. `run_opts={"device": "cuda", "precision": "bf16"}` computes the encoder in
        bfloat16 on a GPU.

    Attributes
    ----------
    labels : tuple of str
        In the order of the probabilities.
    sample_rate : int
        Of the waveforms that it takes, in Hz.
    temperature : float
        Of the probabilities.
    channel : int or None
        Channel of files that is used, from 1; by default `None`, the average of all. May be changed at any time.

    Example
    -------
    >>> sorted(EmotionRecognizer.HPARAMS_NEEDED)
    ['frame_average', 'labels', 'sample_rate', 'trim_db']
    """

    HPARAMS_NEEDED = ("labels", "sample_rate", "trim_db", "frame_average")
    MODULES_NEEDED = ("encoder", "classifier")

    def __init__(self, *args, abstain_below: float | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.labels = tuple(self.hparams.labels)
        self.sample_rate = self.hparams.sample_rate
        self.temperature = float(getattr(self.hparams, "temperature", 1.0))
        default = getattr(self.hparams, "abstain_below", 0.0)
        self.abstain_below = default if abstain_below is None else abstain_below
        self.channel: int | None = None
        self.mods.encoder.compute_dtype = AMPConfig.from_name(self.precision).dtype
        self.reader = FrameReader(self.mods.encoder, self.hparams.trim_db, self.hparams.frame_average)
        self._vectors: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._last: tuple[torch.Tensor, str] | None = None
        self.hparams.label_encoder = CategoricalEncoder()
        self.hparams.label_encoder.update_from_iterable(self.labels)
        self.hparams.label_encoder.expect_len(len(self.labels))
        norm = getattr(self.hparams, "speaker_norm", None)
        if norm:
            logger.warning(
                "trained with speaker_norm %s; a recording comes without a speaker here, so its offset is 0", norm
            )

    @classmethod
    def from_hparams(cls, source, overrides=None, trust_code=False, **kwargs):
        """Load a recogniser.

        Its files are read as data, checked, and built by this package: no code of the folder runs. An encoder that
        lies in the folder, as one that was trained along does, is taken wherever the folder is moved.

        Parameters
        ----------
        source : str or pathlib.Path
            Local folder or hub repository.
        overrides : dict, optional
            Changes to its YAML.
        trust_code : bool
            Whether its YAML is a program of yours: SpeechBrain then runs whatever it names.
        **kwargs
            As for SpeechBrain's `Pretrained.from_hparams`, and `abstain_below`.

        Returns
        -------
        EmotionRecognizer
            In evaluation mode.

        Raises
        ------
        RecogniserError
            If the YAML is more than that of an exported recogniser, or the weights or the encoder cannot be loaded.
        """
        if trust_code:
            return cls._from_program(source, overrides or {}, **kwargs)
        files = {key: kwargs.pop(key) for key in FILE_OPTIONS if key in kwargs}
        hparams = open_recogniser(source, overrides, **files)
        return None if hparams is None else cls(modules=hparams["modules"], hparams=hparams, **kwargs)

    @classmethod
    def _from_program(cls, source, overrides, **kwargs):
        """Let SpeechBrain load a folder, which runs its YAML."""
        changes = {"pretrained_path": str(source), **own_encoder(source)}
        recursive_update(changes, overrides)
        try:
            return super().from_hparams(str(source), overrides=changes, **kwargs)
        except UserError:
            raise
        except (OSError, ValueError, SafetensorError) as error:
            raise RecogniserError(f"{source}: cannot be loaded ({' '.join(str(error).split())}).") from error

    def _apply(self, fn, recurse=True):
        """Follow `.to()`, which leaves SpeechBrain's `device` as it was."""
        super()._apply(fn, recurse)
        device = self.mods.encoder.device
        self.device, self.device_type = str(device), device.type
        self._vectors.clear()
        return self

    @torch.inference_mode()
    def _frames_of(self, waveforms: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [frames[0] if len(frames) == 1 else frames.transpose(0, 1) for frames in self._encoded(waveforms)]

    def _encoded(self, waveforms: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if any(map(self._is_cut, waveforms)):
            return [self._in_pieces(wave) if self._is_cut(wave) else self.reader.encode(wave) for wave in waveforms]
        if self.reader.batches and len(waveforms) > 1:
            return self._together(waveforms)
        return self.reader.encode_each([waveform.to(self.device) for waveform in waveforms])

    def _is_cut(self, waveform: torch.Tensor) -> bool:
        long = len(waveform) > LONG * self.sample_rate
        return long and self.mods.encoder.fingerprint()["model_type"] not in CUTTING

    def _in_pieces(self, waveform: torch.Tensor) -> torch.Tensor:
        # Trimmed as a whole: the pauses at the edges of a piece lie inside the recording.
        heard = self.reader.prepare(waveform)
        # Of equal length: a rest would be a piece of almost nothing.
        pieces = heard.tensor_split(math.ceil(len(heard) / (PIECE_S * self.sample_rate)))
        return torch.cat([self.reader.encode_together([piece])[0] for piece in pieces], dim=1)

    def _together(self, waveforms: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        heard, encoded = [self.reader.prepare(waveform) for waveform in waveforms], {}
        for batch in similar(list(enumerate(heard)), int(BATCH_S * self.sample_rate)):
            places, waves = zip(*batch, strict=True)
            encoded |= zip(places, self.reader.encode_together(waves), strict=True)
        return [encoded[place] for place in range(len(heard))]

    def _frames(self, waveform: torch.Tensor) -> torch.Tensor:
        return self._frames_of([waveform])[0]

    def _frames_each(self, waveforms: Sequence[torch.Tensor], each: Callable) -> Iterator[torch.Tensor]:
        """Encode in batches on a GPU; elsewhere one by one, as `each` applies a function to many things."""
        if self.reader.batches:
            return itertools.chain.from_iterable(map(self._frames_of, batched(waveforms, GROUP)))
        return each(self._frames, waveforms)

    @torch.inference_mode()
    def _embedded(self, frames: Sequence[torch.Tensor]) -> torch.Tensor:
        if not frames:
            return torch.empty(0, self.mods.classifier.hidden.in_features, device=self.device)
        data, lengths = (part.to(self.device) for part in pad_frames(frames))
        return self.mods.classifier.embed(data, lengths)

    @torch.inference_mode()
    def _answers(self, frames: Sequence[torch.Tensor]) -> torch.Tensor:
        logits = self.mods.classifier.head(self._embedded(frames), stochastic=False)
        return self._probs(logits / self.temperature)

    def _probs(self, logits: torch.Tensor) -> torch.Tensor:
        probs = logits.softmax(-1).cpu()
        if not bool(probs.isfinite().all()):
            raise RecogniserError(
                "the recogniser's weights give no finite probabilities. Get its folder, and its encoder, anew."
            )
        return probs

    def _answers_to(self, waveforms: Sequence[torch.Tensor], frames_of: Callable) -> torch.Tensor:
        """Answer to recordings, with zeros to those in which nothing varies or that are too short to be speech."""
        least = LEAST_S * self.sample_rate
        sounding = torch.tensor([len(wave) >= least and not nothing_varies(wave) for wave in waveforms]).bool()
        probs = torch.zeros(len(waveforms), len(self.labels))
        probs[sounding] = self._answers(list(frames_of(list(itertools.compress(waveforms, sounding)))))
        return probs

    def _answer_to(self, waveform: torch.Tensor) -> torch.Tensor:
        return self._answers_to([waveform], self._frames_of)[0]

    @torch.inference_mode()
    def _vector(self, waveform: torch.Tensor) -> torch.Tensor:
        key = self._key(waveform)
        vector = self._vectors.get(key)
        if vector is None:
            frames = self._frames(waveform).to(self.device)
            self._vectors[key] = vector = self.mods.classifier.embed(frames.unsqueeze(0))[0]
            while len(self._vectors) > REMEMBERED:
                self._vectors.popitem(last=False)
        return vector

    def _key(self, waveform: torch.Tensor) -> str:
        # Many answers to one recording are asked for one by one, and hashing takes much longer than comparing. With a
        # copy, since arrays that share a tensor's memory change it unseen.
        last = self._last  # which another thread may replace
        if last is None or last[0].device != waveform.device or not last[0].equal(waveform):
            last = self._last = waveform.clone(), content_hash(waveform)
        return last[1]

    @torch.inference_mode()
    def predict_proba(
        self, waveform: torch.Tensor, n: int = 1, stochastic: bool = False, seed: int | None = None
    ) -> torch.Tensor:
        """Class probabilities of one waveform, at temperature 1 whatever the folder's.

        Parameters
        ----------
        waveform : torch.Tensor or numpy.ndarray
            `[samples]` at `sample_rate`; types as for `classify_batch`.
        n : int
            Number of predictions.
        stochastic : bool
            Whether each is drawn with dropout on; otherwise all are equal.
        seed : int, optional
            Seed of the dropout masks: the same seed gives the same predictions.

        Returns
        -------
        torch.Tensor
            `[n, C]`.

        Raises
        ------
        UserError
            If it is not a waveform.
        """
        vectors = self._vector(_waveform(waveform, "waveform")).expand(n, -1)
        return self._drawn(vectors, stochastic, seed)

    @torch.inference_mode()
    def predict_each(self, waveform: torch.Tensor, seeds: Sequence[int | None]) -> torch.Tensor:
        """Class probabilities `[len(seeds), C]` of one waveform, as `predict_proba` gives them for each seed.

        `None` is no seed, but a prediction without dropout. Several threads may call this at the same time.
        """
        vector = self._vector(_waveform(waveform, "waveform")).unsqueeze(0)
        return torch.cat([self._drawn(vector, seed is not None, seed) for seed in seeds])

    def _drawn(self, vectors: torch.Tensor, stochastic: bool, seed: int | None) -> torch.Tensor:
        on_cpu = self.device_type == "cpu"
        # For each accelerator that was never used, torch.manual_seed would keep a formatted stack trace, every time.
        seed_all = torch.default_generator.manual_seed if on_cpu else torch.manual_seed
        with _drawing, torch.random.fork_rng(devices=[] if on_cpu else None):
            if seed is not None:
                seed_all(seed)
            return self._probs(self.mods.classifier.head(vectors, stochastic))

    def label_of(self, probs: torch.Tensor) -> str | None:
        """Most likely label, or `None` below the threshold.

        Parameters
        ----------
        probs : torch.Tensor
            `[C]`.

        Returns
        -------
        str or None
            One of `labels`.
        """
        sure = bool(probs.any()) and float(probs.max()) >= self.abstain_below
        return self.labels[int(probs.argmax())] if sure else None

    def load_audio(self, path, savedir=None) -> torch.Tensor:
        """Read a recording as the classifier needs it.

        Parameters
        ----------
        path : str or pathlib.Path
            Any local file that libsndfile reads, at any rate.
        savedir
            Part of SpeechBrain's signature, not used: nothing is downloaded.

        Returns
        -------
        torch.Tensor
            `[samples]`, mono, at `sample_rate`, on the recognizer's device.

        Raises
        ------
        BadAudio
            If the recording cannot be read.
        """
        return self._read(path).to(self.device)

    def _read(self, path) -> torch.Tensor:
        if URL.match(str(path)) and not os.path.exists(path):
            raise BadAudio(f"{path}: is not a local file. Download it first, and pass the path of the copy.")
        return load_audio(path, self.sample_rate, channel=self.channel)

    def predict_file(self, path) -> tuple[str | None, torch.Tensor]:
        """Most likely emotion of one recording and all probabilities, without the batch dimension of `classify_file`.

        Parameters
        ----------
        path : str or pathlib.Path
            Any local file that libsndfile reads, at any rate.

        Returns
        -------
        label : str or None
            One of `labels`; `None` when the answer is below `abstain_below`, or nothing is to be heard.
        probs : torch.Tensor
            `[C]`.

        Raises
        ------
        BadAudio
            If the recording cannot be read.
        """
        probs = self._answer_to(self._read(path))
        return self.label_of(probs), probs

    def classify_file(self, path, savedir=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str | None]]:
        """Emotion of one recording, as SpeechBrain's classifiers return it: a batch of one.

        Parameters
        ----------
        path, savedir
            As for `load_audio`.

        Returns
        -------
        out_prob, score, index, text_lab
            As from `classify_batch`, with a batch size of 1.

        Raises
        ------
        BadAudio
            If the recording cannot be read.
        """
        return self._decided(self._answer_to(self._read(path))[None])

    def classify_batch(
        self, wavs: torch.Tensor, wav_lens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str | None]]:
        """Emotions of a padded batch, as SpeechBrain's classifiers return them.

        Parameters
        ----------
        wavs : torch.Tensor or numpy.ndarray
            `[B, samples]` at `sample_rate`, or one waveform `[samples]`, on any device. Floating point with full scale
            1.0, or integers as WAV files hold them (int16, int32, uint8).
        wav_lens : torch.Tensor, optional
            `[B]`, relative to the longest, in (0, 1]; all 1 by default. Padding has no influence.

        Returns
        -------
        out_prob : torch.Tensor
            `[B, C]`, probabilities (as in SpeechBrain's emotion recognizers, not logarithms); each row is what the clip
            gives alone.
        score : torch.Tensor
            `[B]`, probability of the most likely class.
        index : torch.Tensor
            `[B]`, its index in `labels`; of no meaning where `out_prob` is all zero.
        text_lab : list of str or None
            Its name; `None` below `abstain_below`, and where nothing is to be heard.

        Raises
        ------
        UserError
            If `wavs` or `wav_lens` cannot be used.
        """
        clips = _clips(wavs, wav_lens)
        return self._decided(self._answers_to(clips, self._batch_frames))

    def encode_batch(
        self, wavs: torch.Tensor, wav_lens: torch.Tensor | None = None, normalize: bool = False
    ) -> torch.Tensor:
        """Embeddings of a padded batch: the pooled and normalized vectors that the classifier's head takes.

        Parameters
        ----------
        wavs, wav_lens
            As for `classify_batch`.
        normalize : bool
            Part of SpeechBrain's signature, not used: the embeddings are always normalized.

        Returns
        -------
        torch.Tensor
            `[B, D]`.

        Raises
        ------
        UserError
            If `wavs` or `wav_lens` cannot be used.
        """
        return self._embedded(list(self._batch_frames(_clips(wavs, wav_lens)))).cpu()

    def forward(self, wavs: torch.Tensor, wav_lens: torch.Tensor | None = None):
        """Classify a batch; see `classify_batch`."""
        return self.classify_batch(wavs, wav_lens)

    def _batch_frames(self, clips: Sequence[torch.Tensor]) -> Iterable[torch.Tensor]:
        """Encode one clip on all cores, several side by side."""
        return self._frames_of(clips) if len(clips) == 1 else self._frames_each(clips, in_order)

    def _decided(self, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str | None]]:
        score, index = probs.max(-1)
        return probs, score, index, [self.label_of(row) for row in probs]

    def classify_files(
        self,
        paths: Iterable[str | Path],
        window_s: float | None = None,
        hop_s: float | None = None,
        smooth_s: float | None = None,
        show_progress: bool = True,
    ) -> Iterator[Recognition]:
        """Emotions of many recordings, several at a time.

        Parameters
        ----------
        paths : iterable of str or pathlib.Path
            Files.
        window_s, hop_s, smooth_s : float, optional
            With a length of windows, a recording longer than one is heard as `classify_long` does; by default every
            recording is heard as one utterance.
        show_progress : bool
            On standard error.

        Yields
        ------
        Recognition
            One for each file in the order given; for one that cannot be read, `error` says why.

        Raises
        ------
        UserError
            If the lengths do not fit together, or `paths` is a single path.
        """
        if isinstance(paths, str | Path):
            raise UserError(f"paths: {str(paths)!r} is one path; pass a list of them, or call predict_file.")
        windowing = _windowing(window_s, hop_s, smooth_s)
        clip_s = GROUP_S

        def answer(group: list[Path]) -> list[Recognition]:
            nonlocal clip_s
            begin = time.perf_counter()
            heard = [self._heard(path, windowing) for path in group]
            probs = iter(self._answers_to([wave for _, wave in heard if wave is not None], self._frames_of))
            clip_s = (time.perf_counter() - begin) / len(group)
            return [
                found if wave is None else self._answered(found, next(probs), windowing is not None)
                for found, wave in heard
            ]

        paths = [Path(path) for path in paths]
        bar = progress(total=len(paths), desc="recognise", unit="file", disable=not show_progress)
        with bar, summarized(), one_core_threads() as pool:
            long = 0
            groups = shrinking_groups(paths, lambda: min(GROUP, int(GROUP_S / clip_s)), ENCODING_THREADS)
            for found in itertools.chain.from_iterable(ahead(pool, answer, groups, AHEAD)):
                bar.update()
                long += windowing is None and (found.seconds or 0.0) > LONG
                yield found
        if long:
            logger.warning(
                "%d recordings are longer than %.0f s and were heard as one utterance each: window_s (--window_s 4) "
                "gives their emotions over time.",
                long,
                LONG,
            )

    def _heard(self, path: Path, windowing: Windowing | None) -> tuple[Recognition, torch.Tensor | None]:
        """Read a recording; what is too long to wait in memory for the others of its group is answered at once."""
        try:
            wave = self._read(path)
        except BadAudio as error:
            return Recognition(path, None, None, error=str(error)), None
        found = Recognition(path, None, None, len(wave) / self.sample_rate)
        if windowing is not None and found.seconds > windowing.window_s:
            timeline = self._over_time(wave, windowing, map)
            return found._replace(label=timeline.label, probs=timeline.probs, timeline=timeline), None
        if found.seconds > LONG:
            return self._answered(found, self._answer_to(wave), windowing is not None), None
        return found, wave

    def _answered(self, found: Recognition, probs: torch.Tensor, over_time: bool) -> Recognition:
        label = self.label_of(probs)
        timeline = Timeline([Segment(0.0, found.seconds, label, probs)], label, probs) if over_time else None
        return found._replace(label=label, probs=probs, timeline=timeline)

    def classify_folder(
        self,
        folder: str | Path,
        window_s: float | None = None,
        hop_s: float | None = None,
        smooth_s: float | None = None,
        show_progress: bool = True,
    ) -> Iterator[Recognition]:
        """Emotions of every recording below a folder; one that cannot be read is logged and left out.

        Parameters
        ----------
        folder : str or pathlib.Path
            Searched at any depth; hidden files are passed over.
        window_s, hop_s, smooth_s, show_progress
            As for `classify_files`.

        Yields
        ------
        Recognition
            By path.

        Raises
        ------
        UserError
            If there is no such folder or no recording in it.
        """
        for found in self.classify_files(recordings_in(folder), window_s, hop_s, smooth_s, show_progress):
            if found.error is None:
                yield found
            else:
                logger.warning("left out: %s", found.error)

    def classify_long(
        self,
        recording: str | Path | torch.Tensor,
        window_s: float = 4.0,
        hop_s: float | None = None,
        smooth_s: float | None = None,
    ) -> Timeline:
        """Emotions of a long recording over time, from overlapping windows.

        Each window is classified alone; neighbours are then averaged, weighted by nearness and by how much of them is
        speech (not `trim_db` below the loudest 25 ms), and stretches with one answer are put together. All of the
        recording is held in memory: 230 MB an hour.

        Parameters
        ----------
        recording : str, pathlib.Path, torch.Tensor or numpy.ndarray
            A file, or a waveform `[samples]` at `sample_rate`; types as for `classify_batch`.
        window_s : float
            Seconds of a window; about as long as the utterances of the training corpus.
        hop_s : float, optional
            Seconds between two windows; half a window by default.
        smooth_s : float, optional
            How far smoothing reaches to each side; a window by default, 0 for none.

        Returns
        -------
        Timeline
            `segments` of `(start, end, label, probs)` in seconds, without gaps; `label` and `probs` of the whole, the
            mean over the windows weighted by speech. Where nothing is to be heard, `label` is `None`, `probs` zero.

        Raises
        ------
        BadAudio
            If the file cannot be read.
        UserError
            If the lengths do not fit together, or it is not a waveform.
        """
        windowing = Windowing.of(window_s, hop_s, smooth_s)
        is_path = isinstance(recording, str | os.PathLike)
        wave = self._read(recording) if is_path else _waveform(recording, "recording")
        return self._over_time(wave, windowing, in_order)

    def _over_time(self, wave: torch.Tensor, windowing: Windowing, each: Callable) -> Timeline:
        window, hop = (round(part * self.sample_rate) for part in windowing[:2])
        starts = window_starts(len(wave), max(window, 1), max(hop, 1))
        parts = [wave[start : start + window] for start in starts]
        loudest = float(piece_powers(wave).max())
        weights = torch.tensor([loud_share(part, loudest, self.hparams.trim_db) for part in parts])
        probs = torch.cat([self._answers(group) for group in batched(self._frames_each(parts, each), GROUP)])
        centres = torch.tensor([start + len(part) / 2 for start, part in zip(starts, parts, strict=True)])
        centres = centres / self.sample_rate
        over_time = smoothed(probs, weights, centres, windowing.smooth_s)
        whole = weights @ probs / weights.sum() if weights.any() else torch.zeros(len(self.labels))
        labels = [self.label_of(row) for row in over_time]
        segments = stretches(centres, len(wave) / self.sample_rate, labels, over_time)
        return Timeline(segments, self.label_of(whole), whole)

    def stream(
        self,
        chunks: Iterable,
        sample_rate: int,
        window_s: float = 4.0,
        hop_s: float = 1.0,
        smooth_s: float = 2.0,
    ) -> Iterator[Segment]:
        """Emotions of live audio, an update every `hop_s`.

        Each update hears the last `window_s` and is averaged with the ones before it, whose weight falls to a third in
        `smooth_s`; windows count by the speech in them. No more than a window is kept in memory.

        Parameters
        ----------
        chunks : iterable of array or torch.Tensor
            `[samples]` of any number, mono; types as for `classify_batch`.
        sample_rate : int
            Of the chunks, in Hz.
        window_s, hop_s : float
            Seconds that are heard, and between two updates.
        smooth_s : float
            Time constant of the average; 0 for none.

        Yields
        ------
        Segment
            `start` and `end` of what was heard, seconds since the beginning; `label` is `None` while there is silence
            or doubt.

        Raises
        ------
        UserError
            If a chunk is no waveform, or the lengths do not fit together.
        """
        windowing = Windowing.of(window_s, hop_s, smooth_s)
        window, hop = (max(round(part * sample_rate), 1) for part in windowing[:2])
        kept = torch.exp(torch.tensor(-windowing.hop_s / windowing.smooth_s)) if windowing.smooth_s else 0.0
        total, weight, loudest = torch.zeros(len(self.labels)), 0.0, 0.0
        for end, heard in heard_windows(chunks, window, hop):
            wave = resampled(heard, sample_rate, self.sample_rate)
            loudest = max(loudest, float(piece_powers(wave).max()))
            share = loud_share(wave, loudest, self.hparams.trim_db)
            total, weight = kept * total + share * self._answer_to(wave), kept * weight + share
            probs = total / weight if share else torch.zeros_like(total)
            yield Segment((end - len(heard)) / sample_rate, end / sample_rate, self.label_of(probs), probs)


def _waveform(samples, name: str) -> torch.Tensor:
    wave = checked_waveform(samples, name)
    if not len(wave):
        raise UserError(f"{name}: holds no samples.")
    return wave


def _clips(wavs, wav_lens) -> list[torch.Tensor]:
    """Cut the padding off a batch in SpeechBrain's form."""
    wavs = float_samples(wavs, "wavs")
    wavs = wavs[None] if wavs.dim() == 1 else wavs
    if wavs.dim() != 2:
        raise UserError(f"wavs: shape {list(wavs.shape)} is not [batch, samples]. Average the channels first.")
    lens = _relative_lengths(wav_lens, len(wavs))
    clips = [wav[: max(1, round(part * len(wav)))] for wav, part in zip(wavs, lens, strict=True)]
    return [_waveform(clip, f"wavs[{row}]") for row, clip in enumerate(clips)]


def _relative_lengths(wav_lens, count: int) -> list[float]:
    if wav_lens is None:
        return [1.0] * count
    try:
        lens = torch.as_tensor(wav_lens).detach().double().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"wav_lens: {type(wav_lens).__name__} is not a tensor of relative lengths.") from None
    if lens.shape != (count,):
        raise UserError(f"wav_lens: shape {list(lens.shape)} is not [{count}], one relative length for each waveform.")
    for row, part in enumerate(lens.tolist()):
        if not 0 < part <= 1:
            raise UserError(f"wav_lens[{row}]: {part:g} is not in (0, 1]. Divide lengths in samples by wavs.shape[1].")
    return lens.tolist()


def _windowing(window_s: float | None, hop_s: float | None, smooth_s: float | None) -> Windowing | None:
    if window_s is not None:
        return Windowing.of(window_s, hop_s, smooth_s)
    for name, value in (("hop_s", hop_s), ("smooth_s", smooth_s)):
        if value is not None:
            raise UserError(f"{name}: {value} means nothing without windows; give window_s too.")
    return None


def recordings_in(folder: str | Path) -> list[Path]:
    """List the recordings below a folder."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{folder}: no such folder.")
    found = recordings_below(root)
    if not found:
        raise UserError(f"{folder}: holds no recording in a format that can be read.")
    return found


def shrinking_groups(items: Sequence, largest: Callable[[], int], workers: int) -> Iterator[Sequence]:
    """Cut a list into groups that get smaller towards its end, so that all workers come to an end together."""
    place = 0
    while place < len(items):
        group = items[place : place + max(1, min(largest(), (len(items) - place) // (2 * workers)))]
        yield group
        place += len(group)


def in_order(function: Callable, items: Iterable) -> Iterator:
    """Apply a function to many things, several at a time, and hand the results out in order."""
    with one_core_threads() as pool:
        yield from ahead(pool, function, items, AHEAD)


@contextlib.contextmanager
def one_core_threads(count: int = ENCODING_THREADS) -> Iterator[ThreadPoolExecutor]:
    """Start threads whose tensor operations use one core each, and leave those of all other threads as they are."""
    started = threading.Barrier(count)
    pool = ThreadPoolExecutor(count, initializer=_take_one_core)
    with _starting:
        before = torch.get_num_threads()
        # A barrier makes each thread take one: afterwards all have been set, and this thread can be set back.
        for job in [pool.submit(started.wait) for _ in range(count)]:
            job.result()
        torch.set_num_threads(before)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _take_one_core() -> None:
    # A thread's first look takes over the process's number: one that was set before it would be lost again.
    torch.get_num_threads()
    torch.set_num_threads(1)
