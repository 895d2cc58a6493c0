"""Frozen speech encoders: SpeechBrain's Hugging Face wrappers, made exact.

Used as they are, the wrappers stay in training mode after ``modules.train()`` (dropout, LayerDrop), normalise a
waveform over its padding, and let padding leak into group-norm models; Whisper encodes 30 s whatever the clip. Here
every utterance is encoded in evaluation mode, at its true length.
"""

import contextlib
import hashlib
import inspect
import json
import math
import threading
from collections import defaultdict
from functools import partial
from typing import NamedTuple

import torch
from huggingface_hub import constants
from speechbrain.integrations.huggingface.hubert import HuBERT
from speechbrain.integrations.huggingface.wav2vec2 import Wav2Vec2
from speechbrain.integrations.huggingface.wavlm import WavLM
from speechbrain.integrations.huggingface.whisper import Whisper
from transformers import AutoConfig

from speechbrain_mifuse.demo.encoder import demo_encoder
from speechbrain_mifuse.features.pretrained import (
    VOLATILE,
    check_architecture,
    check_extractor,
    check_files,
    local_folder,
    model_folder,
    refuse_missing,
)
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.progress import quiet_loading
from speechbrain_mifuse.utils.schemas import EncoderConfig


class FrozenEncoder(torch.nn.Module):
    """A pretrained speech encoder that no training loop can change.

    It is always in evaluation mode (no dropout, LayerDrop or SpecAugment, whatever ``train()`` is called on), has no
    parameter and no entry in ``state_dict()`` (checkpoints stay small), computes in float32 (whatever ``half()`` or
    autocast say), and yet follows ``.to(device)``. Every utterance is encoded at its true length, so the result never
    depends on padding or on its neighbours.

    Layer numbers are those of Hugging Face's ``hidden_states``: 0 is the input of the first transformer layer, ``i``
    the output of layer ``i``; the last one, ``N``, is ``last_hidden_state``, which is after the final layer norm in
    the models that have one (Whisper and ``do_stable_layer_norm``, such as HuBERT-large). That norm is what
    transformers 4 puts in ``hidden_states[-1]`` too; transformers 5 leaves it out there. Layers above the deepest one
    asked for are not run.

    - HuBERT, WavLM and wav2vec 2.0: the waveform gets zero mean and unit variance over its true length if the model's
      feature extractor says so (``do_normalize``). A clip shorter than the receptive field (400 samples) is then
      zero-padded to it: one frame.
    - Whisper: log-mel of the clip alone, floored 8 decades below the clip's maximum, with no padding to 30 s; the
      positions are those of the clip's frames. In the log-mel of a clip longer than 30 s, every 30 s are encoded on
      their own and the frames are concatenated. A clip shorter than one analysis window (400 samples) is zero-padded
      to it.

    Arguments
    ---------
    source : str or pathlib.Path
        Folder in Hugging Face format, hub id (``facebook/hubert-large-ll60k``), or ``demo``
        (:func:`~speechbrain_mifuse.demo.encoder.demo_encoder`).
    layers : int or list of int, optional
        Which layers to return, negative ones counting from the end. Default: the last.

    Attributes
    ----------
    sample_rate : int
        Of the waveforms, in Hz.
    dim : int
        Features per frame, D.
    frame_rate : float
        Frames per second (50 for every known model).
    layers : list of int
        The layers returned, none negative, in the order asked for.
    compute_dtype : torch.dtype
        What the layers compute in: float32 unless set to bfloat16 or float16. Features of these are not those that the
        fingerprint names; :class:`~speechbrain_mifuse.features.extract.FrameReader` names the type in its own.

    Raises
    ------
    FileNotFoundError, OSError, ValueError
        As :func:`load_wrapper`; ``ValueError`` also for a layer that the model does not have.

    Example
    -------
    >>> import tempfile, torch, transformers
    >>> config = transformers.HubertConfig(
    ...     hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
    ...     conv_dim=(8,) * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     transformers.HubertModel(config).save_pretrained(folder)
    ...     _ = transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    ...     encoder = FrozenEncoder(folder, layers=[1, -1])
    >>> encoder(torch.randn(16000)).shape  # one second: 49 frames, 2 layers
    torch.Size([49, 2, 16])
    >>> encoder.layers, encoder.frame_rate, len(encoder.state_dict())
    ([1, 2], 50.0, 0)
    """

    def __init__(self, source, layers=None):
        super().__init__()
        wrapper = load_wrapper(source, freeze=True).eval().requires_grad_(False)
        config = wrapper.model.config
        reader = FAMILIES[config.model_type].reader(wrapper)
        self.sample_rate = int(wrapper.feature_extractor.sampling_rate)
        self.dim = int(config.hidden_size)
        self.frame_rate = self.sample_rate / reader.hop
        self.layers = _resolve_layers(layers, reader.n_layers)
        self._fingerprint = {
            "encoder": _digest(config, reader.modules()),
            "model_type": config.model_type,
            "dim": self.dim,
            "sample_rate": self.sample_rate,
            "frame_rate": self.frame_rate,
            "input": reader.input_settings(),
        }
        reader.truncate(max(self.layers))
        self.compute_dtype = torch.float32
        # Inside a tuple, torch does not see the modules: no parameters(), no state_dict(), no train().
        self._hidden = (wrapper, reader)

    def _apply(self, fn, recurse=True):
        # Follow the device but not the type: the features are float32's, as the fingerprint promises.
        self._hidden[0].to(fn(torch.empty(0, device=self.device)).device)
        return super()._apply(fn, recurse)

    def train(self, mode=True):
        """Stay in evaluation mode, whatever ``mode`` is."""
        return super().train(False)

    @property
    def device(self):
        """Device of the weights; waveforms are moved to it."""
        return next(self._hidden[0].parameters()).device

    def forward(self, wav):
        """Encode one utterance.

        Arguments
        ---------
        wav : torch.Tensor
            ``[samples]``, floating point, mono, at :attr:`sample_rate`, without padding.

        Returns
        -------
        torch.Tensor
            ``[T, D]`` for one layer, ``[T, L, D]`` for several. T is ``frame_rate`` times the duration, less or more
            by one frame at most.

        Raises
        ------
        ValueError
            If the waveform is not one-dimensional and floating point, is empty, or holds NaN or infinity.
        """
        return self._encode(_checked(wav)[None])[0]

    def encode_batch(self, wavs):
        """Encode several utterances; only those of the same length share a forward pass, so nothing is padded."""
        same_length = defaultdict(list)
        for index, wav in enumerate(wavs):
            same_length[len(_checked(wav))].append(index)
        encoded = [None] * len(wavs)
        for indices in same_length.values():
            states = self._encode(torch.stack([wavs[index] for index in indices]))
            for index, state in zip(indices, states, strict=True):
                encoded[index] = state
        return encoded

    def encode_padded(self, wavs):
        """Encode several utterances in one padded pass, each as :meth:`forward` would alone, up to rounding.

        Padding is masked out of the attention, and kept from everything in front of it that would mix it in. On a GPU
        this is many times faster than one by one; on a processor it is not.

        Arguments
        ---------
        wavs : list of torch.Tensor
            Waveforms ``[samples]``. One that is too long for a pass of its own is encoded alone.

        Returns
        -------
        list of torch.Tensor
            In the same order.
        """
        reader = self._hidden[1]
        together = [index for index, wav in enumerate(wavs) if len(_checked(wav)) <= reader.longest]
        encoded = {index: self.forward(wav) for index, wav in enumerate(wavs) if len(wav) > reader.longest}
        if together:
            encoded |= zip(together, self._encode_padded([wavs[index] for index in together]), strict=True)
        return [encoded[index] for index in range(len(wavs))]

    @torch.no_grad()
    def _encode(self, wavs):
        with self._precision():
            states = self._hidden[1].hidden_states(wavs.to(self.device, torch.float32))
        return self._chosen(states)

    @torch.no_grad()
    def _encode_padded(self, wavs):
        with self._precision():
            states, counts = self._hidden[1].padded_states([wav.to(self.device, torch.float32) for wav in wavs])
        return [state[:count] for state, count in zip(self._chosen(states), counts, strict=True)]

    def _precision(self):
        lower = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.compute_dtype if lower else None, enabled=lower)

    def _chosen(self, states):
        if len(self.layers) == 1:
            return states[self.layers[0]].float()
        return torch.stack([states[layer].float() for layer in self.layers], dim=2)

    def fingerprint(self):
        """Describe what the features depend on, for caches and result files.

        Two encoders with equal fingerprints give the same features. The hash covers the whole encoder's weights (in
        float32) and configuration, not its folder's name nor how the weights are stored.

        Returns
        -------
        dict
            JSON-able: ``encoder`` (sha256), ``model_type``, ``layers``, ``dim``, ``sample_rate``, ``frame_rate``
            and ``input`` (the feature extractor's settings).
        """
        return {**self._fingerprint, "layers": list(self.layers)}


def load_wrapper(source, freeze=False):
    """Load SpeechBrain's wrapper of a pretrained encoder, chosen by the ``model_type`` of its configuration.

    Arguments
    ---------
    source : str or pathlib.Path
        Folder in Hugging Face format, hub id, or ``demo``.
    freeze : bool
        As of SpeechBrain's wrappers.

    Returns
    -------
    torch.nn.Module
        SpeechBrain's ``HuBERT``, ``Wav2Vec2``, ``WavLM`` or ``Whisper`` (encoder only), in float32.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or the folder lacks a configuration.
    OSError
        If the hub cannot be reached or has no such model.
    ValueError
        If the model is of another type, lacks weights, or its files are not plain data of sensible sizes.

    Example
    -------
    >>> load_wrapper("./no-such-folder")
    Traceback (most recent call last):
    ...
    FileNotFoundError: './no-such-folder': no such folder; pass a Hugging Face folder or a hub id
    """
    source = str(demo_encoder()) if str(source) == "demo" else str(source)
    folder = _folder(source)
    check_files(folder, EncoderConfig)
    # Left to its default, transformers asks at the terminal whether code of the model may run.
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"encoder {source!r}: unknown model_type {config.model_type!r}; known ones: {known}")
    check_architecture(config, folder, EncoderConfig)
    check_extractor(folder)
    family = FAMILIES[config.model_type]
    with quiet_loading():
        wrapper = family.wrapper(str(folder), str(constants.HF_HUB_CACHE), freeze=freeze)
    try:
        refuse_missing(wrapper.missing, (f"{part}." for part in family.reader(wrapper).modules()))
    except UserError as error:
        raise UserError(f"encoder {source!r}: {error}") from None
    return wrapper.float()


def _folder(source):
    """Give the folder of an encoder; download it first if the source is a hub id."""
    folder = local_folder(source)
    if folder is None:
        with _hub_errors(source):
            folder = model_folder(source)
    missing = [name for name in ("config.json", "preprocessor_config.json") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"encoder {source!r}: there is no {' and no '.join(missing)}; save the model and its "
            "feature extractor there with save_pretrained()"
        )
    return folder


@contextlib.contextmanager
def _hub_errors(source):
    try:
        yield
    # The hub client's errors share no base class across its versions (requests, httpx, its own), hence Exception.
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise OSError(
            f"encoder {source!r} could not be loaded from the Hugging Face hub ({type(error).__name__}: {reason}). "
            "Either download it elsewhere and pass its folder (--encoder /path/to/folder), or use the small encoder "
            "that needs no hub (--encoder demo)."
        ) from error


def _resolve_layers(layers, n_layers):
    chosen = [n_layers] if layers is None else [layers] if isinstance(layers, int) else list(layers)
    resolved = [layer + n_layers + 1 if layer < 0 else layer for layer in chosen]
    if not resolved or len(set(resolved)) < len(resolved) or not all(0 <= layer <= n_layers for layer in resolved):
        raise ValueError(
            f"layers={layers!r}: give different layers between 0 (the input of the first transformer layer) "
            f"and {n_layers} (the last), or negative ones down to -{n_layers + 1}"
        )
    return resolved


def _checked(wav):
    if wav.dim() != 1 or not wav.is_floating_point():
        raise ValueError(f"expected a floating-point waveform [samples], got {wav.dtype} {list(wav.shape)}")
    if not len(wav):
        raise ValueError("the waveform is empty")
    if not torch.isfinite(wav).all():
        raise ValueError("the waveform holds NaN or infinite samples")
    return wav


def _digest(config, modules):
    settings = {key: value for key, value in config.to_diff_dict().items() if key not in VOLATILE}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for part, module in sorted(modules.items()):
        for name, tensor in sorted(module.state_dict().items()):
            if not tensor.sum().isfinite():  # one number to look at, since encoders are large
                raise ValueError(f"the encoder's weight {part}.{name} holds values that are not finite")
            digest.update(f"{part}.{name} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def _first(output):
    # transformers 4 layers return a tuple, most transformers 5 layers the tensor alone.
    return output[0] if isinstance(output, tuple) else output


def _pad_to(wavs, n_samples):
    return torch.nn.functional.pad(wavs, (0, max(0, n_samples - wavs.shape[-1])))


def _padded(items):
    """Items ``[..., T]`` as one tensor ``[items, ..., T]``, with zeros behind the end of each."""
    longest = max(item.shape[-1] for item in items)
    return torch.stack([_pad_to(item, longest) for item in items])


def _inside(counts, device):
    """Mask ``[items, T]``: true up to each item's count."""
    return torch.arange(max(counts), device=device) < torch.tensor(counts, device=device).unsqueeze(1)


class _WaveformReader:
    """Hidden states of the wav2vec 2.0 family (HuBERT, WavLM, wav2vec 2.0)."""

    def __init__(self, wrapper):
        self.model = wrapper.model
        self.normalize = wrapper.normalize_wav
        self.n_layers = len(self.model.encoder.layers)
        config = self.model.config
        # A norm over all of a clip's frames would take the padding in: before it, nothing may be padded.
        self.norm_over_time = config.feat_extract_norm == "group"
        # Samples of a padded pass: none where a norm makes something of the zeros behind a clip's end (mHuBERT).
        self.longest = 0 if getattr(config, "conv_pos_batch_norm", False) else math.inf
        self.hop = math.prod(config.conv_stride)
        self.receptive_field = 1
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            self.receptive_field = (self.receptive_field - 1) * stride + kernel

    def modules(self):
        # Not the masking vector nor an adapter: unused here, and random where the checkpoint has none.
        return {name: getattr(self.model, name) for name in ("feature_extractor", "feature_projection", "encoder")}

    def input_settings(self):
        return {"do_normalize": bool(self.normalize)}

    def truncate(self, deepest):
        # One layer stays in any case: its input is layer 0.
        self.model.encoder.layers = self.model.encoder.layers[: max(1, deepest)]

    def hidden_states(self, wavs):
        with self._recorded() as states:
            self.model(self._input(wavs))
        return states

    def normalised(self, wavs):
        """Waveforms as the encoder was trained on them, each by itself and without padding."""
        if not self.normalize:
            return wavs
        # The formula of Hugging Face's feature extractor; F.layer_norm's larger epsilon would keep the level of
        # quiet clips.
        centred = wavs - wavs.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-7)

    def _input(self, wavs):
        return _pad_to(self.normalised(wavs), self.receptive_field)

    def padded_states(self, wavs):
        """Hidden states ``[wavs, T, D]`` of waveforms padded to one batch, and the frames of each."""
        wavs = [self._input(wav) for wav in wavs]
        counts = [self.frame_count(len(wav)) for wav in wavs]
        if self.norm_over_time:
            features = _padded([self.model.feature_extractor(wav.unsqueeze(0))[0] for wav in wavs])
        else:
            features = self.model.feature_extractor(_padded(wavs))
        hidden = _first(self.model.feature_projection(features.transpose(1, 2)))
        with self._recorded() as states:
            self.model.encoder(hidden, attention_mask=_inside(counts, hidden.device))
        return states, counts

    def frame_count(self, n_samples):
        """Frames of so many samples."""
        config = self.model.config
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            n_samples = (n_samples - kernel) // stride + 1
        return n_samples

    @contextlib.contextmanager
    def _recorded(self):
        """Collect the hidden states of a forward pass; hooks, as the model's own list differs between versions."""
        encoder, states, thread = self.model.encoder, {}, threading.get_ident()

        def keep(index, state):
            # Hooks hang on the model, so they also see the clips that other threads encode at the same time.
            if threading.get_ident() == thread:
                states[index] = _first(state)

        layers = encoder.layers
        handles = [layers[0].register_forward_pre_hook(lambda _module, inputs: keep(0, inputs))]
        handles += [
            layer.register_forward_hook(lambda _module, _inputs, output, index=index: keep(index, output))
            for index, layer in enumerate(layers, start=1)
        ]
        if len(layers) == self.n_layers:  # only the whole stack has the final layer norm at its end
            handles.append(encoder.register_forward_hook(lambda _m, _i, output: keep(self.n_layers, output[0])))
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()


class _MelReader:
    """Hidden states of Whisper's encoder at the clip's true length."""

    def __init__(self, wrapper):
        self.log_mel = wrapper.log_mel_spectrogram
        self.extractor = wrapper.feature_extractor
        self.encoder = wrapper.model.encoder
        self.n_layers = len(self.encoder.layers)
        self.n_positions = self.encoder.embed_positions.num_embeddings
        self.stride = self.encoder.conv1.stride[0] * self.encoder.conv2.stride[0]
        self.hop = self.extractor.hop_length * self.stride
        self.longest = self.hop * self.n_positions  # samples of one window
        forward = inspect.signature(self.encoder.layers[0].forward).parameters
        # transformers 4 wants a head mask, transformers 5 has none.
        self.masks = {name: None for name in ("attention_mask", "layer_head_mask") if name in forward}

    def modules(self):
        return {"encoder": self.encoder}

    def input_settings(self):
        keys = ("feature_size", "n_fft", "hop_length")
        return {key: int(getattr(self.extractor, key)) for key in keys}

    def truncate(self, deepest):
        self.encoder.layers = self.encoder.layers[:deepest]

    def normalised(self, wavs):
        """Waveforms as they are."""
        return wavs

    def frame_count(self, n_samples):
        """Frames of so many samples."""
        return -(-(n_samples // self.extractor.hop_length) // self.stride)

    def hidden_states(self, wavs):
        wavs = _pad_to(wavs, self.extractor.n_fft)
        mels = torch.stack(self._mels(wavs))
        windows = [self._window(mel) for mel in mels.split(self.n_positions * self.stride, dim=-1)]
        return [torch.cat(states, dim=1) for states in zip(*windows, strict=True)]

    def padded_states(self, wavs):
        """Hidden states ``[wavs, T, D]`` of waveforms padded to one batch, and the frames of each."""
        mels = self._mels([_pad_to(wav, self.extractor.n_fft) for wav in wavs])
        counts = [mel.shape[-1] for mel in mels]
        return self._window(_padded(mels), counts), [-(-count // self.stride) for count in counts]

    def _mels(self, wavs):
        # Clip by clip: the floor follows the maximum of what is given, which must not be another clip's. In float32
        # whatever the layers compute in: 8 bits are too few for the powers of a spectrum.
        with torch.autocast(wavs[0].device.type, enabled=False):
            return [self.log_mel(wav) for wav in wavs]

    def _window(self, mel, counts=None):
        encoder, masks = self.encoder, self.masks
        hidden = torch.nn.functional.gelu(encoder.conv1(mel))
        if counts is not None:
            # A clip's end is followed by zeros, as the second convolution pads it, and by nothing to attend to.
            hidden = hidden * _inside(counts, hidden.device).unsqueeze(1)
            outside = ~_inside([-(-count // self.stride) for count in counts], hidden.device)
            masks = {**masks, "attention_mask": torch.where(outside, -math.inf, 0.0)[:, None, None]}
        hidden = torch.nn.functional.gelu(encoder.conv2(hidden)).transpose(1, 2)
        hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
        states = [hidden]
        for layer in encoder.layers:
            states.append(_first(layer(states[-1], **masks)))
        if len(encoder.layers) == self.n_layers:
            states[-1] = encoder.layer_norm(states[-1])
        return states


class _Reporting:
    """Makes a wrapper of SpeechBrain remember which weights no file held, which it leaves random."""

    def _from_pretrained(self, *arguments, **options):
        super()._from_pretrained(*arguments, output_loading_info=True, **options)
        if isinstance(self.model, tuple):
            self.model, report = self.model
            self.missing = list(report["missing_keys"])

    def _load_sb_pretrained_parameters(self, path):
        weights = self._modify_state_dict(path)
        if weights is None:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        self.missing = self.model.load_state_dict(weights, strict=False).missing_keys


def _reporting(wrapper):
    return type(wrapper.__name__, (_Reporting, wrapper), {})


class Family(NamedTuple):
    """How encoders of one ``model_type`` are loaded and read."""

    wrapper: type  # SpeechBrain's class, or a function with its arguments (source, save_path, freeze)
    reader: type  # hidden states at the true length


FAMILIES = {
    "hubert": Family(_reporting(HuBERT), _WaveformReader),
    "wav2vec2": Family(_reporting(Wav2Vec2), _WaveformReader),
    "wavlm": Family(_reporting(WavLM), _WaveformReader),
    "whisper": Family(partial(_reporting(Whisper), encoder_only=True), _MelReader),
}
